"""Write integer expressions as sums of positions and floors of such sums, in one canonical form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from math import gcd

from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import (
    Apply,
    BlockOf,
    Const,
    Expr,
    Head,
    KeyVar,
    Pos,
    Size,
    Stop,
    Symbol,
    apply,
    kind,
)


@dataclass(frozen=True)
class Floor:
    """floor(inner / divisor). The divisor is positive; it is an expression while sizes are open."""

    inner: Affine
    divisor: int | Expr


Term = Expr | Floor


@dataclass(frozen=True)
class Affine:
    """sum(coefficient * term) + const, terms sorted, no zero coefficient: equal sums are equal."""

    terms: tuple[tuple[Term, int], ...]
    const: int = 0

    def __add__(self, other: Affine | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.terms, self.const + other)
        total = dict(self.terms)
        for term, factor in other.terms:
            total[term] = total.get(term, 0) + factor
        kept = sorted(((t, c) for t, c in total.items() if c), key=lambda item: repr(item[0]))
        return Affine(tuple(kept), self.const + other.const)

    def __mul__(self, factor: int) -> Affine:
        if factor == 0:
            return Affine(())
        return Affine(tuple((t, c * factor) for t, c in self.terms), self.const * factor)

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Affine | int) -> Affine:
        return self + (-other)

    def __floordiv__(self, divisor: int | Expr) -> Affine:
        """Divide and round down, pulling out whatever the divisor divides.

        floor((d*x + y) / d) = x + floor(y / d); floor((floor(x / a) + c) / d) =
        floor((x + a*c) / (a*d)); floor((g*x + c) / (g*d)) = floor((x + floor(c / g)) / d).
        """
        if not isinstance(divisor, int):
            return leaf(Floor(self, divisor))
        whole = Affine(
            tuple((t, c // divisor) for t, c in self.terms if c % divisor == 0),
            self.const // divisor,
        )
        rest = tuple((t, c) for t, c in self.terms if c % divisor)
        const = self.const % divisor
        if not rest:
            return whole
        common = reduce(gcd, (c for _, c in rest), divisor)
        inner = Affine(tuple((t, c // common) for t, c in rest), const // common)
        divisor //= common
        match inner.terms:
            case ((Floor(below, int() as under), 1),):
                return whole + (below + under * inner.const) // (under * divisor)
        return whole + leaf(Floor(inner, divisor))

    @property
    def is_const(self) -> bool:
        """Tell whether there is no term."""
        return not self.terms

    def leaves(self) -> Iterator[Expr]:
        """Yield the expressions below every term, also inside floors."""
        for term, _ in self.terms:
            if isinstance(term, Floor):
                yield from term.inner.leaves()
            else:
                yield term


def leaf(term: Term) -> Affine:
    """Return the sum that is just `term`."""
    return Affine(((term, 1),))


def constant(value: int) -> Affine:
    """Return the sum without terms."""
    return Affine((), value)


def affine(expr: Expr, *, opaque: bool = False, merge_entries: bool = False) -> Affine | None:
    """Return the canonical sum of an integer expression, or None if it has none.

    Args:
        expr: built of positions, heads, stops, sizes and integers with + - * // %.
        opaque: keep what is not affine (min, max, tables, ...) as terms instead of giving up.
        merge_entries: write an entry of disjoint windows as the block of its parent positions,
            and a `BlockOf` key as the block it names, so that equal block indices compare equal.
    """

    def of(e: Expr) -> Affine | None:
        return affine(e, opaque=opaque, merge_entries=merge_entries)

    found: Affine | None = None
    match expr:
        case Const(int() as value) if not isinstance(value, bool):
            return constant(value)
        case Pos(role, Entries(parent, width, stride)) if merge_entries and width == stride:
            return leaf(Pos(role, parent)) // stride
        case BlockOf(axis, width) if merge_entries:
            return leaf(Pos("key", axis.parent)) // width
        case Pos() | Head() | Stop() | Size() | KeyVar() | BlockOf() | Symbol():
            return leaf(expr)
        case Apply("neg", (x,)):
            a = of(x)
            found = None if a is None else -a
        case Apply("add" | "sub" | "mul" | "floordiv" | "mod" as op, (x, y)):
            a, b = of(x), of(y)
            found = None if a is None or b is None else _combine(op, a, b)
    if found is None and opaque and kind(expr) == "int":
        return leaf(expr)
    return found


def _combine(op: str, a: Affine, b: Affine) -> Affine | None:
    match op:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul" if b.is_const:
            return a * b.const
        case "mul" if a.is_const:
            return b * a.const
        case "floordiv" if b.is_const and b.const > 0:
            return a // b.const
        case "floordiv" if not b.is_const and all(isinstance(x, Size) for x in b.leaves()):
            return a // to_expr(b)
        case "mod" if b.is_const and b.const > 0:
            return a - (a // b.const) * b.const
    return None


def to_expr(a: Affine) -> Expr:
    """Return an expression of the same value, positive terms first."""
    result: Expr | None = None
    for term, factor in sorted(a.terms, key=lambda item: item[1] < 0):
        part = _term_expr(term)
        part = part if abs(factor) == 1 else apply("mul", part, Const(abs(factor)))
        if result is None:
            result = part if factor > 0 else apply("neg", part)
        else:
            result = apply("add" if factor > 0 else "sub", result, part)
    if result is None:
        return Const(a.const)
    return apply("add" if a.const >= 0 else "sub", result, Const(abs(a.const)))


def _term_expr(term: Term) -> Expr:
    if not isinstance(term, Floor):
        return term
    divisor = Const(term.divisor) if isinstance(term.divisor, int) else term.divisor
    return apply("floordiv", to_expr(term.inner), divisor)
