"""Differentiate score mods and activations by sympy, sharing what the forward computes anyway.

cap * tanh(s / cap)  ->  t0 = tanh(s / cap);  value cap * t0, slope 1 - t0 * t0
where(s > 0, s, a * s)  ->  slope where(s > 0, 1, a)

Where an expression has a kink, the slope is that of one side: of relu and abs 0, of max and min
that of the first argument. Where it chooses, the slope chooses too, so that a branch not taken
never spoils a result with its NaN. At the end of a domain, such as sqrt at 0, it is infinite
or NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy as sp

from sparsegen.analysis.sums import Sympy
from sparsegen.errors import PatternError, Site
from sparsegen.ir.expr import (
    COMPARE,
    FUNCTIONS,
    LOGIC,
    Apply,
    Const,
    Expr,
    Symbol,
    Table,
    apply,
    children,
    kind,
    rebuild,
    show,
    walk,
)


@dataclass(frozen=True, kw_only=True)
class Derivative:
    """An expression and its derivative, over what both of them use.

    shared  names and what they stand for, in the order to compute them; each may use earlier ones
    value   the expression itself, operation by operation
    slope   its derivative
    """

    shared: tuple[tuple[Symbol, Expr], ...]
    value: Expr
    slope: Expr

    def __str__(self) -> str:
        named = [f"{name.name} = {show(expr)}" for name, expr in self.shared]
        return "\n".join([*named, f"value = {show(self.value)}", f"slope = {show(self.slope)}"])


def differentiate(expr: Expr, by: Symbol = Symbol("s"), *, at: Site | None = None) -> Derivative:  # noqa: B008
    """Return an expression with its derivative; positions, tables and heads are constants.

    Args:
        expr: a score mod over "s", or a function of elements over "x".
        by: the symbol to differentiate by.
        at: where the expression was written.

    Raises:
        PatternError: a part of the expression has no derivative.
    """
    terms = _Terms(by, at)
    term = terms.to_sympy(expr)
    found = sp.diff(term, terms.variable)
    if term.has(sp.zoo, sp.nan) or found.has(sp.zoo, sp.nan):
        raise PatternError(
            f"{show(expr)} has no derivative: a divisor in it is always 0",
            at=at,
            hint="divide by what depends on a position, a head, a table or a score",
        )
    slope = terms.to_expr(found)
    names = _shared(expr, slope)
    return Derivative(
        shared=tuple((name, _named(e, names, inside=e)) for e, name in names.items()),
        value=_named(expr, names),
        slope=_named(slope, names),
    )


# --- operators as sympy sees them ---------------------------------------------------------------
# Its own exp, tanh and Max rewrite themselves, and what is rewritten is no longer shared.


class _Greater(sp.Function):  # type: ignore[misc]
    """a > b: constant wherever it has a derivative."""

    def _eval_derivative(self, by: Sympy) -> Sympy:
        return sp.Integer(0)


class _Where(sp.Function):  # type: ignore[misc]
    """a where the condition holds, b elsewhere; both are differentiated, one is taken."""

    @classmethod
    def eval(cls, condition: Sympy, a: Sympy, b: Sympy) -> Sympy | None:
        return a if a == b else None

    def _eval_derivative(self, by: Sympy) -> Sympy:
        condition, a, b = self.args
        return _Where(condition, a.diff(by), b.diff(by))


class _Max(sp.Function):  # type: ignore[misc]
    def _eval_derivative(self, by: Sympy) -> Sympy:
        a, b = self.args
        return _Where(_Greater(b, a), b.diff(by), a.diff(by))


class _Min(sp.Function):  # type: ignore[misc]
    def _eval_derivative(self, by: Sympy) -> Sympy:
        a, b = self.args
        return _Where(_Greater(a, b), b.diff(by), a.diff(by))


class _Relu(sp.Function):  # type: ignore[misc]
    def _eval_derivative(self, by: Sympy) -> Sympy:
        return _Where(_Greater(self.args[0], 0), self.args[0].diff(by), 0)


class _Abs(sp.Function):  # type: ignore[misc]
    def _eval_derivative(self, by: Sympy) -> Sympy:
        (x,) = self.args
        slope = x.diff(by)
        return _Where(_Greater(x, 0), slope, _Where(_Greater(0, x), -slope, 0))


class _Exp(sp.Function):  # type: ignore[misc]
    def fdiff(self, argindex: int = 1) -> Sympy:
        return self


class _Log(sp.Function):  # type: ignore[misc]
    def fdiff(self, argindex: int = 1) -> Sympy:
        return 1 / self.args[0]


class _Sqrt(sp.Function):  # type: ignore[misc]
    def fdiff(self, argindex: int = 1) -> Sympy:
        return 1 / (2 * self)


class _Tanh(sp.Function):  # type: ignore[misc]
    def fdiff(self, argindex: int = 1) -> Sympy:
        return 1 - self**2


class _Sigmoid(sp.Function):  # type: ignore[misc]
    def fdiff(self, argindex: int = 1) -> Sympy:
        return self * (1 - self)


_KEPT: dict[str, Any] = {
    "exp": _Exp, "log": _Log, "sqrt": _Sqrt, "tanh": _Tanh, "sigmoid": _Sigmoid, "relu": _Relu,
    "abs": _Abs, "max": _Max, "min": _Min, "where": _Where, "gt": _Greater,
}  # fmt: skip
_BACK = {function: op for op, function in _KEPT.items()}
_ALGEBRA: dict[str, Callable[..., Sympy]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
}
assert _KEPT.keys() >= FUNCTIONS


class _Terms:
    """Translate expressions to sympy and back; what came in comes out as the same expression."""

    def __init__(self, by: Symbol, at: Site | None) -> None:
        self.by = by
        self.at = at
        self.variable = sp.Symbol(by.name, real=True)
        self._known: dict[Sympy, Expr] = {self.variable: by}
        self._opaque: dict[Expr, Sympy] = {}

    def to_sympy(self, expr: Expr) -> Sympy:
        """Translate what depends on the variable; everything else is a constant."""
        if expr == self.by:
            return self.variable
        if not any(e == self.by for e in walk(expr)):
            return self._constant(expr)
        match expr:
            case Apply("where", (condition, a, b)):
                found = _Where(self._symbol(condition), self.to_sympy(a), self.to_sympy(b))
            case Apply(op, args) if op in _ALGEBRA:
                found = _ALGEBRA[op](*map(self.to_sympy, args))
            case Apply(op, args) if op in _KEPT and op not in COMPARE:
                found = _KEPT[op](*map(self.to_sympy, args))
            case _:
                raise self._refusal(expr)
        self._known.setdefault(found, expr)
        return found

    def to_expr(self, term: Sympy) -> Expr:
        """Translate back; numbers become floats."""
        if term in self._known:
            return self._known[term]
        if term.is_Rational:
            return Const(float(term))
        if term.is_Add:
            return self._sum(term)
        if term.is_Mul:
            return self._product(term)
        if term.is_Pow and term.exp.is_Integer:
            power = self._power(self.to_expr(term.base), abs(int(term.exp)))
            return power if term.exp > 0 else apply("div", Const(1.0), power)
        return Apply(_BACK[term.func], tuple(map(self.to_expr, term.args)))

    def _constant(self, expr: Expr) -> Sympy:
        match expr:
            case Const(int() | float() as number) if math.isfinite(number):
                return sp.Rational(repr(float(number)))
        return self._symbol(expr)

    def _symbol(self, expr: Expr) -> Sympy:
        """Return the symbol of an expression that counts as a constant."""
        if expr not in self._opaque:
            self._opaque[expr] = sp.Symbol(f"_{len(self._opaque)}", real=True)
            self._known[self._opaque[expr]] = expr
        return self._opaque[expr]

    def _sum(self, term: Sympy) -> Expr:
        ordered = sorted(term.as_ordered_terms(), key=_is_negative)
        total = self.to_expr(ordered[0])
        for part in ordered[1:]:
            if _is_negative(part):
                total = apply("sub", total, self.to_expr(-part))
            else:
                total = apply("add", total, self.to_expr(part))
        return total

    def _product(self, term: Sympy) -> Expr:
        number, rest = term.as_coeff_Mul()
        above, below = sp.fraction(rest)
        top = [self.to_expr(f) for f in sp.Mul.make_args(above) if f != 1]
        if abs(number) != 1 or not top:
            top.insert(0, Const(abs(float(number))))
        found = top[0]
        for factor in top[1:]:
            found = apply("mul", found, factor)
        if below != 1:
            found = apply("div", found, self.to_expr(below))
        return apply("neg", found) if number < 0 else found

    def _power(self, base: Expr, exponent: int) -> Expr:
        if exponent == 1:
            return base
        half = self._power(base, exponent // 2)
        square = Apply("mul", (half, half))
        return square if exponent % 2 == 0 else Apply("mul", (square, base))

    def _refusal(self, expr: Expr) -> PatternError:
        if isinstance(expr, Apply) and expr.op in COMPARE | LOGIC:
            what = "it is a truth value"
            hint = "choose between two numbers: sg.where(condition, a, b)"
        elif isinstance(expr, Apply):
            what = "it jumps"
            hint = f"use arithmetic on {self.by.name} that is continuous, such as division by /"
        else:
            what = f"it reads memory at a place that depends on {self.by.name}"
            hint = f"index tables with positions and heads, not with {self.by.name}"
        return PatternError(f"{show(expr)} has no derivative: {what}", at=self.at, hint=hint)


def _is_negative(term: Sympy) -> bool:
    return bool(term.as_coeff_Mul()[0] < 0)


# --- sharing ------------------------------------------------------------------------------------


def _shared(*exprs: Expr) -> dict[Expr, Symbol]:
    """Name every number that is computed or loaded more than once, innermost first."""
    uses: Counter[Expr] = Counter()
    order: list[Expr] = []

    def visit(expr: Expr) -> None:
        uses[expr] += 1
        if uses[expr] == 1:
            for child in children(expr):
                visit(child)
            order.append(expr)

    for expr in exprs:
        visit(expr)
    found = [
        e for e in order if uses[e] > 1 and isinstance(e, Apply | Table) and kind(e) == "float"
    ]
    return {e: Symbol(f"t{n}") for n, e in enumerate(found)}


def _named(expr: Expr, names: dict[Expr, Symbol], inside: Expr | None = None) -> Expr:
    """Write names for what is shared, except for the whole of the expression that is defined."""
    return rebuild(expr, lambda e: None if e is inside else names.get(e))
