"""The user's view of a model: load it, show it images, ask it things.

    import llava_jax
    model = llava_jax.load("llava-hf/llava-1.5-7b-hf")
    print(model.generate("What is this?", "cat.jpg").text)

A Request becomes an Example (llava_jax.text.prompt), its images become pixels
(llava_jax.images.pixels), and the generator answers it.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Generator as GeneratorType
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llava_jax.batch import check_prompt
from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError, LlavaError, PromptError
from llava_jax.generate import Decoding, Detokenizer, Generator, Output
from llava_jax.generate.request import Image, Messages, Reply, Request, image_list
from llava_jax.images.decode import DEFAULT_LIMITS, Limits
from llava_jax.images.pixels import pixels_of
from llava_jax.progress import progress as progress_bar
from llava_jax.text.conversation import find_template
from llava_jax.text.example import Example
from llava_jax.text.prompt import build_prompt
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.vocabulary import fitted, load_fitting

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llava_jax.convert import Checkpoint

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
SECONDS_PER_PIECE = 0.05
"""What a stream aims at, by more or fewer tokens per step of the model."""


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    base: str | Path | None = None,
    allow_pickle: bool = False,
    vision_tower: str | Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
    template: str | None = None,
) -> LlavaModel:
    """Loads a model: a checkpoint folder of any supported layout, a hub id, or "tiny".

    dtype: "float32" or "bfloat16", of parameters and activations. None is float32 on CPU, where
    bfloat16 is 20 times slower, and bfloat16 elsewhere.
    mesh: spreads the model over devices. base: what a LoRA or projector checkpoint belongs to.
    allow_pickle: read `.bin` files (as weights only). limits: of the images it may be shown.
    template: the conversation template, a key of llava_jax.text.conversation.TEMPLATES, in place of
    the one that the checkpoint's files say.
    "tiny" is the small checkpoint that comes with this package: it knows coloured shapes.
    Raises WeightError or ConfigError, naming the file or key.
    """
    from jax.sharding import Mesh

    from llava_jax.convert import load_checkpoint

    for name, value, kind in (
        ("path", path, str | os.PathLike),
        ("mesh", mesh, Mesh | None),
        ("limits", limits, Limits),
    ):
        if not isinstance(value, kind):
            raise ConfigError(f"{name} is {value!r}, an object of type {type(value).__name__}")
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown", fix=f"one of {', '.join(DTYPES)}")
    checkpoint = load_checkpoint(
        path,
        base=base,
        vision_tower=vision_tower,
        allow_pickle=allow_pickle,
        dtype=DTYPES[dtype],
        mesh=mesh,
        need_tokenizer=True,
        template=template,
    )
    config = checkpoint.config
    return LlavaModel(
        config,
        checkpoint.params,
        load_fitting(checkpoint.tokenizer, config.language.vocab_size, path),
        mesh=mesh,
        source=checkpoint,
        consume=True,
        limits=limits,
    )


class LlavaModel:
    """A model with its tokenizer.

    config, params: as in llava_jax.llava (flat names, stacked layers). source: the checkpoint that
    the parameters are from, if any; `save` writes what else it holds. consume: see Generator.
    limits: what images may be, llava_jax.images.decode.Limits.
    generator: the compiled part, for those who have token ids and pixels already.

    Raises ConfigError when the tokenizer has tokens that the model lacks.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        mesh: Mesh | None = None,
        source: Checkpoint | None = None,
        consume: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ):
        tokenizer = fitted(tokenizer, config.language.vocab_size)
        ends = tuple(dict.fromkeys((*config.language.eos_ids, tokenizer.eos_id)))
        self.config, self.tokenizer, self.limits = config, tokenizer, limits
        self.generator = Generator(config, params, mesh=mesh, consume=consume, eos_ids=ends)
        self._source = replace(source, params={}) if source else None

    # Asking --------------------------------------------------------------------------------------

    def generate(self, messages: Messages, images: Any = None, **settings) -> Reply:
        """Answers `messages` about `images` (one or a list). `settings` are fields of Request.

        Raises PromptError, ImageError or ConfigError for what cannot be asked.
        """
        request = Request.of(messages, images, settings)
        return self._answer([request], [self.with_pixels(self.example(request))])[0]

    def stream(self, messages: Messages, images: Any = None, **settings) -> Stream:
        """Like `generate`, but iterates over pieces of the text as they come."""
        request = Request.of(messages, images, settings)
        return Stream(self, request, self.with_pixels(self.example(request)))

    def generate_batch(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int = 16,
        progress: bool | Callable[[int, int], None] = False,
        on_error: str = "raise",
    ) -> list[Reply]:
        """Answers many requests, batched by like lengths; replies come in the requests' order.

        progress: True for a bar, or a function of (answered, all). on_error: "raise", or "reply" for
        a Reply with finish_reason "error" in place of what cannot be asked.
        Every reply is the one `generate` gives. Raises as `generate` does.
        """
        if on_error not in ("raise", "reply"):
            raise ConfigError(f"on_error {on_error!r} is unknown", fix="use raise or reply")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}, not a whole number of at least 1")
        if isinstance(requests, str | Request | Mapping) or not isinstance(requests, Iterable):
            raise PromptError("requests must be a list of Request", fix="generate asks one")
        requests = list(requests)

        def attempt(make: Callable[[Any], Example], what: Any) -> Example | Reply:
            try:
                return make(what)
            except LlavaError as error:
                if on_error == "raise":
                    raise
                return Reply("", (), "error", error=str(error))

        replies: list[Any] = [attempt(self.example, request) for request in requests]
        order = [i for i, example in enumerate(replies) if isinstance(example, Example)]
        order.sort(key=lambda i: (len(replies[i].images), len(replies[i].ids)))
        done, total = len(requests) - len(order), len(requests)
        bar = progress_bar(total, "answers", "answer", quiet=progress is not True, initial=done)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            for i in part:  # the pixels of one batch at a time are in memory
                replies[i] = attempt(self.with_pixels, replies[i])
            ready = [i for i in part if isinstance(replies[i], Example)]
            answered = self._answer([requests[i] for i in ready], [replies[i] for i in ready])
            for i, reply in zip(ready, answered):
                replies[i] = reply
            done += len(part)
            bar.update(len(part))
            if callable(progress):
                progress(done, total)
        bar.close()
        return replies

    def chat(self, **settings) -> Conversation:
        """A conversation that remembers. `settings` are fields of Request, for every answer."""
        return Conversation(self, **settings)

    # Keeping -------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, to: str = "jax", overwrite: bool = False) -> Path:
        """Writes the model and its tokenizer to a folder: to "jax", "hf" or "original".

        overwrite: replace a checkpoint that is there.
        """
        from llava_jax.convert import Checkpoint, save_checkpoint

        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f"path is {path!r}, an object of type {type(path).__name__}")
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(folder)
            source = self._source or Checkpoint(self.config, {}, Path(folder))
            whole = replace(source, params=dict(self.generator.params()))
            return save_checkpoint(whole, path, to=to, overwrite=overwrite)

    # From a request to what the generator reads --------------------------------------------------

    def pixels(self, image: Image, *, name: str = "the image", exif: bool = False) -> np.ndarray:
        """What the tower sees of an image: uint8[S, S, 3] (float32 if it came normalised).

        exif: turn a photograph upright; the original does not, so that is the default.
        Raises ImageError.
        """
        return pixels_of(image, self.config, name=name, exif=exif, limits=self.limits)

    def example(self, request: Request) -> Example:
        """The prompt of a request as the template writes it; its images are as they were given."""
        if not isinstance(request, Request):
            kind = type(request).__name__
            raise PromptError(f"an object of type {kind} is not a Request", fix="Request(messages)")
        return build_prompt(
            request.message_list(),
            self.tokenizer,
            request.template or self.config.template,
            use_im_start_end=self.config.use_im_start_end,
        )

    def with_pixels(
        self, example: Example, made: Mapping[int, np.ndarray] | None = None
    ) -> Example:
        """The example with pixels for images; those in `made`, by id(), are pixels already.

        Raises ImageError, and PromptError for a prompt that cannot be answered.
        """
        pixels, several = [], len(example.images) > 1
        for i, image in enumerate(example.images, 1):
            name = f"image {i}" if several else "the image"
            known = (made or {}).get(id(image))
            pixels.append(self.pixels(image, name=name) if known is None else known)
        ready = replace(example, images=tuple(pixels))
        check_prompt(ready, self.config)
        return ready

    def _detokenizer(self, request: Request) -> Detokenizer:
        template = find_template(request.template or self.config.template)
        return Detokenizer(self.tokenizer, (*template.stop_strings, *request.stop))

    def _answer(self, requests: Sequence[Request], examples: Sequence[Example]) -> list[Reply]:
        """The replies to one batch."""
        if not requests:
            return []
        requests = [request.seeded() for request in requests]
        texts = [self._detokenizer(request) for request in requests]
        decoding = self.generator.start(examples, requests)
        while True:
            for row, text in enumerate(texts):
                text.push(decoding.ids[row][text.count :])
                if text.stopped:
                    decoding.end(row, keep=text.count)
            if not decoding.running:
                break
            decoding.advance()
        for text in texts:
            text.finish()
        return [_reply(*row) for row in zip(texts, decoding.outputs(), requests)]


