"""The user's view of a model: load it, show it images, ask it things.

    import llava_jax
    model = llava_jax.load("llava-hf/llava-1.5-7b-hf")
    print(model.generate("What is this?", "cat.jpg").text)

Every image passes llava_jax.images.decode; every prompt is laid out by llava_jax.text.prompt.
"""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as GeneratorType
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError, LlavaError, PromptError
from llava_jax.generate import Answer, Decoding, Generator, Output, Sampling
from llava_jax.generate.request import (
    Image,
    Messages,
    Reply,
    Request,
    image_list,
    with_images,
)
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


class _Ready(NamedTuple):
    """A request and its prompt, whose images are not opened yet.

    request: with its seed drawn and the template's stop strings among its own.
    """

    request: Request
    prompt: Example


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
    from llava_jax.convert import load_checkpoint

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
    rows = checkpoint.config.language.vocab_size
    tokenizer = load_fitting(checkpoint.tokenizer, rows, path)
    return LlavaModel(
        checkpoint.config,
        checkpoint.params,
        tokenizer,
        mesh=mesh,
        source=checkpoint,
        consume=True,
        limits=limits,
    )


class LlavaModel:
    """A model with its tokenizer.

    config, params: as in llava_jax.llava (flat names, stacked layers). source: the checkpoint that
    the parameters are from, if any; `save` keeps what else it holds. consume: see Generator.
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
        stream = self.stream(messages, images, **settings)
        stream.run()
        return stream.reply

    def stream(self, messages: Messages, images: Any = None, **settings) -> Stream:
        """Like `generate`, but iterates over pieces of the text as they come."""
        return Stream(self, self._prepare(Request.of(messages, images, settings)))

    def generate_batch(
        self,
        requests: Sequence[Request],
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
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, not at least 1")
        if isinstance(requests, str | Request):
            raise PromptError("requests must be a list of Request", fix="generate asks one")
        replies: list[Reply | None] = [None] * len(requests)
        ready: dict[int, _Ready] = {}
        for i, request in enumerate(requests):
            try:
                ready[i] = self._prepare(request)
            except LlavaError as error:
                replies[i] = _refused(error, on_error)
        order = sorted(ready, key=lambda i: (len(ready[i].prompt.images), len(ready[i].prompt.ids)))
        report, close = _progress(progress, len(requests))
        report(len(requests) - len(ready))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            for i, reply in self._answer({i: ready[i] for i in part}, on_error).items():
                replies[i] = reply
            report(len(part))
        close()
        return [reply for reply in replies if reply is not None]

    def chat(self, **settings) -> Conversation:
        """A conversation that remembers. `settings` are fields of Request, for every answer."""
        return Conversation(self, **settings)

    # Keeping -------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, to: str = "jax", overwrite: bool = False) -> Path:
        """Writes the model and its tokenizer to a folder: to "jax", "hf" or "original"."""
        from llava_jax.convert import Checkpoint, save_checkpoint

        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save(folder)
            source = self._source or Checkpoint(self.config, {}, Path(folder))
            whole = replace(source, params=dict(self.generator.params()))
            return save_checkpoint(whole, path, to=to, overwrite=overwrite)

    # Preparing -----------------------------------------------------------------------------------

    def pixels(self, image: Image, *, name: str = "the image", exif: bool = False) -> np.ndarray:
        """What the tower sees of an image: uint8[S, S, 3] (float32 if it came normalised).

        exif: turn a photograph upright; the original does not, so that is the default.
        Raises ImageError.
        """
        return pixels_of(image, self.config, name=name, exif=exif, limits=self.limits)

    def _prepare(self, request: Request) -> _Ready:
        if not isinstance(request, Request):
            raise PromptError(f"a {type(request).__name__} is no Request", fix="Request(messages)")
        sampling = sampling_of(request)
        prompt = build_prompt(
            with_images(request.messages, request.images, request.system),
            self.tokenizer,
            request.template or self.config.template,
            use_im_start_end=self.config.use_im_start_end,
        )
        template = find_template(request.template or self.config.template)
        stop = tuple(dict.fromkeys((*template.stop_strings, *request.stop)))
        return _Ready(replace(request, seed=sampling.seed, stop=stop), prompt)

    def _open(self, prompt: Example) -> Example:
        """The prompt with pixels for its images."""
        count = len(prompt.images)
        names = [f"image {i + 1}" if count > 1 else "the image" for i in range(count)]
        pixels = (self.pixels(i, name=n) for i, n in zip(prompt.images, names))
        return replace(prompt, images=tuple(pixels))

    def _answer(self, ready: dict[int, _Ready], on_error: str) -> dict[int, Reply]:
        """One batch. Keys are the requests' places."""
        replies, prompts = {}, {}
        for i, one in ready.items():
            try:
                prompt = self._open(one.prompt)
                self.generator.check(prompt)
                prompts[i] = prompt
            except LlavaError as error:
                replies[i] = _refused(error, on_error)
        rows = list(prompts)
        if not rows:
            return replies
        answers = [Answer(self.tokenizer, ready[i].request.stop) for i in rows]

        def stop(row: int, ids: list[int]) -> int | None:
            answers[row].push(ids[answers[row].count :])
            return answers[row].count if answers[row].stopped else None

        watched = any(answer.watches(self.generator.eos_ids) for answer in answers)
        outputs = self.generator.generate(
            [prompts[i] for i in rows],
            [sampling_of(ready[i].request) for i in rows],
            stop=stop if watched else None,
        )
        for i, answer, output in zip(rows, answers, outputs):
            answer.push(output.ids[answer.count :])
            answer.finish()
            replies[i] = _reply(answer, output, ready[i].request)
        return replies


