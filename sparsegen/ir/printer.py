"""Print a program as text that reads like the pattern it came from."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sparsegen.ir.expr import Expr, Member, rebuild, show
from sparsegen.ir.node import Input, Node
from sparsegen.ir.program import Program

_HIDDEN = frozenset({"axes", "site"})


class _Label(str):
    """A printed name standing in for a selection node inside an expression."""

    label: _Label


def show_program(program: Program) -> str:
    """Return one line per value: name, axes, verb and arguments."""
    names: dict[Node, str] = {}
    hyper = ", ".join(f"{k}={v!r}" for k, v in program.hyper)
    params = ", ".join(f"{n.name}: [{_axes(n)}]" for n in program.inputs)
    lines = [f"pattern {program.name}({params}{'; ' + hyper if hyper else ''})"]
    for node in program.nodes:
        if isinstance(node, Input):
            names[node] = node.name
            continue
        names[node] = f"%{len(names) - sum(isinstance(n, Input) for n in names)}"
        args = ", ".join(_arguments(node, names))
        space = f": [{_axes(node)}]" if node.op not in ("reduce", "select") else ""
        lines.append(f"  {names[node]}{space} = {node.op}({args})")
    results = ", ".join(
        names[out.node] + ("" if out.what == "o" else f".{out.what}") for out in program.outputs
    )
    return "\n".join([*lines, f"  return {results}"])


def _axes(node: Node) -> str:
    return " ".join(map(str, node.axes))


def _arguments(node: Node, names: dict[Node, str]) -> list[str]:
    shown = []
    for f in fields(node):
        value = getattr(node, f.name)
        if f.name in _HIDDEN or value is None or value == f.default:
            continue
        shown.append(f"{f.name}={_value(value, names)}")
    return shown


def _value(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, Expr):
        return show(rebuild(value, lambda e: _named(e, names)))
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(v, names) for v in value) + "]"
    if hasattr(value, "__dataclass_fields__"):
        inner = (f"{f.name}={_value(getattr(value, f.name), names)}" for f in fields(value))
        return "(" + ", ".join(inner) + ")"
    return repr(value)


def _named(expr: Expr, names: dict[Node, str]) -> Expr | None:
    if not isinstance(expr, Member):
        return None
    label = _Label(names[expr.selection])
    label.label = label
    keys = tuple(rebuild(k, lambda e: _named(e, names)) for k in expr.keys)
    return Member(label, keys)  # type: ignore[arg-type]
