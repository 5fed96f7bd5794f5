"""A job that dies of one picture and, once, of another: for tests of `llava-jax data check`."""

import os
import signal
from pathlib import Path

from llava_jax.datasets import findings


def picture_job(folder, limits):
    """As findings.picture_job."""
    job = findings.picture_job(folder, limits)

    def work(paths):
        for path in paths:
            once = Path(folder) / "once.flag"
            if path == "deadly.png" or (path == "once.png" and once.exists()):
                once.unlink(missing_ok=True)
                os.kill(os.getpid(), signal.SIGKILL)
        return job(paths)

    return work
