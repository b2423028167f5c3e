"""python -m bench [contract | run [STEM ...] | compare BEFORE AFTER | tune | ssb]; without a word: contract, then every
case."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from bench import compare, contract, record
from bench.run import all_cases, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each provider")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--output", type=Path, help="append JSON lines here, e.g. bench/results/h200.jsonl")
    what = parser.add_subparsers(dest="what")
    what.add_parser("contract", help="counted FLOPs and memory, then linear_logprobs against its peers")
    what.add_parser("run", help="cases of these ops").add_argument("stems", nargs="*")
    two = what.add_parser("compare", help="two result files")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    what.add_parser("tune", help="measure the row kernel's launch parameters on this GPU and keep them")
    ssb = what.add_parser("ssb", help="GRPO with and without the Selective Sample Buffer, seed by seed")
    ssb.add_argument("overrides", nargs="*", metavar="a.b=c", help="of recipes/digits-ssb.yaml")
    ssb.add_argument("--seeds", type=int, default=5)
    ssb.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    ssb.add_argument("--work", type=Path, default=Path("runs/ssb"))
    ssb.add_argument("--lines", type=Path, default=record.RESULTS / "ssb.jsonl")
    arguments = parser.parse_args()
    console = Console()
    if arguments.what == "compare":
        compare.show(arguments.before, arguments.after, console)
        return 0
    if arguments.what == "ssb":
        from bench.ssb import study  # needs the train extra

        options = {"seeds": arguments.seeds, "jobs": arguments.jobs, "overrides": arguments.overrides}
        study(arguments.work.absolute(), arguments.lines.absolute(), console=console, **options)
        return 0
    if arguments.what == "tune":
        from bench import tune  # triton's errors exist where triton does

        return tune.show(console)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    kept = True if arguments.what == "run" else contract.show(console)
    stems = ["linear_logprob"] if arguments.what == "contract" else getattr(arguments, "stems", None)
    chosen = [case for case in all_cases() if device.type in case.devices and (not stems or case.stem in stems)]
    if not chosen:
        raise SystemExit(f"no case of {stems} on {device.type}; ops: {sorted({case.stem for case in all_cases()})}")
    for case in chosen:
        lines = run(case, device, rounds=arguments.rounds, console=console)
        if arguments.output is not None:
            record.write(lines, arguments.output)
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
