"""Expressions printed as TIR and run agree with Python, on scalars and on vectors."""

import math
import random

import numpy as np
import pytest
import torch

from sparsegen import arch
from sparsegen.codegen import tvm
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import I, IRBuilder, T
from sparsegen.errors import UnsupportedError
from sparsegen.ir.axes import Fixed, Named
from sparsegen.ir.expr import Apply, Const, Expr, Head, Member, Pos, Stop, Symbol, Table, kind
from sparsegen.ir.node import Input

QUERY, KEY = Pos("query", Named("T")), Pos("key", Named("S"))
HEAD, STOP, SCORE = Head(Named("H")), Stop("key", Named("S")), Symbol("s")
DOCUMENT = Input(name="doc", kind="int", axes=(Named("S"),))
SLOPE = Input(name="slope", axes=(Named("H"),))
LANES, STEPS, TABLE = 16, 8, 13


def run(exprs: list[Expr], lanes: int, dtype: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Evaluate expressions at LANES * STEPS points; row e of the result is expression e."""
    names = ["query", "key", "head", "score", "doc", "slope"]
    points = LANES * STEPS
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        T.func_name("evaluate")
        buffers = {}
        for name in names:
            data = inputs[name]
            kind_ = "float32" if data.dtype == np.float32 else "int32"
            buffers[name] = T.match_buffer(T.arg(name, T.handle()), data.shape, kind_, align=4)
        out = T.match_buffer(T.arg("out", T.handle()), (len(exprs), points), "float32", align=4)
        with T.serial(points // lanes) as step:
            at = step * lanes

            def read(name: str, at: object = at) -> object:
                return T.bind(tvm.load(buffers[name], at, lanes=lanes))

            def table(expr: Table, index: tuple[object, ...]) -> object:
                (i,) = index
                n = tvm.lanes_of(i)
                i = tvm.cast(i, "int64")
                low, high = (tvm.const(c, "int64", n) for c in (0, TABLE - 1))
                i = tvm.select(i < low, low, tvm.select(i > high, high, i))
                return tvm.tirx.BufferLoad(buffers[expr.tensor.name], [i])

            env = Env(
                query=tvm.cast(read("query"), dtype),
                key=tvm.cast(read("key"), dtype),
                head=tvm.cast(tvm.load(buffers["head"], 0), dtype),  # a scalar among vectors
                key_stop=tvm.const(100, "int32"),
                symbols={"s": read("score")},
                table=table,
                member=lambda _, keys: (
                    (keys[0] & tvm.const(1, tvm.dtype_of(keys[0]), lanes))
                    > tvm.const(0, tvm.dtype_of(keys[0]), lanes)
                ),
            )
            for e, expr in enumerate(exprs):
                value = tvm.broadcast(emit(expr, env), lanes)
                if tvm.dtype_of(value) == "bool":
                    one, zero = (tvm.const(c, "float32", lanes) for c in (1.0, 0.0))
                    value = tvm.select(value, one, zero)
                tvm.store(out, tvm.cast(value, "float32"), e, at)
    run_ = tvm.compile_module(builder.get(), arch.host()).mod["evaluate"]
    result = torch.full((len(exprs), points), float("nan"))
    run_(*(torch.from_numpy(inputs[n]) for n in names), result)
    return result.numpy()


def python(expr: Expr, p: dict[str, object]) -> float | int | bool:
    """Evaluate in Python at one point."""
    match expr:
        case Const(value):
            return value
        case Pos(role):
            return p[role]
        case Head():
            return p["head"]
        case Stop():
            return 100
        case Symbol():
            return p["score"]
        case Table(tensor=tensor, index=(index,)):
            return p[tensor.name][min(max(int(python(index, p)), 0), TABLE - 1)]
        case Member(keys=(key,)):
            return bool(int(python(key, p)) & 1)
    a = [python(x, p) for x in expr.args]
    rules = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: np.float64(a) / np.float64(b),
        "floordiv": lambda a, b: 0 if b == 0 else a // b,
        "mod": lambda a, b: 0 if b == 0 else a % b,
        "min": np.minimum,
        "max": np.maximum,
        "neg": lambda a: -a,
        "lt": lambda a, b: a < b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "ge": lambda a, b: a >= b,
        "eq": lambda a, b: a == b,
        "ne": lambda a, b: a != b,
        "and": lambda a, b: a and b,
        "or": lambda a, b: a or b,
        "not": lambda a: not a,
        "where": lambda c, a, b: a if c else b,
        "relu": lambda a: np.maximum(a, 0),
        "abs": abs,
        "exp": np.exp,
        "log": np.log,
        "tanh": np.tanh,
        "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
        "sqrt": np.sqrt,
    }
    return rules[expr.op](*a)


def random_expr(rng: random.Random, want: str, depth: int) -> Expr:
    """Return an expression whose value stays small: products are of leaves only."""
    leaf = depth == 0 or rng.random() < 0.15
    if want == "int":
        if leaf:
            return rng.choice([QUERY, KEY, HEAD, STOP, Const(rng.randint(-9, 9))])
        op = rng.choice(["add", "sub", "min", "max", "neg", "abs", "relu", "floordiv", "mod"])
        if op in ("floordiv", "mod"):
            b = rng.choice([Const(rng.choice([1, 2, 7, 64, -3])), random_expr(rng, "int", 0)])
            return Apply(op, (random_expr(rng, "int", depth - 1), b))
        if op == "mul":
            return Apply(op, (random_expr(rng, "int", 0), random_expr(rng, "int", 0)))
        if rng.random() < 0.1:
            return Table(DOCUMENT, (random_expr(rng, "int", depth - 1),))
        count = 1 if op in ("neg", "abs", "relu") else 2
        return Apply(op, tuple(random_expr(rng, "int", depth - 1) for _ in range(count)))
    if want == "bool":
        if leaf:
            return rng.choice([Const(True), Const(False), Member(DOCUMENT, (KEY,))])
        op = rng.choice(["lt", "le", "gt", "ge", "eq", "ne", "and", "or", "not"])
        of = "bool" if op in ("and", "or", "not") else "int"
        count = 1 if op == "not" else 2
        return Apply(op, tuple(random_expr(rng, of, depth - 1) for _ in range(count)))
    if leaf:
        return rng.choice([SCORE, Const(rng.choice([0.5, -2.0, 3.25])), Table(SLOPE, (HEAD,)), KEY])
    op = rng.choice(
        ["add", "sub", "mul", "min", "max", "neg", "abs", "relu", "tanh", "sigmoid", "where"]
    )
    if op == "where":
        a, b = (random_expr(rng, "float", depth - 1) for _ in range(2))
        return Apply(op, (random_expr(rng, "bool", depth - 1), a, b))
    if op == "mul":
        return Apply(
            op,
            (random_expr(rng, "float", 0), Apply("tanh", (random_expr(rng, "float", depth - 1),))),
        )
    count = 1 if op in ("neg", "abs", "relu", "tanh", "sigmoid") else 2
    return Apply(op, tuple(random_expr(rng, "float", depth - 1) for _ in range(count)))


def point_inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n = LANES * STEPS
    return {
        "query": rng.integers(-20, 90, n, dtype=np.int32),
        "key": rng.integers(-3, 100, n, dtype=np.int32),
        "head": np.array([5], np.int32),
        "score": rng.normal(0, 3, n).astype(np.float32),
        "doc": rng.integers(0, 6, TABLE, dtype=np.int32),
        "slope": rng.normal(size=TABLE).astype(np.float32),
    }


def expected(expr: Expr, inputs: dict[str, np.ndarray]) -> np.ndarray:
    rows = zip(inputs["query"].tolist(), inputs["key"].tolist(), inputs["score"], strict=True)
    points = ({"query": q, "key": k, "score": np.float64(s)} for q, k, s in rows)
    shared = {"head": 5, "doc": inputs["doc"], "slope": inputs["slope"].astype(np.float64)}
    with np.errstate(all="ignore"):
        return np.array([float(python(expr, p | shared)) for p in points])


@pytest.mark.parametrize(
    ("lanes", "dtype"), [(1, "int32"), (1, "int64"), (16, "int32"), (8, "int64")]
)
def test_random_expressions_agree_with_python(lanes: int, dtype: str) -> None:
    rng = random.Random(lanes + len(dtype))
    exprs = [random_expr(rng, want, 3) for want in ("int", "bool", "float") for _ in range(12)]
    inputs = point_inputs()
    got = run(exprs, lanes, dtype, inputs)
    for expr, row in zip(exprs, got, strict=True):
        want = expected(expr, inputs)
        exact = kind(expr) != "float"
        np.testing.assert_allclose(row, want, rtol=0 if exact else 2e-5, atol=0 if exact else 2e-5)


@pytest.mark.parametrize("lanes", [1, 16])
def test_functions_reach_their_limits(lanes: int) -> None:
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        math.inf,
        -math.inf,
        math.nan,
        88.0,
        -100.0,
        1e-40,
        1e-3,
        200.0,
    ]
    inputs = point_inputs()
    inputs["score"][: len(special)] = special
    names = ("exp", "log", "tanh", "sigmoid", "sqrt", "relu", "abs")
    exprs: list[Expr] = [Apply(op, (SCORE,)) for op in names]
    exprs += [Apply(op, (SCORE, Const(1.5))) for op in ("min", "max")]
    exprs += [Apply(op, (Const(1.5), SCORE)) for op in ("min", "max")]
    got = run(exprs, lanes, "int32", inputs)
    for expr, row in zip(exprs, got, strict=True):
        with np.errstate(over="ignore"):
            want = expected(expr, inputs).astype(np.float32)
        np.testing.assert_allclose(row, want, rtol=2e-6, atol=1e-37, err_msg=str(expr))


def test_a_leaf_without_a_value_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"j\.stop has no value"):
        emit(Apply("lt", (Const(1), STOP)), Env())


def test_constant_axes_do_not_matter() -> None:
    env = Env(key=tvm.const(3, "int32"))
    assert int(emit(Pos("key", Fixed(9)), env)) == 3
