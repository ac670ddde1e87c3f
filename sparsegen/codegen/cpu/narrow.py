"""Narrow the range of a tile by what integer tables say, see `narrowing`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import Bounds, cell, get, pin, put
from sparsegen.codegen.exprs import emit
from sparsegen.codegen.narrowing import KEYS, at_keys, names_of, seen, tables_of
from sparsegen.codegen.tvm import T, Value, cast, const, maximum, minimum
from sparsegen.ir.expr import Expr, Table
from sparsegen.lowering.tasks import Clause

if TYPE_CHECKING:
    from sparsegen.codegen.cpu.view import View

_LAST = 2**31 - 1


def narrow(view: View, clause: Clause, hull: Bounds) -> Bounds:
    """Return bounds inside a hull, from the first 64 keys with a visible pair to the last."""
    tables = tables_of([clause])
    keyed = at_keys(tables)
    known: dict[str, Value] = {}
    for table in (t for t in tables if t not in keyed):
        known |= _ends(view, table, view.i_min, view.present)
    lo, hi = (cell("int32", const(n, "int32")) for n in (_LAST, 0))
    sure_lo, sure_hi = (cell("int32", const(n, "int32")) for n in (0, -1))
    begin = pin(hull.lo // KEYS)
    blocks = maximum((hull.hi + (KEYS - 1)) // KEYS - begin, const(0, "int32"))
    with T.serial(blocks) as n:
        first = pin(maximum((begin + n) * KEYS, hull.lo))
        end = pin(minimum((begin + n + 1) * KEYS, hull.hi))
        here = dict(known) | {"j_min": first, "j_max": T.bind(end - 1)}
        for table in keyed:
            here |= _ends(view, table, first, T.bind(end - first))
        may, must = (_value(view, e, here) for e in seen(clause))
        with T.If(may), T.Then():
            put(lo, minimum(get(lo), first))
            put(hi, end)
        with T.If(must), T.Then():
            # All pairs are visible from behind the last keys before them of which that is not so.
            with T.If(get(sure_hi) < first), T.Then():
                put(sure_lo, first)
            put(sure_hi, end)
    last = pin(get(hi))
    return Bounds(pin(minimum(get(lo), last)), last, pin(get(sure_lo)), pin(get(sure_hi)))


def _ends(view: View, table: Table, start: Value, count: Value) -> dict[str, Value]:
    """Return the least and the greatest entry at `count` > 0 positions from `start` on, by name."""
    first = view._table(table, (start,))
    low, high = cell("int32", first), cell("int32", first)
    with T.serial(count) as n:
        x = T.bind(view._table(table, (T.bind(start + cast(n, "int32")),)))
        put(low, minimum(get(low), x))
        put(high, maximum(get(high), x))
    return dict(zip(names_of(table), (pin(get(low)), pin(get(high))), strict=True))


def _value(view: View, expr: Expr, known: dict[str, Value]) -> Value:
    view.symbols.update(known)
    return T.bind(emit(view._closed(expr, {}), view._env()))