class Stream:
    """One answer as it comes: iterate for pieces of text; `reply` is what there is so far.

    Closing it early, or leaving the loop, ends the answer with finish_reason "cancelled"; so does
    setting the event `cancelled`, from any thread or signal handler, at the model's next step.
    """

    def __init__(self, model: LlavaModel, ready: _Ready, after: Decoding | None = None):
        self._answer, self._request = Answer(model.tokenizer, ready.request.stop), ready.request
        # The first token is chosen here, so that what cannot be asked fails before any output.
        prompt, sampling = model._open(ready.prompt), sampling_of(ready.request)
        self.decoding = model.generator.start([prompt], sampling, after=after)
        self.cancelled = threading.Event()
        self._finished = False
        self._pieces = self._run(pause=0.05)

    @property
    def reply(self) -> Reply:
        """The answer so far; whole once the iteration has ended."""
        (output,) = self.decoding.outputs()
        reply = _reply(self._answer, output, self._request)
        return reply if self._finished else replace(reply, finish_reason="cancelled")

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def close(self) -> None:
        """Ends the answer here."""
        self._pieces.close()

    def run(self) -> None:
        """Answers to the end, in steps as large as possible."""
        self._pieces = self._run(pause=None)
        for _ in self._pieces:
            pass

    def _run(self, pause: float | None) -> GeneratorType[str, None, None]:
        """pause: seconds between pieces to aim at; few tokens a step on a slow machine."""
        decoding, answer = self.decoding, self._answer
        count = 2
        while True:
            piece = answer.push(decoding.ids[0][answer.count :])
            if answer.stopped:
                decoding.end(0, keep=answer.count)
            if piece:
                yield piece
            if not decoding.running:
                self._finished = True
            if self._finished or self.cancelled.is_set():
                break
            before = time.monotonic()
            decoding.advance() if pause is None else decoding.advance(count)
            if pause is not None:
                quick = time.monotonic() - before < pause
                count = min(2 * count, 16) if quick else max(count // 2, 1)
        piece = answer.finish()
        if piece:
            yield piece


class Conversation:
    """Turns that build on each other. `messages` is the record, and may be changed.

    The keys and values of what was already read are kept for the next turn.
    settings: fields of Request other than messages and images. exif: see LlavaModel.pixels.
    Raises ConfigError for a setting that does not exist or means nothing.
    """

    def __init__(self, model: LlavaModel, *, exif: bool = False, **settings):
        self.model, self.settings, self.exif = model, settings, exif
        self.messages: list[dict[str, Any]] = []
        self._last: Decoding | None = None
        sampling_of(Request.of("", (), settings))  # for its checks

    def reset(self) -> None:
        """Forgets everything said and shown."""
        self.messages, self._last = [], None

    def say(self, text: str, images: Any = None) -> Reply:
        """Asks, remembers question and answer, and returns the answer."""
        stream = self.stream(text, images)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, text: str, images: Any = None) -> _Turn:
        """Like `say`, piece by piece. An answer that is closed early is remembered as far as it came.

        Raises as LlavaModel.generate does; the conversation is then as before.
        """
        # Opened once: what comes out of `pixels` is left as it is when it goes in again.
        shown = [
            {"type": "image", "image": self.model.pixels(image, exif=self.exif)}
            for image in image_list(images)
        ]
        asked = {"role": "user", "content": [*shown, {"type": "text", "text": text}]}
        ready = self.model._prepare(Request([*self.messages, asked], **self.settings))
        return _Turn(self, asked, ready)


class _Turn(Stream):
    """The answer to one turn; the conversation remembers it when it ends."""

    def __init__(self, conversation: Conversation, asked: dict[str, Any], ready: _Ready):
        last, conversation._last = conversation._last, None
        super().__init__(conversation.model, ready, last)
        self._conversation, self._asked = conversation, asked

    def _run(self, pause: float | None) -> GeneratorType[str, None, None]:
        conversation, kept = self._conversation, self.decoding
        try:
            yield from super()._run(pause)
        except KeyboardInterrupt:
            kept = None  # the cache may have been handed over and not taken back
            raise
        finally:
            if self.reply.text:  # a turn without an answer could not be laid out again
                said = {"role": "assistant", "content": self.reply.text}
                conversation.messages += [self._asked, said]
            conversation._last = kept


# Small parts --------------------------------------------------------------------------------------


def sampling_of(request: Request) -> Sampling:
    """How the request's answer is chosen, its seed drawn. Raises ConfigError for a senseless value."""
    seed = request.seed
    if seed is None:
        seed = secrets.randbits(32) if request.temperature else 0
    return Sampling(request.temperature, request.top_k, request.top_p, seed, request.max_new_tokens)


def _reply(answer: Answer, output: Output, request: Request) -> Reply:
    return Reply(
        answer.text,
        output.ids,
        output.finish_reason,
        output.prompt_positions,
        output.logprobs,
        request.seed or 0,
    )


def _refused(error: LlavaError, on_error: str) -> Reply:
    if on_error == "raise":
        raise error
    return Reply("", (), "error", error=str(error))


def _progress(progress: bool | Callable[[int, int], None], total: int):
    """(function that takes how many more are answered, function that ends the display)."""
    if not callable(progress):
        bar = progress_bar(total, "answers", "answer", quiet=not progress)
        return bar.update, bar.close
    done = 0

    def report(more: int) -> None:
        nonlocal done
        done += more
        progress(done, total)

    return report, lambda: None
