"""tokenizer.json made from tokenizer.model, with the ids of the original's tokenizer.

transformers 5 makes one itself where a folder has none, incorrectly: it ranks the merges by id
instead of score and drops the leading space. So exports carry this one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path

from llava_jax.config import LlavaConfig
from llava_jax.errors import LlavaError
from llava_jax.util import write_text

log = logging.getLogger(__name__)

SPACE = "▁"
# What tokenizer_config.json says beside it, so that it is taken as it is.
SETTINGS = {
    # As a LlamaTokenizer, transformers 5 would rebuild the pipeline by its own rules.
    "tokenizer_class": "PreTrainedTokenizerFast",
    # Whose default in transformers 4 adds token_type_ids, which LLaVA's generate refuses.
    "model_input_names": ["input_ids", "attention_mask"],
}
_PROBES = (
    "A chat between a curious user and an assistant. USER: What is  this?\n  1 2 ASSISTANT:",
    " leading", "  two", "trailing  ", "é 図 🙂 \t x", "", " ", "def f(x):\n    return x**2",
)  # fmt: skip


def write(
    folder: Path, config: LlavaConfig, added: Mapping[str, int], plain: Collection[str] = ()
) -> bool:
    """Writes tokenizer.json beside the tokenizer.model of `folder`; False if that cannot be done.

    added: {token: id} beside the model's own pieces. plain: those of them that are not special.
    It is written only if it gives the ids of our own tokenizer for a few hard texts.
    """
    model = folder / "tokenizer.model"
    if not model.is_file():
        return False
    fast = build(model, config.tokenizer_legacy, added, plain)
    if fast is None or not _agrees(fast, folder, config):
        log.warning("no tokenizer.json written: it would not give the ids of %s", model.name)
        return False
    data = for_old_versions(json.loads(fast.to_str()))
    text = json.dumps(data, indent=1, ensure_ascii=False)
    write_text(folder / "tokenizer.json", text + "\n")
    return True


def for_old_versions(data: dict) -> dict:
    """tokenizer.json in the spelling of tokenizers 0.15 (transformers 4.37), which new ones read too."""
    model = data["model"]
    model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    for step in (data["pre_tokenizer"] or {}).get("pretokenizers", ()):
        step["add_prefix_space"] = step["prepend_scheme"] != "never"
    return data


def build(model: Path, legacy: bool, added: Mapping[str, int], plain: Collection[str] = ()):
    """A tokenizers.Tokenizer of a sentencepiece BPE model; None for other kinds of model."""
    import sentencepiece
    import tokenizers

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    size = sp.get_piece_size()
    added = {token: number for token, number in added.items() if number >= size}
    vocab = {sp.id_to_piece(i): i for i in range(size)}
    merges = _merges(sp, vocab)
    if not merges:
        return None
    for number in range(size, max([size, *added.values()])):
        if number not in added.values():  # ids without a token: tokenizers wants no gaps
            vocab[f"<unused_{number}>"] = number
    unknown = sp.id_to_piece(sp.unk_id())
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    _pipeline(fast, legacy)
    basic = [sp.id_to_piece(i) for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    for token in [*basic, *sorted(added, key=added.__getitem__)]:
        entry = tokenizers.AddedToken(token, normalized=False, special=token not in plain)
        add = fast.add_special_tokens if entry.special else fast.add_tokens
        add([entry])
    bos = sp.id_to_piece(sp.bos_id())
    fast.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, sp.bos_id())],
    )
    if any(fast.token_to_id(t) != n for t, n in added.items()):
        return None
    return fast


def _merges(sp, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that merge into each piece, pieces by falling score: sentencepiece's own order."""
    found = []
    for piece, number in vocab.items():
        if sp.is_byte(number) or sp.is_control(number) or sp.is_unknown(number):
            continue
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        pairs.sort(key=lambda p: (vocab[p[0]], vocab[p[1]]))
        found += [(-sp.get_score(number), number, i, pair) for i, pair in enumerate(pairs)]
    return [pair for *_, pair in sorted(found)]


def _pipeline(fast, legacy: bool) -> None:
    """Spaces become SPACE, and one more is put before the text: with `legacy` also after every
    special token, else only at the very start."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    spaces = normalizers.Replace(" ", SPACE)
    if legacy:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        fast.normalizer = spaces
        # The normalizer cannot know which stretch is the first, and Metaspace prepends nothing
        # where its own replacement stands already: so it is given a real space to prepend.
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
            ]
        )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def _agrees(fast, folder: Path, config: LlavaConfig) -> bool:
    from llava_jax.text.tokenizer import Tokenizer

    try:
        slow = Tokenizer.load(folder, legacy=config.tokenizer_legacy)
        return all(fast.encode(text).ids == slow.encode(text) for text in _PROBES) and all(
            fast.encode(f"{a}</s>{b}").ids == slow.encode(f"{a}</s>{b}", markup=True)
            for a, b in pairwise(_PROBES)
        )
    except LlavaError as error:
        log.warning("%s", error)
        return False
