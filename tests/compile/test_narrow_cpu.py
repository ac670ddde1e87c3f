"""Ranges that integer tables narrow on CPUs, against the reference."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsegen as sg

SIZES = {"Hq": 6, "Hk": 2, "D": 9}


@sg.pattern
def tables(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"],
    doc: sg.Tensor["S", "int"], keep: sg.Tensor["S", "int"], start: sg.Tensor["T", "int"],
):  # fmt: skip
    """Documents, some keys hidden, rows that start where a table says."""
    i, j = sg.index(q, k)
    seen = (j <= i) & (doc[i] == doc[j]) & (keep[j] > 0) & (j >= i - start[i])
    o = sg.attend(q, k, v, where=seen)
    return o, o.lse


@sg.pattern
def either(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"],
    doc: sg.Tensor["S", "int"], keep: sg.Tensor["S", "int"], start: sg.Tensor["T", "int"],
):  # fmt: skip
    """The first keys and a window beside documents: several ranges share one predicate."""
    i, j = sg.index(q, k)
    near = (j < 5) | (i - j < 70) & (doc[i] == doc[j]) | (keep[j] > start[i])
    o = sg.attend(q, k, v, where=(j <= i) & near)
    return o, o.lse


@cache
def compiled(name: str) -> Any:
    pattern = {"tables": tables, "either": either}[name]
    return pattern.trace(), sg.compile(pattern, target="cpu", sizes=SIZES, dtype="float32")


@pytest.mark.parametrize("name", ["tables", "either"])
@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 90), keys=st.integers(1, 300), seed=st.integers(0, 999),
    documents=st.integers(1, 5), sort=st.booleans(), hidden=st.booleans(),
)  # fmt: skip
def test_matches_the_reference(
    name: str, queries: int, keys: int, seed: int, documents: int, sort: bool, hidden: bool
) -> None:
    program, kernel = compiled(name)
    rng = np.random.default_rng(seed)
    doc = rng.integers(0, documents, keys)
    inputs = {
        "q": rng.standard_normal((queries, 6, 9)), "k": rng.standard_normal((keys, 2, 9)),
        "v": rng.standard_normal((keys, 2, 9)), "doc": np.sort(doc) if sort else doc,
        "keep": rng.integers(0, 2, keys) if hidden else np.ones(keys),
        "start": rng.integers(0, 300, queries) if seed % 3 else np.full(queries, 999),
    }  # fmt: skip
    made = {
        n: x.astype(np.float32 if n in "qkv" else np.int32) for n, x in inputs.items()
    }  # fmt: skip
    want = sg.reference(program, made)
    got = kernel(**{n: torch.from_numpy(x) for n, x in made.items()})
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=2e-5, rtol=2e-5)
