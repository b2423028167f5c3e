"""r1v2-fast train | evaluate | report | doctor."""

from __future__ import annotations

import argparse
import json
import sys

from r1v2_fast._version import __version__


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"r1v2-fast: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="r1v2-fast", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run a recipe through its stages")
    train.add_argument("recipe", help="a shipped recipe's name (digits) or a YAML file")
    train.add_argument("overrides", nargs="*", metavar="a.b=c", help="dotted overrides of the recipe")
    train.add_argument("--resume", action="store_true", help="go on with the run in run.folder")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="greedy accuracy of a model folder on a file of records")
    evaluate.add_argument("model", help="a local InternVL-family folder in Hugging Face format")
    evaluate.add_argument("data", help="records, .jsonl or .parquet")
    evaluate.add_argument("--score", default="exact_match", help="exact_match, math_answer or path.py:name")
    evaluate.add_argument("--max-new-tokens", type=int, default=12)
    evaluate.add_argument("--batch-size", type=int, default=64)
    evaluate.add_argument("--records", type=int, help="only the first so many")
    evaluate.add_argument("--device", default="auto")
    evaluate.set_defaults(command=_evaluate)

    report = commands.add_parser("report", help="write report.html of a run folder")
    report.add_argument("folder")
    report.set_defaults(command=_report)

    doctor = commands.add_parser("doctor", help="which backend every op takes here, and why the others are out")
    doctor.add_argument(
        "--require", action="append", default=[], metavar="BACKEND", help="exit 1 unless an op can run it"
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from r1v2_fast.report import write
    from r1v2_fast.train import config, run

    logging.disable_progress_bar()
    folder = run.train(config.load(arguments.recipe, arguments.overrides), resume=arguments.resume)
    print(f"model   {folder / 'final'}\nreport  {write(folder)}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from transformers.utils import logging

    from r1v2_fast.models import load
    from r1v2_fast.models.policy import Policy
    from r1v2_fast.models.vision import FeatureCache
    from r1v2_fast.train.config import Evaluation
    from r1v2_fast.train.context import Corpus, Reader, pick_device
    from r1v2_fast.train.evaluate import evaluate

    logging.disable_progress_bar()
    path = Path(arguments.data)
    loaded = load.from_folder(arguments.model)
    loaded.model.to(pick_device(arguments.device)).requires_grad_(False)
    corpus = Corpus(path.parent)
    reader = Reader(corpus, loaded, max_tiles=12)
    settings = Evaluation(
        sets={path.stem: path.name},
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        score=arguments.score,
    )
    policy = Policy(loaded, reader.pixels, FeatureCache())
    result = evaluate(policy, reader, corpus.dataset(path.name), settings, records=arguments.records)
    print(json.dumps(result.metrics, indent=2))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from r1v2_fast.report import write

    print(write(arguments.folder))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from r1v2_fast.doctor import run

    return run(arguments.require)
