"""Costs: formulas against masks of the reference, and against figures of published models."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

import sparsegen as sg
from sparsegen import patterns
from sparsegen.analysis.cost import Costing, cache, kernels, multi_head, total
from sparsegen.analysis.sums import closed_form, letter, position, readable, value
from sparsegen.ir.program import Program
from sparsegen.oracle.run import Run
from sparsegen.primitives import Attend, Score

T, S = letter("T"), letter("S")
CASES = [
    pytest.param(name, config, id=f"{name}-{config}")
    for name in patterns.names()
    for config in patterns.configs(name, test=True)
]


def costing(name: str, config: patterns.Config, **hyper: Any) -> Costing:
    program = patterns.load(name).trace(**{**config.hyper, **hyper})
    return Costing(program, config.sizes)


def shape(name: str, config: str) -> patterns.Config:
    return next(c for c in patterns.configs(name) if c.name == config)


def scored_pairs(program: Program) -> Iterator[tuple[Any, Any, Any]]:
    for node in program.nodes:
        if isinstance(node, Attend):
            yield from ((node.q, s.k, s.where) for s in node.sources)
        elif isinstance(node, Score):
            yield node.q, node.k, node.where


@pytest.mark.parametrize(("name", "config"), CASES)
def test_keys_are_those_the_masks_show(name: str, config: patterns.Config) -> None:
    at = costing(name, config)
    run = Run(at.program, patterns.random_inputs(at.program, config.sizes), None, None)

    def number(expr: Any) -> int:
        return int(value(expr, config.sizes))

    for q, k, where in scored_pairs(at.program):
        keys = at.keys(where, q, k)
        heads, kv_heads = (number(at.size(x.axes[1])) for x in (q, k))
        rows, columns = (number(at.size(x.axes[0])) for x in (q, k))
        env = run.env.bind(run.pairs(q, k, slice(None)))
        visible = np.broadcast_to(env(where), (heads, rows, columns))
        shared = visible.reshape(kv_heads, heads // kv_heads * rows, columns)
        counted = (
            (heads * number(keys.total), visible.sum()),
            (heads * number(keys.last), visible[:, -1:].sum()),
            (kv_heads * number(keys.distinct), shared.any(axis=1).sum()),
        )
        for formula, mask in counted:
            assert formula == mask if not keys.assumed else formula >= mask


SIZES = st.integers(0, 9)


@given(c=SIZES, d=SIZES, low=SIZES, high=SIZES, m=st.integers(1, 4), t=SIZES, s=SIZES, cap=SIZES)
def test_sums_are_sums(
    c: int, d: int, low: int, high: int, m: int, t: int, s: int, cap: int
) -> None:
    i = position()
    stairs = sp.floor((i + c - 4) / m) + d - 3
    for los, his in (
        ([sp.Integer(low)], [sp.Integer(high), stairs]),
        ([sp.Integer(0)], [S, i + 1]),
        ([sp.Integer(low), i - d], [S, i + c - 4]),
        ([sp.Integer(low), i - d], [S]),
        ([sp.Integer(0)], [sp.Integer(high), sp.Max(0, i - d)]),
    ):
        for budget in (None, sp.Integer(cap)):
            found = closed_form(los, his, budget, S - T, S)
            sizes = {"T": t + 1, "S": s + 1}
            wanted = 0
            for at in range(s - t, s + 1):
                lo, hi = (
                    fold(int(e.subs({i: at, S: s + 1})) for e in bounds)
                    for fold, bounds in ((max, los), (min, his))
                )
                width = max(0, hi - lo)
                wanted += width if budget is None else min(cap, width)
            assert value(found, sizes) == wanted


def test_usual_masks_have_no_sum_sign() -> None:
    for name in ("full", "causal", "sliding_window", "mla_decode", "dsa", "nsa", "v4_hca"):
        at = costing(name, patterns.configs(name)[0])
        for _, cost in kernels(at):
            assert not sp.sympify(cost.products).has(sp.Sum)
    at = costing("causal", patterns.configs("causal")[0])
    ((_, cost),) = kernels(at)
    assert readable(cost.products, "T", "S") == "Hq*T*(D + E)*(2*S - T + 1)"


def test_sums_without_a_closed_form_are_evaluated() -> None:
    config = shape("moba", "8k")
    at = costing("moba", config)
    (_, attend) = kernels(at)[-1]
    assert attend.products.has(sp.Sum)
    # 15 blocks of 512 before the last one; two of them, where there are so many, and the own one.
    own = 16 * 512 * 513 // 2
    past = sum(min(1024, i + 1) for i in range(8192))
    assert value(attend.products, config.sizes) == 2 * 32 * 256 * (own + past)


def test_mla_keeps_98_percent_less_than_multi_head_attention() -> None:
    config = shape("mla_decode", "deepseek-v3")
    at = costing("mla_decode", config)
    kept = {c.name: value(c.elements, config.sizes) for c in cache(at)}
    assert kept == {"c_kv": 512, "k_rope": 64}
    assert value(multi_head(at), config.sizes) == 32768
    assert round(100 * (1 - sum(kept.values()) / 32768), 1) == 98.2
    # 128 heads multiply 576 elements of a key and 512 of a value.
    attend = kernels(at)[1][1]
    assert value(attend.step, {**config.sizes, "S": 1}) == 278528


def test_mla_follows_its_sizes() -> None:
    config = shape("mla_decode", "deepseek-v3")
    at = costing("mla_decode", config)
    sizes = {**config.sizes, "c": 256}
    assert sum(value(c.elements, sizes) for c in cache(at)) == 320
    half = {**config.sizes, "H": 64}
    assert value(multi_head(at), half) == 16384


def test_nsa_reads_5632_tokens_per_step_at_64k() -> None:
    config = shape("nsa", "nsa-27b-decode")
    spent = total(cost for _, cost in kernels(costing("nsa", config)))
    assert str(spent.at_most) == "S/16 + 1536"
    assert value(spent.at_most, {"S": 65536}) == 5632
    assert value(spent.attended, config.sizes) == 5631  # 4095 windows of 32 are complete
    table = {n: value(spent.at_most, {"S": n}) for n in (8192, 16384, 32768)}
    assert table == {8192: 2048, 16384: 2560, 32768: 3584}


def test_nsa_follows_its_hyperparameters() -> None:
    config = shape("nsa", "nsa-27b-decode")
    at = costing("nsa", config, n=8, W=256, l=64, d=64)
    spent = total(cost for _, cost in kernels(at))
    assert value(spent.at_most, config.sizes) == 65536 // 64 + 8 * 64 + 256


def test_dsa_costs_an_indexer_and_what_it_selects() -> None:
    config = shape("dsa", "deepseek-v3.2-decode")
    (_, select), (_, attend) = kernels(costing("dsa", config))
    assert value(select.step, config.sizes) == 64 * 128 * 2 * 32768
    assert value(attend.step, config.sizes) == 278528 * 2048
    assert value(attend.step, {**config.sizes, "S": 1000}) == 278528 * 1000
    (_, fewer) = kernels(costing("dsa", config, topk=512))[1]
    assert value(fewer.step, config.sizes) == 278528 * 512
    assert attend.assumed == (
        "sel[i, j] holds 2048 keys of every query that may see so many",
        "the lists of sel[i, j] share a key only if they must",
    )


def test_windows_keep_a_constant_cache() -> None:
    config = shape("v4_csa", "v4-flash")
    kept = {c.name: (c.elements, c.last) for c in cache(costing("v4_csa", config))}
    assert kept["kv"][1] == 128
    assert kept["compress(x) every 4"] == (letter("c") / 4, None)
    at = costing("sliding_window", shape("sliding_window", "gpt-oss-120b"))
    assert [c.last for c in cache(at)] == [128, 128]


def test_bytes_count_shared_memory_once() -> None:
    config = shape("dsa", "deepseek-v3.2-decode")
    program = patterns.load("dsa").program
    at = Costing(program, config.sizes, default=2, itemsize={"k_idx": 1})
    (_, select), (_, attend) = kernels(at)
    lists = 2048 * 4
    assert value(attend.read, config.sizes) == 2 * 128 * 576 + 2 * 2048 * 576 + lists
    assert value(attend.written, config.sizes) == 2 * 128 * 512
    assert value(select.read, config.sizes) == 2 * 64 * 128 + 2 * 64 + 32768 * 128


def test_a_slice_of_a_concatenation_reads_its_parts() -> None:
    @sg.pattern
    def odd(q: sg.Tensor["T H D"], a: sg.Tensor["S 1 3"], b: sg.Tensor["S 1 5"], *, d=6):
        k = sg.cat(a, b)
        return sg.attend(sg.cat(q, q)[..., :8], k, k[..., 1:d])

    at = Costing(odd.program, {"D": 4})
    ((node, cost),) = kernels(at)
    assert [(x.name, lo, hi) for x, lo, hi in at.leaves(node.sources[0].v)] == [
        ("a", 1, 3),
        ("b", 0, 3),
    ]
    sizes = {"T": 2, "S": 10, "H": 3, "D": 4}
    assert value(cost.read, sizes) == 4 * (2 * 3 * 4 + 10 * 3 + 10 * 5)


def test_every_program_has_a_cost() -> None:
    for name in patterns.names():
        for config in patterns.configs(name):
            spent = total(cost for _, cost in kernels(costing(name, config)))
            for what in ("products", "pointwise", "read", "written", "step", "attended"):
                assert value(getattr(spent, what), config.sizes) > 0, (name, what)


def test_a_missing_size_is_named() -> None:
    at = costing("causal", shape("causal", "llama-3-8b"))
    with pytest.raises(KeyError, match="D, E, Hq"):
        value(kernels(at)[0][1].products, {"T": 1, "S": 1})
