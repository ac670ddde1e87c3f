"""Say how much memory the values between the tasks of a plan take, as an expression of letters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparsegen.analysis.cost import Costing, stored
from sparsegen.analysis.sums import Sympy, letter
from sparsegen.ir.expr import Expr, Pos, walk
from sparsegen.ir.node import Node
from sparsegen.lowering.plan import Plan
from sparsegen.primitives import Select

if TYPE_CHECKING:
    from sparsegen.lowering.tasks import Buffer

ITEMSIZE = {"float32": 4, "int32": 4, "bfloat16": 2, "float16": 2}


def workspace(plan: Plan, at: Costing, batch: int = 1) -> Sympy:
    """Return the bytes allocated for the intermediates of a call; all of them live to its end.

    Args:
        plan: of the program that `at` costs.
        at: gives extents as letters.
        batch: how many sequences, each with the lengths that the letters stand for.
    """
    import sympy as sp

    between = {b.name for b in plan.intermediates}
    total = sp.Integer(0)
    nodes = [n for n in at.program.nodes if stored(n)]
    for node, task in zip(nodes, plan.tasks, strict=True):
        for buffer in task.writes:
            if buffer.name in between:
                row = _row(node, buffer, plan, at)
                total += _rows(buffer, at, batch) * row * ITEMSIZE[buffer.dtype]
    return total


def scratch(taken: Iterable[tuple[Buffer, Expr]], at: Costing, batch: int = 1) -> Sympy:
    """Return the bytes that a schedule takes beside the buffers of its task, in every call.

    Args:
        taken: buffers, each with the capacity of its extent -1.
        at, batch: as for `workspace`.
    """
    import sympy as sp

    total = sp.Integer(0)
    for buffer, capacity in taken:
        rows = 1 if buffer.rows.space == "none" else _rows(buffer, at, batch)
        wide = at.extents.bound(capacity, sp.oo, sp.oo)
        elements = sp.prod(wide if size == -1 else size for size in buffer.shape)
        total += rows * elements * ITEMSIZE[buffer.dtype]
    return total


def _rows(buffer: Buffer, at: Costing, batch: int) -> Sympy:
    """Return how many rows a buffer has; see `Rows`."""
    import sympy as sp

    queries, keys = (batch * letter(x) for x in (at.program.query, at.program.key))
    rows = buffer.rows
    match rows.space:
        case "query":
            return queries
        case "key":
            return keys
        case "entry":
            assert rows.entries is not None
            parent = queries if rows.role == "query" else keys
            return sp.floor(parent / rows.entries.stride) + batch
        case "query_block":
            return sp.floor(queries / rows.block) + 2 * batch
    return sp.Integer(batch)


def _row(node: Node, buffer: Buffer, plan: Plan, at: Costing) -> Sympy:
    """Return how many elements a row has."""
    import sympy as sp

    if isinstance(node, Select):
        groups = [k for k in node.keys[:-1] if not any(isinstance(e, Pos) for e in walk(k))]
        width = buffer.shape[-1]
        if width == -1:
            stop = at.extents.bound(dict(plan.widths)[buffer.name], sp.oo, sp.oo)
            return sp.prod(map(at.values_of, groups)) * stop
        return sp.prod(map(at.values_of, groups)) * width
    axes = node.axes[1:] if len(buffer.shape) == len(node.axes) - 1 else node.axes[1:2]
    return sp.prod(map(at.size, axes))
