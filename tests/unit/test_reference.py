"""The numeric contract, clause by clause, on the reference."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparsegen as sg
from sparsegen import patterns
from sparsegen.oracle import run
from tests.unit.oracles import Array, masked

RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = np.random.default_rng(7).bit_generator.state


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape)


def qkv(t: int, s: int, hq: int = 4, hk: int = 2, d: int = 5) -> dict[str, Array]:
    return {"q": normal(t, hq, d), "k": normal(s, hk, d), "v": normal(s, hk, d)}


@sg.pattern
def causal(q: "T Hq D", k: "S Hk D", v: "S Hk D"):
    i, j = sg.index(q, k)
    a = sg.attend(q, k, v, where=j <= i)
    return a, a.lse


# --- rows ---------------------------------------------------------------------------------------


def test_row_that_sees_nothing_is_zero_with_lse_minus_infinity() -> None:
    o, lse = sg.reference(causal, qkv(5, 3))
    assert (o[:2] == 0).all()
    assert (lse[:2] == -np.inf).all()
    assert np.isfinite(lse[2:]).all()


@pytest.mark.parametrize(("t", "s"), [(0, 0), (0, 7), (5, 0)])
def test_empty_sequences(t: int, s: int) -> None:
    o, lse = sg.reference(causal, qkv(t, s))
    assert o.shape == (t, 4, 5)
    assert lse.shape == (t, 4)
    assert (o == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("name", patterns.names())
@pytest.mark.parametrize(("t", "s"), [(0, 0), (0, 7), (5, 0), (1, 1)])
def test_every_pattern_takes_empty_sequences(name: str, t: int, s: int) -> None:
    config = patterns.configs(name, test=True)[0]
    program = patterns.load(name).trace(**config.hyper)
    x = patterns.random_inputs(program, {**config.sizes, "T": t, "S": s})
    results = sg.reference(program, x, q_offset=0 if name == "seer" else None)
    o = results[0] if isinstance(results, tuple) else results
    assert len(o) == t
    assert np.isfinite(o).all()
    assert s or (o == 0).all()


def test_offset_is_bottom_right_unless_given() -> None:
    x = qkv(3, 7)
    late, _ = sg.reference(causal, x)
    np.testing.assert_array_equal(late, sg.reference(causal, x, q_offset=4)[0])
    early, _ = sg.reference(causal, x, q_offset=0)
    np.testing.assert_array_equal(early[0], np.repeat(x["v"][0], 2, axis=0))


def test_lse_is_natural_and_leaves_the_sink_out() -> None:
    @sg.pattern
    def sunk(q: "T H D", k: "S H D", v: "S H D", sink: "H"):
        a = sg.attend(q, k, v, sink=sink)
        return a, a.lse

    x = qkv(3, 7, 2, 2)
    s = np.einsum("thd,shd->ths", x["q"], x["k"]) * 5**-0.5
    free, lse = sg.reference(sunk, {**x, "sink": np.full(2, -np.inf)})
    np.testing.assert_allclose(lse, np.log(np.exp(s).sum(-1)), atol=1e-12)
    np.testing.assert_allclose(free, masked(**x, visible=np.ones((1, 1, 7), bool)), atol=1e-12)
    o, again = sg.reference(sunk, {**x, "sink": np.full(2, 1.5)})
    np.testing.assert_array_equal(again, lse)
    share = np.exp(lse) / (np.exp(lse) + np.exp(1.5))
    np.testing.assert_allclose(o, free * share[..., None], atol=1e-12)
    drowned, _ = sg.reference(sunk, {**x, "sink": np.full(2, np.inf)})
    assert (drowned == 0).all()


def test_sink_of_an_empty_row_changes_nothing() -> None:
    @sg.pattern
    def sunk(q: "T H D", k: "S H D", v: "S H D", sink: "H"):
        i, j = sg.index(q, k)
        a = sg.attend(q, k, v, where=j < i - 99, sink=sink)
        return a, a.lse

    for sink in (-np.inf, 0.0, np.inf):
        o, lse = sg.reference(sunk, {**qkv(3, 7, 2, 2), "sink": np.full(2, sink)})
        assert (o == 0).all()
        assert (lse == -np.inf).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_hidden_keys_are_not_read(poison: float) -> None:
    x = qkv(4, 9)
    clean, lse = sg.reference(causal, x)
    for name in "kv":
        x[name][7:] = poison  # seen by the last two queries only
    with np.errstate(all="ignore"):
        o, dirty = sg.reference(causal, x)
    np.testing.assert_allclose(o[:2], clean[:2], atol=1e-13)
    np.testing.assert_allclose(dirty[:2], lse[:2], atol=1e-13)
    assert not np.isfinite(o[2:]).any()


def test_large_scores_do_not_overflow() -> None:
    x = qkv(3, 7)
    x["q"] *= 1e4
    o, lse = sg.reference(causal, x)
    assert np.isfinite(o).all()
    assert np.isfinite(lse).all()


def test_scale_is_the_callers_where_the_pattern_states_none() -> None:
    x = qkv(3, 7)
    half = sg.reference(causal, x, scale=0.5 * 5**-0.5)
    x["q"] *= 0.5
    np.testing.assert_allclose(half[0], sg.reference(causal, x)[0], atol=1e-13)


# --- layouts and dtypes -------------------------------------------------------------------------


def test_dense_ragged_and_paged_split_into_the_same_sequences() -> None:
    dsa = patterns.load("dsa").trace(topk=4, d_v=3)
    names = {n.name: str(n.axes[0]) for n in dsa.inputs}
    sizes = {"Hq": 3, "c": 5, "Hi": 2, "e": 4}
    lengths = [(3, 11), (0, 6), (1, 1), (5, 9), (2, 0)]
    each = [patterns.random_inputs(dsa, {**sizes, "T": t, "S": s}, t) for t, s in lengths]
    want = np.concatenate([sg.reference(dsa, x) for x in each])
    cu_q, cu_k = (np.cumsum([0, *(x[n] for x in lengths)]) for n in (0, 1))
    packed = {n: np.concatenate([x[n] for x in each]) for n in names}
    np.testing.assert_array_equal(
        sg.reference(dsa, packed, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k), want
    )
    page, table = 4, np.full((5, 3), 99)
    pool = {
        n: np.full((20, page, *packed[n].shape[1:]), np.nan) for n, a in names.items() if a == "S"
    }
    free = iter(RNG.permutation(20))
    for b, (_, s) in enumerate(lengths):
        for j in range(s):
            if j % page == 0:
                table[b, j // page] = next(free)
            for n in pool:
                pool[n][table[b, j // page], j % page] = each[b][n][j]
    paged = sg.reference(
        dsa, {**packed, **pool}, cu_seqlens_q=cu_q, page_table=table,
        seqlens_k=[s for _, s in lengths],
    )  # fmt: skip
    np.testing.assert_array_equal(paged, want)
    two = [patterns.random_inputs(dsa, {**sizes, "T": 4, "S": 7}, n) for n in (0, 1)]
    dense = sg.reference(dsa, {n: np.stack([x[n] for x in two]) for n in names}, q_offset=[3, 0])
    for o, x, offset in zip(dense, two, (3, 0), strict=True):
        np.testing.assert_array_equal(o, sg.reference(dsa, x, q_offset=offset))


def test_indices_are_joined_like_the_layout() -> None:
    @sg.pattern
    def lists(q: "T H D", k: "S H D", v: "S H D"):
        i, j = sg.index(q, k)
        h = sg.head(q)
        s = sg.score(q, k, where=j <= i)
        rows = sg.select(s, threshold=0.3)
        columns = sg.select(sg.reduce(s, "sum", by=(h, j)), topk=3)
        blocks = sg.select(sg.reduce(s, "max", by=(h, i // 2, j)), topk=2)
        near = rows[h, i, j] | columns[h, j] | blocks[h, i // 2, j]
        o = sg.attend(q, k, v, where=(j <= i) & near)
        return o, rows.indices, columns.indices, blocks.indices

    o, rows, columns, blocks = sg.reference(lists, qkv(5, 7, 2, 2))
    assert [x.shape for x in (o, rows, columns, blocks)] == [
        (5, 2, 5), (5, 2, 7), (2, 3), (3, 2, 2),
    ]  # fmt: skip
    assert rows.dtype == np.int32
    without = sg.Program(
        name="lists", inputs=lists.program.inputs, hyper=(), outputs=lists.program.outputs[:3],
        single=False, query="T", key="S",
    )  # fmt: skip
    a, b = qkv(5, 7, 2, 2), qkv(2, 9, 2, 2)
    both = {n: np.concatenate([a[n], b[n]]) for n in a}
    cu = {"cu_seqlens_q": [0, 5, 7], "cu_seqlens_k": [0, 7, 16]}
    o, rows, columns = sg.reference(without, both, **cu)
    assert [x.shape for x in (o, rows, columns)] == [(7, 2, 5), (7, 2, 9), (2, 2, 3)]
    with pytest.raises(sg.InputError, match="sequence layout only"):
        sg.reference(lists, both, **cu)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_inputs_of_any_float_dtype_are_evaluated_in_float64(dtype: type) -> None:
    x = {n: a.astype(dtype) for n, a in qkv(3, 7).items()}
    o, _ = sg.reference(causal, x)
    assert o.dtype == np.float64
    wide = {n: a.astype(np.float64) for n, a in x.items()}
    np.testing.assert_array_equal(o, sg.reference(causal, wide)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None}, "causal needs input 'q'"),
        ({"qq": normal(1)}, "causal has no input 'qq'"),
        ({"v": normal(6, 2, 5)}, r"'v' has 6 elements along \[S\], expected 7"),
        ({"k": normal(7, 10)}, r"'k' has shape \(7, 10\), but is declared \[S Hk D\]"),
    ],
    ids=["missing", "unknown", "extent", "rank"],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Array], message: str) -> None:
    x = {n: a for n, a in {**qkv(3, 7), **change}.items() if a is not None}
    with pytest.raises(sg.InputError, match=message):
        sg.reference(causal, x)


@pytest.mark.parametrize("name", patterns.names())
def test_chunks_of_queries_do_not_change_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = patterns.configs(name, test=True)[0]
    program = patterns.load(name).trace(**config.hyper)
    x = patterns.random_inputs(program, config.sizes)
    whole = sg.reference(program, x)
    monkeypatch.setattr(run, "_CHUNK", 1)  # one query at a time
    pieces = sg.reference(program, x)
    pairs = zip(whole, pieces, strict=True) if isinstance(whole, tuple) else [(whole, pieces)]
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


# --- expressions --------------------------------------------------------------------------------


def test_tables_are_clamped_and_follow_the_offset() -> None:
    @sg.pattern
    def biased(q: "T H D", k: "S H D", v: "S H D", near: "9", own: "T", pair: "T S"):
        i, j = sg.index(q, k)
        where = near[i - j] + own[i] + pair[i, j] > 0
        return sg.attend(q, k, v, where=where)

    x = {**qkv(4, 21, 2, 2), "near": normal(9), "own": normal(4), "pair": normal(4, 21)}
    visible = np.zeros((1, 4, 21), bool)
    for t in range(4):
        for j in range(21):
            distance = min(max(t + 17 - j, 0), 8)
            visible[0, t, j] = x["near"][distance] + x["own"][t] + x["pair"][t, j] > 0
    want = masked(x["q"], x["k"], x["v"], visible)
    np.testing.assert_allclose(sg.reference(biased, x), want, atol=1e-12)


def test_division_and_modulo_are_floored() -> None:
    @sg.pattern
    def dilated(q: "T H D", k: "S H D", v: "S H D"):
        i, j = sg.index(q, k)
        return sg.attend(q, k, v, where=((i - j) % 3 == 1) & ((i - j) // 4 >= -2))

    x = qkv(5, 17, 1, 1)
    visible = np.zeros((1, 5, 17), bool)
    for t in range(5):
        for j in range(17):
            visible[0, t, j] = (t - j) % 3 == 1 and (t - j) // 4 >= -2
    want = masked(x["q"], x["k"], x["v"], visible)
    np.testing.assert_allclose(sg.reference(dilated, x, q_offset=0), want, atol=1e-12)


def test_functions_of_the_score() -> None:
    @sg.pattern
    def shaped(q: "T H D", k: "S H D", v: "S H D"):
        i, j = sg.index(q, k)

        def mod(s):
            a = sg.sigmoid(s) + sg.sqrt(sg.abs(s)) - sg.log(1 + sg.exp(s))
            return sg.where(s > 0.1, a, sg.maximum(s, -0.3) * 2 / (j + 1)) - sg.minimum(s, 0.2)

        return sg.attend(q, k, v, where=j <= i, mod=mod)

    x = qkv(4, 9, 1, 1)
    s = (x["q"][:, 0] @ x["k"][:, 0].T) * 5**-0.5
    a = 1 / (1 + np.exp(-s)) + np.sqrt(np.abs(s)) - np.log(1 + np.exp(s))
    s = np.where(s > 0.1, a, np.maximum(s, -0.3) * 2 / (np.arange(9) + 1)) - np.minimum(s, 0.2)
    s = np.where(np.arange(9) <= np.arange(5, 9)[:, None], s, -np.inf)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    np.testing.assert_allclose(sg.reference(shaped, x)[:, 0], p @ x["v"][:, 0], atol=1e-12)


# --- selections ---------------------------------------------------------------------------------


@sg.pattern
def chosen(q: "T 1 1", k: "S 1 1", *, topk=3, forced=0, top_p=None, threshold=None):
    i, j = sg.index(q, k)
    s = sg.score(q, k, scale=1, where=j <= i)
    by = sg.reduce(s, "sum", by=(i, j))
    force = (j < forced) | ((j == 0) & (j < forced))
    sel = sg.select(by, topk=topk, top_p=top_p, threshold=threshold, force=force)
    return sg.attend(q, k, k, where=sel[i, j]), sel.indices


def choose(scores: list[float], **hyper: float) -> list[int]:
    """Select from one row of scores."""
    x = {"q": np.ones((1, 1, 1)), "k": np.array(scores).reshape(-1, 1, 1)}
    with np.errstate(all="ignore"):
        indices = sg.reference(chosen.trace(**hyper), x)[1][0]
    kept = indices[indices >= 0]
    assert (indices[len(kept) :] == -1).all()
    assert (np.diff(kept) > 0).all()
    return kept.tolist()


def test_ties_go_to_the_smallest_index() -> None:
    assert choose([1, 2, 2, 0, 2, 2]) == [1, 2, 4]
    assert choose([0.0] * 9, topk=4) == [0, 1, 2, 3]
    assert choose([0.0, -0.0, 0.0], topk=1) == [0]


def test_nan_counts_as_minus_infinity() -> None:
    assert choose([np.nan, 1, np.nan, -5]) == [1, 3]
    assert choose([np.nan, -np.inf, 3]) == [2]
    assert choose([np.nan] * 3) == []
    assert choose([np.nan, 1, np.nan], forced=1, topk=2) == [0, 1]


def test_infinity_is_a_score() -> None:
    assert choose([1, np.inf, 2], topk=1) == [1]


def test_budget_beyond_the_keys_takes_all_and_pads() -> None:
    x = {"q": np.ones((1, 1, 1)), "k": np.ones((4, 1, 1))}
    assert sg.reference(chosen.trace(topk=6), x)[1].tolist() == [[0, 1, 2, 3, -1, -1]]


def test_forced_keys_count_inside_the_budget_and_only_once() -> None:
    assert choose([0, 0, 5, 6, 7], forced=2) == [0, 1, 4]  # key 0 is forced by two clauses
    assert choose([0, 1, 2, 3], forced=4, topk=2) == [0, 1]  # over the budget: by index
    assert choose([9, 0, 0], forced=1, topk=2) == [0, 1]


def test_forced_keys_ignore_the_score_but_not_the_attention() -> None:
    @sg.pattern
    def ahead(q: "T H D", k: "S H D", v: "S H D"):
        i, j = sg.index(q, k)
        s = sg.reduce(sg.score(q, k, where=j <= i), "sum", by=(i, j))
        sel = sg.select(s, topk=2, force=j == i + 1)
        return sg.attend(q, k, v, where=(j <= i) & sel[i, j]), sel.indices

    x = qkv(4, 4, 1, 1)
    o, indices = sg.reference(ahead, x)
    assert indices[0].tolist() == [0, 1]
    assert 2 in indices[1]
    assert len(set(indices[3])) == 2  # key 4 does not exist
    np.testing.assert_allclose(o[0], x["v"][0], atol=1e-15)


def test_threshold_includes_equality_and_is_capped_by_topk() -> None:
    assert choose([0.5, 1, 2, 0.4], threshold=0.5, topk=9) == [0, 1, 2]
    assert choose([0.5, 1, 2, 0.4], threshold=0.5, topk=2) == [1, 2]
    assert choose([0.5, 1, 2, 0.4], threshold=0.9, forced=1, topk=9) == [0, 1, 2]
    assert choose([0.5, np.nan], threshold=0.1, topk=9) == [0]


def test_top_p_is_the_shortest_prefix() -> None:
    assert choose([4, 1, 3, 2], top_p=0.4, topk=9) == [0]
    assert choose([4, 1, 3, 2], top_p=0.41, topk=9) == [0, 2]
    assert choose([4, 1, 3, 2], top_p=1.0, topk=9) == [0, 1, 2, 3]
    assert choose([4, 1, 0, 0], top_p=1.0, topk=9) == [0, 1]
    assert choose([1, 4, 3, 2], top_p=0.4, forced=1, topk=9) == [0, 1]
    assert choose([1, 4, 3, 2], top_p=0.1, forced=1, topk=9) == [0]
    assert choose([0, 0], top_p=0.5, topk=9) == []


def test_budget_may_depend_on_the_query() -> None:
    @sg.pattern
    def growing(q: "T H D", k: "S H D"):
        i, j = sg.index(q, k)
        s = sg.score(q, k, where=j <= i)
        sel = sg.select(sg.reduce(s, "sum", by=(i, j)), topk=i // 2)
        return sg.attend(q, k, k, where=sel[i, j]), sel.indices

    x = qkv(6, 6, 1, 1)
    _, indices = sg.reference(growing, {n: x[n] for n in "qk"})
    assert (indices >= 0).sum(-1).tolist() == [0, 0, 1, 1, 2, 2]


@given(
    scores=st.lists(
        st.sampled_from([-np.inf, np.nan, np.inf, -1.0, 0.0, -0.0, 0.5, 2.0]), max_size=12
    ),
    topk=st.integers(1, 14),
    forced=st.integers(0, 4),
)
def test_select_is_a_sort(scores: list[float], topk: int, forced: int) -> None:
    finite = {j: s for j, s in enumerate(scores) if s > -np.inf and j >= forced}
    order = list(range(min(forced, len(scores)))) + sorted(finite, key=lambda j: (-finite[j], j))
    assert choose(scores, topk=topk, forced=forced) == sorted(order[:topk])


# --- reductions ---------------------------------------------------------------------------------

KEYS = {
    "h": lambda h, i, j: h,
    "h // 2": lambda h, i, j: h // 2,
    "i": lambda h, i, j: i,
    "i // 3": lambda h, i, j: i // 3,
    "i // 6": lambda h, i, j: i // 6,
}
LAST = {
    "j": lambda h, i, j: j,
    "j // 4": lambda h, i, j: j // 4,
    "(j + 1) // 4": lambda h, i, j: (j + 1) // 4,
    "i - j": lambda h, i, j: i - j,
}


@given(
    before=st.sets(st.sampled_from(sorted(KEYS)), max_size=2).filter(
        lambda keys: sum(k.startswith("i") for k in keys) < 2
    ),
    last=st.sampled_from(sorted(LAST)),
    how=st.sampled_from(["sum", "max", "mean", "lse"]),
    norm=st.sampled_from([None, "softmax"]),
    lengths=st.sampled_from([(7, 13), (5, 3), (1, 9)]),
)
def test_reduce_is_a_loop(
    before: set[str], last: str, how: str, norm: str | None, lengths: tuple[int, int]
) -> None:
    functions = [*(KEYS[k] for k in sorted(before)), LAST[last]]

    @sg.pattern
    def reduced(q: "T Hq D", k: "S Hk D"):
        i, j = sg.index(q, k)
        h = sg.head(q)
        s = sg.score(q, k, where=(j <= i) & (j % 5 != 2))
        by = tuple(f(h, i, j) for f in functions)
        return sg.attend(q, k, k), sg.select(sg.reduce(s, how, by=by, norm=norm), topk=1).indices

    rng = np.random.default_rng(lengths[0])
    x = {"q": rng.normal(size=(lengths[0], 4, 3)), "k": rng.normal(size=(lengths[1], 2, 3))}
    node = reduced.program.outputs[1].node.x
    evaluation = run.Run(reduced.program, x, None, None)
    spaces = list(evaluation.spaces(node))
    got: dict[tuple[int, ...], float] = {}
    for space in spaces:
        for at in np.ndindex(*space.values.shape):
            if space.values[at] > -np.inf:
                got[tuple(int(c[n]) for c, n in zip(space.coords, at, strict=True))] = space.values[
                    at
                ]
    groups: dict[tuple[int, ...], list[float]] = {}
    offset = lengths[1] - lengths[0]
    for h in range(4):
        for t in range(lengths[0]):
            for j in range(lengths[1]):
                if j <= t + offset and j % 5 != 2:
                    key = tuple(int(f(h, t + offset, j)) for f in functions)
                    s = x["q"][t, h] @ x["k"][j, h // 2] * 3**-0.5
                    groups.setdefault(key, []).append(s)
    combine = {
        "sum": np.sum, "max": np.max, "mean": np.mean,
        "lse": lambda v: np.log(np.sum(np.exp(v))),
    }[how]  # fmt: skip
    want = {key: float(combine(values)) for key, values in groups.items()}
    if norm:
        totals: dict[tuple[int, ...], float] = {}
        for key, value in want.items():
            totals[key[:-1]] = totals.get(key[:-1], 0.0) + np.exp(value)
        want = {key: np.exp(value) / totals[key[:-1]] for key, value in want.items()}
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, abs=1e-12)


def test_overlapping_entries_add_their_share_to_each_block() -> None:
    """For windows of 32 every 16 and blocks of 64: p[4b-1] + 2 p[4b .. 4b+2] + p[4b+3]."""

    @sg.pattern
    def shares(q: "T H D", k: "S H D"):
        i, _ = sg.index(q, k)
        kc = sg.compress(k, sg.mean, width=32, stride=16)
        s = sg.reduce(sg.score(q, kc), "sum", by=(i, kc.blocks(64)))
        return sg.attend(q, k, k), sg.select(s, topk=1).indices

    x = {"q": normal(2, 1, 3), "k": normal(256, 1, 3)}
    evaluation = run.Run(shares.program, x, None, None)
    node = shares.program.outputs[1].node.x
    (got,) = [s.values for s in evaluation.spaces(node)]
    (p,) = [s.values[0] for s in evaluation.spaces(node.x)]
    p = np.pad(p, [(0, 0), (1, 1)])  # an entry before the first and after the last: none
    for b in range(4):
        e = 4 * b + 1
        want = p[:, e - 1] + 2 * p[:, e : e + 3].sum(-1) + p[:, e + 3]
        np.testing.assert_allclose(got[:, b], want, atol=1e-12)


def test_max_ignores_nan_and_sum_carries_it() -> None:
    @sg.pattern
    def pooled(q: "T H D", k: "S H D", *, how="max"):
        i, j = sg.index(q, k)
        s = sg.score(q, k, scale=1)
        sel = sg.select(sg.reduce(s, how, by=(i, j // 2)), topk=1)
        return sg.attend(q, k, k), sel.indices

    x = {"q": np.ones((1, 1, 1)), "k": np.array([1, 2, np.nan, 5, 3, 3]).reshape(-1, 1, 1)}
    with np.errstate(all="ignore"):
        assert sg.reference(pooled, x)[1].item() == 1
        assert sg.reference(pooled.trace(how="sum"), x)[1].item() == 2


# --- compression --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "max", "min", "sum"])
@pytest.mark.parametrize("partial", [False, True], ids=["complete", "partial"])
@pytest.mark.parametrize(("width", "stride"), [(4, 4), (5, 2)])
def test_pools_are_loops(how: str, partial: bool, width: int, stride: int) -> None:
    @sg.pattern
    def pooled(q: "T H D", k: "S H D"):
        kc = sg.compress(k, how, width=width, stride=stride, partial=partial)
        return sg.attend(q, kc, kc)

    for s in (3, 4, 13, 16):
        x = {"q": normal(2, 2, 3), "k": normal(s, 2, 3)}
        starts = range(0, s, stride) if partial else range(0, s - width + 1, stride)
        kc = np.array([getattr(x["k"][a : a + width], how)(0) for a in starts]).reshape(-1, 2, 3)
        want = masked(x["q"], kc, kc, np.ones((1, 1, len(kc)), bool))
        np.testing.assert_allclose(sg.reference(pooled, x), want, atol=1e-12)


def test_learned_pools_are_loops() -> None:
    @sg.pattern
    def matrix(q: "T H E", k: "S H D", w: "4 D E", b: "4 D"):
        kc = sg.compress(k, w, width=4, stride=3, bias=b)
        return sg.attend(q, kc, kc)

    @sg.pattern
    def scalar(q: "T H D", k: "S H D", w: "4", b: "4 D"):
        kc = sg.compress(k, w, width=4, stride=3, bias=b)
        return sg.attend(q, kc, kc)

    k, b, wide, narrow = normal(14, 2, 3), normal(4, 3), normal(4, 3, 5), normal(4)
    windows = [k[a : a + 4] + b[:, None] for a in (0, 3, 6, 9)]
    for pattern, w in ((matrix, wide), (scalar, narrow)):
        form = "whd,wde->he" if w.ndim == 3 else "whd,w->hd"
        kc = np.array([np.einsum(form, x, w) for x in windows])
        q = normal(2, 2, kc.shape[2])
        want = masked(q, kc, kc, np.ones((1, 1, 4), bool))
        got = sg.reference(pattern, {"q": q, "k": k, "w": w, "b": b})
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_merging_parts_that_see_nothing() -> None:
    @sg.pattern
    def split(q: "T H D", k: "S H D", v: "S H D"):
        i, j = sg.index(q, k)
        far = sg.attend(q, k, v, where=j < i - 3)
        near = sg.attend(q, k, v, where=(j >= i - 3) & (j <= i))
        a = sg.merge([far, near])
        return a, a.lse

    x = qkv(9, 6, 2, 2)  # three rows see nothing, others only one part
    o, lse = sg.reference(split, x)
    dense, want = sg.reference(causal, x)
    np.testing.assert_allclose(o, dense, atol=1e-12)
    np.testing.assert_allclose(lse, want, atol=1e-12)
