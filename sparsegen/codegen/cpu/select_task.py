"""Say of a select task which heads share a list, what a key enumerates, what is not lowered."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsegen.codegen.cpu.rows import Sequence
from sparsegen.codegen.tvm import (
    Value,
)
from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import (
    Apply,
    Const,
    Expr,
    Head,
    Member,
    Stop,
    walk,
)
from sparsegen.lowering.tasks import SelectTask


def item_heads(task: SelectTask) -> int:
    """Return how many query heads share a list."""
    for key in task.keys[:-1]:
        match key:
            case Head():
                return 1
            case Apply("floordiv", (Head(), Const(int(divisor)))):
                return min(divisor, task.q.heads)
    return task.q.heads


def lanes_of_pass(task: SelectTask) -> int:
    """Return how many heads are scored at a time: those of a list that share a key head."""
    return math.gcd(item_heads(task), task.group)


def granule(key: Expr) -> tuple[int, int]:
    """Return (n, c) of a key (j + c) // n; (1, 0) for a position."""
    match key:
        case Apply("floordiv", (Apply("add", (_, Const(int(shift)))), Const(int(n)))):
            return n, shift
        case Apply("floordiv", (_, Const(int(n)))):
            return n, 0
    return 1, 0


@dataclass(frozen=True)
class Item:
    """One list: its sequence, group of heads (int32), and the query positions that share it."""

    sequence: Sequence
    group: Value
    first: Value  # absolute position, int32
    stop: Value
    row: Value  # of the output, int64
    key: Value  # the value of the query key, int32; 0 where there is none


def looked_up(task: SelectTask) -> list[Member]:
    """Return the selections that are looked up key by key instead of driving the iteration."""
    return [e for c in task.clauses for e in walk(c.residual) if isinstance(e, Member)]


def mixed_stops(task: SelectTask) -> bool:
    """Tell whether an expression counts positions of another axis than the keys'."""
    axis = task.k.rows.entries
    exprs = [task.where, task.force, task.topk, task.mod, task.act]
    stops = [e for x in exprs if x is not None for e in walk(x) if isinstance(e, Stop)]
    return any(
        s.role == "key" and (s.axis if isinstance(s.axis, Entries) else None) != axis for s in stops
    )
