"""Every recipe holds the numbers of the script it follows, and the ablation those of its row."""

import math

import pytest

from llava_jax import cli
from llava_jax.config import LlavaConfig
from llava_jax.configs import variants
from llava_jax.settings import flat
from llava_jax.train.config import load_config
from llava_jax.train.optim import warmup_steps
from llava_jax.train.stages import split_stages

FULL, LORA = ("projector", "language"), ("projector", "lora")
V1_5, V1 = "openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14"
RELEASED = "llava-hf/llava-1.5-{size}-hf"
# The scripts of haotian-liu/LLaVA @ c121f04: config -> (start, batch, peak rate, projector's rate,
# epochs, trained, template, (rank, alpha), bits). {size} is 7b or 13b; each holds for both.
SCRIPTS = {
    "pretrain": ("lmsys/vicuna-{size}-v1.5", 256, 1e-3, None, 1, ("projector",), "plain", None, ""),
    "finetune": ("runs/pretrain_{size}/export", 128, 2e-5, None, 1, FULL, "v1", None, ""),
    "finetune_lora": ("runs/pretrain_{size}/export", 128, 2e-4, 2e-5, 1, LORA, "v1", (128, 256), ""),
    "finetune_qlora": ("runs/pretrain_{size}/export", 128, 2e-4, 2e-5, 1, LORA, "v1", (128, 256), "nf4"),
    "finetune_task": (RELEASED, 128, 2e-5, None, 1, FULL, "v1", None, ""),
    "finetune_task_lora": (RELEASED, 128, 2e-4, 2e-5, 1, LORA, "v1", (128, 256), ""),
    "v1_pretrain": ("lmsys/vicuna-{size}-v1.3", 128, 2e-3, None, 1, ("projector",), "plain", None, ""),
    "v1_finetune": ("runs/v1_pretrain_{size}/export", 128, 2e-5, None, 1, FULL, "v1", None, ""),
    "v1_finetune_full": ("runs/v1_pretrain_{size}/export", 128, 2e-5, None, 3, FULL, "v1", None, ""),
    "v1_finetune_lora": ("runs/v1_pretrain_{size}/export", 128, 2e-5, None, 1, LORA, "v1", (64, 16), ""),
    "v1_finetune_qlora": ("runs/v1_pretrain_{size}/export", 128, 2e-5, None, 1, LORA, "v1", (64, 16), "nf4"),
    "v1_finetune_sqa": ("runs/v1_pretrain_{size}/export", 128, 2e-5, None, 12, FULL, "v1", None, ""),
}  # fmt: skip


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_recipe_has_its_script_s_numbers(script, size):
    c = load_config(f"{script}_{size}", [])
    lora = (c.lora_rank, c.lora_alpha) if c.lora_rank else None
    found = (c.batch_size, c.lr, c.projector_lr, c.epochs, c.trainable, c.data.version, lora)
    start, *wanted, quantize = SCRIPTS[script]
    assert c.model.init == start.format(size=size)
    assert (*found, c.quantize) == (*wanted, quantize)
    # What all of them share.
    assert (c.warmup_ratio, c.lr_end_ratio, c.weight_decay, c.clip_norm) == (0.03, 0.0, 0.0, 0.0)
    assert (c.optimizer, c.b1, c.b2, c.eps) == ("adamw", 0.9, 0.999, 1e-8)
    assert (c.data.max_length, c.lora_dropout, c.dtype) == (2048, 0.05, "bfloat16")
    assert (c.lora_targets, c.lora_rslora, c.lora_dora) == (("language",), False, False)
    assert (c.ema_decay, c.z_loss, c.param_groups) == (0.0, 0.0, ())
    v1, stage1 = script.startswith("v1_"), "pretrain" in script
    assert c.data.group_by_modality == (not v1 and not stage1)
    assert c.data.image_aspect_ratio == ("square" if v1 or stage1 else "pad")
    if stage1:
        assert c.model.vision_tower == (V1 if v1 else V1_5)
        assert c.model.projector == ("linear" if v1 else "mlp2x_gelu")
        assert c.model.projector == (LlavaConfig.v1_7b() if v1 else LlavaConfig.v15_7b()).projector


