"""Turn frozen dataclasses into a table of JSON rows and back; shared values are stored once."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args

from sparsegen.errors import Site
from sparsegen.ir import axes, expr
from sparsegen.ir import node as nodes


@cache
def _plain() -> dict[str, type]:
    from sparsegen.ir.program import Program

    leaves = [
        *get_args(axes.Axis),
        *get_args(expr.Expr),
        nodes.Output,
        Program,
        Site,
    ]
    return {cls.__name__: cls for cls in leaves}


def _classes() -> dict[str, type]:
    known: dict[str, type] = dict(_plain())
    for cls in nodes.NODES.values():
        known[cls.__name__] = cls
        known |= {c.__name__: c for c in getattr(cls, "PARTS", ())}
    return known


def encode(value: Any, *, sites: bool) -> dict[str, Any]:
    """Return {"rows": [...], "root": n}: each dataclass once, references as {"$": row}."""
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[str, Any], int] = {}

    def visit(item: Any) -> Any:
        if isinstance(item, tuple):
            return [visit(x) for x in item]
        if not is_dataclass(item):
            if isinstance(item, float):
                return {"float": item.hex()}
            return item
        key = (type(item).__name__, item)
        if key not in seen or _kinds(item) != _kinds_of_row(rows[seen[key]]):
            row = {
                f.name: visit(getattr(item, f.name))
                for f in fields(item)
                if sites or f.name != "site"
            }
            rows.append({"class": type(item).__name__, **row})
            seen[key] = len(rows) - 1
        return {"$": seen[key]}

    root = visit(value)
    return {"rows": rows, "root": root["$"]}


def _kinds(item: Any) -> str | None:
    # Const(1), Const(1.0) and Const(True) are equal in Python but not in the algebra.
    return type(item.value).__name__ if isinstance(item, expr.Const) else None


def _kinds_of_row(row: dict[str, Any]) -> str | None:
    if row["class"] != "Const":
        return None
    return "float" if isinstance(row["value"], dict) else type(row["value"]).__name__


def decode(table: dict[str, Any]) -> Any:
    """Rebuild what `encode` wrote; unknown classes and fields are refused."""
    known = _classes()
    built: list[Any] = []

    def value(item: Any) -> Any:
        if isinstance(item, list):
            return tuple(value(x) for x in item)
        if isinstance(item, dict):
            if "$" in item:
                return built[item["$"]]
            return float.fromhex(item["float"])
        return item

    for row in table["rows"]:
        name = row["class"]
        if name not in known:
            raise ValueError(f"unknown class {name!r} in a program")
        built.append(known[name](**{k: value(v) for k, v in row.items() if k != "class"}))
    return built[table["root"]]
