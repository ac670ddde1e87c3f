"""Offer the pointwise functions of score mods, activations and predicates."""

from __future__ import annotations

from typing import Any, overload

from sparsegen.dsl.index import Index, _number, _truth
from sparsegen.dsl.values import Value
from sparsegen.ir import expr as ir


def _pointwise(op: str, x: Any) -> Any:
    if isinstance(x, Value):
        return x.map(ir.apply(op, ir.Symbol("x")))
    return Index(ir.apply(op, _number(x)))


@overload
def relu(x: Value) -> Value: ...
@overload
def relu(x: Index) -> Index: ...
def relu(x: Any) -> Any:
    """Return max(x, 0) of an expression, or of each element of a value as it is loaded."""
    return _pointwise("relu", x)


def exp(x: Any) -> Index:
    """Return e to the power x."""
    return Index(ir.apply("exp", _number(x)))


def log(x: Any) -> Index:
    """Return the natural logarithm of x."""
    return Index(ir.apply("log", _number(x)))


def tanh(x: Any) -> Index:
    """Return the hyperbolic tangent of x."""
    return Index(ir.apply("tanh", _number(x)))


def sigmoid(x: Any) -> Index:
    """Return 1 / (1 + exp(-x))."""
    return Index(ir.apply("sigmoid", _number(x)))


def sqrt(x: Any) -> Index:
    """Return the square root of x."""
    return Index(ir.apply("sqrt", _number(x)))


def abs(x: Any) -> Index:
    """Return the absolute value of x."""
    return Index(ir.apply("abs", _number(x)))


def minimum(a: Any, b: Any) -> Index:
    """Return the smaller of a and b."""
    return Index(ir.apply("min", _number(a), _number(b)))


def maximum(a: Any, b: Any) -> Index:
    """Return the larger of a and b."""
    return Index(ir.apply("max", _number(a), _number(b)))


def where(condition: Any, a: Any, b: Any) -> Index:
    """Return a where the condition holds, b elsewhere."""
    return Index(ir.apply("where", _truth(condition, "where()"), _number(a), _number(b)))
