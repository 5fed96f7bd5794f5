"""`llava-jax eval`: run benchmarks on a model, or score, judge, submit and report answer files.

Only the run itself (`llava-jax eval --model …`) imports jax.
"""

import argparse
from pathlib import Path

from llava_jax.errors import LlavaError
from llava_jax.eval.files import check_folder
from llava_jax.eval.report.paper import ROWS
from llava_jax.eval.task import TASKS, Task, TaskSettings, check_settings, get_task
from llava_jax.settings import add_loading_options
from llava_jax.util import refuse_input, write_json

EXAMPLES = """examples:
  llava-jax eval --model M --tasks pope,mme --data DIR --out DIR
  llava-jax eval score pope --answers answers.jsonl --data DIR --json result.json
  llava-jax eval report result.json other.json --out report
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the run, and a sub-parser for each of the other actions."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _run_arguments(parser)
    actions = parser.add_subparsers(action=_Actions, dest="action", metavar="ACTION")
    for name, (arguments, _, help) in ACTIONS.items():
        action = actions.add_parser(name, help=help)
        if arguments:
            arguments(action)


class _Actions(argparse._SubParsersAction):
    """Refuses an option before an action's name, which argparse overwrites with the action's default."""

    def __call__(self, parser, namespace, values, option_string=None):
        name = next(iter(values or ()))
        for action in parser._actions:
            given = getattr(namespace, action.dest, action.default)
            if action.option_strings and given != action.default:
                what = f"{action.option_strings[0]} before {name} is not read"
                raise LlavaError(what, fix=f"options follow the action: eval {name} ... OPTIONS")
        super().__call__(parser, namespace, values, option_string)


def run(args: argparse.Namespace) -> int:
    """Does what the command line asks; returns the exit code."""
    if getattr(args, "include", None) is not None:
        from llava_jax.eval.outside import include

        include(args.include)
    return ACTIONS[args.action][1](args) if args.action else _run(args)


def _run_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", help="checkpoint folder or hub id, or a name at --endpoint")
    p.add_argument("--endpoint", metavar="URL", help="ask a server (OpenAI-compatible) instead")
    p.add_argument("--config", type=Path, help="options in a YAML or JSON file, or a result.json")
    add_loading_options(p, adapters=False)
    p.add_argument("--tasks", help="comma-separated names or NAME:SPLIT; see eval list")
    p.add_argument("--data", type=Path, help="folder with one per benchmark, or a benchmark's own")
    p.add_argument("--images", type=Path, help="image folder, where it is not in the data folder")
    p.add_argument("--out", type=Path, help="folder for answers, results and the report")
    batch = "questions per batch, or at once at an endpoint (default 16)"
    p.add_argument("--batch-size", type=int, help=batch)
    limit = "ask at most N questions, whole pairs and rotations; may be raised later"
    p.add_argument("--limit", type=int, help=limit)
    p.add_argument("--shuffle-seed", type=int, help="ask in a random order drawn from this seed")
    p.add_argument("--chunk", default="0/1", help="K/N: this process asks the K-th of N parts")
    p.add_argument("--max-new-tokens", type=int, help="per answer (default: the paper's)")
    p.add_argument("--mesh", help="DATA,FSDP,TENSOR (default: split over all devices)")
    p.add_argument("--template", help="conversation template (default: the model's own)")
    p.add_argument("--name", help="model_id in the answers (default: the model's folder name)")
    p.add_argument("--key-env", help="variable with the endpoint's key (default OPENAI_API_KEY)")
    p.add_argument("--per-minute", type=float, help="most requests per minute to the endpoint")
    _reading_arguments(p)


def _list_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--include", type=Path, metavar="DIR", help="folder of tasks of your own")


def _reading_arguments(p: argparse.ArgumentParser) -> None:
    _list_arguments(p)
    p.add_argument("--split", help="part of a file name, where several fit")
    options = "an option of a benchmark, [TASK.]NAME=VALUE (ocr=no; textvqa.ocr=no)"
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=options)


def _task_arguments(p: argparse.ArgumentParser, answers: bool = True) -> None:
    p.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="the owner's files")
    _reading_arguments(p)
    if answers:
        strict, skip = "fail unless every question is answered once", "count unreadable lines"
        p.add_argument("--answers", type=Path, required=True, metavar="FILE")
        p.add_argument("--strict", action="store_true", help=strict)
        p.add_argument("--skip-bad-lines", action="store_true", help=f"{skip} instead of failing")


def _score_arguments(p: argparse.ArgumentParser) -> None:
    _task_arguments(p)
    p.add_argument("--json", type=Path, metavar="OUT", help="write totals and per-sample values")
    extracted = "what eval extract wrote: a second number by answers that a model read"
    p.add_argument("--extracted", type=Path, metavar="FILE", help=extracted)
    p.add_argument("--brief", action="store_true", help="totals only")


def _submit_arguments(p: argparse.ArgumentParser, answers: bool = True) -> None:
    _task_arguments(p, answers)
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="what is written")


def _judge_arguments(p: argparse.ArgumentParser) -> None:
    _extract_arguments(p)
    p.add_argument("--runs", type=int, default=1, help="grades or reviews per answer")


def _extract_arguments(p: argparse.ArgumentParser) -> None:
    _submit_arguments(p)
    p.set_defaults(runs=1)
    p.add_argument("--judge-model", required=True, help="the judge's name at the endpoint")
    p.add_argument("--endpoint", default="https://api.openai.com/v1", help="OpenAI-compatible URL")
    p.add_argument("--key-env", default="OPENAI_API_KEY", help="variable that holds the key")
    p.add_argument("--per-minute", type=float, default=60, help="requests per minute (default 60)")
    p.add_argument("--parallel", type=int, default=8, help="requests at a time (default 8)")
    p.add_argument("--price-in", type=float, help="dollars per million tokens read")
    p.add_argument("--price-out", type=float, help="dollars per million tokens written")
    p.add_argument("--yes", action="store_true", help="start without asking")


def _report_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("results", nargs="+", type=Path, help="files of eval score --json")
    p.add_argument("--out", type=Path, required=True, help="folder for index.html and report.md")
    p.add_argument("--images", type=Path, help="image folder, for the gallery of failures")
    p.add_argument("--compare", action="store_true", help="compare runs of the same benchmark")
    row = f"row of the paper to compare with: {', '.join(ROWS)} (default: that of the model's size)"
    p.add_argument("--row", choices=ROWS, metavar="ROW", help=row)
    p.add_argument("--title", default="Evaluation", help="heading of the page")


def _fetch_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--org", help="hub organisation, where files come from the hub")
    p.add_argument("--images", action="store_true", help="image archives too (gigabytes)")


def _questions_arguments(p: argparse.ArgumentParser) -> None:
    _submit_arguments(p, answers=False)


def task_settings_of(args: argparse.Namespace, task: Task) -> TaskSettings:
    """How a command line asks to read and score a task; raises LlavaError for what it does not take."""
    strict, skip = getattr(args, "strict", False), getattr(args, "skip_bad_lines", False)
    settings = TaskSettings(args.split, strict, skip, options_of(args))
    check_settings([task], settings)
    return settings


def options_of(args: argparse.Namespace) -> dict[str, str]:
    """The pairs of --set."""
    options = {}
    for pair in args.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise LlavaError(f"--set {pair}: expected NAME=VALUE")
        options[name] = value
    return options


def _task_of(args: argparse.Namespace, out: Path | None) -> tuple[Task, TaskSettings]:
    """The task, and how to read it; raises LlavaError where `out` would replace what the command reads."""
    files = [pair.partition("=")[2] or None for pair in args.set]  # such as gpt4=FILE
    files += [args.data, getattr(args, "answers", None), getattr(args, "extracted", None)]
    if out is not None:
        refuse_input(out, files)
    task = get_task(args.task)
    return task, task_settings_of(args, task)


def _list(args: argparse.Namespace) -> int:
    from llava_jax.eval.outside import installed

    installed()
    width = max(map(len, TASKS)) + 2
    for name, title in TASKS.items():
        task = get_task(name)
        judged = "; needs a judge" if task.judge else ""
        print(f"{name:{width}}{title}: {task.max_new_tokens} tokens{judged}")
        print(f"{'':{width}}data: {task.data_files}")
    return 0


def _score(args: argparse.Namespace) -> int:
    from llava_jax.eval.report.text import as_text, complete

    task, settings = _task_of(args, args.json)
    if args.extracted:
        from llava_jax.eval.judge.extract import score_extracted

        scored = score_extracted(task, args.answers, args.data, settings, args.extracted)
    else:
        scored = task.score(args.answers, args.data, settings)
    result = complete(scored)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, result, indent=1, ensure_ascii=False)
    print(as_text(result, tables=not args.brief))
    return 0


def _submit(args: argparse.Namespace) -> int:
    task, settings = _task_of(args, args.out)
    print(f"wrote {task.submission(args.answers, args.data, args.out, settings)}")
    return 0


def _questions(args: argparse.Namespace) -> int:
    from llava_jax.eval.run.predict import write_questions

    task, settings = _task_of(args, args.out)
    questions = task.questions(args.data, settings)
    write_questions(questions, args.out)
    print(f"wrote {len(questions)} questions to {args.out}")
    return 0


def _judge(args: argparse.Namespace) -> int:
    from llava_jax.eval.judge.command import judge_command

    refuse_input(args.out, [args.answers])  # in the data folder it may be its own, to go on with
    return judge_command(args, task_settings_of(args, get_task(args.task)))


def _report(args: argparse.Namespace) -> int:
    from llava_jax.eval.report.write import PAGES, write_report

    check_folder("--images", args.images)
    for page in PAGES:
        refuse_input(args.out / page, args.results)
    how = {name: getattr(args, name) for name in ("images", "compare", "title", "row")}
    html, markdown = write_report(args.results, args.out, **how)
    print(f"wrote {html} and {markdown}")
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from llava_jax.eval.fetch import fetch

    for path in fetch(args.task, args.out, org=args.org, images=args.images):
        print(path)
    return 0


def _run(args: argparse.Namespace) -> int:
    from llava_jax.eval.run.command import run_command

    return run_command(args, options_of(args))


# Action -> its arguments (None: it has none), what it does, a line of help.
ACTIONS = {
    "score": (_score_arguments, _score, "score an answer file"),
    "submit": (_submit_arguments, _submit, "write the file that a benchmark's server accepts"),
    "judge": (_judge_arguments, _judge, "have a judge model grade answers"),
    "extract": (_extract_arguments, _judge, "have a model read answers that name no option"),
    "report": (_report_arguments, _report, "one page of results next to the paper's"),
    "fetch": (_fetch_arguments, _fetch, "download a benchmark's files"),
    "questions": (_questions_arguments, _questions, "write a benchmark's prompts as LLaVA's jsonl"),
    "list": (_list_arguments, _list, "the benchmarks and the files each needs"),
}
