"""Print index and score expressions as TIR, on scalars and on vectors.

Lanes: any leaf may be a vector; scalars are broadcast where they meet one. Types: truth values are
`bool`, integers keep the width of their leaves (int32 or int64; the wider wins), everything else is
float32. Code is emitted into the current IRBuilder frame, because elementary functions bind their
intermediate values there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.stream import pin
from sparsegen.codegen.tvm import (
    T,
    Value,
    broadcast,
    cast,
    const,
    dtype_of,
    lanes_of,
    select,
    tirx,
)
from sparsegen.errors import UnsupportedError
from sparsegen.ir.expr import (
    Apply,
    Const,
    Expr,
    Head,
    KeyVar,
    Member,
    Pos,
    Stop,
    Symbol,
    Table,
    kind,
    show,
)

Function = Callable[[Value], Value]

CPU_FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        "exp": vec.exp,
        "log": vec.log,
        "tanh": vec.tanh,
        "sigmoid": vec.sigmoid,
        "sqrt": T.sqrt,  # one instruction, also for vectors
    }
)


@dataclass(frozen=True, kw_only=True)
class Env:
    """The values of the leaves at one point of a kernel; None marks what has no meaning there.

    query, key    absolute query position, key position (or entry number) of the source at hand
    head          query head
    query_stop, key_stop  exclusive ends of `query` and `key`
    symbols       "s", "x", "i_min", "i_max" ... by name
    key_vars      the keys of a selection, for `force` and budgets
    functions     exp, log, tanh, sigmoid, sqrt on float32 of any lanes
    table         reads a table at emitted (not yet clamped) indices
    member        tells whether emitted keys lie in a selection
    """

    query: Value | None = None
    key: Value | None = None
    head: Value | None = None
    query_stop: Value | None = None
    key_stop: Value | None = None
    symbols: Mapping[str, Value] = field(default_factory=dict)
    key_vars: tuple[Value, ...] = ()
    functions: Mapping[str, Function] = field(default_factory=lambda: CPU_FUNCTIONS)
    table: Callable[[Table, tuple[Value, ...]], Value] | None = None
    member: Callable[[Member, tuple[Value, ...]], Value] | None = None


def emit(expr: Expr, env: Env) -> Value:
    """Return the TIR of `expr`.

    Raises:
        UnsupportedError: `expr` mentions something that has no value in `env`.
    """
    match expr:
        case Const(bool(value)):
            return const(value, "bool")
        case Const(int(value)):
            return const(value, "int32" if -(2**31) <= value < 2**31 else "int64")
        case Const(value):
            return const(value, "float32")
        case Apply(op, args):
            return _apply(op, [emit(a, env) for a in args], expr, env)
        case Table(index=index) if env.table is not None:
            value = env.table(expr, tuple(emit(i, env) for i in index))
            return _as_float(value) if kind(expr) == "float" else value
        case Member(keys=keys) if env.member is not None:
            return env.member(expr, tuple(emit(k, env) for k in keys))
    leaf = _leaf(expr, env)
    if leaf is None:
        raise UnsupportedError(f"{show(expr)} has no value at this place of a kernel")
    return leaf


def emit_bool(expr: Expr, env: Env) -> Value | None:
    """Return the TIR of a predicate; None when it is the constant True."""
    return None if expr == Const(True) else emit(expr, env)


def both(a: Value | None, b: Value | None) -> Value | None:
    """Return the conjunction of two predicates, None standing for True."""
    if a is None or b is None:
        return a if b is None else b
    return _logic("and", *_lanes([a, b]))


def _leaf(expr: Expr, env: Env) -> Value | None:
    match expr:
        case Pos(role):
            return env.query if role == "query" else env.key
        case Stop(role):
            return env.query_stop if role == "query" else env.key_stop
        case Head():
            return env.head
        case Symbol(name):
            return env.symbols.get(name)
        case KeyVar(index):
            return env.key_vars[index] if index < len(env.key_vars) else None
    return None


def _apply(op: str, args: list[Value], expr: Apply, env: Env) -> Value:
    if op in ("and", "or"):
        return _logic(op, *_lanes([_as_bool(a) for a in args]))
    if op == "not":
        (a,) = (_as_bool(a) for a in args)
        # T.Not on vectors of bool breaks the range analysis of whoever binds the result.
        return T.Not(a) if lanes_of(a) == 1 else a ^ const(True, "bool", lanes_of(a))
    if op == "where":
        yes, no = _common(args[1:])
        chosen = _lanes([_as_bool(args[0]), yes, no])
        return select(*chosen)
    if op in CPU_FUNCTIONS:
        if op not in env.functions:
            raise UnsupportedError(f"{show(expr)}: this kernel has no {op}")
        return env.functions[op](pin(_as_float(args[0])))
    if op == "div":
        a, b = _lanes([_as_float(x) for x in args])
        return a / b
    return _ARITHMETIC[op](*_lanes(_common(args)))


def _logic(op: str, a: Value, b: Value) -> Value:
    if lanes_of(a) > 1:
        return a & b if op == "and" else a | b
    return T.And(a, b) if op == "and" else T.Or(a, b)


def _is_float(x: Value) -> bool:
    return dtype_of(x).startswith(("float", "bfloat"))


def _as_float(x: Value) -> Value:
    return x if dtype_of(x) == "float32" else cast(x, "float32")


def _as_bool(x: Value) -> Value:
    return x if dtype_of(x) == "bool" else tirx.NE(x, _zero(x))


def _common(args: list[Value]) -> list[Value]:
    """Convert to one type: float32 if any is floating point, else the widest integer."""
    dtypes = {dtype_of(a) for a in args}
    if len(dtypes) == 1 and dtypes != {"bool"}:
        return args
    if any(_is_float(a) for a in args):
        return [_as_float(a) for a in args]
    width = "int64" if "int64" in dtypes else "int32"
    return [a if dtype_of(a) == width else _widen(a, width) for a in args]


def _widen(x: Value, dtype: str) -> Value:
    return const(int(x), dtype) if isinstance(x, tirx.IntImm) else cast(x, dtype)


def _lanes(args: list[Value]) -> list[Value]:
    width = max(lanes_of(a) for a in args)
    return [broadcast(a, width) for a in args]


def _zero(x: Value) -> Value:
    return const(0, dtype_of(x), lanes_of(x))


def _floordiv(a: Value, b: Value) -> Value:
    if _is_float(a):
        return T.floor(a / b)
    if _is_constant(b):
        return tirx.floordiv(a, b)
    # A zero divisor must not trap: the quotient is 0 then, and so is the remainder.
    none = tirx.EQ(b, _zero(b))
    return select(
        none, _zero(a), tirx.floordiv(a, select(none, const(1, dtype_of(b), lanes_of(b)), b))
    )


def _mod(a: Value, b: Value) -> Value:
    if _is_float(a):
        return a - b * T.floor(a / b)
    if _is_constant(b):
        return tirx.floormod(a, b)
    none = tirx.EQ(b, _zero(b))
    return select(
        none, _zero(a), tirx.floormod(a, select(none, const(1, dtype_of(b), lanes_of(b)), b))
    )


def _is_constant(b: Value) -> bool:
    scalar = b.value if isinstance(b, tirx.Broadcast) else b
    return isinstance(scalar, tirx.IntImm) and int(scalar) != 0


def _min(a: Value, b: Value) -> Value:
    return select(_before(a < b, a), a, b)


def _max(a: Value, b: Value) -> Value:
    return select(_before(a > b, a), a, b)


def _before(condition: Value, a: Value) -> Value:
    """Let NaN win on either side: a comparison with NaN is false, which already picks b."""
    return _logic("or", condition, T.isnan(a)) if _is_float(a) else condition


def _abs(a: Value) -> Value:
    return T.fabs(a) if _is_float(a) else select(a < _zero(a), -a, a)


_ARITHMETIC: Mapping[str, Callable[..., Value]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": _floordiv,
    "mod": _mod,
    "min": _min,
    "max": _max,
    "neg": lambda a: _zero(a) - a if not _is_float(a) else -a,
    "abs": _abs,
    # Written so that NaN stays NaN; one max instruction.
    "relu": lambda a: select(a < _zero(a), _zero(a), a),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    # Python's == and != on TIR are lazy, for use as a condition in Python.
    "eq": lambda a, b: tirx.EQ(a, b),
    "ne": lambda a, b: tirx.NE(a, b),
}
