"""What fits where: the table of docs/scale.md, by `llava-jax plan`, for hardware that is not here.

    python bench/plan.py                       # every row that is not finished yet, then the table
    python bench/plan.py --only v5e-8 1xH200   # of some machines
    python bench/plan.py --as-it-is            # looks for no change where a step does not fit
    python bench/plan.py --show                # the table of what is finished, nothing is compiled

Needs libtpu and the CUDA plug-in (docs/scale.md). Rows are kept in bench/results/plan.jsonl, each as
soon as it is finished; those that are there are skipped, and chips that differ in memory alone share a
program. A row takes half a minute (GPU) to ten (TPU) on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llava_jax.plan.rows import Kept
from llava_jax.plan.table import table

OUT = Path(__file__).parent / "results" / "plan.jsonl"
PACKED = ("data.pack=fill", "data.pack_length=4096", "data.group_by_modality=false")
ALL = ("8xA100-40", "8xA100-80", "8xH100", "1xH200", "v5e-8", "v5e-16", "v5p-8", "v5p-64")
SWEEP = {
    "finetune_7b": ALL,
    "finetune_13b": ALL,
    "finetune_lora_7b": ("8xA100-40", "1xH200", "v5e-8"),
    "pretrain_7b": ("8xA100-40", "1xH200", "v5e-8"),
    "pretrain_13b": ("8xA100-40",),
}
"""{recipe: machines}. Stage 2 is packed; stage 1 is as its recipe says."""


def main() -> int:
    """Plans what is missing and prints the table; 1 if a command failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="machines")
    parser.add_argument("--as-it-is", action="store_true", help="look for no change")
    parser.add_argument("--show", action="store_true", help="compile nothing")
    args = parser.parse_args()
    failed = False
    machines = dict.fromkeys(m for of_recipe in SWEEP.values() for m in of_recipe)
    for machine in () if args.show else args.only or machines:
        for recipe, of_recipe in SWEEP.items():
            if machine in of_recipe:
                failed |= plan(recipe, machine, args.as_it_is) > 1  # 1: nothing that was tried fits
    print("\n".join(rows_of_sweep()))
    return int(failed)


def plan(recipe: str, machine: str, as_it_is: bool) -> int:
    """Exit code of one row's command. A process each: a compiler that dies takes no other row along."""
    words = ["--config", recipe, "--topology", machine, "--out", str(OUT)]
    if not recipe.startswith("pretrain"):
        words += [f"--config.{setting}" for setting in PACKED]
    words += ["--as-it-is"] if as_it_is else []
    path = os.pathsep.join([sys.path[0], os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "llava_jax", "plan", *words]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def rows_of_sweep() -> list[str]:
    """The table of the rows that are finished, in the order of SWEEP."""
    places = {(r, m): n for n, (r, m) in enumerate((r, m) for r in SWEEP for m in SWEEP[r])}
    kept = [row for row in Kept(OUT).rows.values() if (row["name"], row["topology"]) in places]
    kept.sort(key=lambda row: (places[row["name"], row["topology"]], bool(row["change"])))
    return table(kept)


if __name__ == "__main__":
    sys.exit(main())
