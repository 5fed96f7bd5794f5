"""Recipes that differ from a file of configs/ in a few settings; `--config NAME` takes them like files.

A config of your own starts from one so:

    from llava_jax.configs import variants

    def get_config():
        c = variants.get_config("finetune_lora_13b")
        ...

Sources: the scripts/ folder of haotian-liu/LLaVA (v1: those outside of v1_5/) and the ablation of LLaVA-1.5
(arXiv 2310.03744, table 2). Where the paper does not say a number, it is that of finetune_7b.
"""

import importlib
from typing import Any, NamedTuple


class Variant(NamedTuple):
    """start: the config or variant that it changes. words: what it is, in a line."""

    start: str
    words: str
    changes: dict[str, Any]


VARIANTS: dict[str, Variant] = {}


def get_config(name: str) -> Any:
    """The locked settings of a variant."""
    variant = VARIANTS[name]
    if variant.start in VARIANTS:
        c = get_config(variant.start)
    else:
        c = importlib.import_module(f"llava_jax.configs.{variant.start}").get_config()
    for setting, value in {"name": name, **variant.changes}.items():
        *groups, last = setting.split(".")
        group = c
        for part in groups:
            group = group[part]
        group[last] = value
    return c


def _add(name: str, start: str, words: str, **changes: Any) -> None:
    """A row of the table; in the names of settings __ stands for the dot."""
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    VARIANTS[name] = Variant(start, words, settings)


# LLaVA-1.5 -----------------------------------------------------------------------------------------

_RELEASED = "llava-hf/llava-1.5-13b-hf"
_add("finetune_lora_13b", "finetune_lora_7b", "LoRA fine-tuning of LLaVA-1.5-13B",
    model__init="runs/pretrain_13b/export")  # fmt: skip
for _size in ("7b", "13b"):
    _add(f"finetune_qlora_{_size}", f"finetune_lora_{_size}",
        f"LoRA over a base in 4 bits (nf4), LLaVA-1.5-{_size.upper()}",
        quantize="nf4")  # fmt: skip
_add("finetune_task_13b", "finetune_task_7b",
    "Fine-tuning of the released LLaVA-1.5-13B on data of your own",
    model__init=_RELEASED)  # fmt: skip
_add("finetune_task_lora_13b", "finetune_task_lora_7b",
    "LoRA on data of your own, from the released LLaVA-1.5-13B",
    model__init=_RELEASED)  # fmt: skip

# LLaVA v1: CLIP at 224 pixels, a linear projector, Vicuna v1.3 --------------------------------------

_CLIP_224 = "openai/clip-vit-large-patch14"
for _size in ("7b", "13b"):
    _of = f"LLaVA v1 {_size.upper()}"
    # scripts/pretrain.sh; pretrain_xformers.sh is the same with grad_accum 4.
    _add(f"v1_pretrain_{_size}", f"pretrain_{_size}",
        f"Stage 1 of {_of}: a linear projector over CLIP at 224 pixels",
        model__init=f"lmsys/vicuna-{_size}-v1.3", model__vision_tower=_CLIP_224,
        model__projector="linear", batch_size=128, lr=2e-3)  # fmt: skip
    # scripts/finetune.sh
    _add(f"v1_finetune_{_size}", f"finetune_{_size}",
        f"Stage 2 of {_of} on 80K instructions",
        model__init=f"runs/v1_pretrain_{_size}/export",
        data__image_aspect_ratio="square", data__group_by_modality=False)  # fmt: skip
    # scripts/finetune_full_schedule.sh
    _add(f"v1_finetune_full_{_size}", f"v1_finetune_{_size}",
        f"Stage 2 of {_of} on 158K instructions, three epochs",
        epochs=3.0)  # fmt: skip
    # scripts/finetune_lora.sh
    _add(f"v1_finetune_lora_{_size}", f"v1_finetune_{_size}",
        f"LoRA of rank 64, {_of}",
        trainable=("projector", "lora"), lora_rank=64, lora_alpha=16.0)  # fmt: skip
    # scripts/finetune_qlora.sh, whose scales are in 8 bits too (double quantisation); ours are not.
    _add(f"v1_finetune_qlora_{_size}", f"v1_finetune_lora_{_size}",
        f"LoRA of rank 64 over a base in 4 bits (nf4), {_of}",
        quantize="nf4")  # fmt: skip
    # scripts/finetune_sqa.sh
    _add(f"v1_finetune_sqa_{_size}", f"v1_finetune_{_size}",
        f"ScienceQA, twelve epochs, from stage 1 of {_of}",
        epochs=12.0)  # fmt: skip

# The ablation of LLaVA-1.5, row by row; data.path has one file per set ------------------------------

_add("ablation_pretrain_linear_224_7b", "pretrain_7b",
    "Stage 1 for rows 1 to 3 of the ablation: linear projector, 224 pixels",
    model__vision_tower=_CLIP_224, model__projector="linear", lr=2e-3)  # fmt: skip
_add("ablation_pretrain_mlp_224_7b", "pretrain_7b",
    "Stage 1 for rows 4 to 6 of the ablation: MLP projector, 224 pixels",
    model__vision_tower=_CLIP_224)  # fmt: skip
_LINEAR = {"model__init": "runs/ablation_pretrain_linear_224_7b/export"}
_MLP_224 = {"model__init": "runs/ablation_pretrain_mlp_224_7b/export"}
_MLP_336: dict[str, str] = {}  # finetune_7b's own stage 1
_ROWS = (
    ("llava", "LLaVA at 224 pixels", _LINEAR, ("llava_instruct_158k",)),
    ("vqav2", "+ VQAv2", _LINEAR, ("vqav2_without_format",)),
    ("format", "+ response format prompt", _LINEAR, ("vqav2",)),
    ("mlp", "+ MLP projector", _MLP_224, ()),
    ("okvqa_ocr", "+ OKVQA and OCR", _MLP_224, ("okvqa", "aokvqa", "ocrvqa", "textcaps")),
    ("region", "+ region-level VQA", _MLP_224, ("refcoco", "vg")),
    ("336", "+ 336 pixels", _MLP_336, ()),
    ("gqa", "+ GQA", _MLP_336, ("gqa",)),
    ("sharegpt", "+ ShareGPT", _MLP_336, ("sharegpt",)),
)
_sets: tuple[str, ...] = ()
for _number, (_name, _words, _init, _more) in enumerate(_ROWS, 1):
    # Row 3 has the same questions as row 2, with the prompt.
    _sets = (*(s for s in _sets if s != "vqav2_without_format"), *_more)
    _add(f"ablation_{_number}_{_name}_7b", "finetune_7b", f"Row {_number} of the ablation: {_words}",
        data__path=tuple(f"{s}.json" for s in _sets), data__image_folder="data",
        **_init)  # fmt: skip
_add("ablation_10_13b", "ablation_9_sharegpt_7b", "Row 10 of the ablation: + 13B",
    model__init="runs/pretrain_13b/export")  # fmt: skip
