"""Every setting of a training run, with its default; the other files change a few of them.

llava-jax train --config configs/finetune_7b.py --config.lr=1e-5 --workdir runs/finetune \\
    --config.data.path=llava_v1_5_mix665k.json --config.data.image_folder=data

llava_jax.settings.TrainSettings is the table that they come from, docs/settings.md its page.
"""

from typing import Any

from ml_collections import ConfigDict

from llava_jax.settings import TRAINING


def get_config() -> Any:
    """All settings, locked: a name that is not among them cannot be set. None stands for "not set".

    Types are not checked here but with the limits, by llava_jax.train.config.
    """
    c: Any = ConfigDict(type_safe=False)
    for name, row in TRAINING.items():
        group, _, last = name.rpartition(".")
        if group and group not in c:
            c[group] = ConfigDict(type_safe=False)
        (c[group] if group else c)[last] = row.default
    # Several runs, one after another: {name: {setting: value}}; each starts from the one before.
    c.stages = ConfigDict(type_safe=False)
    return lock(c)


def lock(c: Any) -> Any:
    """Closes `c` to new names; a file with settings of its own unlocks it, adds them and calls this.

    Entries of `stages` stay open: llava_jax.train.config checks their names against `c`.
    """
    c.lock()
    c.stages.unlock()
    return c
