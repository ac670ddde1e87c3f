"""Derivatives of mods and activations: against finite differences, and what is shared."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import sparsegen as sg
from sparsegen import patterns
from sparsegen.analysis.derivative import Derivative, differentiate
from sparsegen.errors import PatternError
from sparsegen.ir.axes import Named
from sparsegen.ir.expr import (
    FUNCTIONS,
    Apply,
    Const,
    Expr,
    Head,
    Pos,
    Symbol,
    Table,
    apply,
    show,
    walk,
)
from sparsegen.ir.node import Input
from sparsegen.primitives import Attend, Score
from sparsegen.primitives._evaluate import Env

S, X = Symbol("s"), Symbol("x")
QUERY, J, H = Pos("query", Named("T")), Pos("key", Named("S")), Head(Named("Hq"))
BIAS = Input(name="bias", axes=(Named("Hq"),))
ROWS = np.array([0.5, -1.25, 0.75])


def evaluate(found: Derivative, by: Symbol, at: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return value and slope, computed in the order of the shared names."""
    at = np.asarray(at, np.float64)
    env = Env(
        sizes={"Hq": 3},
        stop=lambda role, axis: 20,
        table=lambda tensor, index: ROWS[np.clip(index[0], 0, 2)],
        member=lambda member, keys: np.asarray(True),
        values={by: at, QUERY: np.asarray(7), J: np.asarray(4), H: np.asarray(1)},
    )
    for name, expr in found.shared:
        env = env.bind({name: env(expr)})
    return tuple(np.broadcast_to(env(e), at.shape) for e in (found.value, found.slope))


def check(expr: Expr, points: Any, by: Symbol = S) -> Derivative:
    """Compare with central differences of the expression itself."""
    found = differentiate(expr, by)
    points, step = np.asarray(points, np.float64), 1e-5
    plain = Derivative(shared=(), value=expr, slope=Const(0.0))

    def value(x: np.ndarray) -> np.ndarray:
        return evaluate(plain, by, x)[0]

    got, slope = evaluate(found, by, points)
    np.testing.assert_array_equal(got, value(points), err_msg=str(found))
    want = (value(points + step) - value(points - step)) / (2 * step)
    np.testing.assert_allclose(slope, want, rtol=1e-6, atol=1e-6, err_msg=str(found))
    return found


POINTS = [-2.3, -0.7, 0.4, 1.9]


@pytest.mark.parametrize("op", sorted(FUNCTIONS))
def test_every_function_has_a_derivative(op: str) -> None:
    points = [0.3, 0.9, 2.5] if op in ("log", "sqrt") else POINTS
    found = check(Apply(op, (S,)), points)
    inner = apply("mul", Const(0.5), apply("add", S, apply("sub", QUERY, J)))
    check(Apply(op, (inner,)), [0.3, 0.9, 2.5])
    check(Apply(op, (X,)), points, by=X)
    assert all(e.op in FUNCTIONS | {"mul", "div", "sub", "where", "gt", "neg"}
               for e in walk(found.slope) if isinstance(e, Apply))  # fmt: skip


@pytest.mark.parametrize(
    "expr",
    [
        apply("max", S, Const(0.25)),
        apply("min", apply("mul", S, S), Apply("sub", (QUERY, J))),
        apply("max", Apply("neg", (S,)), Apply("exp", (S,))),
        Apply("where", (Apply("gt", (S, Const(0))), S, Apply("mul", (Const(0.01), S)))),
        Apply("where", (Apply("le", (J, QUERY)), Apply("tanh", (S,)), Const(-math.inf))),
        Apply("sub", (S, Apply("mul", (Table(BIAS, (H,)), Apply("sub", (QUERY, J)))))),
        Apply("div", (Const(1), Apply("add", (Const(1), Apply("exp", (Apply("neg", (S,)),)))))),
        Apply("mul", (S, Apply("sigmoid", (S,)))),
        Apply("div", (S, Table(BIAS, (H,)))),
        Apply("mul", (S, Apply("mul", (S, Apply("mul", (S, S)))))),
    ],
    ids=show,
)
def test_usual_mods(expr: Expr) -> None:
    check(expr, POINTS)


def test_softcap_shares_its_tanh() -> None:
    cap = Const(30.0)
    found = check(Apply("mul", (cap, Apply("tanh", (Apply("div", (S, cap)),)))), POINTS)
    assert str(found) == "t0 = tanh((s / 30.0))\nvalue = (30.0 * t0)\nslope = (1.0 - (t0 * t0))"


def test_what_is_shared_is_computed_once() -> None:
    found = check(Apply("exp", (Apply("mul", (S, Const(0.5))),)), POINTS)
    assert str(found) == "t0 = exp((s * 0.5))\nvalue = t0\nslope = (0.5 * t0)"
    table = Table(BIAS, (H,))
    found = check(Apply("mul", (table, Apply("sigmoid", (S,)))), POINTS)
    assert [show(e) for _, e in found.shared] == ["bias[h]", "sigmoid(s)"]


@pytest.mark.parametrize("name", patterns.names())
def test_all_mods_and_activations_of_shipped_patterns(name: str) -> None:
    for node in patterns.load(name).program.nodes:
        if isinstance(node, Attend | Score):
            for expr in (node.mod, getattr(node, "act", None)):
                if expr is not None and not any(isinstance(e, Table) for e in walk(expr)):
                    check(expr, POINTS)


