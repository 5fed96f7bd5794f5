"""Every value of every JSON file of a checkpoint, of a wrong type: it works, or the file is named."""

import copy
import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from llava_jax.convert import Options, Target, convert, open_source
from llava_jax.errors import LlavaError
from llava_jax.text.vocabulary import load_fitting
from tests.convert import tiny

WRONG = (None, "", "x", -1, 0, 10**400, 1e300, [], [[]], {}, {"": {}}, float("nan"), True, "\ud800")
KINDS = ("hf", "original", "jax", "peft", "joined", "fast")
SAMPLE = 25  # of each kind; all of them by hand: thousands


def make(kind: str, folder: Path) -> tuple[Path, Options]:
    """(a tiny checkpoint, how to open it)."""
    tokenizer = tiny.tokenizer(folder / "tokenizer")
    added = {"<image>": 320, "<pad>": 321}
    (tokenizer / "added_tokens.json").write_text(json.dumps(added))
    source = tiny.save(folder / "first", "jax", tiny.TEXT, tokenizer=tokenizer)
    if kind == "joined":
        lm, clip = tiny.language_model(folder / "lm"), tiny.clip(folder / "clip")
        clip.rename(lm / "clip")
        return lm, Options(vision_tower=lm / "clip")
    if kind == "peft":
        base = tiny.save(folder / "base", "hf", tiny.ORIGINAL)
        adapted = tiny.save(folder / "adapted", "jax", tiny.lora())
        convert(adapted, folder / "a", Target("peft"), Options(base=base))
        return folder / "a", Options(base=base, merge=True)
    for i, to in enumerate({"fast": ["hf"]}.get(kind, ["hf", "original", kind])):
        convert(source, folder / f"a{i}", Target(to))
        source = folder / f"a{i}"
    if kind == "fast":  # what transformers 5 saves
        (source / "tokenizer.model").unlink()
    return source, Options()


def places(data, at=()):
    """The path to every value in some JSON, long lists and objects by their ends."""
    yield at
    items = list(
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in items if len(items) < 30 else items[:2] + items[-2:]:
        yield from places(value, (*at, key))


def mutations(folder: Path):
    """(file, its text with one value replaced, words about it)."""
    for path in sorted(folder.rglob("*.json")):
        data = json.loads(path.read_text("utf-8"))
        for at in places(data):
            for value in WRONG:
                changed = copy.deepcopy(data)
                if not at:
                    changed = value
                else:
                    inner = changed
                    for key in at[:-1]:
                        inner = inner[key]
                    inner[at[-1]] = value
                yield path, lambda c=changed: json.dumps(c), f"{path.name} {at} {str(value)[:20]!r}"


def attempt(source: Path, options: Options, out: Path, to: str) -> None:
    """Converts, and loads the tokenizer. Raises AssertionError for a parameter that is NaN."""
    opened = convert(source, out, Target(to), options)
    if opened.tokenizer:
        load_fitting(opened.tokenizer, opened.config.language.vocab_size, source)
    for name, leaf in open_source(out).leaves.items():
        assert all(np.isfinite(part.read()).all() for part in leaf.parts), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_of_a_wrong_type(kind, tmp_path):
    folder, options = make(kind, tmp_path)
    found = list(mutations(folder))
    rng = random.Random(0)
    wrong = []
    for n, (path, text, said) in enumerate(rng.sample(found, min(SAMPLE, len(found)))):
        before = path.read_bytes()
        path.write_text(text())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                attempt(
                    folder, options, tmp_path / f"out{n}", rng.choice(["hf", "original", "jax"])
                )
        except LlavaError as error:
            line = str(error)
            if path.stem.partition(".")[0] not in line and str(folder) not in line:
                wrong.append(f"{said}: does not name the file: {line}")
        except Exception as error:
            wrong.append(f"{said}: {type(error).__name__}: {error}"[:300])
        finally:
            path.write_bytes(before)
    assert not wrong, "\n".join(wrong)
