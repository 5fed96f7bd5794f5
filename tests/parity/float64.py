"""LLaVA in float64 numpy: the exact value that float32 implementations scatter around."""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def logits(config, params, batch) -> list[np.ndarray]:
    """float64[t, V] of each row of a right-padded batch, its padding left out."""
    p = {n: np.asarray(v, np.float64) for n, v in params.items()}
    return [_decoder(config.language, p, x) for x in _embeddings(config, p, batch)]


def added(checkpoint) -> dict[str, np.ndarray]:
    """Its parameters in float64, each adapted kernel with its update added."""
    params = {n: np.asarray(p, np.float64) for n, p in checkpoint.params.items()}
    for name in [n.removesuffix(".lora_a") for n in params if n.endswith(".lora_a")]:
        a, b = params[f"{name}.lora_a"], params[f"{name}.lora_b"]
        params[f"{name}.kernel"] += checkpoint.config.lora.scale * np.einsum("lir,lro->lio", a, b)
    return params


def distance(rows: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The largest difference of any value between two lists of [t, V]."""
    return max(float(np.abs(a - b).max()) for a, b in zip(rows, others, strict=True))


def _embeddings(config, p, batch) -> list[np.ndarray]:
    """float64[t, D] per row: text embeddings, with image features at the image slots."""
    out = []
    for b in range(len(batch["tokens"])):
        n = int(batch["segments"][b].sum())
        slots = batch["slots"][b, :n]
        x = p["language.embed.embedding"][batch["tokens"][b, :n]]
        if (slots >= 0).any():
            images = np.asarray(batch["images"][b], np.float64)
            features = np.concatenate([_projector(config, p, _tower(config, p, i)) for i in images])
            x = np.where((slots >= 0)[:, None], features[np.maximum(slots, 0)], x)
        out.append(x)
    return out


def _tower(config, p, image):
    c = config.vision
    n, s = c.image_size // c.patch_size, c.patch_size
    patches = image.reshape(n, s, n, s, 3).transpose(0, 2, 1, 3, 4).reshape(n * n, -1)
    x = patches @ p["vision.patch_embed.kernel"].reshape(-1, c.width)
    x = np.concatenate([p["vision.class_embed"][None], x]) + p["vision.pos_embed"]
    x = _layer_norm(x, p, "vision.pre_norm", ..., c.norm_eps)
    for i in range(config.vision_layers_run):

        def linear(x, name, i=i):
            at = f"vision.layers.{name}"
            return x @ p[f"{at}.kernel"][i] + p[f"{at}.bias"][i]

        y = _layer_norm(x, p, "vision.layers.norm1", i, c.norm_eps)
        q, k, v = (_heads(linear(y, f"attn.{a}"), c.heads) for a in "qkv")
        x = x + linear(_attend(q, k, v, 0.0), "attn.out")
        y = linear(_layer_norm(x, p, "vision.layers.norm2", i, c.norm_eps), "mlp.fc1")
        x = x + linear(y / (1 + np.exp(-1.702 * y)), "mlp.fc2")
    return x[1:] if config.feature_select == "patch" else x


def _projector(config, p, x):
    for i in range(config.projector_depth):
        x = x if i == 0 else 0.5 * x * (1 + _erf(x / np.sqrt(2)))
        x = x @ p[f"projector.linear_{i}.kernel"] + p[f"projector.linear_{i}.bias"]
    return x


def _decoder(c, p, x):
    angle = np.arange(len(x))[:, None] / c.rope_theta ** (
        np.arange(0, c.head_width, 2) / c.head_width
    )
    cos, sin = np.tile(np.cos(angle), 2), np.tile(np.sin(angle), 2)

    def rotate(h):
        half = c.head_width // 2
        return h * cos + np.concatenate([-h[..., half:], h[..., :half]], -1) * sin

    mask = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    for i in range(c.layers):

        def linear(x, name, i=i):
            at = f"language.layers.{name}"
            return x @ p[f"{at}.kernel"][i]

        y = _rms(x, p["language.layers.attn_norm.scale"][i], c.norm_eps)
        q, k, v = (_heads(linear(y, f"attn.{a}"), c.heads) for a in "qkv")
        x = x + linear(_attend(rotate(q), rotate(k), v, mask), "attn.o")
        y = _rms(x, p["language.layers.mlp_norm.scale"][i], c.norm_eps)
        gate = linear(y, "mlp.gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, "mlp.up"), "mlp.down")
    return _rms(x, p["language.norm.scale"], c.norm_eps) @ p["language.head.kernel"]


def _heads(x, n):
    return x.reshape(len(x), n, -1).transpose(1, 0, 2)


def _attend(q, k, v, mask):
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]) + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).transpose(1, 0, 2).reshape(q.shape[1], -1)


def _rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _layer_norm(x, p, name, i, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * p[f"{name}.scale"][i] + p[f"{name}.bias"][i]
