"""Compiled programs kept between processes, for programs that a person waits for.

The first answer of a process is mostly XLA's compiling; read back from a file it takes a moment.
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

_MOST_BYTES = 2**30  # the least recently used programs go first
_WORTH_SECONDS = 0.2  # to compile; what is quicker is not kept


def use_compile_cache() -> Path | None:
    """Makes jax keep compiled programs, from now on and for the whole process; returns the folder.

    It is $LLAVA_JAX_CACHE, else llava_jax/compiled in $XDG_CACHE_HOME or ~/.cache. Does nothing,
    and returns None, where $LLAVA_JAX_CACHE is "off", jax has a cache already (say, by
    $JAX_COMPILATION_CACHE_DIR), or the folder cannot be written to.
    """
    import jax

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
    """A name for this kind of processor.

    A home folder may be shared, and XLA's programs for one processor can hold instructions that
    another lacks.
    """
    facts = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        pass
    return hashlib.sha256(facts.encode()).hexdigest()[:12]
