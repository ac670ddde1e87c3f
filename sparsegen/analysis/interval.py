"""Bound the keys that satisfy an affine inequality for some, or for all, queries of a tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparsegen.analysis.affine import Affine, Floor, Term, affine, constant, leaf, to_expr
from sparsegen.ir.axes import Axis
from sparsegen.ir.expr import Apply, Const, Expr, Pos, Stop, Symbol, apply

I_MIN, I_MAX = Symbol("i_min"), Symbol("i_max")
Quantifier = Literal["some", "all"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Keys lo <= j < hi of a query tile.

    `lo` and `hi` are expressions over Symbol("i_min") and Symbol("i_max") (first and last absolute
    query position of the tile), Stop and Const; the true bound is max over `lo`, min over `hi`.
    """

    lo: tuple[Expr, ...]
    hi: tuple[Expr, ...]

    def __and__(self, other: Interval) -> Interval:
        return Interval(lo=_unique(self.lo + other.lo), hi=_unique(self.hi + other.hi))


def whole(key: Axis) -> Interval:
    """Return all keys of the axis."""
    return Interval(lo=(Const(0),), hi=(Stop("key", key),))


@dataclass(frozen=True)
class Space:
    """The positions an inequality speaks of; anything else but stops is unknown."""

    query: Axis
    key: Axis

    @property
    def i(self) -> Pos:
        """Return the query position."""
        return Pos("query", self.query)

    @property
    def j(self) -> Pos:
        """Return the key position."""
        return Pos("key", self.key)

    def knows(self, bound: Affine) -> bool:
        """Tell whether every leaf is i, j or a stop, and every divisor a number."""
        own = (self.i, self.j, Stop("key", self.key), Stop("query", self.query))
        return all(x in own for x in bound.leaves()) and _closed(bound)


def _closed(bound: Affine) -> bool:
    floors = [t for t, _ in bound.terms if isinstance(t, Floor)]
    return all(isinstance(t.divisor, int) and _closed(t.inner) for t in floors)


def solve(bound: Affine, space: Space, over: Quantifier) -> Interval | None:
    """Return the keys with `bound <= 0` for some (or all) i of the tile; None if there are none.

    For "some" the interval may be larger than the truth, for "all" smaller; never the reverse.
    """
    solver = _Solver(space, over)
    if not solver.add(bound):
        return None
    return Interval(lo=_unique(tuple(solver.lo)), hi=_unique(tuple(solver.hi)))


