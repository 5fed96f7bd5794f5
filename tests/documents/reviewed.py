"""Which lines of the documents are not run as they stand, and why. Reviewed by hand: keep it short."""

# Of a command: pattern -> why it is not run here. Each entry must still fit some line.
NOT_RUN = {
    r"^python3\.11 -m venv|^\. \.venv/bin/activate": "the environment of the tests; .ci/run makes it",
    r"^python -m pytest|PYTEST": "this suite; .ci/run runs the README's line",
    r"^pre-commit install": "writes into the clone's .git",
    r"^uv pip compile": "asks a package index; tests/test_packaging.py checks its outputs",
    r"^python -m build": "asks a package index; tests/test_packaging.py builds wheel and sdist",
    r"^llava-jax quickstart$": "minutes; tests/quickstart/test_run.py runs it with few steps",
    r"^python -m examples\.tiny": "minutes; tests/examples/test_tiny.py runs it with few steps",
    r"^python -m llava_jax\.settings": "tests/test_settings.py compares what it prints with the page",
    r"^python bench/lines\.py": "counts what git lists, and the copy that runs the lines is no checkout",
    r"^python bench/packing\.py": "minutes; tests/data/test_packing.py and test_lengths.py hold what it measures",
    r"^llava-jax verify|^cd runs/finetune_7b/checkpoints|sha256sum -c|^find .* -exec sha256sum": "of a run that is there; tests/train/test_checkpoint.py runs all",
    r"--config\.data\.eval=": "needs validation sets; tests/train/test_validate.py trains with some",
    r"^llava-jax (serve|demo)": "runs until it is stopped; tests/serve/test_command.py starts and stops it",
    r"^llava-jax report": "of runs that are there; tests/report/test_report.py makes the page",
    r"--profile": "more steps than are run here; tests/train/test_profiling.py traces one",
    r"--supervise": "starts processes; tests/train/test_supervise.py runs it",
    r"^python -m bench (checkpoint|load|start|compile|machine|--all)|^python -m bench .*--records": "minutes; tests/test_bench.py runs the frame",
    r"^python -m bench aot": "compiles for minutes; tests/test_bench_aot.py counts a program",
    r"^llava-jax chat .*--folder": "needs a folder; tests/chat/test_folder.py has one",
    r"^python -m bench\.survival": "minutes to hours; tests/train hold the short form of each part",
    r"^python bench/plan\.py": "compiles for an hour; tests/plan holds what its rows say",
    r"^llava-jax plan ": "compiles for minutes; tests/plan runs it on a tiny model",
    r"^llava-jax data build": "needs the owners' files; tests/datasets/test_build.py runs it on small ones",
    r"^llava-jax data pack .*--beam": "Beam has an environment of its own; tests/store/test_write.py runs it",
    r"data\.path=packed/mix": "needs the line before it; tests/store/test_write.py loads packed data",
    r"--out out/7b": "needs the released weights; the tiny model's line is below it",
    r"^llava-jax eval report out/7b": "of results of the released weights",
    r"--out out/tiny": "tests/eval/test_run_model.py runs these sets",
    r"^llava-jax eval (extract seed|score seed)": "needs a model that answers; tests/eval/test_extract.py has one",
    r"--endpoint http://127": "needs a server; tests/eval/test_remote.py has one",
    r"--config OUT/pope/result\.json": "tests/eval/test_outside.py asks a result again",
    r"convert SRC DST --to FORMAT": "the form of the command, not a command",
}

# Of a command: pattern -> the quick test that holds the same fact. Run with --slow.
SLOW = {
    r"--config configs/\w+_13b\.py": "the same line with the 7B's config",
    r"--config configs/(pretrain|finetune)_7b\.py": "tests/rehearsal/test_recipes.py: an epoch of it",
    r"--config configs/finetune_(lora|task)_7b\.py": "README.md's line with finetune_task_lora_7b",
    r"--config configs/finetune_task_lora_7b\.py --workdir runs/task": "README.md's line with that config",
    r"--config configs/(easy_vqa|quickstart)\.py": "tests/examples/test_tiny.py, and the 7B's configs",
    r"--config finetune_task_lora_7b --workdir runs/mine": "README.md's line with the file's path",
    r"--config finetune_7b --config\.data\.pack=fill": "tests/rehearsal/test_layouts.py: packed rows",
    r"^srun --nodes=4 ": "tests/train/test_processes.py: processes that SLURM numbers",
    r"^python bench/attention\.py": "tests/attention/test_kernels.py: what it measures",
    r"^python -m bench train": "tests/train/test_compiled.py: the step that it measures",
    r"^python -m bench pictures": "tests/images/test_resample.py: that pixels are Pillow's",
    r"^python -m bench (decode|prefill)": "tests/generate/test_engine.py: what it measures, on a tiny model",
    r"^python -m bench budgets": "tests/generate/test_budget.py: what it measures, on a tiny model",
    r"^python -m bench lookup": "tests/generate/test_lookup.py: what it measures, on a tiny model",
}

# Programs beside `llava-jax`: pattern -> what is appended to make them small. Each is a new process.
PROGRAMS = {
    r"^python examples/benchmark_sets\.py": ("--count", "2"),
    r"^python bench/convert\.py": ("--size", "tiny", "--folder", "disk"),
    r"^python bench/attention\.py": ("--lengths", "40", "--repeats", "1"),
    r"^python -m bench --list": ("--list",),
    r"^python -m bench train": ("--size=tiny", "--rows=8", "--length=40", "--repeats=1"),
    r"^python -m bench pictures": ("--count", "1", "--repeats", "1"),
    r"^python -m bench (decode|prefill)": ("--size=tiny", "--tokens", "2", "--repeats", "1"),
    r"^python -m bench budgets": (
        "--size=tiny",
        "--budgets",
        "8",
        "--repeats",
        "1",
        "--pictures",
        "0",
    ),
    r"^python bench/quantize\.py": ("--pictures", "1"),
}

# Appended to a training command, and only this: fewer and smaller steps.
FEWER = ("steps=1",)
FEWER_STAGES = (
    *("batch_size=8", "stages.stage1.steps=1"),
    *("stages.stage2.steps=1", "stages.stage2.batch_size=8"),
)
WITH_STAGES = ("quickstart", "easy_vqa")
