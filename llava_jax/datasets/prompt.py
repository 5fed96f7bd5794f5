"""Which tokenizer, template and limits `llava-jax data check`, `stats` and `show` go by."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError
from llava_jax.processes import cores
from llava_jax.text.conversation import find_template
from llava_jax.text.sample import ExampleMaker
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.vocabulary import load_fitting


def prompt_of(args: argparse.Namespace) -> tuple[Tokenizer, LlavaConfig]:
    """(tokenizer, config) of --model: a checkpoint, or a tokenizer.model with LLaVA-1.5's config."""
    if args.model is None:
        note = "tokens of tiny, the small model that comes with llava_jax: --model names another"
        print(note, file=sys.stderr)
    model = args.model or "tiny"
    if model.endswith(".model") and Path(model).is_file():
        return Tokenizer.load(model), LlavaConfig.v15_7b()
    from llava_jax.convert import Options, open_source

    options = Options(
        base=args.base, vision_tower=args.vision_tower, allow_pickle=args.allow_pickle
    )
    source = open_source(model, options)
    rows = source.config.language.vocab_size
    return load_fitting(source.tokenizer, rows, model), source.config


def workers_of(args: argparse.Namespace) -> int:
    """How many processes --workers asks for; by default as many as there are cores."""
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers {args.workers} is not a number from 1")
    return args.workers or cores()


def maker_of(args: argparse.Namespace, tokenizer: Tokenizer, config: LlavaConfig) -> ExampleMaker:
    """What makes Examples of records by the options of the command line."""
    if args.max_length is not None and args.max_length < 1:
        raise ConfigError(f"--max-length {args.max_length} is not a number from 1")
    if args.version:  # as the original, ExampleMaker would take any name for vicuna_v1
        find_template(args.version)
    return ExampleMaker(
        tokenizer,
        version=args.version or config.template,
        max_length=args.max_length or config.max_length,
        image_tokens=config.image_tokens,
        turns=args.turns,
        compat=args.compat,
        use_im_start_end=config.use_im_start_end,
    )
