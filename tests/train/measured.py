"""`llava-jax train`, as a program that also notes the memory of its process.

    python -m tests.train.measured OUT.json --config common ...

OUT.json: by how many bytes anonymous memory grew, at most, while weights were read and while the model
was exported; how many were read from files; and by how many it had grown once the model was ready.
"""

import contextlib
import ctypes
import json
import sys
import threading
import time
from pathlib import Path

from llava_jax import cli, convert
from llava_jax.convert.io.lazy import Leaf
from llava_jax.train import loop

found: dict[str, int] = {"read": 0}


def anonymous() -> int:
    """The bytes of this process that are not those of a file."""
    return 1024 * int(_line("RssAnon"))


def _line(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(x.split()[1] for x in lines if x.startswith(name))


def trimmed() -> int:
    """`anonymous`, once memory that was freed is given back."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous()


@contextlib.contextmanager
def growth(name: str):
    """Notes the growth of anonymous memory in the context."""
    before, done = trimmed(), threading.Event()
    found[name] = 0

    def watch() -> None:
        while not done.is_set():
            found[name] = max(found[name], anonymous() - before)
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found[f"{name}, after"] = trimmed() - before


def watched(name: str, work):
    def run(*args):
        with growth(name):
            return work(*args)

    return run


def counting(read):
    def run(self, index=None):
        array = read(self, index)
        found["read"] += array.nbytes
        return array

    return run


if __name__ == "__main__":
    out, *words = sys.argv[1:]
    Leaf.read = counting(Leaf.read)
    convert.read_leaves = watched("reading", convert.read_leaves)
    loop.read_params = watched("start", loop.read_params)
    loop.save_model = watched("export", loop.save_model)
    code = cli.main(["train", *words])
    Path(out).write_text(json.dumps(found))
    sys.exit(code)
