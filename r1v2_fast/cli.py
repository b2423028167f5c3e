"""r1v2-fast train | evaluate | filter | chat | export | convert | plan | report | doctor."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from typing import Any

from r1v2_fast._version import __version__


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    command = options.pop("command")
    try:
        return command(**options)
    except KeyboardInterrupt:
        print("r1v2-fast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"r1v2-fast: {error}", file=sys.stderr)
    except _of_files() as error:
        print(f"r1v2-fast: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _options(argv: list[str] | None) -> dict[str, Any]:
    """What was asked for; argparse itself takes no overrides behind an option."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(argv)
    options = vars(parsed)
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options["overrides"] = [*options["overrides"], *rest]
    return options


def _of_files() -> tuple[type[Exception], ...]:
    """What a user's files and disk raise; imported when something was raised, for a quick start."""
    import jinja2
    import safetensors
    import yaml

    return OSError, safetensors.SafetensorError, yaml.YAMLError, jinja2.TemplateError


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options):
        super().__init__(formatter_class=_Help, **options)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="r1v2-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="run a recipe through its stages")
    train.add_argument("recipe", help="a shipped recipe's name (digits) or a YAML file")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="dotted overrides of the recipe")
    train.add_argument("--resume", action="store_true", help="go on with the run in run.folder")
    train.add_argument(
        "--dummy-weights", action="store_true",
        help="random weights for the recipe's architecture, and made-up records where its data is not there",
    )  # fmt: skip
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="greedy accuracy of a model folder on a file of records")
    _model_and_data(evaluate)
    _scoring(evaluate, time_limit=600.0, what="all answers")
    _answering(evaluate, max_new_tokens=256)
    evaluate.add_argument("--batch-size", type=int, default=64, help="records a rollout")
    evaluate.set_defaults(command=_evaluate)

    pool = commands.add_parser("filter", help="write the records that a model answers right now and then")
    _model_and_data(pool)
    pool.add_argument("out", help="file to write: .jsonl beside the pictures, or .parquet with them inside")
    _scoring(pool, time_limit=120.0, what="a rollout's responses")
    _answering(pool, max_new_tokens=256)
    pool.add_argument("--group-size", type=int, default=8, help="responses a record")
    pool.add_argument("--temperature", type=float, default=1.0, help="above 0, or a group repeats one response")
    pool.add_argument("--batch-size", type=int, default=32, help="records a rollout")
    pool.add_argument("--low", type=float, help="least pass rate kept; without it, all above 0")
    pool.add_argument("--high", type=float, help="greatest pass rate kept; without it, all below 1")
    pool.add_argument("--keep-all", action="store_true", help="keep every record, with its pass rate")
    pool.add_argument("--seed", type=int, default=0, help="of the responses")
    pool.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    pool.set_defaults(command=_filter)

    chat = commands.add_parser(
        "chat",
        help="answer a question about pictures, or one after the other",
        usage="r1v2-fast chat model [question] [--image PATH ...] [--temperature T] [--max-new-tokens N] [--device D]",
    )
    chat.add_argument("model", help="a local InternVL-family folder in Hugging Face format")
    # not nargs="?": argparse would spend that before an option, and not know a question behind it
    question = chat.add_argument("question", help="without it, questions are read from stdin until an empty line")
    question.required = False
    chat.add_argument("--image", action="append", default=[], metavar="PATH", help="a picture; may be given again")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    _answering(chat, max_new_tokens=512)
    chat.set_defaults(command=_chat)

    export = commands.add_parser("export", help="write a run's policy as a Hugging Face folder with a model card")
    export.add_argument("run_folder", metavar="run", help="the folder of a run")
    export.add_argument("out", help="folder to write")
    export.add_argument("--from", dest="source", default="final", help="final, best or a stage")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the policy's")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.set_defaults(command=_export)

    convert = commands.add_parser(
        "convert", help="turn an InternVL or Skywork checkpoint into transformers' layout, or back"
    )
    convert.add_argument("source", metavar="src", help="a local checkpoint folder in either layout")
    convert.add_argument("out", metavar="dst", help="folder to write")
    convert.add_argument("--to", choices=("transformers", "original"), help="default: the layout that src is not in")
    convert.add_argument("--language-model-only", action="store_true", help="write its Qwen2ForCausalLM alone")
    convert.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file: 5GB, 2GiB, 500MB")
    convert.add_argument("--allow-pickle", action="store_true", help="read .bin shards where there is nothing else")
    convert.add_argument("--overwrite", action="store_true", help="replace an earlier conversion")
    convert.set_defaults(command=_convert)

    plan = commands.add_parser("plan", help="the memory and time that a recipe takes on given GPUs, computed")
    plan.add_argument("recipe", help="a shipped recipe's name (r1v2-38b-one-gpu) or a YAML file")
    plan.add_argument("overrides", nargs="*", metavar="a.b=c", help="dotted overrides of the recipe")
    plan.add_argument("--gpus", type=int, default=1, help="how many, 1 to 64")
    plan.add_argument("--gpu", default="h200", help="a100, h100, h200 or b200")
    plan.add_argument("--bandwidth", type=float, default=400.0, metavar="GB/s", help="of a node of 8 to the others")
    plan.add_argument("--shard", choices=("none", "full"), help="default: none where the whole model trains, else full")
    plan.add_argument("--prompt-tokens", type=int, metavar="N", help="default: the most image tokens, and 200")
    plan.add_argument("--response-tokens", type=int, metavar="N", help="default: max_new_tokens")
    plan.set_defaults(command=_plan)

    report = commands.add_parser("report", help="write report.html of a run folder")
    report.add_argument("folder")
    report.set_defaults(command=_report)

    doctor = commands.add_parser("doctor", help="which backend every op takes here, and why the others are out")
    doctor.add_argument(
        "--require", action="append", default=[], metavar="BACKEND", help="exit 1 unless an op can run it here"
    )
    doctor.add_argument("--device", choices=("cpu", "cuda"), help="of this one alone; exit 1 where it is not here")
    doctor.set_defaults(command=_doctor)
    return parser


