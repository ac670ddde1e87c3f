"""Overload Python's operators over positions, heads and scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

from sparsegen.errors import PatternError, Site
from sparsegen.ir import expr as ir
from sparsegen.ir.expr import Expr, Pos, Stop


class Index:
    """An expression over positions i, j, heads h, the score s, tables and selections."""

    __slots__ = ("expr",)
    __hash__: ClassVar[None]  # type: ignore[assignment]
    # numpy would otherwise take the operator and loop over its elements.
    __array_ufunc__ = None

    def __init__(self, expr: Expr) -> None:
        self.expr = expr

    @property
    def stop(self) -> Index:
        """Return the exclusive end of this position's axis in the current sequence."""
        if not isinstance(self.expr, Pos):
            raise PatternError(
                f"{self} has no .stop",
                at=Site.caller(),
                hint="only the i and j of sg.index() have one: i.stop, j.stop",
            )
        return Index(Stop(self.expr.role, self.expr.axis))

    def __bool__(self) -> NoReturn:
        raise PatternError(
            f"the index expression {self} has no truth value",
            at=Site.caller(),
            hint="use & | ~ instead of and/or/not, sg.where() instead of if, "
            "and (a <= b) & (b < c) instead of a <= b < c",
        )

    def __index__(self) -> NoReturn:
        raise PatternError(
            f"{self} cannot index a Python or captured array",
            at=Site.caller(),
            hint='make the table a parameter of the pattern: table: sg.Tensor["S"]',
        )

    def __iter__(self) -> NoReturn:
        raise PatternError(
            f"{self} is one index, not a sequence of them",
            at=Site.caller(),
            hint="say what holds for one pair of i and j; sg.index(q, k) returns the two",
        )

    def __float__(self) -> NoReturn:
        raise PatternError(
            f"{self} has no value while the pattern is traced",
            at=Site.caller(),
            hint="use sg.exp, sg.tanh, ... instead of the math module",
        )

    __int__ = __float__

    def __repr__(self) -> str:
        return ir.show(self.expr)

    def __neg__(self) -> Index:
        return Index(ir.apply("neg", _number(self)))

    def __invert__(self) -> Index:
        return Index(ir.apply("not", _truth(self, "~")))


def as_expr(value: Any, what: str = "an index expression") -> Expr:
    """Return the expression of an `Index` or a number; name what a user passed instead."""
    if isinstance(value, Index):
        return value.expr
    if isinstance(value, bool | int | float):
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise PatternError(
                f"{value} does not fit into 32 bits, in which positions are counted",
                at=Site.caller(),
                hint="write a smaller one, or a float such as 1e10 in arithmetic on scores",
            )
        return ir.Const(value)
    if is_tensor(value):
        raise PatternError(
            f"a captured tensor of shape {tuple(value.shape)} stands where {what} belongs",
            at=Site.caller(),
            hint="make it a parameter of the pattern and index it there",
        )
    raise PatternError(
        f"{_describe(value)} stands where {what} belongs",
        at=Site.caller(),
        hint="use i, j of sg.index(q, k), h of sg.head(q), numbers and tables",
    )


def is_tensor(value: Any) -> bool:
    """Tell whether `value` is an array of some library, by its type alone."""
    return hasattr(type(value), "shape") and hasattr(type(value), "dtype")


def _describe(value: Any) -> str:
    node = getattr(value, "node", None)
    return node.title if node is not None else f"{value!r} of type {type(value).__name__}"


def _number(value: Any) -> Expr:
    expr = as_expr(value)
    if ir.kind(expr) == "bool":
        raise PatternError(
            f"the predicate {ir.show(expr)} is used as a number",
            at=Site.caller(),
            hint="combine predicates with & | ~, or choose values with sg.where(p, a, b)",
        )
    return expr


def _truth(value: Any, operator: str) -> Expr:
    expr = as_expr(value, "a predicate")
    if ir.kind(expr) != "bool":
        raise PatternError(
            f"{operator} takes a predicate, but {ir.show(expr)} is a number",
            at=Site.caller(),
            hint="comparisons bind weaker than & and |: write (j <= i) & (i - j < W)"
            if operator in "&|~"
            else "compare it with something, as in j <= i",
        )
    return expr


def _binary(op: str, swap: bool = False) -> Callable[[Index, Any], Index]:
    def method(self: Index, other: Any) -> Index:
        a, b = (other, self) if swap else (self, other)
        left, right = _number(a), _number(b)
        if op in ("floordiv", "mod") and isinstance(right, ir.Const) and not right.value > 0:
            raise PatternError(
                f"{ir.show(left)} {'//' if op == 'floordiv' else '%'} {right.value}: "
                "the divisor must be positive",
                at=Site.caller(),
                hint="divide by a positive number or hyperparameter",
            )
        return Index(ir.apply(op, left, right))

    return method


def _logic(op: str, symbol: str) -> Callable[[Index, Any], Index]:
    def method(self: Index, other: Any) -> Index:
        return Index(ir.apply(op, _truth(self, symbol), _truth(other, symbol)))

    return method


for _name, _op in {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floordiv",
    "mod": "mod",
}.items():  # fmt: skip
    setattr(Index, f"__{_name}__", _binary(_op))
    setattr(Index, f"__r{_name}__", _binary(_op, swap=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Index, f"__{_name}__", _binary(_name))
for _name, _symbol in (("and", "&"), ("or", "|")):
    setattr(Index, f"__{_name}__", _logic(_name, _symbol))
    setattr(Index, f"__r{_name}__", _logic(_name, _symbol))
