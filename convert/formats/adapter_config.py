"""adapter_config.json of PEFT <-> LoraConfig. Settings that would change the formula are refused.

Fields and their effect: peft 0.21, src/peft/tuners/lora/config.py and variants.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.convert.io import hub
from llava_jax.convert.table import keys
from llava_jax.errors import WeightError
from llava_jax.reader import Reader, shown

FILE = "adapter_config.json"
MERGE = "merge the adapter with PEFT (merge_and_unload) and convert the result"
# Fields that change the formula unless they have this value. (Absent and null change nothing.)
_NEUTRAL: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_qalora": False,
}
# Fields that change the formula unless they are empty.
_EMPTY = (
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
# Initialisations of the factors that leave the base as it is (MiCA's and orthogonal's have B A = 0).
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
# Those that subtract the initial B A from the base. PEFT can convert them for the plain base.
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


def lora_config(settings: dict[str, Any], where: str = FILE) -> LoraConfig:
    """adapter_config.json -> LoraConfig, but for its targets, which the tensors of the adapter tell.

    where: what errors call the file. Raises WeightError, naming the field, for every variant of LoRA
    other than W + scale * B A over the plain base with one rank and one scale (rsLoRA's or not, with
    DoRA's magnitudes or without).
    """
    r = Reader(settings, where)
    if r.word("peft_type", "LORA") != "LORA":
        raise WeightError(f"{where}: peft_type {shown(settings['peft_type'])} is not supported")
    _check_init(settings.get("init_lora_weights"), where)
    for key, value in settings.items():
        if _changes(key, value):
            raise WeightError(f"{where}: {key} {shown(value)} is not supported", fix=MERGE)
    return LoraConfig(
        r.integer("r"),
        r.number("lora_alpha", low=-1e9, high=1e9),
        r.number("lora_dropout", 0.0, low=0.0, high=0.999),
        rslora=r.flag("use_rslora"),
        dora=r.flag("use_dora"),
    )


def _changes(key: str, value: Any) -> bool:
    """Whether a field makes the adapter something other than W + scale * B A."""
    if key in _EMPTY:
        return value is not None and value is not False and value not in ([], {})
    if key in _NEUTRAL:
        return value is not None and value != _NEUTRAL[key]
    return (
        key.startswith("use_") and key not in ("use_rslora", "use_dora") and bool(value)
    )  # newer than this list


def _check_init(value: Any, where: str) -> None:
    """Raises WeightError for an initialisation that changed the base the adapter was trained on."""
    name = shown(value).strip("'").lower()
    if value is None or name in _PLAIN_INITS:
        return
    said = f"{where}: init_lora_weights {shown(value)}"
    if name.startswith(_CONVERTIBLE_INITS):
        raise WeightError(
            f"{said}: the adapter belongs to a changed base, not to the one it names",
            fix="save it again with path_initial_model_for_weight_conversion "
            "(PEFT's save_pretrained), which makes it an adapter of that base",
        )
    raise WeightError(
        f"{said} is not supported",
        fix="merge the adapter with PEFT into the base it was trained on, and convert the result",
    )


def check_saved(settings: dict[str, Any], names: Iterable[str], where: str) -> None:
    """Raises WeightError when modules_to_save names a module of which the adapter has no tensor."""
    names = [f".{n}." for n in names]
    listed = settings.get("modules_to_save")
    for module in listed if isinstance(listed, list) else ():
        if not any(f".{module}." in n for n in names):
            raise WeightError(
                f"{where}: modules_to_save lists {ascii(module)[:60]}, the adapter does not hold it"
            )


# Writing ----------------------------------------------------------------------------------------


def fresh(config: LlavaConfig, lora: LoraConfig, layout: keys.Layout) -> dict[str, Any]:
    """adapter_config.json for an adapter that did not come from PEFT, on a model of `layout`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "modules_to_save": None,
        "target_modules": pattern(config, layout),
    }


def pattern(config: LlavaConfig, layout: keys.Layout) -> str:
    """target_modules as a regex of whole names, because a q_proj is in the decoder and in the tower."""
    found = []
    for pairing in keys.pairings(layout, config):
        if not pairing.ours.endswith(".lora_a"):
            continue
        modules = [n.removeprefix(keys.PEFT).removesuffix(".lora_A.weight") for n in pairing.theirs]
        if not pairing.stacked:
            found.append(re.escape(modules[0]))
            continue
        # Only the tower has layers that no adapter is on: those after the feature layer.
        layer = r"\d+"
        if pairing.ours.startswith("vision."):
            layer = f"({'|'.join(map(str, range(len(modules))))})"
        before, after = (re.escape(part) for part in modules[0].split(".0.", 1))
        found.append(rf"{before}\.{layer}\.{after}")
    return "|".join(found)


def targets(settings: dict[str, Any]) -> set[str] | None:
    """The last names of the modules that target_modules lists; None where it is a regex."""
    listed = settings.get("target_modules")
    if not isinstance(listed, list):
        return None
    return {m.rpartition(".")[2] for m in listed if isinstance(m, str)}


def base_name(base: str | Path) -> str:
    """What base_model_name_or_path calls a base: a hub id as it is, a folder by its absolute path."""
    path = hub.local(base)
    return str(path.resolve()) if path.exists() else str(base)