def _model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a local InternVL-family folder in Hugging Face format")
    parser.add_argument("data", help="records, .jsonl or .parquet")
    parser.add_argument("--records", type=int, help="only the first so many")
    parser.add_argument("--root", help="folder that image paths are relative to; default: the data's")
    parser.add_argument("--allow-outside", action="store_true", help="image paths may leave the root")
    parser.add_argument("--max-tiles", type=int, help="of a picture; default: what the model's image processor says")


def _scoring(parser: argparse.ArgumentParser, *, time_limit: float, what: str) -> None:
    parser.add_argument(
        "--score", default="exact_match",
        help="exact_match, math_answer or path.py:name; an answer is right where its reward is at least 1",
    )  # fmt: skip
    parser.add_argument("--time-limit", type=float, default=time_limit, help=f"seconds to score {what}; 0 is none")
    parser.add_argument(
        "--on-nan", choices=("stop", "skip"), default="stop", help="at a NaN reward: stop, or leave the answer unscored"
    )


def _answering(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help="of an answer")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU where there is one")


def _train(recipe: str, overrides: list[str], resume: bool, dummy_weights: bool) -> int:
    from transformers.utils import logging

    from r1v2_fast import config
    from r1v2_fast.parallel.world import first_rank
    from r1v2_fast.report import write
    from r1v2_fast.stop import Stopped
    from r1v2_fast.train import run

    logging.disable_progress_bar()
    try:
        if dummy_weights:
            overrides = [*overrides, "model.dummy_weights=true"]
        folder = run.train(config.load(recipe, overrides), resume=resume)
    except Stopped as stopped:
        print(f"r1v2-fast: {stopped}; go on with --resume", file=sys.stderr)
        return stopped.status
    if not first_rank():
        return 0
    print(f"model   {folder / 'final'}", flush=True)
    try:
        print(f"report  {write(folder)}")
    except Exception as error:  # the training is done, whatever its report meets
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"r1v2-fast: no report: {said}; r1v2-fast report {folder} tries again", file=sys.stderr)
    return 0


def _evaluate(**options) -> int:
    from r1v2_fast.commands import evaluate

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for JSON, and a reward may print
        metrics = evaluate.run(**options)
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    print(json.dumps(finite, indent=2, allow_nan=False))
    return 0


def _filter(**options) -> int:
    from r1v2_fast.commands import filter

    print(filter.run(**options))
    return 0


def _chat(**options) -> int:
    from r1v2_fast.commands import chat

    for answer in chat.run(**options):
        print(answer, flush=True)
    return 0


def _export(**options) -> int:
    from r1v2_fast.commands import export

    print(export.run(**options))
    return 0


def _convert(**options) -> int:
    from r1v2_fast.commands import convert

    print(convert.run(**options))
    return 0


def _plan(**options) -> int:
    from r1v2_fast.plan import run

    return run.run(**options)


def _report(folder: str) -> int:
    from r1v2_fast.report import write

    print(write(folder))
    return 0


def _doctor(require: list[str], device: str | None) -> int:
    from r1v2_fast.doctor import run

    return run(require, device)
