"""rsLoRA, DoRA, and adapters on tower and projector: PEFT's logits, loss and gradients, both ways."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert import load_checkpoint, save_checkpoint
from llava_jax.convert.table import keys
from llava_jax.layers import Compute
from llava_jax.llava import build
from llava_jax.params import is_lora
from llava_jax.train.step import make_loss
from tests.parity.test_model_hf import LLAMA, hugging_face, inputs, labels_of

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

DECODER = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
TOWER = (
    r"(.*vision_tower.*layers\.[01]|.*language_model.*)\..*(q_proj|v_proj|out_proj|fc1|down_proj)"
)
KINDS = {
    "rslora, projector whole": (
        DECODER,
        {"use_rslora": True, "modules_to_save": ["multi_modal_projector"]},
    ),
    "dora": (DECODER, {"use_dora": True}),
    "dora and rslora, tower and projector": (
        rf"{TOWER}|.*multi_modal_projector\.linear_[12]",
        {"use_dora": True, "use_rslora": True},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    hugging_face(LLAMA, {}).save_pretrained(folder)
    return folder


def adapted(targets, switches):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **switches)
    model = peft.get_peft_model(hugging_face(LLAMA, {}), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.mul_(1.1).add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_peft_s_both_ways(kind, base, tmp_path):
    theirs = adapted(*KINDS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    checkpoint = load_checkpoint(tmp_path / "adapter", base=base)
    config = replace(checkpoint.config, max_length=None)
    params = {k: jnp.asarray(v, jnp.float32) for k, v in checkpoint.params.items()}
    batch, words = inputs(config)
    real = batch["segments"] > 0
    out = theirs(**words, labels=labels_of(batch))
    out.loss.backward()
    ours = build(config, params)
    wanted = out.logits.detach().numpy()[real]
    np.testing.assert_allclose(np.asarray(ours.logits(ours(batch)))[real], wanted, atol=1e-5)

    trained = {n: v for n, v in params.items() if is_lora(n)}
    frozen = {n: v for n, v in params.items() if not is_lora(n)}
    value, grads = jax.value_and_grad(make_loss(config, Compute()))(trained, frozen, batch)
    assert float(value) == pytest.approx(float(out.loss.detach()), abs=1e-5)
    places, count = keys.places(keys.HF_MEMORY, config), 0
    for name, parameter in theirs.named_parameters():
        name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector")
        pairing, layer = places.get(name.replace(".default.", "."), (None, 0))
        if pairing is None or not is_lora(pairing.ours):
            continue
        mine = np.asarray(grads[pairing.ours])
        mine = (mine[layer] if pairing.stacked else mine).T
        gradient = parameter.grad.numpy()
        np.testing.assert_allclose(mine, gradient, atol=1e-5 * max(1, np.abs(gradient).max()))
        count += 1
    assert count == sum(
        len(p.theirs) for p in keys.pairings(keys.HF_MEMORY, config) if is_lora(p.ours)
    )

    # Back: written by us, with a regex of our own in adapter_config.json, and read by PEFT.
    checkpoint.metadata.pop("lora")
    save_checkpoint(checkpoint, tmp_path / "back", to="peft", base=base)
    settings = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert isinstance(settings["target_modules"], str)
    again = peft.PeftModel.from_pretrained(hugging_face(LLAMA, {}), tmp_path / "back").eval()
    with torch.no_grad():
        logits = again(**words).logits.numpy()[real]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    # Merged, which the other formats need, it is the same model.
    merged = load_checkpoint(tmp_path / "adapter", base=base, merge=True)
    whole = build(
        replace(merged.config, max_length=None),
        {k: jnp.asarray(v) for k, v in merged.params.items()},
    )
    np.testing.assert_allclose(np.asarray(whole.logits(whole(batch)))[real], wanted, atol=1e-5)


def test_the_original_s_pair_holds_no_adapters_on_the_tower(base, tmp_path):
    from llava_jax.errors import WeightError

    adapted(*KINDS["dora and rslora, tower and projector"]).save_pretrained(tmp_path / "adapter")
    checkpoint = load_checkpoint(tmp_path / "adapter", base=base)
    with pytest.raises(WeightError, match="the original LLaVA loads no adapters on vision.layers"):
        save_checkpoint(checkpoint, tmp_path / "pair", to="lora")
    assert not (tmp_path / "pair").exists()
