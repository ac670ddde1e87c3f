"""Print what is installed: patterns, schedules, architectures, verbs, and what is tuned."""

import argparse
import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsegen.plugins import Plugins, discover

HELP = "list patterns, schedules, architectures, strategies, verbs and what is tuned"

_TUNED = "tuned"
_CONSTANTS = ("FAMILY", "REQUIRES", "PRIORITY", "HELP")


def _kinds() -> dict[str, Plugins]:
    return {
        "patterns": discover("sparsegen.patterns", "pattern"),
        "schedules": discover("sparsegen.schedules", "schedule"),
        "archs": discover("sparsegen.arch", "architecture"),
        "strategies": discover("sparsegen.tuning.strategies", "strategy"),
        "verbs": discover("sparsegen.cli", "verb"),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sparsegen list`."""
    parser.add_argument(
        "what", nargs="?", choices=sorted([*_kinds(), _TUNED]), help="only this kind"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the catalogue; files are read, not imported."""
    kinds = _kinds()
    wanted = [args.what] if args.what else [*kinds, _TUNED]
    listed = {
        kind: _tuned()
        if kind == _TUNED
        else [describe(name, path) for name, path in kinds[kind].files().items()]
        for kind in wanted
    }
    if args.json:
        json.dump(listed, sys.stdout, indent=2)
        print()
        return 0
    for kind, rows in listed.items():
        print(f"{kind} ({len(rows)})")
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            extra = ", ".join(row.get("requires", ()))
            print(f"  {row['name']:<{width}}  {row['about']}" + (f"  [{extra}]" if extra else ""))
    return 0


def _tuned() -> list[dict[str, Any]]:
    """Return the choices that are shipped, a row for each processor."""
    from sparsegen.tuning.summary import processors

    return [{"name": row.name, "about": row.about, "file": str(row.file)} for row in processors()]


def describe(name: str, path: Path) -> dict[str, Any]:
    """Return the name, first docstring line and literal constants of a plug-in file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    about = (ast.get_docstring(tree) or "").partition("\n")[0]
    row: dict[str, Any] = {"name": name, "about": about}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=key)], value=value) if key in _CONSTANTS:
                row[key.lower()] = _literal(value)
            case ast.AnnAssign(target=ast.Name(id=key), value=ast.expr() as value) if (
                key in _CONSTANTS
            ):
                row[key.lower()] = _literal(value)
    return row


def _literal(value: ast.expr) -> Any:
    """Return a literal, a frozenset of literals sorted into a list; None for anything computed."""
    wrap: Callable[[Any], Any] = lambda x: x  # noqa: E731
    match value:
        case ast.Call(func=ast.Name(id="frozenset"), args=[]):
            return []
        case ast.Call(func=ast.Name(id="frozenset"), args=[inner]):
            value, wrap = inner, sorted
    try:
        return wrap(ast.literal_eval(value))
    except ValueError:
        return None
