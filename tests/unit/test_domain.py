from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import sparsegen as sg
from sparsegen.analysis.domain import Clause, Interval, clauses, evaluate
from sparsegen.dsl.index import Index
from sparsegen.ir.axes import Axis, Entries, Fixed, Named
from sparsegen.ir.expr import (
    FALSE,
    TRUE,
    Apply,
    Const,
    Expr,
    Head,
    Member,
    Pos,
    Stop,
    Table,
    apply,
    show,
)
from sparsegen.ir.node import Input
from sparsegen.primitives.score import score
from sparsegen.primitives.select import Select, select

T, S, H = Named("T"), Named("S"), Fixed(2)
ENTRIES = Entries(S, 8, 4)
QUERY, KEY, HEAD = Pos("query", T), Pos("key", S), Head(H)
i, j, h = Index(QUERY), Index(KEY), Index(HEAD)
DOCS = Input(name="doc", kind="int", axes=(S,))


def selection(topk: int) -> Select:
    q = Input(name="q", axes=(T, H, Fixed(4)))
    k = Input(name="k", axes=(S, H, Fixed(4)))
    scores = score(
        q, k, where=TRUE, scale=None, mod=None, act=None, weights=None, norm=None, site=None
    )
    return select(scores, topk=Const(topk), top_p=None, threshold=None, force=None, site=None)


TOKENS, BLOCKS, SLASHES = selection(3), selection(4), selection(5)
MEMBERS = (
    Member(TOKENS, (HEAD, QUERY, KEY)),
    Member(BLOCKS, (HEAD, QUERY, apply("floordiv", KEY, Const(4)))),
    Member(BLOCKS, (HEAD, QUERY, apply("floordiv", apply("add", KEY, Const(3)), Const(4)))),
    Member(SLASHES, (HEAD, QUERY, apply("sub", QUERY, KEY))),
)
_OPS: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative,
    "floordiv": np.floor_divide, "mod": np.mod, "min": np.minimum, "max": np.maximum,
    "abs": np.abs, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal, "and": np.logical_and, "or": np.logical_or,
    "not": np.logical_not, "where": np.where,
}  # fmt: skip


