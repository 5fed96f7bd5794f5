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
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from llava_jax.batch import batch_bucket, check_prompt
from llava_jax.config import QUANTIZED, LlavaConfig, TokenBudget
from llava_jax.errors import ConfigError, LlavaError, PromptError
from llava_jax.generate import Detokenizer, Engine, Generator, Job
from llava_jax.generate import beam as search
from llava_jax.generate.adapters import Adapter
from llava_jax.generate.constrain import Grammars, schema_of
from llava_jax.generate.conversation import Conversation as Conversation
from llava_jax.generate.conversation import Stream as Stream
from llava_jax.generate.job import reply_of
from llava_jax.generate.many import answer_many
from llava_jax.generate.request import Image, Messages, Reply, Request
from llava_jax.images.decode import DEFAULT_LIMITS, Limits
from llava_jax.images.pixels import pixels_of
from llava_jax.progress import progress as progress_bar
from llava_jax.settings import LoadingSettings
from llava_jax.text.conversation import find_template
from llava_jax.text.example import Example
from llava_jax.text.prompt import build_prompt
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.vocabulary import fitted, load_fitting

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llava_jax.convert import Checkpoint

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
MOST_AT_ONCE = 256
"""Requests of a batch that are answered at once where nobody says how many."""


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
    quantize: str = "",
    image_aspect_ratio: str = "",
    image_tokens: int = 0,
    image_tokens_by: str = "visionzip",
    image_positions: str = "consecutive",
    adapters: Mapping[str, str | Path] | None = None,
) -> LlavaModel:
    """Loads a model: a checkpoint folder of any supported layout, a hub id, or "tiny".

    dtype: "float32" or "bfloat16", of parameters and activations. None is float32 on CPU, where
    bfloat16 is 20 times slower, and bfloat16 elsewhere.
    mesh: spreads the model over devices. base: what a LoRA or projector checkpoint belongs to.
    allow_pickle: read `.bin` files (as weights only). limits: of the images it may be shown.
    template: the conversation template, a key of llava_jax.text.conversation.TEMPLATES, in place of
    the one that the checkpoint's files say.
    quantize: "int8" or "nf4" (4 bits) holds the decoder's kernels in fewer bits, quantised as they are
    placed; such a model answers and is not saved.
    image_aspect_ratio: "pad" or "square" (cropped), how images become square, in place of what the files say.
    image_tokens: the decoder reads so many features of an image, by "visionzip", "divprune" or "pool", at
    "consecutive" or "original" positions (LoadingSettings); 0: all. Such a model is not saved either.
    adapters: LoRA adapters of this model, {name: folder}, that requests may name; they stay unmerged.
    "tiny" is the small checkpoint that comes with this package: it knows coloured shapes.
    Raises WeightError or ConfigError, naming the file or key.
    """
    from llava_jax.convert import load_checkpoint

    dtype = _checked(path, mesh, limits, dtype, quantize)
    given = LoadingSettings(
        image_aspect_ratio=image_aspect_ratio,
        image_tokens=image_tokens,
        image_tokens_by=image_tokens_by,
        image_positions=image_positions,
    )
    options = {"base": base, "vision_tower": vision_tower, "allow_pickle": allow_pickle}
    options |= {"dtype": DTYPES[dtype], "template": template}
    # Before minutes of reading.
    beside = _beside(path, adapters, options, given) if adapters else {}
    checkpoint = load_checkpoint(path, mesh=mesh, need_tokenizer=True, lazy=True, **options)
    config = replace(_as_given(checkpoint.config, given), quantize=quantize)
    return LlavaModel(
        config,
        checkpoint.params,
        load_fitting(checkpoint.tokenizer, config.language.vocab_size, path),
        mesh=mesh,
        source=checkpoint,
        consume=True,
        limits=limits,
        adapters=beside,
    )


def _checked(path: Any, mesh: Any, limits: Any, dtype: str | None, quantize: str) -> str:
    """The dtype, by device where there is none. Raises ConfigError for what `load` cannot take."""
    from jax.sharding import Mesh

    kinds = (str | os.PathLike, Mesh | None, Limits)
    for name, value, kind in zip(("path", "mesh", "limits"), (path, mesh, limits), kinds):
        if not isinstance(value, kind):
            raise ConfigError(f"{name} is {value!r}, an object of type {type(value).__name__}")
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    for name, value, known in (("dtype", dtype, DTYPES), ("quantize", quantize, QUANTIZED)):
        if value not in known:
            fix = f"one of {', '.join(filter(None, known))}"
            raise ConfigError(f"{name} {value!r} is unknown", fix=fix)
    return dtype


def _as_given(config: LlavaConfig, given: LoadingSettings) -> LlavaConfig:
    config = replace(
        config, image_aspect_ratio=given.image_aspect_ratio or config.image_aspect_ratio
    )
    if given.image_tokens in (0, config.image_features):
        return config
    budget = TokenBudget(given.image_tokens, given.image_tokens_by, given.image_positions)
    return replace(config, budget=budget)


