"""Pictures a second a core, from JPEG bytes to normalised pixels, and what a data file takes of a process.

    python -m bench pictures                  # four ways, interleaved; processor seconds, wherever spent
    python -m bench pictures --records 665000 # reading a LLaVA JSON of so many records
    python -m bench pictures --batches 20     # a run's loader, into a training step's first operation

640x480 JPEGs with noise like that of photographs (1/f), padded to a square, 336 pixels. "HF" are
transformers' processors, "Pillow" what the original does by hand. Processor seconds of the process and its
threads are counted, so work that a library does in threads is too. The uint8 pixels of ours are normalised
by XLA on this host's processor, which is counted as well; an accelerator does it elsewhere.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from bench import frame

SIZE = 336
A100 = {"stage 1": 100.0, "stage 2": 38.0}
"""Pictures a second that eight A100 take at 65 % of their peak: 312 TFLOP/s x 8 x 0.65 over 16.3 TFLOP a
sample in stage 1, and over 35.2 in stage 2, most of whose samples have a picture."""


def photographs(count: int) -> list[bytes]:
    """JPEGs of 640x480, quality 85, about 130 to 160 KB."""
    rng = np.random.RandomState(0)
    made = []
    for _ in range(count):
        file = io.BytesIO()
        photograph(rng, 480, 640).save(file, "JPEG", quality=85)
        made.append(file.getvalue())
    return made


def photograph(rng: np.random.RandomState, height: int, width: int) -> Image.Image:
    """Coloured noise of that many pixels, whose strength falls as one over the frequency."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    frequency = np.sqrt(rows**2 + columns**2)
    frequency[0, 0] = 1
    noise = np.fft.fft2(rng.normal(size=(3, height, width))) / frequency
    image = np.fft.ifft2(noise).real
    image = (image - image.mean()) / image.std() * 50 + 128
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def ways() -> dict[str, Callable[[list[bytes]], object]]:
    """Name -> function from JPEGs to their float32 pixels; each as it takes a batch."""
    import jax

    from llava_jax.config import LlavaConfig
    from llava_jax.images.pixels import normalize_for, pad_color, pixels_of

    config = LlavaConfig.v15_7b()
    color, vision = pad_color(config.vision), config.vision
    mean, std = (np.asarray(v, np.float32) for v in vision.units)
    rescale = np.float32(vision.pixels.rescale)
    on_device = jax.jit(lambda x: (x.astype(np.float32) * rescale - mean) / std)

    def square(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        side = max(image.size)
        padded = Image.new("RGB", (side, side), color)
        padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return padded

    def pillow(batch: list[bytes]) -> object:
        resized = [square(d).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for d in batch]
        return [normalize_for(np.asarray(image), vision) for image in resized]

    def ours(batch: list[bytes]) -> object:
        return on_device(np.stack([pixels_of(d, config) for d in batch])).block_until_ready()

    found: dict[str, Callable[[list[bytes]], object]] = {}
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    try:
        from transformers import CLIPImageProcessorPil

        hf = CLIPImageProcessorPil(**sizes)
        found["HF, Pillow"] = lambda batch: [
            hf(square(d), return_tensors="np")["pixel_values"] for d in batch
        ]
        import torchvision  # noqa: F401
        from transformers import CLIPImageProcessor

        fast = CLIPImageProcessor(**sizes)
        found["HF, torchvision"] = lambda batch: fast(
            [square(d) for d in batch], return_tensors="pt"
        )["pixel_values"]
    except ImportError as error:
        print(f"left out: {error.name} is not installed")
    return {**found, "Pillow": pillow, "ours": ours}


def pictures(count: int, repeats: int) -> dict[str, object]:
    """Prints the table of the four ways."""
    from llava_jax.config import LlavaConfig
    from llava_jax.images.pixels import pixels_of

    data, made = photographs(count), ways()
    differ = 0
    for one in data:
        image = Image.open(io.BytesIO(one)).convert("RGB")
        padded = Image.new("RGB", (640, 640), (122, 116, 104))
        padded.paste(image, (0, 80))
        want = np.asarray(padded.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
        differ = max(differ, int(np.abs(want - pixels_of(one, LlavaConfig.v15_7b())).max()))
    print(f"{count} JPEGs of {np.mean([len(d) for d in data]) / 1e3:.0f} KB")
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for function in made.values():
        function(data)
    for _ in range(repeats):
        for name, function in made.items():
            begun = time.process_time()
            function(data)
            seconds[name].append((time.process_time() - begun) / count)
    rows = []
    slowest = frame.spread(seconds["HF, Pillow" if "HF, Pillow" in seconds else "Pillow"])
    for name, found in seconds.items():
        own = frame.spread(found)
        kinds = ("min", "median")
        rows.append([name, *(1 / own[k] for k in kinds), *(slowest[k] / own[k] for k in kinds)])
    head = ["pictures/s a core", "of least time", "of median", "ratio of least", "of median"]
    frame.show(head, rows)
    print(f"largest difference between our uint8 pixels and Pillow's: {differ}")
    return {"seconds_a_picture": seconds, "largest_difference": differ}


def into_steps(count: int) -> dict[str, object]:
    """Prints what the loader of a run takes for each picture: JSON, tokens, JPEG, batch, and to the device."""
    import jax

    import llava_jax
    from llava_jax.config import LlavaConfig
    from llava_jax.data.loader import make_loader
    from llava_jax.text.tokenizer import Tokenizer

    config, size = LlavaConfig.v15_7b(), 16
    tokenizer = Tokenizer.load(Path(llava_jax.__file__).parent / "assets" / "tiny")
    rescale = np.float32(config.vision.pixels.rescale)
    mean, std = (np.asarray(v, np.float32) for v in config.vision.units)
    normalised = jax.jit(lambda x: (x.astype(np.float32) * rescale - mean) / std)
    with tempfile.TemporaryDirectory() as folder:
        for n, data in enumerate(photographs(8)):
            (Path(folder) / f"{n}.jpg").write_bytes(data)
        turns = [("human", "<image>\nwhat color is the bus"), ("gpt", "red " * 80)]
        records = [
            {
                "id": str(n),
                "image": f"{n % 8}.jpg",
                "conversations": [{"from": a, "value": b} for a, b in turns],
            }
            for n in range(size * count)
        ]
        path = Path(folder) / "mix.json"
        path.write_text(json.dumps(records))
        settings = {"path": str(path), "image_folder": folder, "batch_size": size, "cache_mb": 0}
        loader = make_loader(settings, config, tokenizer, say=False)
        normalised(next(loader)[0]["images"]).block_until_ready()
        begun, clock = time.process_time(), time.monotonic()
        for _ in range(count):
            batch = jax.device_put(next(loader)[0])
            normalised(batch["images"]).block_until_ready()
        spent, passed = time.process_time() - begun, time.monotonic() - clock
        loader.close()
    rate = size * count / spent
    print(
        f"load {os.getloadavg()[0]:.1f}: {rate:.0f} pictures/s a core into a step, all of it counted; "
        f"{size * count / passed:.0f} by the clock"
    )
    for stage, eaten in A100.items():
        print(f"{stage}: 8xA100 take {eaten:.0f} pictures/s: {eaten / rate:.2f} cores")
    return {"pictures_per_core_second": rate, "pictures_per_second": size * count / passed}


def reading(count: int) -> dict[str, object]:
    """Prints what opening a JSON of `count` records takes, twice, as a run with held-out data does."""
    from llava_jax.data.check import HELD_SIDE, open_data

    words = (
        "the a photo of man woman dog on street red near with two people what color is this".split()
    )
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mix.json"
        drawn = []
        for _ in range(2000):
            turns = []
            for _ in range(max(1, min(20, int(rng.expovariate(1 / 5))))):
                for who, many in (("human", 9), ("gpt", rng.choice([1, 2, 4, 20, 60, 90]))):
                    turns.append({"from": who, "value": " ".join(rng.choices(words, k=many))})
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            drawn.append(json.dumps(turns))
        with path.open("w") as file:
            for i in range(count):
                head = f'{{"id": "{i:012}", "image": "{i % 1000}.jpg", "conversations": '
                file.write(("," if i else "[") + head + rng.choice(drawn) + "}")
            file.write("]")
        for i in range(min(count, 1000)):
            (Path(folder) / f"{i}.jpg").touch()
        settings = {"path": str(path), "image_folder": folder, "holdout": 0.01}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.process_time()
        data = open_data(settings, say=False)
        first = time.process_time() - begun
        held = open_data({**settings, **HELD_SIDE}, say=False)
        second = time.process_time() - begun - first
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"{len(data) + len(held):,} records, {path.stat().st_size / 1e9:.2f} GB: {first:.0f} s of "
            f"processor to the first step, {second:.1f} s for the held-out side; "
            f"{(peak - before) / 1e3:.0f} MB added"
        )
    return {"first_cpu_seconds": first, "held_out_cpu_seconds": second, "added_kb": peak - before}


def main(name: str, words: list[str]) -> int:
    """Prints what the options ask for."""
    parser = frame.parser(__doc__)
    parser.add_argument("--count", type=int, default=16, help="pictures")
    parser.add_argument("--records", type=int, default=0, help="read a JSON of so many instead")
    parser.add_argument("--batches", type=int, default=0, help="make so many of a run's instead")
    args = parser.parse_args(words)
    frame.pin(args.threads)
    if args.records:
        found = reading(args.records)
    elif args.batches:
        found = into_steps(args.batches)
    else:
        found = pictures(args.count, args.repeats)
    frame.record(name, args, **found)
    return 0
