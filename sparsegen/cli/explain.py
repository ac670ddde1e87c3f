"""Explain what becomes of a pattern: tasks, domains, costs, bounds, schedules and caches."""

import argparse

from sparsegen.cli import _pattern
from sparsegen.errors import BindingError

HELP = "explain tasks, costs, bounds, schedules and caches of a pattern"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sparsegen explain`."""
    _pattern.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Explain, without compiling anything."""
    request = _pattern.request(args)
    if not request["sizes"]:
        raise BindingError(f"explaining {args.pattern} needs sizes", hint=_shapes(args.pattern))
    from sparsegen.report import explain

    found = explain(**request)
    print(found.to_json() if args.json else found)
    return 0


def _shapes(name: str) -> str:
    from sparsegen import patterns

    known = [] if ":" in name else [config.name for config in patterns.configs(name)]
    shapes = f"--config {known[0]} ({', '.join(known)}), or " if known else ""
    return f"pass {shapes}--sizes T=1,S=8192,..."
