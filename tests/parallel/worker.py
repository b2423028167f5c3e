"""A run in fp64, alone or as one rank under torchrun: python worker.py [--resume] [--kill SIGNAL STAGE STEP RANK] key=value

In fp64 the sums of ranks differ from one rank's by 1e-16, so that no sampled token flips and runs stay comparable.
--kill sends itself a signal in that rank's step.
"""

import argparse
import os
import sys

import torch
from transformers.utils import logging

from r1v2_fast import config
from r1v2_fast.models import load
from r1v2_fast.models.reward_model import RewardModel
from r1v2_fast.stop import Stopped
from r1v2_fast.testing.double import to_double
from r1v2_fast.train import run
from r1v2_fast.train.context import Context


def double(read):
    def read_double(*arguments, dtype, **options):
        loaded = read(*arguments, dtype=torch.float64, **options)
        to_double(loaded.model)
        return loaded

    return read_double


def double_reward_model(read):
    def read_double(*arguments, **options):
        model = read(*arguments, **options)
        to_double(model.internvl)
        model.head.double()
        return model

    return read_double


def signalled(signum: int, stage: str, step: int, rank: int) -> None:
    seed_globals = Context.seed_globals

    def seed_and_signal(context, at_stage, at_step):
        seed_globals(context, at_stage, at_step)
        if (at_stage, at_step, context.world.rank) == (stage, step, rank):
            os.kill(os.getpid(), signum)

    Context.seed_globals = seed_and_signal


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill", nargs=4)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    logging.disable_progress_bar()
    load.from_preset, load.from_folder = double(load.from_preset), double(load.from_folder)
    RewardModel.load = double_reward_model(RewardModel.load)
    if given.kill:
        signum, stage, step, rank = given.kill
        signalled(int(signum), stage, int(step), int(rank))
    try:
        run.train(config.load("digits", given.overrides), resume=given.resume)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return stopped.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
