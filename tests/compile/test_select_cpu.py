"""Selections on the CPU are those of the reference, whatever ties, NaN and infinities there are.

Inputs are small integers, so that scores are exact and a list has one right answer.
"""

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsegen as sg
from tests.compile.test_patterns_cpu import check
from tests.harness import Case, as_numpy, listed

Q, K = sg.Tensor["T H D"], sg.Tensor["S 1 D"]


@sg.pattern
def tokens(q: Q, k: K, *, n=5):
    i, j = sg.index(q, k)
    s = sg.score(q, k, scale=1, where=j <= i)
    return sg.select(sg.reduce(s, "sum", by=(i, j)), topk=n).indices


@sg.pattern
def per_head(q: Q, k: K, *, n=3):
    i, j = sg.index(q, k)
    h = sg.head(q)
    return sg.select(sg.score(q, k, scale=1, where=(j <= i) & (h < i)), topk=n + h).indices


@sg.pattern
def blocks(q: Q, k: K, *, n=4):
    i, j = sg.index(q, k)
    s = sg.reduce(sg.score(q, k, scale=1, where=j <= i), "max", by=(i, j // 3))
    near = (j // 3 == 0) | (j // 3 == i // 3)
    return sg.select(s, topk=n, force=near).indices


@sg.pattern
def above(q: Q, k: K):
    i, j = sg.index(q, k)
    s = sg.reduce(sg.score(q, k, scale=1, act=sg.relu, where=j <= i), "mean", by=(i, j))
    return sg.select(s, threshold=1.0, topk=7).indices


@sg.pattern
def columns(q: Q, k: K):
    i, j = sg.index(q, k)
    s = sg.score(q, k, scale=1, where=j <= i)
    best = sg.select(sg.reduce(s, "max", by=(j,)), topk=6)
    lines = sg.select(sg.reduce(s, "max", by=(i - j,)), topk=6, force=i - j < 2)
    return best.indices, lines.indices


ODD = (np.nan, np.inf, -np.inf, 0.0, -0.0)


@given(
    pattern=st.sampled_from([tokens, per_head, blocks, above, columns]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    lengths=st.tuples(st.integers(0, 21), st.integers(0, 150)),
    spread=st.integers(0, 2),
    odd=st.lists(st.tuples(st.sampled_from("qk"), st.sampled_from(ODD)), max_size=9),
    seed=st.integers(0, 999),
)
def test_lists_are_exact(
    pattern: Any, dtype: torch.dtype, lengths: tuple[int, int], spread: int,
    odd: list[tuple[str, float]], seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    inputs = {
        n: torch.from_numpy(rng.integers(-spread, spread + 1, (rows, heads, 4))).to(dtype)
        for n, rows, heads in (("q", lengths[0], 2), ("k", lengths[1], 1))
    }
    for name, value in odd:
        flat = inputs[name].view(-1)
        if len(flat):
            flat[rng.integers(len(flat))] = value
    with np.errstate(all="ignore"):
        want = listed(sg.reference(pattern, as_numpy(inputs)))
    options = {"dtype": str(dtype).removeprefix("torch."), "sizes": {"H": 2, "D": 4}}
    check(Case(pattern.program, options, inputs, {}, want))
