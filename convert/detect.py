"""Which kind of checkpoint a folder is, told by its files and tensor names, never by its name."""

from __future__ import annotations

from pathlib import Path

from llava_jax.convert import quantised, tensors
from llava_jax.errors import WeightError

KINDS = {
    "jax": "llava_jax",
    "hf": "Hugging Face LLaVA",
    "original": "original LLaVA",
    "projector": "projector of the original's stage 1",
    "lora": "LoRA adapter",
    "llama": "language model alone",
    "clip": "vision tower alone",
}


def identify(path: Path) -> str:
    """One of KINDS. Raises WeightError when the folder is none of them."""
    path = Path(path)
    if path.suffix == ".gguf":
        raise WeightError(f"{path}: GGUF files are written, not read", fix=quantised.FIX)
    if path.is_file():
        if path.suffix not in (".bin", ".pt", ".pth", ".safetensors"):
            raise WeightError(f"{path}: is no checkpoint folder and no projector file")
        return "projector"
    if (path / "llava_jax.json").is_file():
        return "jax"
    if (path / "adapter_config.json").is_file():
        return "lora"
    if not tensors.weight_files(path):
        if (path / tensors.PROJECTOR_FILE).is_file() or projector_file(path):
            return "projector"
        fix = (
            "expected .safetensors or .bin files (the hub's .bin need --allow-pickle), or an index"
        )
        if (path / "export").is_dir():  # a training run's work directory
            fix = f"the model of this run is {path / 'export'}"
        elif any(path.glob("*.gguf")):
            fix = f"GGUF files are written, not read: {quantised.FIX}"
        raise WeightError(f"{path}: holds no weights", fix=fix)
    return _by_config(path)


def projector_file(folder: Path) -> Path | None:
    """The file with a stage-1 projector: mm_projector.bin, or mm_projector/checkpoint-N.bin's last."""
    if (folder / tensors.PROJECTOR_FILE).is_file():
        return folder / tensors.PROJECTOR_FILE
    numbered = sorted(
        (folder / "mm_projector").glob("checkpoint-*.bin"),
        key=lambda p: int(p.stem.rpartition("-")[2]) if p.stem[-1].isdigit() else -1,
    )
    return numbered[-1] if numbered else None


def _by_config(path: Path) -> str:
    data = tensors.read_json(path / "config.json", required=True)
    # "llava" is HF's model_type, and that of released original checkpoints too: the parts decide.
    if "text_config" in data and "vision_config" in data and data.get("model_type") == "llava":
        return "hf"
    if "mm_vision_tower" in data or "mm_projector_type" in data or "mm_hidden_size" in data:
        return "original"
    kind = data.get("model_type")
    if kind in ("clip", "clip_vision_model"):
        return "clip"
    if kind == "llava" and ("image_token_index" in data or "image_token_id" in data):
        return "hf"
    if kind in ("llama", "mistral"):
        return "llama"
    raise WeightError(
        f"{path}: config.json describes a {ascii(kind)[:40]}, which is not supported",
        fix="LLaVA, LLaMA- or Mistral-shaped language models and CLIP are",
    )
