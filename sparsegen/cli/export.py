"""Compile a pattern and write it as a bundle that runs without sparsegen and TVM."""

import argparse
from pathlib import Path

from sparsegen.cli import _pattern

HELP = "write a compiled pattern as a bundle that needs neither sparsegen nor TVM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sparsegen export`."""
    _pattern.add_arguments(parser, several=True)
    parser.add_argument("folder", type=Path, help="an empty or new folder")


def run(args: argparse.Namespace) -> int:
    """Compile, export and print the folder."""
    from sparsegen.exporting import export

    request = _pattern.request(args)
    program = request["pattern"].program
    request["sizes"] = {
        letter: size
        for letter, size in request["sizes"].items()
        if letter not in (program.query, program.key)
    }
    kernel, target = request.pop("pattern"), request.pop("target").split(",")
    print(export(kernel, args.folder, target, **request))
    return 0
