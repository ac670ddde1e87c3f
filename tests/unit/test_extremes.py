"""Predicates over ranges of their leaves, against every value in the ranges."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from sparsegen.analysis.extremes import Ends, ends, truth
from sparsegen.ir.axes import Named
from sparsegen.ir.expr import FALSE, TRUE, Apply, Const, Expr, Pos, Symbol, Table, apply
from sparsegen.ir.node import Input
from tests.unit.test_domain import _OPS, DOCS, HEAD, KEY, QUERY, Sequence, predicates

DOC_I, DOC_J = Table(DOCS, (QUERY,)), Table(DOCS, (KEY,))


def named(expr: Expr) -> Ends | None:
    names = {QUERY: "i", KEY: "j", DOC_I: "doc i", DOC_J: "doc j"}
    name = names.get(expr)
    return None if name is None else Ends(Symbol(f"{name} lo"), Symbol(f"{name} hi"))


def value(expr: Expr, env: dict[str, int]) -> Any:
    match expr:
        case Const(x):
            return x
        case Symbol(name):
            return env[name]
        case Apply(op, args):
            return _OPS[op](*(value(a, env) for a in args))
    raise AssertionError(expr)


@given(
    where=predicates(),
    sequence=st.builds(
        Sequence, n_q=st.integers(1, 9), n_k=st.integers(1, 23), first=st.integers(-3, 12),
        seed=st.integers(0, 9),
    ),
    begin=st.integers(0, 22),
    size=st.integers(1, 9),
)  # fmt: skip
def test_what_may_and_must_hold(where: Expr, sequence: Sequence, begin: int, size: int) -> None:
    seen = sequence.visible(where)[:, :, begin : begin + size]
    if seen.shape[-1] == 0:
        return
    _, i, j = sequence.grid()
    keys = j[:, :, begin : begin + size]
    docs = [sequence.docs[np.clip(x, 0, len(sequence.docs) - 1)] for x in (i, keys)]
    leaves = {"i": i, "j": keys, "doc i": docs[0], "doc j": docs[1]}
    env = {f"{n} lo": int(x.min()) for n, x in leaves.items()}
    env |= {f"{n} hi": int(x.max()) for n, x in leaves.items()}
    may, must = (value(e, env) for e in truth(where, named))
    assert may or not seen.any()
    assert not must or seen.all()


def span(lo: int, hi: int) -> Ends:
    return Ends(Const(lo), Const(hi))


def test_documents() -> None:
    same = apply("eq", DOC_I, DOC_J)

    def over(queries: Ends, keys: Ends) -> tuple[Expr, Expr]:
        return truth(same, {DOC_I: queries, DOC_J: keys}.get)

    assert over(span(3, 3), span(1, 2)) == (FALSE, FALSE)
    assert over(span(3, 3), span(3, 3)) == (TRUE, TRUE)
    assert over(span(2, 3), span(3, 3)) == (TRUE, FALSE)
    assert over(span(2, 4), span(3, 3)) == (TRUE, FALSE)


@pytest.mark.parametrize(
    ("expr", "least", "most"),
    [
        (apply("mod", KEY, Const(8)), 3, 5),
        (apply("mod", KEY, Const(6)), 0, 5),
        (apply("floordiv", KEY, Const(4)), 2, 3),
        (apply("mul", Const(-2), KEY), -26, -22),
        (apply("sub", Const(1), KEY), -12, -10),
        (Apply("where", (apply("lt", KEY, Const(20)), KEY, Const(99))), 11, 13),
        (Apply("where", (apply("lt", KEY, Const(12)), KEY, Const(99))), 11, 99),
        (Apply("where", (apply("lt", KEY, Const(11)), KEY, Const(99))), 99, 99),
    ],
)
def test_ends(expr: Expr, least: int, most: int) -> None:
    found = ends(expr, {KEY: span(11, 13)}.get)
    assert found is not None
    assert (value(found.lo, {}), value(found.hi, {})) == (least, most)


def test_what_is_not_known_may_be_anything() -> None:
    real = Table(Input(name="x", kind="float", axes=(Named("S"),)), (KEY,))
    for unknown in (HEAD, real, Pos("key", Named("other"))):
        assert truth(apply("lt", unknown, Const(3)), named) == (TRUE, FALSE)
    assert truth(apply("lt", apply("mul", KEY, KEY), Const(3)), named) == (TRUE, FALSE)
    assert truth(apply("and", apply("lt", HEAD, Const(3)), FALSE), named) == (FALSE, FALSE)
