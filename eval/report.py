"""The report: our numbers beside the paper's, with their noise, as one HTML and one Markdown page."""

from collections.abc import Sequence
from pathlib import Path

from llava_jax.eval.entries import collect, comparisons_of
from llava_jax.eval.errors import DataError
from llava_jax.eval.pictures import Pictures
from llava_jax.eval.report_html import page
from llava_jax.eval.report_md import markdown


def write_report(
    results: Sequence[Path],
    out: Path,
    *,
    images: Path | None = None,
    compare: bool = False,
    title: str = "Evaluation",
) -> tuple[Path, Path]:
    """Writes `out`/index.html and `out`/report.md.

    Args:
      results: files of `eval score --json`, of any benchmarks and runs. A run is named by
        its model, else by the folder of its file, if the files lie in several, else by the file.
      images: folder with the images anywhere in it, for the gallery of failures.
      compare: also compare the runs of each benchmark, question by question, with the first.
    Returns:
      The two paths.
    """
    entries = collect(results)
    comparisons = comparisons_of(entries) if compare else []
    if compare and not comparisons:
        raise DataError("nothing to compare: no benchmark has two results")
    out.mkdir(parents=True, exist_ok=True)
    html, text = out / "index.html", out / "report.md"
    html.write_text(
        page(entries, comparisons, title, Pictures(images) if images else None), encoding="utf-8"
    )
    text.write_text(markdown(entries, comparisons, title), encoding="utf-8")
    return html, text
