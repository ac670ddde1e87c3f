"""Say scalar expressions over positions, heads, scores and tables: one algebra for everything.

Index keys, predicates, score mods, activations, budgets and forced keys are all `Expr`. The leaves
are positions and symbols, the inner nodes are applications of a closed set of operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from sparsegen.ir.axes import Axis, Entries

if TYPE_CHECKING:
    from sparsegen.ir.node import Input, Node

Role = Literal["query", "key"]
Kind = Literal["int", "float", "bool"]

COMPARE = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
LOGIC = frozenset({"and", "or", "not"})
# Pointwise functions every target must print and sympy must differentiate.
FUNCTIONS = frozenset({"exp", "log", "tanh", "sigmoid", "relu", "abs", "sqrt"})
ARITHMETIC = frozenset({"add", "sub", "mul", "div", "floordiv", "mod", "min", "max", "neg"})
OPERATORS = COMPARE | LOGIC | FUNCTIONS | ARITHMETIC | {"where"}


@dataclass(frozen=True)
class Const:
    """A literal number or truth value."""

    value: int | float | bool


@dataclass(frozen=True)
class Pos:
    """A position: of a query (absolute, in key coordinates), of a key, or of a compressed entry."""

    role: Role
    axis: Axis


@dataclass(frozen=True)
class Stop:
    """The number of positions along a role's axis in this sequence: exclusive end of `Pos`."""

    role: Role
    axis: Axis


@dataclass(frozen=True)
class Head:
    """A query head: 0 <= h < extent of `axis`."""

    axis: Axis


@dataclass(frozen=True)
class Size:
    """An extent named by a letter, known once the pattern is bound."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A free scalar: "s" is the score inside a mod or activation, "x" the element inside a map."""

    name: str


@dataclass(frozen=True)
class BlockOf:
    """The blocks of `width` parent positions that an entry overlaps: a key with several values.

    Reduced with "sum", entry e adds overlap(e, block) / stride of itself to each block (NSA,
    arXiv 2502.11089, eq. 9); with other operators it takes part in each block it overlaps.
    """

    axis: Entries
    width: int


@dataclass(frozen=True)
class KeyVar:
    """The n-th key of the keyed space a selection is made over (in `force` and budgets)."""

    index: int


@dataclass(frozen=True)
class Apply:
    """An operator applied to arguments; see `OPERATORS`. Division and modulo are floored."""

    op: str
    args: tuple[Expr, ...]


@dataclass(frozen=True)
class Table:
    """A read of an input at computed indices; indices outside the table are clamped to its edge."""

    tensor: Input
    index: tuple[Expr, ...]


@dataclass(frozen=True)
class Member:
    """Whether the key lies in a selection: `selection[keys...]`."""

    selection: Node
    keys: tuple[Expr, ...]


Expr = Const | Pos | Stop | Head | Size | Symbol | BlockOf | KeyVar | Apply | Table | Member

TRUE = Const(True)
FALSE = Const(False)


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the sub-expressions of `expr`."""
    match expr:
        case Apply(args=args):
            return args
        case Table(index=index):
            return index
        case Member(keys=keys):
            return keys
        case _:
            return ()


def walk(expr: Expr) -> Iterator[Expr]:
    """Yield `expr` and everything below it, parents first."""
    yield expr
    for child in children(expr):
        yield from walk(child)


def rebuild(expr: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Replace every sub-expression for which `rule` returns one, outermost first."""
    new = rule(expr)
    if new is not None:
        return new
    match expr:
        case Apply(op, args):
            done = tuple(rebuild(a, rule) for a in args)
            return expr if done == args else apply(op, *done)
        case Table(index=index):
            return replace(expr, index=tuple(rebuild(a, rule) for a in index))
        case Member(keys=keys):
            return replace(expr, keys=tuple(rebuild(a, rule) for a in keys))
        case _:
            return expr


def kind(expr: Expr) -> Kind:
    """Return whether `expr` is an integer, a float or a truth value.

    Tables of named integer use (document ids) are integers: `Table` reads take the declared kind.
    """
    match expr:
        case Const(value):
            return (
                "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"
            )
        case Symbol():
            return "float"
        case Member():
            return "bool"
        case Table(tensor=tensor):
            return tensor.kind
        case Apply(op, args):
            if op in COMPARE or op in LOGIC:
                return "bool"
            if op in FUNCTIONS - {"relu", "abs"} or op == "div":
                return "float"
            rest = args[1:] if op == "where" else args
            return "float" if any(kind(a) == "float" for a in rest) else kind(rest[0])
        case _:
            return "int"


_FOLD: dict[str, Callable[..., int | float | bool]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "div": lambda a, b: a / b,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda a: not a,
}


def apply(op: str, *args: Expr) -> Expr:
    """Apply `op`, folding constants and the identities of `and`, `or`, `+ 0`, `* 1` and `// 1`."""
    if op in _FOLD and all(isinstance(a, Const) for a in args):
        values = [a.value for a in args if isinstance(a, Const)]
        if not (op in {"floordiv", "mod", "div"} and values[1] == 0):
            return Const(_FOLD[op](*values))
    match op, args:
        case "and", (Const(True), x) | (x, Const(True)):
            return x
        case "and", (Const(False), _) | (_, Const(False)):
            return FALSE
        case "or", (Const(False), x) | (x, Const(False)):
            return x
        case "or", (Const(True), _) | (_, Const(True)):
            return TRUE
        case "not", (Apply("not", (x,)),):
            return x
        case "add", (x, Const(0)) | (Const(0), x):
            return x
        case "sub", (x, Const(0)):
            return x
        case ("mul", (x, Const(1)) | (Const(1), x)) | ("floordiv", (x, Const(1))):
            return x
    return Apply(op, args)


_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "and": "&", "or": "|",
}  # fmt: skip


def show(expr: Expr) -> str:
    """Print `expr` as the user would have written it."""
    match expr:
        case Const(value):
            return repr(value)
        case Pos(role, axis):
            return (
                "i"
                if role == "query" and not isinstance(axis, Entries)
                else (
                    f"i[{axis}]"
                    if role == "query"
                    else "j"
                    if not isinstance(axis, Entries)
                    else f"e[{axis}]"
                )
            )
        case Stop(role):
            return "i.stop" if role == "query" else "j.stop"
        case Head():
            return "h"
        case Size(name) | Symbol(name):
            return name
        case BlockOf(axis, width):
            return f"blocks({axis}, {width})"
        case KeyVar(index):
            return f"key{index}"
        case Table(tensor=tensor, index=index):
            return f"{tensor.name}[{', '.join(map(show, index))}]"
        case Member(selection=selection, keys=keys):
            return f"{selection.label}[{', '.join(map(show, keys))}]"
        case Apply("neg", (x,)):
            return f"-{show(x)}"
        case Apply("not", (x,)):
            return f"~{show(x)}"
        case Apply(op, args) if op in _INFIX:
            return "(" + f" {_INFIX[op]} ".join(map(show, args)) + ")"
        case Apply(op, args):
            return f"{op}({', '.join(map(show, args))})"


def field_values(expr: Expr) -> dict[str, object]:
    """Return the fields of an expression node by name (for serialisation)."""
    return {f.name: getattr(expr, f.name) for f in fields(expr)}
