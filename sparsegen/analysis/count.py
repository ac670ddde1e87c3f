"""Count the keys that queries see, as closed forms over named sizes, from the iteration domain.

j <= i                    ->  T * (2*S - T + 1) / 2  pairs of T queries at the end of S keys
(j <= i) & (i - j < 512)  ->  Min(512, S)            keys of the last query
(j <= i) & sel[i, j]      ->  Min(2048, S)           keys of the last query, for a budget of 2048

Ranges of one query are exact; what depends on data is assumed, and the assumption is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Any

from sparsegen.analysis.domain import Clause, Interval, clauses
from sparsegen.analysis.interval import I_MAX, I_MIN, evaluate
from sparsegen.analysis.sums import Sympy, closed_form, letter, position
from sparsegen.ir.axes import Axis, Concat, Entries, Fixed, Named
from sparsegen.ir.expr import (
    TRUE,
    Apply,
    Const,
    Expr,
    Head,
    Pos,
    Size,
    Stop,
    Symbol,
    rebuild,
    show,
    walk,
)

if TYPE_CHECKING:
    from sparsegen.ir.program import Program


@dataclass(frozen=True, kw_only=True)
class Keys:
    """How many keys the queries of one sequence see, for one head.

    total     pairs of a query and a key, over all queries
    last      keys of the last query, which sees the whole sequence behind it
    step      the most that `last` is, apart from incomplete windows: linear in the length or
              constant, as papers print it
    distinct  keys that some query sees; each has to be read at least once
    grows     whether later queries need ever more of the keys, or any of them
    assumed   what these numbers take for granted about data
    """

    total: Sympy
    last: Sympy
    step: Sympy
    distinct: Sympy
    grows: bool
    assumed: tuple[str, ...] = ()


class Extents:
    """Turn axes and bounds of intervals into sympy: letters stay symbols.

    A letter with the name of an integer hyperparameter is that number. `known` gives sizes to
    predicates that mention one (`h // q.group`); it does not enter the counts.
    """

    def __init__(self, program: Program, known: Mapping[str, int]) -> None:
        self.program = program
        sequence = {program.query, program.key}
        self.fixed = {
            n: v for n, v in program.hyper if n in program.letters - sequence and isinstance(v, int)
        }
        self.known = {**known, **self.fixed}

    def of(self, axis: Axis) -> Sympy:
        """Return the extent of an axis."""
        import sympy as sp

        match axis:
            case Named(name):
                return sp.Integer(self.fixed[name]) if name in self.fixed else letter(name)
            case Fixed(size):
                return sp.Integer(size)
            case Entries(parent, width, stride, partial):
                length = self.of(parent)
                if partial:
                    return sp.ceiling(length / stride)
                return sp.Max(0, sp.floor((length - width) / stride) + 1)
            case Concat(parts):
                return sum(map(self.of, parts), sp.Integer(0))

    def queries(self, axis: Axis) -> tuple[Sympy, Sympy]:
        """Return the first query position of the sequence and the position behind the last."""
        import sympy as sp

        first = letter(self.program.key) - letter(self.program.query)
        if isinstance(axis, Entries):
            first = sp.floor(first / axis.stride)
        return first, first + self.of(axis)

    def bound(self, expr: Expr, i_min: Sympy, i_max: Sympy) -> Sympy:
        """Return the bound of an interval over the query positions of a tile."""
        import sympy as sp

        match expr:
            case Const(value):
                return sp.Integer(int(value))
            case Symbol(name):
                return {I_MIN.name: i_min, I_MAX.name: i_max}[name]
            case Stop("query", axis):
                return self.queries(axis)[1]
            case Stop("key", axis):
                return self.of(axis)
            case Size(name):
                return self.of(Named(name))
            case Apply(op, args):
                values = [self.bound(a, i_min, i_max) for a in args]
                return _OPERATORS[op](sp, *values)
        raise ValueError(f"{show(expr)} is no bound")


_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "add": lambda sp, a, b: a + b,
    "sub": lambda sp, a, b: a - b,
    "mul": lambda sp, a, b: a * b,
    "neg": lambda sp, a: -a,
    "floordiv": lambda sp, a, b: sp.floor(a / b),
    "mod": lambda sp, a, b: sp.Mod(a, b),
    "min": lambda sp, a, b: sp.Min(a, b),
    "max": lambda sp, a, b: sp.Max(a, b),
    "le": lambda sp, a, b: sp.Le(a, b),
    "where": lambda sp, c, a, b: sp.Piecewise((a, c), (b, True)),
}


def count(where: Expr, *, query: Axis, key: Axis, heads: Sympy, extents: Extents) -> Keys:
    """Return how many keys of `key` the queries of `query` see under a predicate.

    Args:
        where: without open sizes.
        heads: key heads, over which the lists of a selection are spread.
        extents: of the program that the axes belong to.
    """
    import sympy as sp

    parts = [
        _clause(clause, query, key, heads, extents)
        for clause in clauses(where, query=query, key=key)
    ]
    total, last, step, distinct = (
        sum((getattr(p, what) for p in parts), sp.Integer(0))
        for what in ("total", "last", "step", "distinct")
    )
    return Keys(
        total=total,
        last=last,
        step=step,
        distinct=distinct if len(parts) < 2 else sp.Min(distinct, extents.of(key)),
        grows=any(p.grows for p in parts),
        assumed=tuple(dict.fromkeys(a for p in parts for a in p.assumed)),
    )


def _clause(clause: Clause, query: Axis, key: Axis, heads: Sympy, extents: Extents) -> Keys:
    import sympy as sp

    i = position()
    first, stop = extents.queries(query)
    budget, assumed, lists = None, [], sp.Integer(1)
    if clause.keys is not None:
        budget, said = _budget(clause, key, extents)
        lists = _lists(clause, heads, extents, stop - first)
        assumed.append(said)
        if lists != 1:
            assumed.append(f"the lists of {show(clause.keys.member)} share a key only if they must")
    if _hides(clause):
        assumed.append(
            f"every key in the range of {show(clause.residual)} counts, also those it hides"
        )
    los = [extents.bound(b, i, i) for b in clause.hull.lo]
    his = [extents.bound(b, i, i) for b in clause.hull.hi]
    width = sp.Max(0, sp.Min(*his) - sp.Max(*los))
    capped = width if budget is None else sp.Min(budget, width)
    until = sp.Min(*(extents.bound(b, first, stop - 1) for b in clause.hull.hi))
    wide = sp.Max(0, until - sp.Max(*(extents.bound(b, first, stop - 1) for b in clause.hull.lo)))
    step = _linear(clause.hull, extents, query, key)
    return Keys(
        total=closed_form(los, his, budget, first, stop),
        last=capped.subs(i, stop - 1),
        step=step if budget is None else budget,
        distinct=wide if budget is None else sp.Min(wide, budget * lists),
        grows=budget is not None or bool(step.free_symbols),
        assumed=tuple(assumed),
    )


def _hides(clause: Clause) -> bool:
    """Tell whether the residual may hide keys of one query's range."""
    if clause.residual == TRUE:
        return False
    if clause.full is None:
        return True
    return _single(clause.hull) != _single(clause.full)


