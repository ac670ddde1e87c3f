"""Every shipped pattern, in every layout and dtype, against the float64 reference on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegen import patterns
from sparsegen.patterns import Config
from tests.harness import UNPAGED, Case, batch, listed, one_sequence, poisoned

# Inputs are rounded before both sides read them, so what is left is fp32 accumulation and the
# rounding of the output: half a unit in the last place of the dtype.
TOLERANCE = {
    "float32": (3e-5, 3e-5),
    "float16": (2e-4, 2**-10),
    "bfloat16": (2e-4, 2**-7),
}

CASES = [
    pytest.param(n, c, id=f"{n}-{c}")
    for n in patterns.names()
    for c in patterns.configs(n, test=True)
]
LAYOUTS = [
    pytest.param(n, x, id=f"{n}-{x}")
    for n in patterns.names()
    for x in ("dense", "ragged", "paged")
]
NARROW = [
    pytest.param(n, d, id=f"{n}-{d}")
    for n in patterns.names()
    for d in (torch.bfloat16, torch.float16)
]


def check(case: Case) -> None:
    got = listed(case.compile("cpu")(**case.inputs, **case.call))
    assert len(got) == len(case.want)
    atol, rtol = TOLERANCE[case.options["dtype"]]
    for g, w in zip(got, case.want, strict=True):
        assert tuple(g.shape) == np.shape(w)
        if g.dtype == torch.int32:
            np.testing.assert_array_equal(g.numpy(), w)
        else:
            np.testing.assert_allclose(g.double().numpy(), w, atol=atol, rtol=rtol)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_one_sequence(name: str, config: Config) -> None:
    check(one_sequence(name, config, torch.float32))


@pytest.mark.parametrize("roles", [("key",), ("query",)], ids=lambda r: r[0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", patterns.names())
def test_a_row_reaches_only_who_sees_it(name: str, value: float, roles: tuple[str, ...]) -> None:
    check(poisoned(name, patterns.configs(name, test=True)[0], torch.float32, value, roles))


@pytest.mark.parametrize(("name", "dtype"), NARROW)
def test_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    check(one_sequence(name, patterns.configs(name, test=True)[0], dtype))


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_batches(name: str, layout: str) -> None:
    if layout == "paged" and name in UNPAGED:
        pytest.skip("queries and keys share one axis, which cannot be paged")
    config = patterns.configs(name, test=True)[1]
    lengths = (
        [(7, 29), (7, 29), (7, 29)] if layout == "dense" else [(5, 31), (0, 0), (1, 17), (9, 9)]
    )
    check(batch(name, config, layout, lengths))


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(set(patterns.names()) - UNPAGED)),
    layout=st.sampled_from(["dense", "ragged", "paged"]),
    lengths=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 47)), min_size=1, max_size=4),
    page=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_random_batches(
    name: str, layout: str, lengths: list[tuple[int, int]], page: int, seed: int
) -> None:
    if layout == "dense":
        lengths = [lengths[0]] * len(lengths)
    config = patterns.configs(name, test=True)[0]
    check(batch(name, config, layout, lengths, page=page, seed=seed))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, Config]:
    """Draw a pattern, head counts and extents; hyperparameters are those of a test shape."""
    name = draw(st.sampled_from(sorted(set(patterns.names()) - UNPAGED)))
    config = draw(st.sampled_from(patterns.configs(name, test=True)))
    sizes = {x: draw(st.integers(1, 21)) for x in sorted(config.sizes)}
    if "Hk" in sizes:
        sizes["Hk"] = draw(st.integers(1, 3))
        sizes["Hq"] = sizes["Hk"] * draw(st.integers(1, 5))
    if "d_v" in config.hyper:  # values are the first of the elements of a key
        sizes["c"] += int(config.hyper["d_v"] or 0)
    if "slots" in sizes:  # two windows
        sizes["slots"] = config.sizes["slots"]
    return name, Config("drawn", sizes, config.hyper)


@settings(max_examples=25)
@given(
    shape=shapes(),
    layout=st.sampled_from(["dense", "ragged", "paged"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=3),
    page=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_random_shapes(
    shape: tuple[str, Config], layout: str, dtype: torch.dtype, lengths: list[tuple[int, int]],
    page: int, seed: int,
) -> None:  # fmt: skip
    if layout == "dense":
        lengths = [lengths[0]] * len(lengths)
    check(batch(*shape, layout, lengths, page=page, dtype=dtype, seed=seed))
