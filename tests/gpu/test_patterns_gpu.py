"""Every shipped pattern, in every layout and 16-bit dtype, against the float64 reference on a GPU.

Outputs and the memory of schedules are poisoned and lie between guards; repeats must be equal bit
for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsegen import patterns
from sparsegen.patterns import Config
from tests.harness import UNPAGED, Case, batch, listed, one_sequence, poisoned

pytestmark = pytest.mark.gpu

# Weights are rounded to 16 bits before they meet the values: an output errs by up to half a unit
# (2**-9 in bfloat16) of the values it sees, which are up to 4 here, however small it is itself. For
# values a tenth as large, as activations often are, that is the usual 8e-4.
OUT_ATOL = {"bfloat16": 8e-3, "float16": 1e-3}
OUT_RTOL = {"bfloat16": 3.01 / 128, "float16": 3.01 / 1024}
OUT_COSINE = 7e-6
LSE_ATOL, LSE_RTOL = 1e-6, 2.01 / 65536  # not rounded
# What the values are multiplied by at most: three gated branches are summed.
SCALE = {"nsa": 3.0}
GUARD = 256  # bytes, before and after each allocation
REPEATS = 5

DTYPES = (torch.bfloat16, torch.float16)
CASES = [
    pytest.param(n, c, d, id=f"{n}-{c}-{str(d)[6:]}")
    for n in patterns.names()
    for c in patterns.configs(n, test=True)
    for d in DTYPES
]
PUBLISHED = [
    pytest.param(n, c, id=f"{n}-{c.name}") for n in patterns.names() for c in patterns.configs(n)
]
LAYOUTS = [
    pytest.param(n, x, id=f"{n}-{x}")
    for n in patterns.names()
    for x in ("dense", "ragged", "paged")
]


@contextmanager
def guarded(poison: int) -> Iterator[Callable[[], None]]:
    """Let torch allocate memory full of a byte, between guards; yields what checks these."""
    empty, like, taken = torch.empty, torch.empty_like, []

    def allocate(*shape: Any, dtype: torch.dtype, device: Any, **rest: Any) -> torch.Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        size = int(np.prod(shape)) * dtype.itemsize
        whole = empty(size + 2 * GUARD, dtype=torch.uint8, device=device, **rest)
        whole.fill_(poison)
        taken.append((whole, size))
        return whole[GUARD : GUARD + size].view(dtype).view(shape)

    def check() -> None:
        for whole, size in taken:
            guards = torch.cat([whole[:GUARD], whole[GUARD + size :]])
            assert bool((guards == poison).all()), "written outside of an allocation"

    def allocate_like(model: torch.Tensor) -> torch.Tensor:
        return allocate(*model.shape, dtype=model.dtype, device=model.device)

    torch.empty, torch.empty_like = allocate, allocate_like
    try:
        yield check
    finally:
        torch.empty, torch.empty_like = empty, like


def run(case: Case, repeats: int = REPEATS) -> list[torch.Tensor]:
    """Call the kernel of a case with poisoned memory; check guards, and repeats bit for bit."""
    kernel = case.compile("cuda")
    inputs, call = case.to("cuda")
    first: list[torch.Tensor] = []
    for n in range(repeats):
        # 0xFF is NaN in every floating-point type, 0x5A a large number.
        with guarded((0xFF, 0x5A)[n % 2]) as check:
            got = listed(kernel(**inputs, **call))
            torch.cuda.synchronize()
            check()
        got = [x.cpu() for x in got]
        first = first or got
        for a, b in zip(first, got, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"repeat {n} differs"
    return first


def verify(case: Case, got: list[torch.Tensor], scale: float = 1.0) -> None:
    """Compare with the reference: lists exactly, outputs and lse within their tolerances.

    Args:
        scale: of the inputs.
    """
    dtype = case.options["dtype"]
    assert len(got) == len(case.want)
    for g, want in zip(got, case.want, strict=True):
        assert tuple(g.shape) == np.shape(want)
        if g.dtype == torch.int32:
            np.testing.assert_array_equal(g.numpy(), want)
            continue
        w = torch.from_numpy(np.asarray(want, dtype=np.float64))
        x = g.double()
        lse = g.dtype == torch.float32
        out = OUT_ATOL[dtype] * scale, OUT_RTOL[dtype]
        atol, rtol = (LSE_ATOL, LSE_RTOL) if lse else out
        assert torch.equal(x.isnan(), w.isnan())
        assert torch.equal(x.isinf(), w.isinf())
        finite = w.isfinite()
        assert torch.equal(x[~finite & ~w.isnan()], w[~finite & ~w.isnan()])
        x, w = x[finite], w[finite]
        over = (x - w).abs() - (atol + rtol * w.abs())
        note(case, lse, x, w)
        assert not x.numel() or float(over.max()) <= 0, (
            f"{int((over > 0).sum())} of {x.numel()} elements, worst {float((x - w).abs().max())}"
        )
        if not lse and float((w * w).sum()) > 0:
            norm = (x * x + w * w).sum()
            assert float(1 - 2 * (x * w).sum() / norm) <= OUT_COSINE


def note(case: Case, lse: bool, x: torch.Tensor, w: torch.Tensor) -> None:
    """Append the largest errors to the file that $SPARSEGEN_TEST_NOTES names, if it does."""
    path = os.environ.get("SPARSEGEN_TEST_NOTES")
    if path is None or not x.numel():
        return
    error = (x - w).abs()
    strict = error - (4e-4 + w.abs() * 2**-7)
    with Path(path).open("a") as file:
        print(
            case.program.name, case.options["dtype"], case.options.get("layout", "sequence"),
            "lse" if lse else "out", f"{float(error.max()):.3e}",
            f"{float((error / w.abs().clamp_min(1e-2)).max()):.3e}", int((strict > 0).sum()),
            x.numel(), file=file,
        )  # fmt: skip


def check(case: Case, repeats: int = REPEATS, scale: float = 1.0) -> None:
    verify(case, run(case, repeats), scale)


@pytest.mark.parametrize(("name", "config", "dtype"), CASES)
def test_one_sequence(name: str, config: Config, dtype: torch.dtype) -> None:
    check(one_sequence(name, config, dtype))


@pytest.mark.parametrize(("name", "config"), PUBLISHED)
def test_published(name: str, config: Config) -> None:
    """Shapes of models: their heads, dimensions and lists, over fewer tokens."""
    program = patterns.load(name).trace(**config.hyper)
    fewer = {program.query: 37, program.key: 2597}
    if program.query == program.key:
        fewer = {program.key: 1201}
    sizes = {k: min(v, fewer.get(k, v)) for k, v in config.sizes.items()}
    case = one_sequence(name, replace(config, sizes=sizes), torch.bfloat16)
    check(case, scale=SCALE.get(name, 1.0))


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_batches(name: str, layout: str) -> None:
    if layout == "paged" and name in UNPAGED:
        pytest.skip("queries and keys share one axis, which cannot be paged")
    config = patterns.configs(name, test=True)[1]
    lengths = (
        [(7, 29), (7, 29), (7, 29)] if layout == "dense" else [(5, 31), (0, 0), (1, 17), (9, 9)]
    )
    check(batch(name, config, layout, lengths, dtype=torch.bfloat16, explicit=False))


@pytest.mark.parametrize("name", patterns.names())
def test_longer(name: str) -> None:
    """Several tiles of queries, and chunks of keys."""
    config = patterns.configs(name, test=True)[0]
    lengths = [(150, 333), (65, 700), (1, 129), (0, 5)]
    check(batch(name, config, "ragged", lengths, dtype=torch.bfloat16, explicit=False), 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", patterns.names())
def test_a_hidden_row_reaches_no_output(name: str, value: float) -> None:
    """Make a row of every tensor on the key axis infinite or NaN: who does not see it is finite."""
    config = patterns.configs(name, test=True)[0]
    check(poisoned(name, config, torch.bfloat16, value), 2)


@pytest.mark.parametrize("name", patterns.names())
@settings(max_examples=12)
@given(
    layout=st.sampled_from(["dense", "ragged", "paged"]),
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300)), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_random_batches(name: str, layout: str, lengths: list[tuple[int, int]], seed: int) -> None:
    if layout == "paged" and name in UNPAGED:
        layout = "ragged"
    if layout == "dense":
        lengths = [lengths[0]] * len(lengths)
    config = patterns.configs(name, test=True)[0]
    dtype = torch.bfloat16
    check(batch(name, config, layout, lengths, dtype=dtype, seed=seed, explicit=False), 2)
