"""The two answer normalisers of the VQA family, with their measured quirks.

`vqa_normalize` is GT-Vision-Lab/VQA `vqaEvaluation/vqaEval.py`; `m4c_normalize` is the EvalAI
processor of facebookresearch/mmf `m4c_evaluators.py`, which LLaVA runs over every file it uploads.
They agree on most answers and differ in three places, kept as they are because servers run them:

* m4c splits a possessive ("king's" -> "king 's") and drops "," and "?" before anything else;
* m4c takes any run of commas between digits as a number, vqaEval exactly one comma;
* both hand `re.UNICODE` to `sub` as its *count*, so only the first 32 periods are removed.
"""

import re
from functools import lru_cache

_NUMBERS = {
    w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))

# A word that lacks exactly one apostrophe of one of these gets it back ("couldnt've").
_FULL_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    full[:i] + full[i + 1 :]: full for full in _FULL_FORMS for i, c in enumerate(full) if c == "'"
}
# The one entry that runs the other way in both tables.
CONTRACTIONS["somebody'd"] = "somebodyd"

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ANY_PUNCTUATION = re.compile("[" + re.escape(_PUNCTUATION) + "]")
# Reads as "not preceded by a digit" but `(?!<=\d)` is a look-ahead for the text "<=" and a digit,
# which a period never is; so the rule is only: a period that no digit follows.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_PERIODS_REMOVED = int(re.UNICODE)  # 32
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")  # VLMEvalKit, which mended that
_VQA_COMMA = re.compile(r"(\d)(\,)(\d)")
_M4C_COMMA = re.compile(r"(?<=\d)(\,)+(?=\d)")


def _punctuation(text: str, comma: re.Pattern[str], period: re.Pattern[str] = _PERIOD) -> str:
    out = text
    if _ANY_PUNCTUATION.search(text):
        number = comma.search(text) is not None
        for p in _PUNCTUATION:
            if p in text:
                beside_space = p + " " in text or " " + p in text
                out = out.replace(p, "" if number or beside_space else " ")
    return period.sub("", out, count=_PERIODS_REMOVED) if "." in out else out


def plain_words(text: str) -> list[str]:
    """The words of VLMEvalKit's process_punctuation (vlmeval/smp/misc.py), in lower case."""
    return _punctuation(text.lower(), _VQA_COMMA, _LONE_PERIOD).split()


def _digits_and_articles(text: str) -> str:
    words = (_NUMBERS.get(w, w) for w in text.lower().split())
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def one_line(text: str) -> str:
    """`text` with newlines and tabs as spaces, stripped (what vqaEval does to every answer)."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)
def vqa_normalize(text: str) -> str:
    """vqaEval's processPunctuation and processDigitArticle, for an answer already on one line."""
    return _digits_and_articles(_punctuation(text, _VQA_COMMA))


@lru_cache(maxsize=1 << 18)
def m4c_normalize(text: str) -> str:
    """The m4c EvalAI answer processor: what LLaVA uploads, and what TextVQA compares."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _digits_and_articles(_punctuation(one_line(text), _M4C_COMMA))


def leave_one_out(prediction: str, answers: list[str]) -> float:
    """Soft accuracy in 0..1: for each annotator min(1, matches among the others / 3), averaged.

    Both sides come normalised as the benchmark asks.
    """
    matches = answers.count(prediction)
    if not matches or matches > 3:  # every annotator gives the same
        return float(matches > 3)
    # Added one by one, as the scorers do: the last bit of 0.9 depends on the order.
    total = 0.0
    for answer in answers:
        total += min(1, float(matches - (answer == prediction)) / 3)
    return total / len(answers)