def test_a_branch_not_taken_does_no_harm() -> None:
    expr = Apply("where", (Apply("gt", (S, Const(0))), Apply("log", (S,)), Const(0)))
    _, slope = evaluate(differentiate(expr), S, [-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(slope, [0, 0, 0.5])


def test_kinks_have_the_slope_of_a_side() -> None:
    at = [-0.0, 0.0]
    for op, want in (("relu", 0), ("abs", 0)):
        assert set(evaluate(differentiate(Apply(op, (S,))), S, at)[1]) == {want}
    for op in ("max", "min"):
        both = Apply(op, (Apply("mul", (Const(3), S)), Apply("mul", (Const(2), S))))
        assert set(evaluate(differentiate(both), S, at)[1]) == {3}


@pytest.mark.parametrize(
    ("expr", "why"),
    [
        (Apply("gt", (S, Const(0))), r"\(s > 0\) has no derivative: it is a truth value"),
        (Apply("mul", (S, Apply("not", (Apply("gt", (S, QUERY)),)))), "a truth value"),
        (Apply("floordiv", (S, Const(2))), r"\(s // 2\) has no derivative: it jumps"),
        (Apply("mod", (S, Const(2))), "it jumps"),
        (Apply("div", (S, Apply("sub", (S, S)))), "is always 0"),
        (Apply("div", (S, Const(0))), "is always 0"),
        (Table(BIAS, (S,)), r"bias\[s\] has no derivative: it reads memory at a place"),
    ],
    ids=lambda x: x if isinstance(x, str) else show(x),
)
def test_what_has_no_derivative_is_named(expr: Expr, why: str) -> None:
    with pytest.raises(PatternError, match=why) as caught:
        differentiate(expr)
    assert caught.value.hint


def test_the_line_of_a_mod_is_named() -> None:
    @sg.pattern
    def jumps(q: sg.Tensor["T H D"], k: sg.Tensor["S H D"]):
        return sg.attend(q, k, k, mod=lambda s: s // 2)

    (node,) = (n for n in jumps.program.nodes if isinstance(n, Attend))
    with pytest.raises(PatternError) as caught:
        differentiate(node.mod, at=node.site)
    assert caught.value.at is not None
    assert caught.value.at.file == __file__


NUMBERS = st.sampled_from([Const(2), Const(-1), Const(0.5), Const(3.25), Const(0.1)])
LEAVES = st.one_of(st.just(S), st.just(S), NUMBERS, st.sampled_from([QUERY, Table(BIAS, (H,))]))


def grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def pair(op: str) -> st.SearchStrategy[Expr]:
        return st.tuples(inner, inner).map(lambda ab: Apply(op, ab))

    condition = st.tuples(inner, inner).map(lambda ab: Apply("lt", ab))
    return st.one_of(
        *(inner.map(lambda a, op=op: Apply(op, (a,))) for op in sorted(FUNCTIONS | {"neg"})),
        *(pair(op) for op in ("add", "sub", "mul", "div", "min", "max")),
        st.tuples(condition, inner, inner).map(lambda cab: Apply("where", cab)),
    )


def away(expr: Expr) -> Iterator[Expr]:
    """Yield what has to be positive: at 0 is a pole, of the derivative at least, or a kink."""
    for e in walk(expr):
        match e:
            case Apply("sqrt" | "log", (x,)):
                yield x
            case Apply("div", (_, x)) | Apply("abs" | "relu", (x,)):
                yield Apply("abs", (x,))
            case Apply("min" | "max", (a, b)):
                yield Apply("abs", (Apply("sub", (a, b)),))


@given(expr=st.recursive(LEAVES, grow, max_leaves=8), at=st.floats(-3, 3))
def test_random_expressions_agree_with_finite_differences(expr: Expr, at: float) -> None:
    try:
        found = differentiate(expr)
    except PatternError as error:
        assume("is always 0" not in error.message)
        raise
    plain = Derivative(shared=(), value=expr, slope=Const(0.0))

    def difference(step: float) -> tuple[float, float]:
        """Return the central difference, and how far the two one-sided ones are apart."""
        low, here, high = evaluate(plain, S, [at - step, at, at + step])[0]
        assume(np.isfinite([low, here, high]).all())
        return float((high - low) / (2 * step)), float(abs(high - 2 * here + low) / step)

    # Where two steps disagree, a kink, a jump or a pole is near, or rounding hides the slope.
    places = (evaluate(Derivative(shared=(), value=e, slope=e), S, [at])[0] for e in away(expr))
    assume(all(float(place[0]) > 1e-3 for place in places))
    (coarse, apart), (fine, closer) = difference(2e-4), difference(1e-4)
    assume(abs(coarse - fine) <= 1e-6 * max(1.0, abs(fine)))
    assume(closer <= 0.6 * apart + 1e-8 * max(1.0, abs(fine)))
    value, slope = (float(x[0]) for x in evaluate(found, S, [at]))
    np.testing.assert_equal(value, float(evaluate(plain, S, [at])[0][0]))
    assert abs(slope - fine) <= 1e-5 * max(1.0, abs(fine), abs(value)), str(found)
