"""Say how a selection is stored: its rows, its groups of heads and how many keys it may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsegen.errors import UnsupportedError
from sparsegen.ir.axes import Entries, extent
from sparsegen.ir.expr import Apply, BlockOf, Const, Expr, Head, Pos, Stop, apply, show, walk
from sparsegen.ir.node import Node
from sparsegen.lowering.tasks import Rows


def group_extents(keys: Sequence[Expr], sizes: Mapping[str, int], node: Node) -> tuple[int, ...]:
    """Return the extent of each key that groups heads: h, or h // n."""
    found = []
    for key in keys:
        match key:
            case Head(axis):
                found.append(extent(axis, dict(sizes)))
            case Apply("floordiv", (Head(axis), Const(divisor))):
                found.append(-(-extent(axis, dict(sizes)) // int(divisor)))
            case _ if any(isinstance(e, Head) for e in walk(key)):
                raise UnsupportedError(
                    f"a selection grouped by {show(key)} is not lowered",
                    at=node.site,
                    hint="group heads by h or h // n, as in h // q.group",
                )
    return tuple(found)


def list_rows(keys: Sequence[Expr], node: Node) -> Rows:
    """Return how the rows of a selection with these keys (without the last) are addressed."""
    match [k for k in keys if any(isinstance(e, Pos) for e in walk(k))]:
        case []:
            return Rows(space="batch")
        case [Pos("query", Entries(stride=stride))]:
            return Rows(space="query_block", block=stride)
        case [Pos("query")]:
            return Rows(space="query")
        case [Apply("floordiv", (Pos("query"), Const(block)))]:
            return Rows(space="query_block", block=int(block))
        case others:
            raise UnsupportedError(
                f"a selection keyed by {', '.join(map(show, others))} is not lowered",
                at=node.site,
                hint="key queries by i or i // n, once",
            )


def capacity(key: Expr, node: Node) -> Expr:
    """Return how many values the selected key takes, as an expression over Stop."""
    match key:
        case Pos("key", axis):
            return Stop("key", axis)
        case BlockOf(entries, width):
            return _ceil(Stop("key", entries.parent), width)
        case Apply("floordiv", (Pos("key", axis), Const(width))):
            return _ceil(Stop("key", axis), int(width))
        case Apply("floordiv", (Apply("add", (Pos("key", axis), Const(shift))), Const(width))):
            return _ceil(apply("add", Stop("key", axis), Const(shift)), int(width))
        case Apply("sub", (Pos("query", axis), Pos("key"))):
            return Stop("query", axis)
    raise UnsupportedError(
        f"select() over the key {show(key)} is not lowered",
        at=node.site,
        hint="select over j, j // n, i - j, entries, or kc.blocks(n)",
    )


def _ceil(total: Expr, width: int) -> Expr:
    return apply("floordiv", apply("add", total, Const(width - 1)), Const(width))
