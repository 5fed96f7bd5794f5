"""Training checkpoints: trained parameters, optimizer, step, place in the data and their digests, in one commit.

`folder`/STEP holds the arrays as orbax writes them, run.json, and SHA256SUMS of both. All of it is
written to a hidden folder beside, is on the disk, and only then gets its name: a step exists whole or not
at all. Frozen parameters are not in it; they come from the model that the run started from.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llava_jax.digests import SUMS, damages, write_sums
from llava_jax.errors import LlavaError
from llava_jax.train.distributed import gather, is_main, together
from llava_jax.train.step import TrainState
from llava_jax.util import read_object, sync_path, sync_tree, write_json

log = logging.getLogger(__name__)

STATE, RUN, DAMAGED = "state", "run.json", "damaged"
FILE_BYTES = 256 * 2**20
"""Largest data file, so that several are written, and checked, at a time."""

_DISK = re.compile(
    "no space left on device|disk quota exceeded|read-only file system|permission denied"
    "|input/output error|stale file handle|file too large",
    re.IGNORECASE,
)


class Checkpointer:
    """Saves and restores TrainState and the data iterator under `folder`/STEP.

    Keeps the newest `keep` steps. All processes call each method at the same point of the run. A save is
    `begin`, then `advance` after each step until it is no longer `open`, or `settle` at once. A failure
    of the disk is logged, and raised by nothing but `settle`'s result: training goes on. ends: the
    step after which the run ends, for the words of that line.
    """

    ends = -1

    def __init__(self, folder: Path, *, keep: int = 2):
        import orbax.checkpoint as ocp

        self._ocp, self._folder, self._keep = ocp, folder.absolute(), keep
        # Weights hardly compress; Zarr 3 is what can be cut into files of FILE_BYTES.
        self._arrays = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        self._pool = ThreadPoolExecutor(1, "checkpoint")  # orbax writes in threads of its own
        self._open: tuple[int, dict[str, Any]] | None = None
        self._part: Future[None] | None = None  # the writing of this process
        self._commit: Future[bool] | None = None  # of the main process
        together(self._make_folder if is_main() else lambda: None)

    # Reading -------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """The steps that were saved, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdigit())

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, meta) of the newest step that is whole; None where nothing was saved.

        like: arrays, or abstract ones; the state gets their shardings. meta: as `begin` got it. A step
        that is damaged is named in a warning and renamed to STEP.damaged.
        Raises LlavaError where all are damaged, or the newest is of a run with other settings.
        """
        steps, damaged = gather(self.steps())[0], {}
        for step in reversed(steps):
            damaged[step] = self._damages(self._folder / str(step))
            if not damaged[step]:
                for bad, problems in list(damaged.items())[:-1]:
                    self._set_aside(bad, problems)
                found = self._read(step, like)
                if is_main():
                    self._remove_old()  # a kill between a commit and a removal left one more
                return found
        if steps and all(problems == [f"{SUMS} is missing"] for problems in damaged.values()):
            raise LlavaError(
                f"{self._folder}: no checkpoint has {SUMS}; an earlier version wrote them, or it was "
                "removed",
                fix="go on with that version, or write it (docs/reliability.md), or name another --workdir",
            )
        if steps:
            found = "; ".join(f"{step}: {problems[0]}" for step, problems in damaged.items())
            raise LlavaError(
                f"{self._folder}: all checkpoints are damaged ({found})",
                fix="restore one from a copy, or remove the folder, and the run begins anew",
            )
        return None

    def _damages(self, folder: Path) -> list[str]:
        """`damages`, found by all processes together, each reading a share of the files."""
        import jax

        ours = damages(folder, jax.process_index(), jax.process_count())
        return list(dict.fromkeys(line for lines in gather(ours) for line in lines))

    def _set_aside(self, step: int, problems: list[str]) -> None:
        folder, number = self._folder / str(step), 1
        while (
            place := folder.with_name(f"{step}.{DAMAGED}{number if number > 1 else ''}")
        ).exists():
            number += 1
        together(lambda: folder.rename(place) if is_main() else None)
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        log.warning("checkpoint %d is not used: %s%s; see %s", step, problems[0], more, place)

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        folder = self._folder / str(step)
        abstract = _abstract(like)
        how = self._ocp.checkpoint_utils.construct_restore_args(abstract)
        args = self._ocp.args.PyTreeRestore(abstract, restore_args=how)
        try:
            found = self._arrays.restore(_path(folder / STATE), args=args)
            meta = read_object(folder / RUN)
        except Exception as error:  # orbax and tensorstore raise many kinds
            log.debug("restore failed", exc_info=error)
            raise LlavaError(
                f"{folder} is whole, but does not fit: it belongs to other settings",
                fix="name another --workdir",
            ) from error
        return _from_tree(found, like), meta

    # Writing -------------------------------------------------------------------------------------

    @property
    def writing(self) -> bool:
        """Whether this process still writes its part of the open save."""
        return self._part is not None and not self._part.done()

    @property
    def lost(self) -> bool:
        """Whether this process could not write its part of the open save."""
        return self._part is not None and self._part.done() and self._part.exception() is not None

    def begin(
        self, step: int, state: TrainState, meta: dict[str, Any], before: Callable = lambda: None
    ) -> None:
        """Starts writing `step`; returns once the arrays are copied. An open save must be settled before.

        meta: JSON-ready, the main process's counts. before: what must be on the disk before this is; it
        raises OSError where it is not.
        """
        work = self._folder / f".{step}.tmp"
        self._open, self._part = (step, meta), Future()
        try:
            together(lambda: (before(), self._make_work(work)) if is_main() else None)
            tree = self._ocp.args.PyTreeSave(
                _kept(_as_tree(state)), ocdbt_target_data_file_size=FILE_BYTES
            )
            # In a thread, since the caller may have an event loop of its own (a notebook).
            saving = self._arrays.async_save(_path(work / STATE), args=tree)
            writes = self._pool.submit(asyncio.run, saving).result()
            self._part = self._pool.submit(_finished, writes or ())
        except Exception as error:  # orbax raises many kinds
            self._part.set_exception(error)

    def advance(self, writing: bool, lost: bool) -> None:
        """Commits the open save once no process is `writing`, in the background; drops it if one `lost`."""
        if self._open is None or writing:
            return
        (step, meta), self._open = self._open, None
        if lost:
            self._say_lost(step, self._part.exception() if self._part else None)
        if is_main():
            work: Callable = self._drop if lost else self._finish
            self._commit = self._pool.submit(work, step, meta)

    @property
    def failed(self) -> bool:
        """In the main process: whether the last save is known not to be there."""
        return self._commit is not None and self._commit.done() and not self._commit.result()

    def settle(self) -> bool:
        """Returns when no save is open; whether the last one is there, for all processes alike."""
        if self._open is not None:
            if self._part:
                self._part.exception()  # waits
            self.advance(False, any(gather(self.lost)))
        return all(gather(self._commit is None or self._commit.result()))

    def close(self) -> None:
        """Ends the threads. A run that fails alone commits what is being written; peers may be dead."""
        import jax

        if jax.process_count() == 1:
            self.settle()
        self._pool.shutdown()
        self._arrays.close()

    # In the main process

    def _make_folder(self) -> None:
        """Makes the folder, without what a killed run began to write or to remove."""
        self._folder.mkdir(parents=True, exist_ok=True)
        clear(self._folder)

    def _make_work(self, work: Path) -> None:
        clear(self._folder)
        (work / STATE).mkdir(parents=True)

    def _finish(self, step: int, meta: dict[str, Any]) -> bool:
        """Commits what all processes wrote; False, and a line in the log, where that fails."""
        work = self._folder / f".{step}.tmp"
        try:
            self._arrays.finalize(_path(work / STATE))
            write_json(work / RUN, meta)
            write_sums(work)
            sync_tree(work)
            work.rename(self._folder / str(step))
            sync_path(self._folder)
        except Exception as error:
            self._say_lost(step, error)
            return self._drop(step, meta)
        log.debug("saved step %d", step)
        self._remove_old()
        return True

    def _remove_old(self) -> None:
        """Removes all steps but the newest. They lose their names first: half of one would look damaged."""
        for step in self.steps()[: -self._keep]:
            gone = self._folder / f".{step}.tmp"
            with contextlib.suppress(OSError):
                (self._folder / str(step)).rename(gone)
                shutil.rmtree(gone)

    def _drop(self, step: int, meta: dict[str, Any]) -> bool:
        shutil.rmtree(self._folder / f".{step}.tmp", ignore_errors=True)
        return False

    def _say_lost(self, step: int, error: BaseException | None) -> None:
        if error is not None:  # else another process's, which says it
            log.error(
                "the checkpoint of step %d is not saved: %s (%s)%s",
                step,
                reason_of(error),
                self._folder,
                "" if step == self.ends else "; training goes on",
            )


def newest_meta(folder: Path) -> dict[str, Any]:
    """The meta of the newest step in `folder`, before anything is restored; {} where none can be read."""
    steps = [path for path in folder.glob("*") if path.name.isdigit()]
    for step in sorted(steps, key=lambda path: -int(path.name)):
        with contextlib.suppress(LlavaError, OSError):
            return read_object(step / RUN)
    return {}


def clear(folder: Path) -> None:
    """Removes what no save or removal is at any more: a kill left it, or a folder that was read-only."""
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def reason_of(error: BaseException) -> str:
    """What stopped a write, in a few words: a full disk, most likely."""
    known = _DISK.search(f"{error}")
    if known:
        return known[0].lower()
    if isinstance(error, OSError) and error.errno in errno.errorcode:
        return os.strerror(error.errno or 0).lower()
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _kept(tree: dict[str, Any]) -> dict[str, Any]:
    """The arrays as they are written while the next step gives up the state: orbax copies from devices.

    On a CPU it would write from the state's own memory, and the step, which may then not reuse it, would
    copy it while all cores write.
    """
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "cpu":
        return tree
    return jax.block_until_ready(jax.tree.map(jnp.copy, tree))


def _finished(writes: Sequence[Any]) -> None:
    for write in writes:
        write.result()


def _path(path: Path) -> Any:
    from etils import epath  # the paths of orbax

    return epath.Path(path)


def _abstract(like: TrainState) -> dict[str, Any]:
    import jax

    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _as_tree(like)
    )


def _as_tree(state: TrainState) -> dict[str, Any]:
    """Optimizer state as a list of leaves: optax may change its containers, the format must not."""
    import jax

    return {
        "step": state.step,
        "params": state.params,
        "opt_state": {f"{i:04d}": x for i, x in enumerate(jax.tree.leaves(state.opt_state))},
        **({"recent": state.recent} if state.recent is not None else {}),
    }


def _from_tree(tree: dict[str, Any], like: TrainState) -> TrainState:
    import jax

    leaves = [tree["opt_state"][k] for k in sorted(tree["opt_state"])]
    opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
    return TrainState(tree["step"], tree["params"], opt_state, tree.get("recent"))
