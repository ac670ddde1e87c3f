"""Search for the fastest knobs of a pattern on this machine."""

import argparse
from pathlib import Path

from sparsegen.cli import _pattern

HELP = "search for the fastest knobs of a pattern on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sparsegen tune`."""
    _pattern.add_arguments(parser)
    parser.add_argument("--budget", type=_pattern.seconds, default=60.0, metavar="60s|5m")
    parser.add_argument("--strategy", default="evolutionary", help="see `sparsegen list`")
    parser.add_argument(
        "--distribution", default="uniform", metavar="KIND",
        help="where gathered keys lie: uniform, local, clustered or trace:FILE.npy",
    )  # fmt: skip
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="append to this file, and resume from it"
    )
    parser.add_argument(
        "--task", action="append", metavar="NAME", help="tune this task only; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Tune and print the result; the last line is the argument to paste."""
    from sparsegen.api import tune

    result = tune(
        **_pattern.request(args),
        budget=args.budget,
        strategy=args.strategy,
        distribution=args.distribution,
        records=args.records,
        tasks=args.task,
        seed=args.seed,
    )
    print(result)
    return 0
