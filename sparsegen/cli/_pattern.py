"""Read a pattern, its sizes and its binding from the command line."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from sparsegen.dsl.pattern import Pattern
from sparsegen.errors import BindingError, did_you_mean
from sparsegen.lowering.binding import DTYPES, LAYOUTS


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Declare what names a bound pattern, for one target or several."""
    parser.add_argument(
        "pattern", metavar="PATTERN", help="a shipped pattern, or FILE.py:NAME of your own"
    )
    parser.add_argument(
        "--sizes", type=sizes, default={}, metavar="T=64,S=8192,...", help="extents by letter"
    )
    parser.add_argument(
        "--config", metavar="NAME", help="a shape the pattern comes with; --sizes overrides it"
    )
    more = ", or several with commas between" if several else ""
    parser.add_argument(
        "--target", default="cpu", help=f"cpu (this machine), cuda or an architecture{more}"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--layout", default="sequence", choices=LAYOUTS)
    parser.add_argument("--page-size", type=int, default=0, metavar="KEYS")
    parser.add_argument(
        "--set", action="append", type=setting, default=[], metavar="NAME=VALUE",
        help="a hyperparameter, such as topk=512; may be repeated",
    )  # fmt: skip


def request(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `sparsegen.compile` and `sparsegen.tune` that were given."""
    found = pattern(args.pattern)
    letters, hyper = config(args.pattern, args.config) if args.config else ({}, {})
    return {
        "pattern": found,
        "target": args.target,
        "dtype": args.dtype,
        "layout": args.layout,
        "page_size": args.page_size,
        "sizes": {**letters, **args.sizes},
        **hyper,
        **dict(args.set),
    }


def pattern(name: str) -> Pattern:
    """Return a shipped pattern, or one of a file of the user's.

    Raises:
        BindingError: there is no such pattern or file.
    """
    if ":" not in name:
        from sparsegen import patterns

        return patterns.load(name)
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise BindingError(f"no file {file!r}", hint="name a pattern as FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BindingError(f"{file!r} is no Python file", hint="name a pattern as FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    found = getattr(module, attribute, None)
    if not isinstance(found, Pattern):
        known = [k for k, v in vars(module).items() if isinstance(v, Pattern)]
        raise BindingError(
            f"{file} has no pattern {attribute!r}", hint=did_you_mean(attribute, known)
        )
    return found


def config(name: str, shape: str) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the sizes and hyperparameters of a shape that a shipped pattern comes with."""
    from sparsegen import patterns

    shapes = {} if ":" in name else {c.name: c for c in patterns.configs(name)}
    if shape not in shapes:
        raise BindingError(f"{name} has no shape {shape!r}", hint=did_you_mean(shape, shapes))
    return dict(shapes[shape].sizes), dict(shapes[shape].hyper)


def sizes(text: str) -> dict[str, int]:
    """Parse `T=64,S=8192`."""
    found: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        letter, _, value = item.partition("=")
        if not letter.strip() or not value.strip().isdecimal():
            raise argparse.ArgumentTypeError(f"{item!r} is not LETTER=NUMBER")
        found[letter.strip()] = int(value)
    return found


def setting(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`; numbers, true and false are taken for what they are."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def seconds(text: str) -> float:
    """Parse `90`, `60s`, `5m` or `1h`."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        return float(number) * units[unit]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 60s or 5m") from None
