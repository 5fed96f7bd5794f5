"""Training checkpoints: trained parameters, optimizer, step and data-iterator state, in one commit.

Orbax writes them asynchronously and atomically: a step exists whole or not at all. Frozen parameters
are not in them; they come from the model that the run started from.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError
from llava_jax.train.step import TrainState

log = logging.getLogger(__name__)

_DISK = re.compile(
    "no space left on device|disk quota exceeded|read-only file system|permission denied"
    "|input/output error|stale file handle|file too large",
    re.IGNORECASE,
)


class NotSaved(LlavaError):
    """A checkpoint could not be written; earlier ones are whole."""


class Checkpointer:
    """Saves and restores TrainState and the data iterator under `folder`/<step>.

    Keeps the newest `keep` steps. Call `close()` at the end: it waits for the write in progress.
    A failed write is raised as NotSaved by the next call.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: TrainState, data_state: dict, meta: dict) -> None:
        """Starts writing `step`; returns once the arrays are copied. meta and data_state are JSON."""
        args = self._ocp.args
        with self._writing():
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
        """(state, data_state, meta) of the newest step, with the shardings of `like` (arrays or abstract).

        Raises LlavaError, naming the folder, if it is damaged or holds another tree (of other
        trainable groups, say).
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
        except Exception as error:  # orbax and tensorstore raise many kinds
            log.debug("restore failed", exc_info=error)
            before = [s for s in self._manager.all_steps() if s != step]
            then = f"resumes from step {max(before)}" if before else "starts again"
            raise LlavaError(
                f"{self._folder / str(step)} cannot be read: it is damaged, or belongs to other settings",
                fix=f"remove this folder, and the run {then}; or name another --workdir",
            ) from error
        return _from_tree(found["state"], like), found["data"], found["meta"]

    def wait(self) -> None:
        """Returns when the write in progress is committed; raises NotSaved if it failed."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Within it, whatever orbax raises becomes NotSaved: a full disk, most likely."""
        try:
            yield
        except Exception as error:
            known = _DISK.search(str(error))
            reason = known[0].lower() if known else f"{type(error).__name__}: {error}"[:300]
            raise NotSaved(
                f"{self._folder}: the checkpoint could not be written: {reason}",
                fix="fix that, and run the same command again to resume",
            ) from error

    def close(self) -> None:
        """Waits for the write in progress and releases the folder."""
        self.wait()
        self._manager.close()


def _as_tree(state: TrainState) -> dict[str, Any]:
    """Optimizer state as a list of leaves: optax may change its containers, the format must not."""
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
