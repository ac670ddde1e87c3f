"""Check the invariants of a program, always, before anything reads it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sparsegen.errors import PatternError, Site
from sparsegen.ir.axes import Axis
from sparsegen.ir.expr import Expr, Head, Pos, show, walk
from sparsegen.ir.node import Node
from sparsegen.ir.program import Program


def verify(program: Program, site: Site | None) -> None:
    """Raise PatternError unless every expression speaks of its own node's axes.

    A predicate of attend(q, k) may mention the positions of q and k and the heads of q; positions
    of other axes would be undefined there.
    """
    for node in program.nodes:
        for space, expr in _spaces(node):
            for leaf in walk(expr):
                _check_leaf(leaf, space, node, expr)
    unused = [n.name for n in program.inputs if n not in program.nodes]
    if unused:
        raise PatternError(
            f"{program.name} never uses {', '.join(unused)}", at=site, hint="drop the parameter"
        )


def _spaces(node: Node) -> list[tuple[tuple[Axis, Axis, Axis], Expr]]:
    """Return (query heads, query axis, key axis) with each expression evaluated in that space."""
    found: list[tuple[tuple[Axis, Axis, Axis], Expr]] = []
    pairs: list[tuple[Any, Any]] = []
    if node.op == "attend":
        pairs = [(s, s.k) for s in node.sources]  # type: ignore[attr-defined]
    elif node.op == "score":
        pairs = [(node, node.k)]  # type: ignore[attr-defined]
    for owner, k in pairs:
        q: Node = node.q  # type: ignore[attr-defined]
        space = (q.axes[1], q.axes[0], k.axes[0])
        holders = {id(owner): owner, id(node): node}.values()
        for holder in holders:
            for f in fields(holder):
                value = getattr(holder, f.name)
                # A mod is shared by all sources, so key positions there belong to the single one.
                if isinstance(value, Expr):
                    found.append((space, value))
    return found


def _check_leaf(leaf: Expr, space: tuple[Axis, Axis, Axis], node: Node, expr: Expr) -> None:
    heads, query, key = space
    match leaf:
        case Pos("query", axis) if axis != query:
            wrong = f"the query position of [{axis}], but its queries are [{query}]"
        case Pos("key", axis) if axis != key:
            wrong = f"the key position of [{axis}], but its keys are [{key}]"
        case Head(axis) if axis != heads:
            wrong = f"a head of [{axis}], but its query heads are [{heads}]"
        case _:
            return
    raise PatternError(
        f"{show(expr)} in {node.op}() mentions {wrong}",
        at=node.site,
        hint="take i, j from sg.index(q, k) of the q and k at hand, h from sg.head(q)",
    )
