"""The settings of the tiny pre-training, apart from it so that a config file imports no jax."""

from __future__ import annotations

from ml_collections import ConfigDict

from llava_jax.quickstart.scenes import PLACES

JSON_PHRASES = (
    ' [{"color": "',
    '[{"color": "',
    '", "shape": "',
    '", "place": "',
    '"}, {"color": "',
    '"}]',
)


def tiny_defaults() -> ConfigDict:
    """`config.tiny`, with the values that suit some ten thousand pictures of 64 x 64 pixels."""
    return ConfigDict(
        dict(
            vocabulary=620,
            # Further phrases that become single tokens.
            phrases=(
                *("What", "Which", "Where", "Describe the image concisely."),
                *("Describe the image as JSON.", *JSON_PHRASES),
                *PLACES,
                *(f" {place}" for place in PLACES),
            ),
            image_size=64,
            patch_size=16,
            tower_width=96,
            tower_layers=3,
            feature_layer=-1,
            language_width=96,
            language_layers=2,
            language_mlp=256,
            batch_size=64,
            tower_lr=0.02,
            tower_steps=600,
            language_lr=0.02,
            language_steps=150,
            language_records=4000,
            caption_rows=4,  # rows of a language batch that hold captions, several in each
        )
    )
