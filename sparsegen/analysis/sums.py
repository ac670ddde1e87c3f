"""Sum clipped staircases over positions in closed form; evaluate what has none with numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

Sympy = Any
"""A sympy expression; sympy has no types."""


@cache
def letter(name: str) -> Sympy:
    """Return the symbol of a letter: a positive integer."""
    import sympy as sp

    return sp.Symbol(name, positive=True, integer=True)


@cache
def position() -> Sympy:
    """Return the symbol of a query position."""
    import sympy as sp

    return sp.Symbol("i", integer=True)


@dataclass(frozen=True)
class _Clip:
    """clip(floor((i + c) / m), lo, hi), with lo <= hi; m = 0 stands for the constant `lo`."""

    m: int
    c: Sympy
    lo: Sympy
    hi: Sympy


def closed_form(
    los: Sequence[Sympy], his: Sequence[Sympy], budget: Sympy | None, first: Sympy, stop: Sympy
) -> Sympy:
    """Return the sum over first <= i < stop of min(budget, max(0, min(his) - max(los))).

    A form without a sum sign where the bounds are constants and floors of i + c, one of each at
    most; a sympy Sum otherwise.
    """
    import sympy as sp

    rows = sp.Max(0, stop - first) if (stop - first).is_nonnegative is not True else stop - first
    lo, hi = _clipped(sp.Max(*los)), _clipped(sp.Min(*his))
    if lo is not None and hi is not None:
        if lo.m == 0:
            width = _shift(_at_least(hi, lo.lo), -lo.lo)
            return _sum(width if budget is None else _at_most(width, budget), first, stop, rows)
        window = (lo.m, lo.hi) == (1, sp.oo) and lo.lo != -sp.oo
        if budget is None and window and hi.m == 0:
            return rows * sp.Max(0, hi.lo - lo.lo) - _pairs(lo.c, lo.lo, hi.lo, first, stop)
        if budget is None and window and (hi.m, hi.lo) == (1, -sp.oo) and hi.hi != sp.oo:
            until = sp.Max(hi.c, lo.c)
            return _pairs(until, lo.lo, hi.hi, first, stop) - _pairs(
                lo.c, lo.lo, hi.hi, first, stop
            )
    width = sp.Max(0, sp.Min(*his) - sp.Max(*los))
    summand = width if budget is None else sp.Min(budget, width)
    return sp.Sum(summand, (position(), first, stop - 1))


def _clipped(expr: Sympy) -> _Clip | None:
    """Read an expression over i as a clipped staircase."""
    import sympy as sp

    i = position()
    if not expr.has(i):
        return _Clip(0, sp.Integer(0), expr, expr)
    if expr.func in (sp.Max, sp.Min):
        rest = [a for a in expr.args if a.has(i)]
        level = expr.func(*(a for a in expr.args if not a.has(i)))
        inner = _clipped(rest[0]) if len(rest) == 1 else None
        if inner is None:
            return None
        return _at_least(inner, level) if expr.func is sp.Max else _at_most(inner, level)
    level, moving = expr.as_independent(i, as_Add=True)
    if moving == i:
        return _Clip(1, level, -sp.oo, sp.oo)
    if moving.func is sp.floor:
        numerator, denominator = sp.fraction(sp.together(moving.args[0]))
        offset = numerator - i
        if denominator.is_Integer and not offset.has(i):
            m = int(denominator)
            return _Clip(m, offset + m * level, -sp.oo, sp.oo)
    if level != 0 and moving.func in (sp.Max, sp.Min):
        inner = _clipped(moving)
        return None if inner is None else _shift(inner, level)
    return None


def _at_least(x: _Clip, level: Sympy) -> _Clip:
    import sympy as sp

    return _Clip(x.m, x.c, sp.Max(x.lo, level), sp.Max(x.hi, level))


def _at_most(x: _Clip, level: Sympy) -> _Clip:
    import sympy as sp

    return _Clip(x.m, x.c, sp.Min(x.lo, level), sp.Min(x.hi, level))


def _shift(x: _Clip, by: Sympy) -> _Clip:
    return _Clip(x.m, x.c + x.m * by, x.lo + by, x.hi + by)


def _sum(x: _Clip, first: Sympy, stop: Sympy, rows: Sympy) -> Sympy:
    """Sum a staircase that is bounded below: lo + ramp(i + c - m*lo) - ramp(i + c - m*hi)."""
    import sympy as sp

    total = rows * x.lo
    if x.m == 0:
        return total
    total += _ramps(x.m, x.c - x.m * x.lo, first, stop)
    return total if x.hi == sp.oo else total - _ramps(x.m, x.c - x.m * x.hi, first, stop)


def _pairs(c: Sympy, lo: Sympy, hi: Sympy, first: Sympy, stop: Sympy) -> Sympy:
    """Count (i, j) with first <= i < stop, lo <= j < hi and j < i + c."""
    import sympy as sp

    hi = sp.Max(lo, hi)
    return _ramps(1, c - lo, first, stop) - _ramps(1, c - hi, first, stop)


def _ramps(m: int, c: Sympy, first: Sympy, stop: Sympy) -> Sympy:
    """Return the sum over first <= i < stop of max(0, floor((i + c) / m))."""
    return _area(m, stop - 1 + c) - _area(m, first - 1 + c)


def _area(m: int, n: Sympy) -> Sympy:
    """Return floor(1 / m) + floor(2 / m) + ... + floor(n / m); zero for negative n."""
    import sympy as sp

    n = sp.Max(0, n)
    if m == 1:
        return n * (n + 1) / 2
    steps = sp.floor(n / m)
    return steps * (n + 1) - m * steps * (steps + 1) / 2


def value(expr: Sympy, sizes: Mapping[str, int]) -> int | float:
    """Return the number that an expression is at these sizes: exact where it is whole.

    Raises:
        KeyError: a letter has no size; the argument names it.
    """
    import sympy as sp

    expr = sp.sympify(expr)
    given = {letter(name): size for name, size in sizes.items()}
    totals = {s: sp.Integer(_total(s, given)) for s in expr.atoms(sp.Sum)}
    found = expr.xreplace(totals).subs(given)
    if missing := sorted(map(str, found.free_symbols)):
        raise KeyError(", ".join(missing))
    return int(found) if found.is_integer else float(found)


def _total(s: Sympy, given: Mapping[Sympy, int]) -> int:
    """Evaluate one sum, all positions at once."""
    import numpy as np
    import sympy as sp

    summand, (i, low, high) = s.args[0].subs(given), s.args[1]
    low, high = int(low.subs(given)), int(high.subs(given))
    values = sp.lambdify(i, summand, modules="numpy")(np.arange(low, high + 1))
    return int(np.sum(np.broadcast_to(values, max(0, high + 1 - low))))


def readable(expr: Sympy, query: str, key: str) -> str:
    """Print an expression, simplified for queries that are the last of the keys."""
    import sympy as sp

    expr = sp.sympify(expr)
    if query != key and {letter(query), letter(key)} & expr.free_symbols:
        past = sp.Symbol("_past", nonnegative=True, integer=True)
        expr = expr.subs(letter(key), letter(query) + past)
        expr = sp.factor_terms(sp.expand(expr)).subs(past, letter(key) - letter(query))
    return str(sp.factor_terms(expr) if expr.has(sp.floor, sp.Sum) else sp.factor(expr))
