"""Which features a budget keeps, against the authors' rules in torch on a random Hugging Face tower.

The rules are written here from the papers and the authors' repositories, in loops over one picture.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dataclasses import replace  # noqa: E402

from llava_jax import budget  # noqa: E402
from llava_jax.config import TokenBudget  # noqa: E402
from llava_jax.convert import load_checkpoint  # noqa: E402
from llava_jax.llava import build  # noqa: E402


def their_visionzip(states, attention, keys, dominant, contextual):
    """(features, places) of one picture: states [S, D], attention [N, S, S], keys [N, S, H]."""
    looked = attention[:, 0, 1:].sum(0)
    chosen = [0, *sorted((looked.topk(dominant - 1).indices + 1).tolist())]
    others = [i for i in range(len(states)) if i not in chosen]
    targets = others[:: max(1, len(others) // contextual)][:contextual]
    unit = torch.nn.functional.normalize(keys.mean(0), dim=-1)
    joined = {t: [] for t in targets}
    for i in others:
        if i not in joined:
            joined[targets[int((unit[targets] @ unit[i]).argmax())]].append(states[i])
    merged = [states[t] + (sum(js) / len(js) if js else 0) for t, js in joined.items()]
    return torch.stack([*states[chosen], *merged]), [*chosen, *targets]


def their_divprune(features, count):
    """Places of one picture's features [I, D]."""
    unit = features / features.norm(dim=1, keepdim=True)
    apart = 1 - unit @ unit.T
    chosen = [int(apart.sort(dim=0).values[1].argmax())]
    while len(chosen) < count:
        chosen.append(int(apart[chosen].min(dim=0).values.argmax()))
    return sorted(chosen)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(their model, our config, our parameters, pixels of three pictures)."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 84, "patch_size": 14}  # fmt: skip
    text = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 64, "vocab_size": 70,
            "num_hidden_layers": 1, "num_attention_heads": 4}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=69, attn_implementation="eager"
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # attention and keys that differ
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    ours = load_checkpoint(folder)
    params = {k: jnp.asarray(v, jnp.float32) for k, v in ours.params.items()}
    pixels = np.random.default_rng(1).normal(size=(3, 84, 84, 3)).astype(np.float32)
    return model, ours.config, params, pixels


@pytest.fixture(scope="module")
def seen(pair):
    """Of the feature layer: their states, attention and keys [M, N, S, H]."""
    model, _, _, pixels = pair
    tower, kept = model.model.vision_tower, []
    layer = next(m for n, m in tower.named_modules() if n.endswith("layers.2.self_attn.k_proj"))
    layer.register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        out = tower(
            torch.tensor(pixels.transpose(0, 3, 1, 2)),
            output_hidden_states=True,
            output_attentions=True,
        )
    keys = kept[0].reshape(3, 37, 4, 8).transpose(1, 2)
    return out.hidden_states[-2], out.attentions[-2], keys


@pytest.fixture(scope="module")
def looks(pair):
    """What our tower gives of the same."""
    _, config, params, pixels = pair
    return jax.jit(lambda images: build(config, params).vision.with_looks(images))(pixels)


def read(pair, tokens, by):
    _, config, params, pixels = pair
    chosen = replace(config, budget=TokenBudget(tokens, by))
    return jax.jit(lambda images: build(chosen, params).read(images)[0])(pixels)


@pytest.mark.parametrize("tokens", [30, 12, 2])
def test_visionzip_is_its_authors(pair, seen, looks, tokens):
    found, places = jax.jit(budget.visionzip, static_argnums=3)(*looks, tokens)
    merged = budget.merged_of(tokens)
    wanted = [their_visionzip(*one, tokens - merged, merged) for one in zip(*seen)]
    assert places.tolist() == [places for _, places in wanted]
    features = torch.stack([w for w, _ in wanted])
    np.testing.assert_allclose(found, features, atol=1e-5)
    if tokens == 12:
        with torch.no_grad():
            projected = pair[0].model.multi_modal_projector(features)
        np.testing.assert_allclose(read(pair, tokens, "visionzip"), projected, atol=1e-5)


def test_visionzip_merges_as_many_as_its_authors_published():
    assert [budget.merged_of(n) for n in (192, 128, 64)] == [30, 20, 10]


@pytest.mark.parametrize("tokens", [35, 12, 1])
def test_divprune_is_its_authors(pair, seen, tokens):
    model = pair[0]
    with torch.no_grad():
        projected = model.model.multi_modal_projector(seen[0][:, 1:])
    wanted = [their_divprune(one, tokens) for one in projected]
    found, places = jax.jit(budget.divprune, static_argnums=1)(jnp.asarray(projected), tokens)
    assert places.tolist() == wanted
    kept = torch.stack([one[places] for one, places in zip(projected, wanted)])
    np.testing.assert_allclose(found, kept, atol=1e-5)
    if tokens == 12:
        np.testing.assert_allclose(read(pair, tokens, "divprune"), kept, atol=1e-5)


def test_divprune_takes_no_feature_twice():
    same = jnp.ones((1, 6, 4))
    assert budget.divprune(same, 5)[1].tolist()[0] == sorted({*range(5)})


@pytest.mark.parametrize(("tokens", "grid"), [(9, (3, 3)), (12, (3, 4)), (20, (4, 5)), (1, (1, 1))])
def test_pool_is_adaptive_average_pooling(pair, seen, tokens, grid):
    assert TokenBudget(tokens, "pool").grid(6) == grid
    patches = seen[0][:, 1:].reshape(3, 6, 6, -1).permute(0, 3, 1, 2)
    means = torch.nn.functional.adaptive_avg_pool2d(patches, grid).flatten(2).mT
    found, _ = budget.pool(jnp.asarray(seen[0][:, 1:]), grid)
    np.testing.assert_allclose(found, means, atol=1e-5)
    if tokens == 12:
        with torch.no_grad():
            projected = pair[0].model.multi_modal_projector(means)
        np.testing.assert_allclose(read(pair, tokens, "pool"), projected, atol=1e-5)


def test_the_budgets_of_the_papers_have_grids():
    grids = {n: TokenBudget(n, "pool").grid(24) for n in (192, 128, 64, 144, 36, 127)}
    assert grids == {192: (12, 16), 128: (8, 16), 64: (8, 8), 144: (12, 12), 36: (6, 6), 127: None}
