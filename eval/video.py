"""The one frame of a video that SEED-Bench's questions are asked about, by PyAV (the extra `video`)."""

import os
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import DataError
from llava_jax.util import need

PURPOSE = "to take the frames of SEED-Bench's videos"


def save_middle_frame(
    video: Path, out: Path, segment: tuple[float, float] | None = None, seconds: bool = False
) -> None:
    """Writes the middle frame of a video, or of its `segment`, as a picture.

    The frame is that of LLaVA's extract_video_frames.py (SEED-Bench's own sampling with one frame):
    int((n - 1) / 2) of n frames, of a whole video of one frame less.

    Args:
      segment: first and last frame, or `seconds`, which become frames by the average rate.
    Raises:
      LlavaError: PyAV is not installed. DataError: the file is no video, or has no such frame.
    """
    av = need("av", PURPOSE, "llava_jax[video]")
    try:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            times = [p.pts for p in container.demux(stream) if p.size]
            index = _index(len(times), segment, float(stream.average_rate) if seconds else 0.0)
        with av.open(str(video)) as container:
            picture = _frame(container, times, index).to_image()
    except (av.FFmpegError, OSError, LookupError, StopIteration, TypeError) as e:
        what = " ".join(str(e).split())[:80] or type(e).__name__
        raise DataError(f"{video}: no middle frame can be read ({what})") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    picture.save(part, "PNG")
    part.replace(out)


def _index(count: int, segment: tuple[float, float] | None, rate: float) -> int:
    if segment is None:
        first, last = 0, count - 1
    elif rate:
        first, last = (int(min(max(x * rate, 0), count - 1)) for x in segment)
    else:
        first, last = int(segment[0]), min(int(segment[1]), count)
    return first + max(0, int((last - first - 1) / 2))


def _frame(container: Any, times: list[int | None], index: int) -> Any:
    """The frame at a place in the order of showing: decoded from the key frame before it where packets
    carry their times, else from the start."""
    stream = container.streams.video[0]
    if None in times:
        return next(f for n, f in enumerate(container.decode(stream)) if n == index)
    wanted = sorted(t for t in times if t is not None)[index]
    container.seek(wanted, stream=stream)
    return next(f for f in container.decode(stream) if f.pts is not None and f.pts >= wanted)