class Sequence:
    """One sequence: queries [first, first + n_q) of n_k keys, documents and random selections."""

    def __init__(self, n_q: int, n_k: int, first: int, key: Axis = S, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.stops = {"query": first + n_q, "key": n_k}
        self.first, self.key = first, key
        self.docs = np.sort(rng.integers(0, 3, max(n_k, 1)))
        span = n_k + n_q + abs(first) + 8
        shape = (2, n_q, span)
        self.chosen = {s: rng.random(shape) < 0.4 for s in (TOKENS, BLOCKS, SLASHES)}

    def grid(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        i = np.arange(self.first, self.stops["query"])
        return np.ix_(np.arange(2), i, np.arange(self.stops["key"]))  # type: ignore[return-value]

    def value(self, expr: Expr) -> Any:
        hs, is_, js = self.grid()
        match expr:
            case Const(value):
                return value
            case Pos(role):
                return is_ if role == "query" else js
            case Head():
                return hs
            case Stop(role):
                return self.stops[role]
            case Table(index=(index,)):
                return self.docs[np.clip(self.value(index), 0, len(self.docs) - 1)]
            case Member(selection, keys):
                items = self.value(keys[-1])
                chosen = self.chosen[selection]  # type: ignore[index]
                inside = (items >= 0) & (items < chosen.shape[-1])
                return chosen[hs, is_ - self.first, np.where(inside, items, 0)] & inside
            case Apply(op, args):
                return _OPS[op](*(self.value(a) for a in args))
        raise AssertionError(expr)

    def visible(self, expr: Expr) -> np.ndarray:
        hs, is_, js = self.grid()
        shape = np.broadcast_shapes(hs.shape, is_.shape, js.shape)
        return np.broadcast_to(self.value(expr), shape)

    def produced(self, clause: Clause, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return how often each pair is produced, and which pairs go unchecked."""
        _, is_, js = self.grid()
        tile = is_[:, rows]
        a, b = int(tile.min()), int(tile.max())
        lo, hi = evaluate(clause.hull, a, b, self.stops)
        assert lo >= 0
        assert hi <= self.stops["key"] or lo == hi
        inside = (js >= lo) & (js < hi)
        sure = np.zeros_like(inside)
        if clause.full is not None:
            lo, hi = evaluate(clause.full, a, b, self.stops)
            sure = (js >= lo) & (js < hi)
            assert not (sure & ~inside).any(), "full leaves the hull"
        shape = (2, tile.shape[1], js.shape[2])
        inside, sure = np.broadcast_to(inside, shape), np.broadcast_to(sure, shape)
        if clause.keys is not None:
            listed = np.zeros(shape, bool)
            keys = clause.keys
            chosen = self.chosen[keys.member.selection][:, rows]  # type: ignore[index]
            for head, row, item in zip(*np.nonzero(chosen), strict=True):
                start = item * keys.granule - keys.shift
                items = range(start, start + keys.granule)
                if keys.slash:
                    items = range(a + row - item, a + row - item + 1)
                for key in items:
                    if 0 <= key < shape[2]:
                        listed[head, row, key] = True
            inside, sure = inside & listed, sure & listed
        checked = self.visible(clause.residual)[:, rows]
        return inside & (sure | checked), sure


def check(where: Expr, sequence: Sequence, tile: int) -> int:
    """Compare the clauses with the predicate pair by pair; return the pairs hulls visit."""
    found = clauses(where, query=T, key=sequence.key)
    visible = sequence.visible(where)
    for start in range(0, visible.shape[1], tile):
        rows = slice(start, start + tile)
        count = np.zeros(visible[:, rows].shape, int)
        for clause in found:
            pairs, sure = sequence.produced(clause, rows)
            assert not (sure & ~visible[:, rows]).any(), f"full shows hidden pairs: {show(where)}"
            count += pairs
        assert (count == visible[:, rows]).all(), show(where)
    return len(found)


def ints(depth: int, key: Pos) -> st.SearchStrategy[Expr]:
    numbers = st.integers(-9, 9).map(Const)
    leaves = st.sampled_from([QUERY, key, Stop("query", T), Stop("key", key.axis)]) | numbers
    if depth == 0:
        return leaves
    below = ints(depth - 1, key)
    small = st.integers(1, 7).map(Const)
    return st.one_of(
        leaves,
        st.builds(lambda op, a, b: apply(op, a, b), st.sampled_from(["add", "sub"]), below, below),
        st.builds(lambda a, b: apply("mul", a, b), below, st.integers(-3, 4).map(Const)),
        st.builds(
            lambda op, a, b: apply(op, a, b), st.sampled_from(["floordiv", "mod"]), below, small
        ),
        st.builds(lambda op, a, b: apply(op, a, b), st.sampled_from(["min", "max"]), below, below),
        st.builds(lambda a: apply("abs", a), below),
    )


def predicates(key: Pos = KEY, members: bool = True) -> st.SearchStrategy[Expr]:
    compare = st.builds(
        lambda op, a, b: apply(op, a, b),
        st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), ints(2, key), ints(1, key),
    )  # fmt: skip
    simple: list[Any] = [
        apply("le", key, QUERY),
        apply("lt", apply("sub", QUERY, key), Const(5)),
        apply("lt", key, Const(2)),
        apply("eq", apply("floordiv", key, Const(4)), apply("floordiv", QUERY, Const(4))),
        apply("eq", HEAD, Const(1)),
        TRUE,
        FALSE,
    ]
    if members:
        simple += [*MEMBERS, apply("eq", Table(DOCS, (QUERY,)), Table(DOCS, (key,)))]
    leaves = compare | st.sampled_from(simple)
    return st.recursive(
        leaves,
        lambda below: st.one_of(
            st.builds(
                lambda op, a, b: apply(op, a, b), st.sampled_from(["and", "or"]), below, below
            ),
            st.builds(lambda a: apply("not", a), below),
            st.builds(lambda c, a, b: apply("where", c, a, b), below, below, below),
        ),
        max_leaves=6,
    )


SEQUENCES = st.builds(
    Sequence,
    n_q=st.integers(1, 17), n_k=st.integers(0, 23), first=st.integers(-3, 12),
    seed=st.integers(0, 9),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(where=predicates(), sequence=SEQUENCES, tile=st.integers(1, 9))
def test_clauses_produce_each_visible_pair_once(where: Expr, sequence: Sequence, tile: int) -> None:
    check(where, sequence, tile)


@settings(max_examples=25, deadline=None)
@given(where=predicates(Pos("key", ENTRIES), members=False), tile=st.integers(1, 9))
def test_clauses_over_entries(where: Expr, tile: int) -> None:
    check(where, Sequence(11, 5, 9, key=ENTRIES), tile)


def visits(where: Index | Expr, *, tile: int = 8, n: int = 64, key: Axis = S, n_k: int = 0) -> int:
    """Return how many keys the ranges visit in vain, over the tiles of a square."""
    expr = where.expr if isinstance(where, Index) else where
    sequence = Sequence(n, n_k or n, 0, key=key)
    check(expr, sequence, tile)
    visible = sequence.visible(expr)
    waste = 0
    for start in range(0, n, tile):
        seen = visible[:, start : start + tile].any(axis=(0, 1)).sum()
        visited = 0
        for clause in clauses(expr, query=T, key=key):
            lo, hi = evaluate(clause.hull, start, start + tile - 1, sequence.stops)
            visited += hi - lo
        waste += visited - seen
    return int(waste)


def unsure(where: Index | Expr, *, tile: int = 8, n: int = 64, key: Axis = S, n_k: int = 0) -> int:
    """Return how many (tile, key) pairs are visible throughout but not known to be."""
    expr = where.expr if isinstance(where, Index) else where
    sequence = Sequence(n, n_k or n, 0, key=key)
    visible = sequence.visible(expr)
    missed = 0
    for start in range(0, n, tile):
        missed += int(visible[:, start : start + tile].all(axis=(0, 1)).sum())
        for clause in clauses(expr, query=T, key=key):
            if clause.full is not None:
                lo, hi = evaluate(clause.full, start, start + tile - 1, sequence.stops)
                missed -= hi - lo
    return missed


ENTRY = Index(Pos("key", ENTRIES))
EXACT: dict[str, tuple[Index | Expr, Axis]] = {
    "everything": (TRUE, S),
    "nothing": (FALSE, S),
    "causal": (j <= i, S),
    "causal with offset": (j <= i - 5, S),
    "window": ((j <= i) & (i - j < 11), S),
    "band": (sg.abs(i - j) < 7, S),
    "window and sink": ((j <= i) & ((i - j < 11) | (j < 3)), S),
    "sink and window": ((j <= i) & ((j < 3) | (i - j < 11)), S),
    "last rows dense": ((j <= i) & ((i - j < 6) | (i >= i.stop - 8)), S),
    "prefix": ((j <= i) | (j < 9), S),
    "chunks": ((j <= i) & (i // 16 == j // 16), S),
    "same block": (j // 4 == i // 4, S),
    "past blocks": (j // 4 * 4 + 3 < i // 4 * 4, S),
    "two blocks": ((j <= i) & (i // 4 - j // 4 < 2), S),
    "entries": (i >= ENTRY * 4 + 7, ENTRIES),
    "entries of past chunks": (i // 16 * 16 > ENTRY * 4 + 7, ENTRIES),
    "compressed causality": ((i + 1) // 4 > ENTRY, ENTRIES),
    "minimum": (j <= sg.minimum(i, 20), S),
    "not itself": ((j <= i) & (j != i), S),
    "queries from 16 on": ((j <= i) & (i >= 16), S),
}


# Where two alternatives meet in a tile, some keys are visible throughout only by their union.
UNION_ONLY = {"window and sink": 3, "sink and window": 3, "last rows dense": 6, "prefix": 7}


@pytest.mark.parametrize("name", EXACT)
def test_common_predicates_are_exact(name: str) -> None:
    where, key = EXACT[name]
    n_k = 15 if key == ENTRIES else 0
    assert visits(where, key=key, n_k=n_k) == 0
    assert unsure(where, key=key, n_k=n_k) <= UNION_ONLY.get(name, 0)


def bounds(interval: Interval | None) -> tuple[list[str], list[str]] | None:
    return None if interval is None else ([*map(show, interval.lo)], [*map(show, interval.hi)])


def test_window_and_sink_print_as_two_disjoint_ranges() -> None:
    window, sink = clauses(
        ((j <= i) & ((i - j < 4096) | (j < 4))).expr, query=T, key=S
    )  # fmt: skip
    assert bounds(window.hull) == (["0", "(i_min - 4095)"], ["j.stop", "(i_max + 1)"])
    assert bounds(window.full) == (["0", "(i_max - 4095)"], ["j.stop", "(i_min + 1)"])
    assert bounds(sink.hull) == (
        ["0"], ["j.stop", "(i_max + 1)", "4", "max(0, (i_min - 4095))"],
    )  # fmt: skip
    assert sink.full is not None
    a, b = 8192, 8319
    stops = {"query": 16384, "key": 16384}
    assert evaluate(window.hull, a, b, stops) == (4097, 8320)
    assert evaluate(sink.hull, a, b, stops) == (0, 4)
    assert evaluate(sink.full, a, b, stops) == (0, 4)


def test_static_part_comes_first_and_lists_leave_it_out() -> None:
    blocks = Index(MEMBERS[1])
    local, chosen = clauses(
        ((j <= i) & (blocks | (j // 4 == i // 4))).expr, query=T, key=S
    )  # fmt: skip
    assert local.keys is None
    assert chosen.keys is not None
    assert (chosen.keys.granule, chosen.keys.shift, chosen.keys.slash) == (4, 0, False)
    assert show(chosen.residual) == "((j <= i) & ~((j // 4) == (i // 4)))"
    assert bounds(chosen.full) is not None
    assert evaluate(chosen.full, 9, 9, {"query": 32, "key": 32}) == (0, 8)  # type: ignore[arg-type]


def test_shortest_list_drives() -> None:
    tokens, blocks = Index(MEMBERS[0]), Index(MEMBERS[1])
    (clause,) = clauses((blocks & tokens & (j <= i)).expr, query=T, key=S)
    assert clause.keys is not None
    assert clause.keys.member is MEMBERS[0]
    assert MEMBERS[1] in (clause.residual, *getattr(clause.residual, "args", ()))


def test_slash_list() -> None:
    (clause,) = clauses(((j <= i) & Index(MEMBERS[3])).expr, query=T, key=S)
    assert clause.keys is not None
    assert clause.keys.slash
    check(((j <= i) & Index(MEMBERS[3])).expr, Sequence(12, 12, 0), 4)


def test_documents_are_partial_everywhere() -> None:
    same = Index(Table(DOCS, (QUERY,))) == Index(Table(DOCS, (KEY,)))
    (clause,) = clauses(((j <= i) & same).expr, query=T, key=S)
    assert clause.full is None
    assert bounds(clause.hull) == (["0"], ["j.stop", "(i_max + 1)"])


def test_too_many_alternatives_visit_everything() -> None:
    where = apply("and", TRUE, TRUE)
    for n in range(6):
        pair = apply("or", apply("eq", KEY, Const(n)), apply("eq", QUERY, Const(2 * n)))
        where = apply("and", where, pair)
    (clause,) = clauses(where, query=T, key=S)
    assert bounds(clause.hull) == (["0"], ["j.stop"])
    check(where, Sequence(13, 13, 0), 4)


def test_evaluate_takes_a_million_tiles_at_once() -> None:
    (clause,) = clauses(((j <= i) & (i - j < 4096)).expr, query=T, key=S)
    first = np.arange(0, 1 << 20, dtype=np.int64)
    lo, hi = evaluate(clause.hull, first, first + 63, {"query": 1 << 21, "key": 1 << 21})
    assert lo.shape == hi.shape == first.shape
    assert (hi - lo).max() == 4096 + 63


def test_disjoint_hulls_at_every_tile() -> None:
    where = (j <= i) & ((i - j < 8) | (j < 3) | (j // 8 == i // 16))
    found = clauses(where.expr, query=T, key=S)
    stops = {"query": 64, "key": 64}
    for start, tile in itertools.product(range(0, 64, 8), (1, 4, 8)):
        seen: set[int] = set()
        for clause in found:
            keys = range(*evaluate(clause.hull, start, start + tile - 1, stops))
            assert not seen & set(keys)
            seen |= set(keys)
