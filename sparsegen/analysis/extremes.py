"""Tell whether a predicate may hold, and whether it must, where its leaves take ranges of values.

Over queries of one document, documents 3 to 3, and keys of documents 1 to 2, `doc[i] == doc[j]`
holds nowhere; over keys of documents 3 to 3 it holds for every pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.ir.expr import COMPARE, FALSE, TRUE, Apply, Const, Expr, apply, kind

_SWAPPED = {"gt": "lt", "ge": "le"}


@dataclass(frozen=True)
class Ends:
    """The least and the greatest value of an integer, or bounds of them."""

    lo: Expr
    hi: Expr


# Returns the ends of a position, a table or anything else with a value of its own; None: unknown.
Leaf = Callable[[Expr], Ends | None]


def truth(predicate: Expr, leaf: Leaf) -> tuple[Expr, Expr]:
    """Return whether a predicate may hold for some values of its leaves, and must hold for all.

    Both are predicates over the ends of the leaves; the first may hold more often, the second less.
    Leaves are taken to be independent of each other.
    """
    match predicate:
        case Const(value):
            return (TRUE, TRUE) if value else (FALSE, FALSE)
        case Apply("not", (x,)):
            may, must = truth(x, leaf)
            return apply("not", must), apply("not", may)
        case Apply(("and" | "or") as op, (a, b)):
            left, right = truth(a, leaf), truth(b, leaf)
            return apply(op, left[0], right[0]), apply(op, left[1], right[1])
        case Apply(op, (a, b)) if op in COMPARE:
            one, other = ends(a, leaf), ends(b, leaf)
            return (TRUE, FALSE) if one is None or other is None else _compare(op, one, other)
    found = ends(predicate, leaf)
    if found is None:
        return TRUE, FALSE
    return _compare("ne", found, Ends(Const(0), Const(0)))


def _compare(op: str, x: Ends, y: Ends) -> tuple[Expr, Expr]:
    if op in _SWAPPED:
        return _compare(_SWAPPED[op], y, x)
    if op in ("lt", "le"):
        return apply(op, x.lo, y.hi), apply(op, x.hi, y.lo)
    if op == "ne":
        may, must = _compare("eq", x, y)
        return apply("not", must), apply("not", may)
    overlap = apply("and", apply("le", x.lo, y.hi), apply("le", y.lo, x.hi))
    return overlap, apply("and", apply("eq", x.lo, y.hi), apply("eq", x.hi, y.lo))


def ends(expr: Expr, leaf: Leaf) -> Ends | None:
    """Return bounds of an integer expression; None where there are none, or it is no integer."""
    if isinstance(expr, Const):
        return Ends(expr, expr) if kind(expr) == "int" else None
    if not isinstance(expr, Apply):
        return leaf(expr)
    if expr.op == "where":
        condition, yes, no = expr.args
        return _either(truth(condition, leaf), ends(yes, leaf), ends(no, leaf))
    found = [ends(x, leaf) for x in expr.args]
    known = [x for x in found if x is not None]
    return _number(expr.op, known) if len(known) == len(found) else None


def _either(when: tuple[Expr, Expr], yes: Ends | None, no: Ends | None) -> Ends | None:
    """Return the ends of a choice, given when its condition may and must hold."""
    if yes is None or no is None:
        return None
    may, must = when
    lo, hi = apply("min", yes.lo, no.lo), apply("max", yes.hi, no.hi)
    lo = apply("where", must, yes.lo, apply("where", may, lo, no.lo))
    return Ends(lo, apply("where", must, yes.hi, apply("where", may, hi, no.hi)))


def _number(op: str, args: list[Ends]) -> Ends | None:
    match op, args:
        case (("add" | "min" | "max"), [x, y]):
            return Ends(apply(op, x.lo, y.lo), apply(op, x.hi, y.hi))
        case "sub", [x, y]:
            return Ends(apply("sub", x.lo, y.hi), apply("sub", x.hi, y.lo))
        case "neg", [x]:
            return Ends(apply("neg", x.hi), apply("neg", x.lo))
        case "mul", [x, y]:
            one, other = (x, _constant(y)) if _constant(y) is not None else (y, _constant(x))
            return None if other is None else _times(one, other)
        case (("floordiv" | "mod"), [x, y]):
            divisor = _constant(y)
            return None if divisor is None or divisor <= 0 else _divided(op, x, divisor)
    return None


def _constant(x: Ends) -> int | None:
    known = isinstance(x.lo, Const) and x.lo == x.hi
    return int(x.lo.value) if known and isinstance(x.lo, Const) else None


def _times(x: Ends, factor: int) -> Ends:
    low, high = (apply("mul", end, Const(factor)) for end in (x.lo, x.hi))
    return Ends(low, high) if factor >= 0 else Ends(high, low)


def _divided(op: str, x: Ends, divisor: int) -> Ends:
    first, last = (apply("floordiv", end, Const(divisor)) for end in (x.lo, x.hi))
    if op == "floordiv":
        return Ends(first, last)
    # Of several rounds, all remainders.
    same = apply("eq", first, last)
    lo, hi = (apply("mod", end, Const(divisor)) for end in (x.lo, x.hi))
    return Ends(apply("where", same, lo, Const(0)), apply("where", same, hi, Const(divisor - 1)))
