"""The two pages of a report, from the templates page.html and page.txt beside this module."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import counted
from llava_jax.eval.errors import DataError
from llava_jax.eval.report import collect
from llava_jax.eval.report.charts import bars, radar
from llava_jax.eval.report.collect import Comparison, ModelResult
from llava_jax.eval.report.paper import ROWS
from llava_jax.eval.report.pictures import Pictures
from llava_jax.eval.report.text import answered_of, grid
from llava_jax.util import need, write_text

PAGES = ("index.html", "report.md")


def need_jinja2() -> Any:
    """What fills in the pages; raises LlavaError where it is not installed."""
    return need("jinja2", "to write reports", "llava_jax[eval]")


def write_report(
    results: Sequence[Path],
    out: Path,
    *,
    images: Path | None = None,
    compare: bool = False,
    title: str = "Evaluation",
    row: str | None = None,
) -> tuple[Path, Path]:
    """Writes `out`/index.html (self-contained: no script, no network) and `out`/report.md.

    Args:
      results: files of `eval score --json`, of any benchmarks and runs. A run is named by
        its model, else by its file (see collect.run_names).
      images: folder with the images anywhere in it, for the gallery of failures.
      compare: also compare the runs of each benchmark, question by question, with the first.
      row: of the paper, to compare with; by default that of each model's own size.
    Returns:
      The two paths.
    """
    found = collect.collect(results, row)
    comparisons = collect.comparisons_of(found) if compare else []
    if compare and not comparisons:
        raise DataError("nothing to compare: no benchmark has two results")
    out.mkdir(parents=True, exist_ok=True)
    html, text = (out / name for name in PAGES)
    pictures = Pictures(images) if images else None
    write_text(html, _render("page.html", found, comparisons, title, pictures))
    write_text(text, _render("page.txt", found, comparisons, title, None))
    return html, text


def _render(
    template: str,
    results: Sequence[ModelResult],
    comparisons: Sequence[Comparison],
    title: str,
    pictures: Pictures | None,
) -> str:
    jinja2 = need_jinja2()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html"),  # all that a model or a file says is escaped
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "svg": jinja2.utils.markupsafe.Markup}
    known = {"collect": collect, "answered_of": answered_of, "counted": counted, "grid": grid}
    known |= {"figures": _figures, "flip_cards": _flip_cards, "radar": _radar, "title": title}
    known["failure_cards"] = lambda result: _failure_cards(result, pictures)
    page = environment.get_template(template)
    return page.render(known, results=results, comparisons=comparisons).strip() + "\n"


def _cell(text: Any) -> str:
    """Text on one line of Markdown, in which it means nothing else."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _radar(results: Sequence[ModelResult]) -> str:
    """All runs beside the paper's 7B and 13B, on the benchmarks that the paper has; "" for fewer
    than three."""
    paper = {r.title: r.paper for r in results if r.paper}
    if len(paper) < 3:
        return ""
    series: dict[str, list[float | None]] = {}
    for row in ROWS[:2]:
        series[f"LLaVA-1.5 {row}"] = [scores[row] for scores in paper.values()]
    # One result per benchmark, each in a file of its own name, is one run.
    single = len({r.title for r in results}) == len(results)
    for run in ["ours"] if single else dict.fromkeys(r.run for r in results):
        ours = {r.title: r.interval.value for r in results if single or r.run == run}
        series[run] = [ours.get(name) for name in paper]
    return radar(list(paper), series)


def _figures(result: ModelResult) -> list[tuple[str, str]]:
    """(caption, SVG) of what a model sees that is not there (POPE, CHAIR)."""
    found = []
    if result.task == "pope":
        ratios = {k: float(v["Yes ratio"]) for k, v in result.file["tables"]["per split"].items()}
        truth = [s["truth"] == "yes" for s in result.samples.values()]
        line = 100 * sum(truth) / len(truth)
        found.append(("share of “yes”; line: truth", bars(ratios, 100.0, line)))
    if seen := collect.hallucinated(result):
        found.append(("seen where it is not", bars(seen)))
    return found


def _failure_cards(result: ModelResult, pictures: Pictures | None) -> list[dict[str, Any]]:
    cards = []
    for key, s in collect.failures(result):
        truth, image, parsed = s["truth"], s.get("image", ""), s.get("parsed")
        lines = {
            "": key,
            "question": s.get("prompt", ""),
            "answer": s["answer"],
            "read as": "" if parsed in (None, s["answer"]) else parsed,
            "truth": truth if isinstance(truth, str) else json.dumps(truth),
        }
        picture = pictures.thumbnail(image) if pictures and image else ""
        shown = [(name, text) for name, text in lines.items() if text != ""]
        cards.append({"image": image, "picture": picture, "lines": shown})
    return cards


def _flip_cards(c: Comparison, limit: int = 8) -> list[dict[str, Any]]:
    cards = []
    flipped = [("gained", key) for key in c.flips.gained[:limit]]
    for kind, key in [*flipped, *(("lost", key) for key in c.flips.lost[:limit])]:
        one, two = c.first.samples[key], c.second.samples[key]
        lines = [(kind, key), ("question", one.get("prompt", "")), (c.first.run, one["answer"])]
        lines += [(c.second.run, two["answer"]), ("truth", one["truth"])]
        cards.append({"image": "", "picture": "", "lines": lines})
    return cards
