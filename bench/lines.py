"""Counts the lines of the product, for one commit or the files as they are.

    python bench/lines.py            # the checkout
    python bench/lines.py 5145f1a    # a commit

Prints, for each top folder, all lines and lines without blanks, comments and docstrings.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize

FOLDERS = ("llava_jax", "convert", "eval", "configs", "bench", "examples")
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}


def git(*words: str) -> str:
    """The output of a git command in this checkout."""
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def sources(commit: str | None) -> dict[str, str]:
    """{path: text} of the product's Python files."""
    if commit is None:
        listed = git("ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS)
    else:
        listed = git("ls-tree", "-r", "--name-only", commit, *FOLDERS)
    paths = [path for path in listed.splitlines() if path.endswith(".py")]
    if commit is None:
        return {path: open(path, encoding="utf-8").read() for path in paths}
    return {path: git("show", f"{commit}:{path}") for path in paths}


def code_lines(text: str) -> int:
    """Lines that hold code: not blank, not a comment, not a docstring."""
    held = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT and token.type != tokenize.ENDMARKER:
            held.update(range(token.start[0], token.end[0] + 1))
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            doc = node.body[0]
            held.difference_update(range(doc.lineno, (doc.end_lineno or doc.lineno) + 1))
    return len(held)


def main(commit: str | None = None) -> None:
    """Prints the table."""
    files = sources(commit)
    print(f"{'folder':<12}{'files':>7}{'lines':>9}{'code':>9}")
    rows = [(f, [t for p, t in files.items() if p.startswith(f"{f}/")]) for f in FOLDERS]
    for name, texts in [*rows, ("all", list(files.values()))]:
        lines = sum(text.count("\n") for text in texts)
        print(f"{name:<12}{len(texts):>7}{lines:>9,}{sum(map(code_lines, texts)):>9,}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