def _beside(
    path: Any, adapters: Mapping[str, Any], options: dict[str, Any], given: LoadingSettings
) -> dict[str, Adapter]:
    """The adapters as the generator takes them. Raises WeightError or ConfigError."""
    from llava_jax.convert import Options, open_source
    from llava_jax.convert.beside import read_beside

    own = open_source(path, Options(**options))
    if own.config.lora:
        raise ConfigError(f"{path} is an adapter itself", fix="load its base with both as adapters")
    own = replace(own, config=replace(_as_given(own.config, given), budget=None))
    return {
        name: Adapter(*read_beside(folder, path, own, Options(**options)))
        for name, folder in adapters.items()
    }


class LlavaModel:
    """A model with its tokenizer.

    config, params: as in llava_jax.llava (flat names, stacked layers). source: the checkpoint that
    the parameters are from, if any; `save` writes what else it holds. consume: see Generator.
    limits: what images may be, llava_jax.images.decode.Limits.
    adapters: beside the model, by name. generator: the compiled part, for those who have token ids and
    pixels already.

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
        adapters: Mapping[str, Adapter] | None = None,
    ):
        tokenizer = fitted(tokenizer, config.language.vocab_size)
        ends = tuple(dict.fromkeys((*config.language.eos_ids, tokenizer.eos_id)))
        self.config, self.tokenizer, self.limits = config, tokenizer, limits
        self.generator = Generator(
            config, params, mesh=mesh, consume=consume, eos_ids=ends, adapters=adapters
        )
        self._source = replace(source, params={}) if source else None
        self._engines: dict[bool, Engine] = {}  # the one of a single slot, and one of several

    # Asking --------------------------------------------------------------------------------------

    def generate(self, messages: Messages, images: Any = None, **settings) -> Reply:
        """Answers `messages` about `images` (one or a list). `settings`: as for `generate_n`.

        Raises PromptError, ImageError or ConfigError for what cannot be asked.
        """
        return self.generate_n(messages, images, n=1, **settings)[0]

    def generate_n(
        self,
        messages: Messages,
        images: Any = None,
        *,
        n: int,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        **settings,
    ) -> list[Reply]:
        """n answers: with the seed and those after it, or the n best of `num_beams` by beam search.

        length_penalty: scores of beams are log-probabilities over length to this power. settings:
        fields of Request. Raises as `generate` does.
        """
        request = Request.of(messages, images, settings).seeded()
        search.check(request, n, num_beams, length_penalty)
        ready, seed = self.with_pixels(self.example(request)), (request.seed or 0) % 2**32
        if num_beams > 1:
            slots = batch_bucket(num_beams, self.generator.row_multiple)
            room = self.generator.slot_length(slots, self._room(ready, request))
            engine = Engine(self.generator, slots, capacity=room, keep_logits=True)
            make = lambda: self.job(request, ready)  # noqa: E731
            return [reply_of(j) for j in search.run(engine, make, num_beams, length_penalty)[:n]]
        jobs = [
            self.job(request if not i else replace(request, seed=seed + i), ready) for i in range(n)
        ]
        engine = self.engine(n, self._room(ready, request))
        engine.run([engine.submit(job) for job in jobs])
        return [reply_of(job) for job in jobs]

    def stream(self, messages: Messages, images: Any = None, **settings) -> Stream:
        """Like `generate`, but iterates over pieces of the text as they come."""
        request = Request.of(messages, images, settings)
        return Stream(self, request, self.with_pixels(self.example(request)))

    def generate_batch(
        self,
        requests: Iterable[Request],
        *,
        batch_size: int | None = 16,
        progress: bool | Callable[[int, int], None] = False,
        on_error: str = "raise",
    ) -> list[Reply]:
        """Answers many requests, up to `batch_size` at a time; replies come in the requests' order.

        batch_size: None for as many, up to 256, as have room in a small part of the device's memory.
        progress: True for a bar, or a function of (answered, all). on_error: "raise", or "reply" for
        a Reply with finish_reason "error" in place of what cannot be asked.
        Every reply is the one `generate` gives. Raises as `generate` does; the others are then not answered.
        """
        if on_error not in ("raise", "reply"):
            raise ConfigError(f"on_error {on_error!r} is unknown", fix="use raise or reply")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigError(f"batch_size is {batch_size!r}, not a whole number of at least 1")
        if isinstance(requests, str | Request | Mapping) or not isinstance(requests, Iterable):
            raise PromptError("requests must be a list of Request", fix="generate asks one")
        requests = list(requests)

        def attempt(make: Callable[[Any], Any], what: Any) -> Any:
            try:
                return make(what)
            except LlavaError as error:
                if on_error == "raise":
                    raise
                return Reply("", (), "error", error=str(error))

        replies: list[Any] = [attempt(self.example, request) for request in requests]
        order = [i for i, example in enumerate(replies) if isinstance(example, Example)]
        order.sort(key=lambda i: (len(replies[i].images), len(replies[i].ids)))
        done, total = 0, len(requests)

        def tell(more: int) -> None:
            nonlocal done
            done += more
            bar.update(more)
            if more and callable(progress):
                progress(done, total)

        def make(i: int) -> Any:
            request = requests[i].seeded()
            return attempt(lambda example: self.job(request, self.with_pixels(example)), replies[i])

        def take(ended: Mapping[int, Any]) -> None:
            for i, made in ended.items():
                replies[i] = attempt(reply_of, made) if isinstance(made, Job) else made
            tell(len(ended))

        with closing(progress_bar(total, "answers", "answer", quiet=progress is not True)) as bar:
            tell(total - len(order))
            if order:
                room = max(self._room(replies[i], requests[i]) for i in order)
                most = min(batch_size or MOST_AT_ONCE, len(order))
                fitting = most if batch_size else self.generator.slots_that_fit(most, room)
                answer_many(self.engine(fitting, room), order, make, take)
        return replies

    def chat(self, **settings) -> Conversation:
        """A conversation that remembers. `settings` are fields of Request, for every answer."""
        return Conversation(self, **settings)

    def drop_params(self) -> None:
        """Gives the memory of the parameters and of the caches back, until `generator.set_params`."""
        self._engines.clear()
        self.generator.drop_params()

    # Keeping -------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, to: str = "jax", overwrite: bool = False) -> Path:
        """Writes the model and its tokenizer to a folder: to "jax", "hf" or "original".

        overwrite: replace a checkpoint that is there.
        """
        from llava_jax.convert import Checkpoint, save_checkpoint

        if not isinstance(path, str | os.PathLike):
            raise ConfigError(f"path is {path!r}, an object of type {type(path).__name__}")
        if self.config.quantize:
            what = f"a model held in {self.config.quantize} cannot be saved"
            raise ConfigError(what, fix="load it without quantize")
        if self.config.budget:
            what = (
                f"a model that reads {self.config.image_tokens} features of an image is not saved"
            )
            raise ConfigError(what, fix="load it without image_tokens")
        with tempfile.TemporaryDirectory() as folder:
            source = self._source
            if source is None:
                self.tokenizer.save(folder)
                source = Checkpoint(self.config, {}, Path(folder))
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
        """The prompt of a request as the template writes it; its images are as they were given.

        Raises PromptError, and ConfigError for an adapter that is not here.
        """
        if not isinstance(request, Request):
            kind = type(request).__name__
            raise PromptError(f"an object of type {kind} is not a Request", fix="Request(messages)")
        self.generator.adapters.index(request.adapter)
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

    def job(self, request: Request, example: Example, **more: Any) -> Job:
        """A request, with its example with pixels, as the engine takes it. more: fields of Job.

        Raises ConfigError for a schema that cannot be followed, and a token that is not in the vocabulary.
        """
        vocab = self.config.language.vocab_size
        if (wrong := next((t for t in request.logit_bias if t >= vocab), None)) is not None:
            raise ConfigError(f"logit_bias {wrong}: the vocabulary has {vocab} tokens")
        template = find_template(request.template or self.config.template)
        schema, stops = schema_of(request.response_format), (*template.stop_strings, *request.stop)
        return Job(
            example,
            request,
            # Of JSON, a template's stop string may be a part.
            Detokenizer(self.tokenizer, stops if schema is None else ()),
            constraint=None if schema is None else self.grammars.constraint(schema),
            bias=request.logit_bias,
            tops_wanted=request.top_logprobs,
            adapter=request.adapter,
            **more,
        )

    @cached_property
    def grammars(self) -> Grammars:
        """What makes constraints for answers in JSON."""
        vocab, ends = self.config.language.vocab_size, self.generator.eos_ids
        return Grammars(self.tokenizer, vocab, ends)

    def engine(self, slots: int = 1, room: int | None = None) -> Engine:
        """The engine that answers here, with so many slots of at least `room` positions (None: all).

        It keeps what it has read, for prompts that begin alike.
        """
        slots = batch_bucket(slots, self.generator.row_multiple)
        alone, context = slots == 1, self.config.language.max_positions
        known = self._engines.get(alone)
        if known is None or known.slots != slots or known.context < min(room or context, context):
            known = None  # with the next line, its memory is free before the new one takes any
            self._engines.pop(alone, None)
            room = self.generator.slot_length(slots, room)
            known = self._engines[alone] = Engine(self.generator, slots, capacity=room)
        return known

    def _room(self, example: Example, request: Request) -> int:
        return example.length(self.config.image_tokens) + int(request.max_new_tokens)
