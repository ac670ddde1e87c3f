"""Compile a pattern and write it as a bundle that runs without sparsegen and TVM."""

import argparse
from pathlib import Path

from sparsegen.cli import _pattern

HELP = "write a compiled pattern as a bundle that needs neither sparsegen nor TVM"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sparsegen export`."""
    _pattern.add_arguments(parser)
    parser.add_argument("folder", type=Path, help="an empty or new folder")


def run(args: argparse.Namespace) -> int:
    """Compile, export and print the folder."""
    from sparsegen.api import compile
    from sparsegen.bundle import export

    request = _pattern.request(args)
    program = request["pattern"].program
    request["sizes"] = {
        letter: size
        for letter, size in request["sizes"].items()
        if letter not in (program.query, program.key)
    }
    print(export(compile(**request), args.folder))
    return 0