class _Solver:
    def __init__(self, space: Space, over: Quantifier) -> None:
        self.space = space
        self.over = over
        self.lo: list[Expr] = []
        self.hi: list[Expr] = []

    def add(self, bound: Affine) -> bool:
        """Take `bound <= 0` into account; return False if no key can satisfy it."""
        bound = self._relax_keys(bound)
        mixed = self.over == "some" and self._directions(bound) == {1, -1}
        feasible = self._isolate(bound)
        if feasible and mixed:
            # i - B * (i // B) is bounded by the sum of its terms and by relaxing the floor.
            feasible = self._isolate(_relax(bound, "some", self._has_i))
        return feasible

    def _has_i(self, term: Term) -> bool:
        return self.space.i in leaf(term).leaves()

    def _has_j(self, term: Term) -> bool:
        return self.space.j in leaf(term).leaves()

    def _relax_keys(self, bound: Affine) -> Affine:
        """Leave one term with j, and that one free of i unless it is the only term with i."""
        while True:
            keys = [t for t, _ in bound.terms if self._has_j(t)]
            floors = [t for t in keys if isinstance(t, Floor)]
            rest = [t for t, _ in bound.terms if self._has_i(t) and t not in floors]
            mixed = [t for t in floors if self._has_i(t)]
            chosen = floors if len(keys) > 1 else mixed if rest else []
            if not chosen:
                return bound
            bound = _relax(bound, self.over, chosen.__contains__)

    def _isolate(self, bound: Affine) -> bool:
        """Solve for j: c * j + r <= 0, b * floor(x / m) + r <= 0, or a condition on the tile."""
        keys = [(t, c) for t, c in bound.terms if self._has_j(t)]
        if not keys:
            return self._gate(self._extreme(bound))
        ((term, factor),) = keys
        rest = self._extreme(bound - leaf(term) * factor)
        if isinstance(term, Floor):
            assert isinstance(term.divisor, int)
            if factor > 0:
                most = (-rest) // factor
                return self.add(term.inner - (most + 1) * term.divisor + 1)
            least = -((-rest) // -factor)
            return self.add(least * term.divisor - term.inner)
        if factor > 0:
            self.hi.append(to_expr((-rest) // factor + 1))
        else:
            self.lo.append(to_expr(-((-rest) // -factor)))
        return True

    def _gate(self, value: Affine) -> bool:
        """Admit every key of tiles with value <= 0, none of the others."""
        if nonnegative(-value):
            return True
        if nonnegative(value - 1):
            return False
        holds = Apply("le", (to_expr(value), Const(0)))
        self.hi.append(Apply("where", (holds, Stop("key", self.space.key), Const(0))))
        return True

    def _directions(self, bound: Affine) -> set[int]:
        found = set()
        for term, factor in bound.terms:
            if self._has_i(term) and not self._has_j(term):
                slope = _slope(term, self.space.i)
                found |= {1, -1} if slope == 0 else {slope * (1 if factor > 0 else -1)}
        return found

    def _extreme(self, rest: Affine) -> Affine:
        """Return the least (or greatest) value of `rest` over the tile, bounding term by term."""
        total = constant(rest.const)
        for term, factor in rest.terms:
            if not self._has_i(term):
                total += leaf(term) * factor
                continue
            total += self._term_extreme(term, (factor > 0) == (self.over == "all")) * factor
        return total

    def _term_extreme(self, term: Term, greatest: bool) -> Affine:
        if isinstance(term, Floor):
            assert isinstance(term.divisor, int)
            inner = constant(term.inner.const)
            for t, c in term.inner.terms:
                up = greatest == (c > 0)
                inner += (self._term_extreme(t, up) if self._has_i(t) else leaf(t)) * c
            return inner // term.divisor
        return leaf(I_MAX if greatest else I_MIN)


def _slope(term: Term, i: Expr) -> int:
    """Return +1 or -1 if `term` never falls or never rises with i, 0 if neither is evident."""
    if not isinstance(term, Floor):
        return 1
    signs = {
        _slope(t, i) * (1 if c > 0 else -1) for t, c in term.inner.terms if i in leaf(t).leaves()
    }
    return signs.pop() if len(signs) == 1 else 0


def _relax(bound: Affine, over: Quantifier, chosen: Any) -> Affine:
    """Replace chosen floors by x / m or (x - m + 1) / m, whichever keeps the bound valid.

    The result is scaled by the divisors, which does not change the sign of the bound.
    """
    for term, factor in bound.terms:
        if isinstance(term, Floor) and chosen(term):
            m = term.divisor
            assert isinstance(m, int)
            below = (factor > 0) == (over == "some")
            linear = term.inner - (m - 1) if below else term.inner
            return _relax((bound - leaf(term) * factor) * m + linear * factor, over, chosen)
    return bound


def nonnegative(value: Affine) -> bool:
    """Tell whether `value` >= 0 is evident, knowing i_min <= i_max and stops >= 0."""
    return _nonnegative(value) or _nonnegative(_single(value))


def _single(value: Affine) -> Affine:
    """Bound `value` from below by writing i_min for i_max wherever it grows with i_max."""
    total = constant(value.const)
    for term, factor in value.terms:
        grows = I_MAX in leaf(term).leaves() and _slope(term, I_MAX) * factor > 0
        total += (_at_start(term) if grows else leaf(term)) * factor
    return total


def _at_start(term: Term) -> Affine:
    if isinstance(term, Floor):
        inner = constant(term.inner.const)
        for t, c in term.inner.terms:
            inner += _at_start(t) * c
        return inner // term.divisor
    return leaf(I_MIN if term == I_MAX else term)


def _nonnegative(value: Affine) -> bool:
    value = _relax(value, "some", lambda _: True)
    factors = dict(value.terms)
    first, last = factors.pop(I_MIN, 0), factors.pop(I_MAX, 0)
    if first + last != 0 or last < 0 or value.const < 0:
        return False
    return all(isinstance(t, Stop) and c > 0 for t, c in factors.items())


def below(a: Expr, b: Expr) -> bool:
    """Tell whether a <= b is evident for bounds of a tile."""
    if a == b:
        return True
    match a, b:
        case _, Apply("max", args) if any(below(a, x) for x in args):
            return True
        case Apply("min", args), _ if any(below(x, b) for x in args):
            return True
        case Apply("max", args), _:
            return all(below(x, b) for x in args)
        case _, Apply("min", args):
            return all(below(a, x) for x in args)
        case Apply("where", (_, x, y)), _:
            return below(x, b) and below(y, b)
        case _, Apply("where", (_, x, y)):
            return below(a, x) and below(a, y)
    low, high = affine(a), affine(b)
    return low is not None and high is not None and nonnegative(high - low)


def empty(interval: Interval) -> bool:
    """Tell whether the interval evidently holds no key, whatever the tile."""
    return any(below(h, low) for h in interval.hi for low in interval.lo)


def tidy(interval: Interval) -> Interval:
    """Drop bounds that another one evidently implies."""
    lo = _tightest(interval.lo, lambda a, b: below(b, a))
    return Interval(lo=lo, hi=_tightest(interval.hi, below))


def _tightest(bounds: tuple[Expr, ...], implies: Any) -> tuple[Expr, ...]:
    kept: list[Expr] = []
    for n, bound in enumerate(bounds):
        others = [*kept, *bounds[n + 1 :]]
        if not any(implies(other, bound) for other in others):
            kept.append(bound)
    return tuple(kept)


def fold(op: Literal["min", "max"], bounds: tuple[Expr, ...]) -> Expr:
    """Return the least or greatest of the bounds as one expression."""
    result = bounds[0]
    for bound in bounds[1:]:
        result = apply(op, result, bound)
    return result


def _unique(bounds: tuple[Expr, ...]) -> tuple[Expr, ...]:
    return tuple(dict.fromkeys(bounds))


def evaluate(
    interval: Interval, i_min: Any, i_max: Any, stops: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Return (lo, hi) of tiles, lo <= hi; integers or numpy arrays of equal shape.

    Args:
        interval: closed-form bounds.
        i_min: first absolute query position of each tile.
        i_max: last one.
        stops: "query" and "key": the exclusive ends of the two axes in the sequence.
    """
    import numpy as np

    env = {"i_min": i_min, "i_max": i_max}
    los = [value_of(e, env, stops) for e in interval.lo]
    his = [value_of(e, env, stops) for e in interval.hi]
    lo, hi = los[0], his[0]
    for other in los[1:]:
        lo = np.maximum(lo, other)
    for other in his[1:]:
        hi = np.minimum(hi, other)
    hi = np.maximum(lo, hi)
    if np.ndim(i_min) == 0:
        return int(lo), int(hi)
    lo, hi, _ = np.broadcast_arrays(lo, hi, i_min)
    return lo, hi


def value_of(expr: Expr, env: Mapping[str, Any], stops: Mapping[str, Any]) -> Any:
    """Evaluate the bound of an interval on integers or numpy arrays."""
    import numpy as np

    match expr:
        case Const(value):
            return value
        case Symbol(name):
            return env[name]
        case Stop(role):
            return stops[role]
        case Apply(op, args):
            values = [value_of(a, env, stops) for a in args]
            functions: dict[str, Any] = {
                "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative,
                "floordiv": np.floor_divide, "min": np.minimum, "max": np.maximum,
                "le": np.less_equal, "where": np.where,
            }  # fmt: skip
            return functions[op](*values)
    raise ValueError(f"{expr} is no bound")