def _single(interval: Interval) -> tuple[frozenset[Expr], frozenset[Expr]]:
    """Return the bounds of a tile of one query."""

    def one(expr: Expr) -> Expr:
        return rebuild(expr, lambda e: I_MIN if e == I_MAX else None)

    return frozenset(map(one, interval.lo)), frozenset(map(one, interval.hi))


def _budget(clause: Clause, key: Axis, extents: Extents) -> tuple[Sympy, str]:
    """Return how many keys a list stands for, and what that assumes."""
    import sympy as sp

    assert clause.keys is not None
    member, granule = clause.keys.member, clause.keys.granule
    selection: Any = member.selection
    name = show(member)
    whole = extents.of(key)
    leaves = () if selection.topk is None else tuple(walk(selection.topk))
    if selection.topk is None or any(isinstance(e, Pos | Head) for e in leaves):
        how = f"top_p={selection.top_p}" if selection.top_p is not None else "its rule"
        return whole, f"{name} holds every key: {how} depends on data"
    try:
        chosen = extents.bound(selection.topk, whole, whole)
    except (ValueError, KeyError):
        return whole, f"{name} holds every key: the budget {show(selection.topk)} depends on data"
    of = f" blocks of {granule}" if granule > 1 else " keys"
    return sp.Min(chosen * granule, whole) if not chosen.is_number else chosen * granule, (
        f"{name} holds {chosen}{of} of every query that may see so many"
    )


def _lists(clause: Clause, heads: Sympy, extents: Extents, rows: Sympy) -> Sympy:
    """Return how many lists choose from the keys of one key head."""
    import sympy as sp

    assert clause.keys is not None
    groups, found = sp.Integer(1), rows if clause.keys.slash else sp.Integer(1)
    for key in clause.keys.member.keys[:-1]:
        match key:
            case Head(axis):
                groups *= extents.of(axis)
            case Apply("floordiv", (Head(axis), Const(n))):
                groups *= sp.ceiling(extents.of(axis) / int(n))
            case Apply("floordiv", (Pos("query"), Const(n))):
                found *= sp.ceiling(rows / int(n))
            case _ if any(isinstance(e, Pos) for e in walk(key)):
                found *= rows
    return found * sp.Max(1, sp.ceiling(groups / heads))


def _linear(interval: Interval, extents: Extents, query: Axis, key: Axis) -> Sympy:
    """Return slope * length, or the greatest width, of the range of a query far from the start."""
    import numpy as np
    import sympy as sp

    period = 1
    for bound in (*interval.lo, *interval.hi):
        for e in walk(bound):
            if isinstance(e, Apply) and e.op == "floordiv" and isinstance(e.args[1], Const):
                period = lcm(period, int(e.args[1].value))
    for axis in (query, key):
        period = lcm(period, axis.stride if isinstance(axis, Entries) else 1)
    far = period << 32

    def widths(length: int) -> Any:
        i = np.arange(length - period, length)
        if isinstance(query, Entries):
            i = i // query.stride
        keys = key.count(length) if isinstance(key, Entries) else length
        lo, hi = evaluate(interval, i, i, {"query": int(i[-1]) + 1, "key": keys})
        return hi - lo

    near, beyond = widths(far), widths(2 * far)
    slope = Fraction(int(beyond[-1] - near[-1]), far)
    if slope == 0:
        return sp.Integer(int(near.max()))
    parent = key.parent if isinstance(key, Entries) else key
    return sp.Rational(slope.numerator, slope.denominator) * extents.of(parent)
