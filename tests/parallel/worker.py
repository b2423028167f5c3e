"""A run in fp64, alone or as one rank under torchrun: python worker.py [--resume] key=value ...

In fp64 the sums of ranks differ from one rank's by 1e-16, so that no sampled token flips and runs stay comparable.
"""

import sys

from r1v2_fast import config
from r1v2_fast.models import load
from r1v2_fast.testing.double import to_double
from r1v2_fast.train import run


def double(read):
    def read_double(*arguments, **options):
        loaded = read(*arguments, **options)
        to_double(loaded.model)
        return loaded

    return read_double


def main(arguments: list[str]) -> None:
    load.from_preset, load.from_folder = double(load.from_preset), double(load.from_folder)
    resume = "--resume" in arguments
    run.train(config.load("digits", [a for a in arguments if a != "--resume"]), resume=resume)


if __name__ == "__main__":
    main(sys.argv[1:])
