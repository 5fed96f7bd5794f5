"""Training checkpoints: trained parameters, optimizer, step and data-iterator state, in one commit.

Orbax writes them asynchronously and atomically: a step is there whole or not at all. Frozen
parameters are not in them; they come from the model the run started with.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError
from llava_jax.train.step import TrainState

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores TrainState and the data iterator under `folder`/<step>.

    Keeps the newest `keep` steps. Call `close()` at the end: it waits for the write under way and
    raises what went wrong in it.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: TrainState, data_state: dict, meta: dict) -> None:
        """Starts writing `step`; returns once the arrays are copied. meta and data_state are JSON."""
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave(_as_tree(state)),
                data=args.JsonSave(data_state),
                meta=args.JsonSave(meta),
            ),
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> tuple[TrainState, dict, dict]:
        """(state, data_state, meta) of the newest step, laid out as `like` (arrays or abstract ones).

        Raises LlavaError when the stored tree is another one (say, other trainable groups).
        """
        import jax

        args, step = self._ocp.args, self.latest()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _as_tree(like)
        )
        try:
            found = self._manager.restore(
                step,
                args=args.Composite(
                    state=args.StandardRestore(abstract),
                    data=args.JsonRestore(),
                    meta=args.JsonRestore(),
                ),
            )
        except (ValueError, KeyError) as error:
            log.debug("restore failed", exc_info=error)
            raise LlavaError(
                f"checkpoint {step} in the work directory does not fit this run's parameters",
                fix="use the settings it was made with, or another --workdir",
            ) from error
        return _from_tree(found["state"], like), found["data"], found["meta"]

    def wait(self) -> None:
        """Returns when the write under way is committed; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the write under way and releases the folder."""
        self.wait()
        self._manager.close()


def _as_tree(state: TrainState) -> dict[str, Any]:
    """Optimizer state as a list of leaves: its containers are optax's affair, not the format's."""
    import jax

    return {
        "step": state.step,
        "params": state.params,
        "opt_state": {f"{i:04d}": x for i, x in enumerate(jax.tree.leaves(state.opt_state))},
    }


def _from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    import jax

    leaves = [tree["opt_state"][k] for k in sorted(tree["opt_state"])]
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
    return TrainState(tree["step"], tree["params"], opt_state)
