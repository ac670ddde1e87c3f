"""Lists of diagonals, of which maps are asked, on emulated GPUs, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsegen as sg
from schedules import attend_mma, attend_tiles_sm90
from schedules.attend_tiles_sm90 import Knobs
from sparsegen import arch as archs
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.tasks import AttendTask
from sparsegen.patterns import Config
from tests.compile.test_tiles_sm90_emulated import LENGTHS, SMALL, check
from tests.emulator import compile_task, unwritten
from tests.harness import batch

SLASH = Config("slash", SMALL, {"last": 5, "columns": 9, "slashes": 12, "first": 2, "recent": 3})


@pytest.mark.parametrize("page", [0, 24])
def test_diagonals_are_asked_of_maps(page: int) -> None:
    """Chunks of 64 keys, whose windows begin before the first item and end after the last."""
    layout = "paged" if page else "ragged"
    options = {"page": page, "dtype": torch.bfloat16, "explicit": False}
    check(batch("vertical_slash", SLASH, layout, [*LENGTHS, (129, 129)], **options))


@sg.pattern
def others(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"], *, columns):
    """Leave out the keys that the last queries favour."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    p = sg.score(q, k, norm="softmax", where=(j <= i) & (i >= i.stop - 5))
    vertical = sg.select(sg.reduce(p, "sum", by=(h, j)), topk=columns)
    return sg.attend(q, k, v, where=(j <= i) & ~vertical[h, j])


def test_ranges_that_leave_out_what_is_listed() -> None:
    config = Config("others", SMALL, {"columns": 7})
    options = {"dtype": torch.bfloat16, "explicit": False}
    check(batch(others, config, "ragged", [*LENGTHS, (129, 129)], **options))


@sg.pattern
def diagonals(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"], *, columns, slashes
):
    i, j = sg.index(q, k)
    h = sg.head(q)
    p = sg.score(q, k, norm="softmax", where=(j <= i) & (i >= i.stop - 5))
    vertical = sg.select(sg.reduce(p, "sum", by=(h, j)), topk=columns)
    slash = sg.select(sg.reduce(p, "sum", by=(h, i - j)), topk=slashes)
    o = sg.attend(q, k, v, where=(j <= i) & (vertical[h, j] | slash[h, i - j]))
    return o, o.lse


# Chunks of one window, of half of it, and of two; and pairs one by one.
KERNELS: list[tuple[Any, Any, str]] = [
    (attend_tiles_sm90, Knobs(groups=3, keys=64, stages=2, ahead=False), "sm_90"),
    (attend_tiles_sm90, Knobs(groups=2, keys=32, stages=3, ahead=False, joint=True), "sm_90"),
    (attend_tiles_sm90, Knobs(groups=2, keys=128, stages=2, queries=2, ahead=True), "sm_90"),
    (attend_mma, attend_mma.Knobs(4, 2, 1, 1, 32, 1), "sm_80"),
    (attend_mma, attend_mma.Knobs(2, 1, 2, 1, 64, 2), "sm_80"),
]


@pytest.fixture(scope="module")
def attend(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return what compiles a kernel, and what says of it how memory is shaped."""
    folder = tmp_path_factory.mktemp("diagonals")

    @cache
    def compiled(number: int) -> Any:
        sizes = tuple(sorted({"Hq": 4, "Hk": 2, "D": 64}.items()))
        program = diagonals.trace(columns=6, slashes=9)
        plan = partition(program, Binding(dtype="bfloat16", sizes=sizes))
        task = next(t for t in plan.tasks if isinstance(t, AttendTask))
        path = folder / f"{number}.so"
        schedule, knobs, name = KERNELS[number]
        return compile_task(schedule, task, knobs, archs.get(name), path)

    return compiled


@pytest.mark.parametrize("number", range(len(KERNELS)))
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 300)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    shift=st.integers(-40, 40),
    poison=st.booleans(),
    twice=st.booleans(),
)
def test_lists_of_diagonals(
    attend: Callable[..., Any], number: int, lengths: list[tuple[int, int]], seed: int,
    shift: int, poison: bool, twice: bool,
) -> None:  # fmt: skip
    """Indices that do not exist, queries before and behind the keys; some indices listed twice."""
    function, memory = attend(number)
    generator = torch.Generator().manual_seed(seed)
    n_q, n_k = (sum(x[i] for x in lengths) for i in range(2))
    q, k, v = (
        torch.randn(n, h, 64, generator=generator).bfloat16()
        for n, h in ((n_q, 4), (n_k, 2), (n_k, 2))
    )
    if poison and n_k:
        k[n_k // 3], v[n_k // 2] = math.nan, math.nan
    cu_q, cu_k = (torch.tensor([0, *(x[i] for x in lengths)]).cumsum(0).int() for i in range(2))
    offset = torch.tensor([s - t + shift for t, s in lengths]).int()
    vertical, slash = (
        torch.rand(len(lengths), 4, 350, generator=generator).argsort(-1)[..., :n].int() - 2
        for n in (6, 9)
    )
    for index in (vertical, slash):
        index[..., 0] = torch.tensor([-(2**31), 2**31 - 1, 340, -1], dtype=torch.int32)
        if twice:
            index[..., 1] = index[..., 2]
        # Looked up by halves where an item may be listed twice: ascending, negative ones last.
        order = torch.where(index < 0, 2**32, index.long()).argsort(-1)
        index[:] = index.gather(-1, order)
    out = torch.full((n_q, 4, 64), math.nan).bfloat16()
    lse = torch.full((n_q, 4), math.nan)
    rest = unwritten(memory, n_q, n_k, len(lengths), 64)
    function(cu_q, cu_k, offset, vertical, slash, q, k, v, out, lse, *rest)
    for b, (t, s) in enumerate(lengths):
        keys = torch.arange(s)
        for h in range(4):
            columns = (vertical[b, h][:, None] == keys).sum(0)
            for i in range(t):
                row, position = int(cu_q[b]) + i, int(offset[b]) + i
                distances = (slash[b, h][:, None] == position - keys).sum(0)
                times = torch.where(columns > 0, columns, distances).double()
                seen = (times > 0) & (keys <= position)
                mine, values = (x[int(cu_k[b]) :][:s][seen][:, h // 2].double() for x in (k, v))
                scores = mine @ q[row, h].double() / 8 + times[seen].log()
                want = scores.softmax(-1) @ values if seen.any() else torch.zeros(64).double()
                torch.testing.assert_close(
                    out[row, h].double(), want, atol=8e-3, rtol=3.01 / 128, equal_nan=True
                )
                torch.testing.assert_close(
                    lse[row, h].double(), scores.logsumexp(-1), atol=1e-5, rtol=2.01 / 65536,
                    equal_nan=True,
                )  # fmt: skip
