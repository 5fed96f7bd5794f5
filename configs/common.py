"""Every setting of a training run, with its default; the other files change a few of them.

llava-jax train --config configs/finetune_7b.py --config.lr=1e-5 --workdir runs/finetune \\
    --config.data.path=llava_v1_5_mix665k.json --config.data.image_folder=data

llava_jax.settings.TrainSettings is the table that they come from, docs/settings.md its page.
"""

from types import UnionType
from typing import Any, get_args

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from llava_jax.settings import TRAINING


def get_config() -> Any:
    """All settings, locked: a name that is not among them cannot be set. None stands for "not set"."""
    c: Any = ConfigDict()
    for name, row in TRAINING.items():
        parent, _, last = name.rpartition(".")
        if parent and parent not in c:
            c[parent] = ConfigDict()
        group: Any = c[parent] if parent else c
        if not isinstance(row.type, UnionType):
            group[last] = row.default
        elif row.default is None:
            group[last] = placeholder(get_args(row.type)[0])
        else:  # one value or a tuple of them
            group[last] = FieldReference(row.default, field_type=object)
    # Several runs, one after another: {name: {setting: value}}; each starts from the one before.
    c.stages = ConfigDict()
    return lock(c)


def lock(c: Any) -> Any:
    """Closes `c` to new names; a file with settings of its own unlocks it, adds them and calls this.

    Entries of `stages` stay open: llava_jax.train.config checks their names against `c`.
    """
    c.lock()
    c.stages.unlock()
    return c
