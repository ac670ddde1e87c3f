"""Evaluate expressions with numpy, vectorised over whatever the leaves are bound to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsegen.ir.axes import Axis
from sparsegen.ir.expr import Apply, Const, Expr, Member, Role, Size, Stop, Table, show
from sparsegen.ir.node import Input

Array = npt.NDArray[Any]

_OPERATORS: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "where": np.where,
}


@dataclass(frozen=True)
class Env:
    """What the leaves of an expression stand for in one sequence.

    sizes   extents by letter
    stop    the value of `Stop(role, axis)`
    table   reads an input at integer arrays of indices, clamping them
    member  looks keys (arrays) up in the selection of a `Member`
    values  arrays for leaves, and for whole sub-expressions such as the keys of a reduction; all
            of them broadcast against each other
    floors  (x, n, array): x // n is known although x is not, so x // (n * m) is known too
    """

    sizes: Mapping[str, int]
    stop: Callable[[Role, Axis], int]
    table: Callable[[Input, tuple[Array, ...]], Array]
    member: Callable[[Member, tuple[Array, ...]], Array]
    values: Mapping[Expr, Array] = field(default_factory=dict)
    floors: tuple[tuple[Expr, int, Array], ...] = ()

    def bind(self, values: Mapping[Expr, Array]) -> Env:
        """Return this environment with further leaves bound."""
        return replace(self, values={**self.values, **values})

    def __call__(self, expr: Expr) -> Array:
        """Evaluate `expr`; integers are int64, real numbers float64, predicates bool."""
        with np.errstate(all="ignore"):
            return np.asarray(self._evaluate(expr))

    def _evaluate(self, expr: Expr) -> Array:
        if expr in self.values:
            return self.values[expr]
        match expr:
            case Const(value):
                return np.asarray(value)
            case Size(name):
                return np.asarray(self.sizes[name])
            case Stop(role, axis):
                return np.asarray(self.stop(role, axis))
            case Apply("floordiv", (x, Const(int() as n))) if (
                known := self._floor(x, n)
            ) is not None:
                return known
            case Apply(op, args):
                return _OPERATORS[op](*(self._evaluate(a) for a in args))
            case Table(tensor, index):
                return self.table(tensor, tuple(np.asarray(self._evaluate(x)) for x in index))
            case Member(_, keys):
                return self.member(expr, tuple(np.asarray(self._evaluate(k)) for k in keys))
        raise AssertionError(f"{show(expr)} has no value here; verify() should have refused it")

    def _floor(self, x: Expr, n: int) -> Array | None:
        """Return x // n from a finer floor of x."""
        for base, divisor, values in self.floors:
            if base == x and n % divisor == 0:
                return values // (n // divisor)
        return None