class Stream:
    """One answer as it comes: iterate for pieces of text; `reply` is what there is so far.

    Closing it early, or leaving the loop, ends the answer with finish_reason "cancelled"; so does
    setting the event `cancelled`, from any thread or signal handler, at the model's next step.
    """

    def __init__(
        self, model: LlavaModel, request: Request, example: Example, after: Decoding | None = None
    ):
        self._text, self._request = model._detokenizer(request), request.seeded()
        # The first token is chosen here, so that what cannot be asked fails before any output.
        self.decoding = model.generator.start([example], self._request, after=after)
        self.cancelled = threading.Event()
        self.at_end: Callable[[], Any] = lambda: None
        self._finished = False
        self._pieces = self._run()

    @property
    def reply(self) -> Reply:
        """The answer so far; whole once the iteration has ended."""
        (output,) = self.decoding.outputs()
        reply = _reply(self._text, output, self._request)
        return reply if self._finished else replace(reply, finish_reason="cancelled")

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """Ends the answer here."""
        self._pieces.close()

    def _run(self) -> GeneratorType[str, None, None]:
        decoding, text, count = self.decoding, self._text, 2
        try:
            while True:
                piece = text.push(decoding.ids[0][text.count :])
                if text.stopped:
                    decoding.end(0, keep=text.count)
                if piece:
                    yield piece
                self._finished = not decoding.running
                if self._finished or self.cancelled.is_set():
                    break
                before = time.monotonic()
                decoding.advance(count)
                quick = time.monotonic() - before < SECONDS_PER_PIECE
                count = min(2 * count, 16) if quick else max(count // 2, 1)
            if piece := text.finish():
                yield piece
        finally:
            self.at_end()


class Conversation:
    """Turns that build on each other. `messages` is the record, and may be changed.

    The keys and values of what was already read are kept for the next turn.
    settings: fields of Request other than messages and images. exif: see LlavaModel.pixels.
    Raises ConfigError for a setting that does not exist or means nothing.
    """

    def __init__(self, model: LlavaModel, *, exif: bool = False, **settings):
        self.model, self.settings, self.exif = model, settings, exif
        Request.of("", (), settings)  # for its checks
        self.reset()

    def reset(self) -> None:
        """Forgets everything said and shown."""
        self.messages: list[dict[str, Any]] = []
        self._last: Decoding | None = None
        self._pixels: dict[int, np.ndarray] = {}  # by id(): the images in `messages` opened here

    @property
    def has_images(self) -> bool:
        """Whether an image was shown in it."""
        parts = (
            p for m in self.messages if not isinstance(m["content"], str) for p in m["content"]
        )
        return any(not isinstance(p, str) and p.get("type") != "text" for p in parts)

    def say(self, text: str, images: Any = None) -> Reply:
        """Asks, remembers question and answer, and returns the answer."""
        stream = self.stream(text, images)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, text: str, images: Any = None) -> Stream:
        """Like `say`, piece by piece. An answer that is closed early is remembered as far as it came.

        Raises as LlavaModel.generate does; the conversation is then as before.
        """
        shown = [self.model.pixels(image, exif=self.exif) for image in image_list(images)]
        content = [{"type": "image", "image": pixels} for pixels in shown]
        asked = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        request = Request([*self.messages, asked], **self.settings)
        made = self._pixels | {id(pixels): pixels for pixels in shown}
        example = self.model.with_pixels(self.model.example(request), made)
        last, self._last = self._last, None
        stream = Stream(self.model, request, example, last)

        def remember() -> None:
            if answer := stream.reply.text:  # a turn without one could not be written again
                self.messages += [asked, {"role": "assistant", "content": answer}]
                self._pixels = made
            self._last = stream.decoding

        stream.at_end = remember
        return stream


def _reply(text: Detokenizer, output: Output, request: Request) -> Reply:
    return Reply(
        text.text,
        output.ids,
        output.finish_reason,
        output.prompt_positions,
        output.logprobs,
        request.seed or 0,
    )
