"""A cache of compiled programs on disk, for every command that compiles some.

Most of the time until a process's first answer is XLA's compilation; reading the program back takes
a moment.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from pathlib import Path

log = logging.getLogger(__name__)

VARIABLE = "LLAVA_JAX_CACHE"
"""Environment variable: another folder for the cache, or "off" for none."""

_MOST_BYTES = 2**30  # beyond it, the least recently used programs are deleted
_WORTH_SECONDS = 0.2  # programs that compile faster are not cached


def use_compile_cache() -> Path | None:
    """Turns jax's compilation cache on for the rest of the process; returns its folder.

    The folder is in $LLAVA_JAX_CACHE, else in llava_jax/compiled of $XDG_CACHE_HOME or ~/.cache.
    Does nothing and returns None if $LLAVA_JAX_CACHE is "off", jax has a cache already (such as
    $JAX_COMPILATION_CACHE_DIR), or the folder is not writable; nor in a run of several processes on CPUs,
    whose collectives (gloo) have aborted with programs from a cache.
    """
    import jax

    if jax.distributed.is_initialized() and jax.default_backend() == "cpu":
        return None
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() == "off" or jax.config.values["jax_compilation_cache_dir"]:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = (Path(chosen) if chosen else home / "llava_jax" / "compiled") / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.debug("no compile cache: %s", error)
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _processor() -> str:
    """A name for this type of processor.

    Machines may share a home folder, and XLA's code for one processor can contain instructions that
    another lacks.
    """
    facts = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        pass
    return hashlib.sha256(facts.encode()).hexdigest()[:12]
