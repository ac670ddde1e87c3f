"""Show, merge and compare files of tuning records."""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from sparsegen.errors import TuningError

if TYPE_CHECKING:
    from sparsegen.tuning.records import Record

HELP = "show, merge and compare files of tuning records"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sparsegen records`."""
    below = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = below.add_parser("show", help="print the choices and how many candidates failed")
    show.add_argument(
        "file", type=Path, nargs="?", help="default: the user's own, and those that are shipped"
    )
    show.add_argument("--json", action="store_true", help="print JSON")
    merge = below.add_parser("merge", help="write the records of several files into one")
    merge.add_argument("into", type=Path, help="a new file")
    merge.add_argument("files", type=Path, nargs="+")
    merge.add_argument("--choices", action="store_true", help="leave single candidates out")
    diff = below.add_parser("diff", help="compare the choices of two files")
    diff.add_argument("old", type=Path)
    diff.add_argument("new", type=Path)


def run(args: argparse.Namespace) -> int:
    """Do what was asked for."""
    return {"show": _show, "merge": _merge, "diff": _diff}[args.action](args)


def _read(path: Path) -> "list[Record]":
    from sparsegen.tuning import records

    if not path.exists():
        raise TuningError(
            f"there are no records in {path}",
            hint="run `sparsegen tune`, or name a file it wrote",
        )
    return records.read(path)


def _title(r: "Record") -> str:
    s, key = r.key.sizes, r.key
    return (
        f"{r.origin.program}.{r.origin.task} {r.origin.binding.get('dtype', '')} "
        f"B={s.batch} queries={s.query} keys={s.key} {key.distribution} {_where(r)}"
    )


def _where(r: "Record") -> str:
    if not r.key.device:
        return f"{r.key.arch}x{r.key.threads}"
    others = f", serves other {r.serves}" if r.serves else ""
    return f"{r.key.device} ({r.key.arch}{others})"


def _show(args: argparse.Namespace) -> int:
    from sparsegen.tuning import records
    from sparsegen.tuning.database import shipped_files, user_file
    from sparsegen.tuning.space import Rejected

    files = [args.file or user_file()]
    if args.file is None:
        files = [path for path in (*files, *shipped_files()) if path.exists()] or files
    found = [record for path in files for record in _read(path)]
    choices = records.choices(found)
    failed: dict[str, int] = {}
    for r in found:
        if isinstance(r.outcome, Rejected):
            failed[r.outcome.stage] = failed.get(r.outcome.stage, 0) + 1
    if args.json:
        rows = [json.loads(r.to_json()) for r in choices.values()]
        json.dump({"choices": rows, "rejected": failed}, sys.stdout, indent=2)
        print()
        return 0
    for r in choices.values():
        print(f"{_title(r)}\n  {_speed(r)}  {r.candidate}")
    candidates = sum(r.what == "candidate" for r in found)
    tail = "".join(f", {n} rejected at stage {stage!r}" for stage, n in failed.items())
    print(f"{len(choices)} choices, {candidates} candidates{tail}")
    return 0


def _speed(r: "Record") -> str:
    from sparsegen.tuning.space import Measured

    assert isinstance(r.outcome, Measured)
    burst = f" ({median(r.outcome.burst):.4g} in a burst)" if r.outcome.burst else ""
    return f"{r.outcome.micros:.4g} us{burst}, {1 / r.outcome.ratio:.2f}x the default"


def _merge(args: argparse.Namespace) -> int:
    from sparsegen.tuning import records

    if args.into.exists():
        raise TuningError(f"{args.into} exists", hint="merge into a new file")
    merged = list(records.merge(args.files))
    if args.choices:
        merged = list(records.choices(merged).values())
    # The new file appears whole: a merge that is interrupted leaves nothing behind.
    part = args.into.with_name(f"{args.into.name}.{os.getpid()}.part")
    part.write_text("".join(r.to_json() + "\n" for r in merged))
    part.replace(args.into)
    print(f"{len(merged)} records in {args.into}")
    return 0


def _diff(args: argparse.Namespace) -> int:
    from sparsegen.tuning import records

    old, new = (records.choices(_read(path)) for path in (args.old, args.new))
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        known = a or b
        assert known is not None
        lines = [f"- {_speed(a)}  {a.candidate}"] if a else []
        lines += [f"+ {_speed(b)}  {b.candidate}"] if b else []
        if a and b and a.candidate == b.candidate:
            lines = [f"= {_speed(a)} -> {_speed(b)}  {b.candidate}"]
        print("\n  ".join([_title(known), *lines]))
    return 0