@pytest.mark.parametrize(
    ("name", "records", "steps", "warmup"),
    [("pretrain_7b", 558_128, 2181, 66), ("finetune_7b", 665_298, 5198, 156)],
)
def test_steps_and_warm_up_of_the_original_s_stages(name, records, steps, warmup):
    c = load_config(name, [])
    assert math.ceil(c.epochs * math.ceil(records / c.batch_size)) == steps
    assert warmup_steps(c.warmup_ratio, steps) == warmup


# Table 2 of arXiv 2310.03744: (pixels, projector, the sets that a row adds), and the records of each set.
ROWS = {
    "1_llava": (224, "linear", {"llava_instruct_158k": 157_712}),
    "2_vqav2": (224, "linear", {"vqav2_without_format": 82_783}),
    "3_format": (224, "linear", {"vqav2": 82_783}),
    "4_mlp": (224, "mlp2x_gelu", {}),
    "5_okvqa_ocr": (224, "mlp2x_gelu",
        {"okvqa": 8_998, "aokvqa": 66_160, "ocrvqa": 80_000, "textcaps": 21_953}),
    "6_region": (224, "mlp2x_gelu", {"refcoco": 48_447, "vg": 86_417}),
    "7_336": (336, "mlp2x_gelu", {}),
    "8_gqa": (336, "mlp2x_gelu", {"gqa": 72_140}),
    "9_sharegpt": (336, "mlp2x_gelu", {"sharegpt": 40_688}),
}  # fmt: skip


def test_the_ablation_adds_set_by_set_what_the_paper_adds():
    sets, base = {}, dict(flat(load_config("finetune_7b", [])))
    for row, (pixels, projector, more) in ROWS.items():
        config = load_config(f"ablation_{row}_7b", [])
        sets = {n: k for n, k in sets.items() if n != "vqav2_without_format"} | more
        assert config.data.path == tuple(f"{name}.json" for name in sets)
        stage1 = load_config(config.model.init.split("/")[1], [])
        assert stage1.model.vision_tower == (V1_5 if pixels == 336 else V1)
        assert (stage1.model.projector, stage1.batch_size) == (projector, 256)
        assert stage1.lr == (2e-3 if projector == "linear" else 1e-3)  # halved for the MLP
        changed = {n for n, v in flat(config) if base[n] != v}
        assert changed <= {"name", "model.init", "data.path", "data.image_folder"}
    assert sum(sets.values()) == 665_298
    whole = load_config("ablation_10_13b", [])
    assert whole.data.path == config.data.path
    assert whole.model.init == "runs/pretrain_13b/export"


def test_a_variant_says_only_what_differs_from_its_start():
    for name, variant in variants.VARIANTS.items():
        before = dict(flat(load_config(variant.start, [])))
        assert variant.changes
        for setting, value in variant.changes.items():
            assert before[setting] != value, (name, setting)


def test_a_variant_is_named_like_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--config", "finetune_qlora_13b", "--config.lr=1e-5", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "name = 'finetune_qlora_13b'" in shown
    assert "lr = 1e-05" in shown
    assert cli.main(["train", "--config", "finetune_qlora_33b", "--show"]) == 2
    assert "did you mean 'finetune_qlora_13b'?" in capsys.readouterr().err
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in variants.VARIANTS)
    (tmp_path / "mine.py").write_text(
        "from llava_jax.configs import variants\n\n"
        "def get_config():\n"
        "    c = variants.get_config('finetune_lora_13b')\n"
        "    c.data.path = 'mine.json'\n"
        "    return c\n"
    )
    ((_, mine),) = split_stages(load_config("mine.py", []))
    assert (mine.name, mine.data.path, mine.lora_rank) == ("mine", "mine.json", 128)
