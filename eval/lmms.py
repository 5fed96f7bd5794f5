"""lmms-eval finds our models through its entry point group `lmms_eval.models` (setup.py).

    lmms-eval --model llava_jax --model_args pretrained=FOLDER --tasks pope,mme

Its prompts, token limits and scorers are its own (docs/evaluation.md lists where they leave the
paper); leave WORLD_SIZE unset, one process drives all devices.
"""

MODEL = "llava_jax.eval.lmms_model.LlavaJax"


def manifest():
    """What the registry asks for: our name and where the class is. Imports neither jax nor torch."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="llava_jax", simple_class_path=MODEL)
