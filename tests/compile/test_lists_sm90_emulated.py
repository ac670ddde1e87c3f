"""Attention over lists of keys on an emulated Hopper, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm_ffi

import sparsegen as sg
from schedules import attend_sm90
from sparsegen import arch as archs
from sparsegen.codegen.tvm import cuda_source
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.tasks import AttendTask
from tests.emulator import compile_source

# Few cores, so that a block has several tiles.
ARCH = replace(archs.get("sm_90"), cores=5)
D_QK, D_V = 576, 512
SCALE = D_QK**-0.5
# What the benchmarks allow, for keys of this size.
OUT = {"atol": 8e-4, "rtol": 3.01 / 128}
COSINE = 7e-6
LSE = {"atol": 1e-6, "rtol": 2.01 / 65536}
# query heads, slots of a list, dtype
KERNELS = [
    (1, 1, "bfloat16"),
    (37, 129, "float16"),
    (64, 300, "bfloat16"),
    (128, 64, "bfloat16"),
]
SEQUENCES = [(5, 300), (0, 17), (11, 1), (2, 0), (9, 131)]  # queries, keys
LARGEST = 2**31 - 1


@sg.pattern
def listed(
    q: sg.Tensor["T Hq c"], kv: sg.Tensor["S 1 c"], x: sg.Tensor["T 1 e"], y: sg.Tensor["S 1 e"],
    *, topk=1,
):  # fmt: skip
    i, j = sg.index(q, kv)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    o = sg.attend(q, kv, kv[..., :D_V], where=(j <= i) & sel[i, j])
    return o, o.lse


@pytest.fixture(scope="module")
def attend(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return what compiles the kernel of a number of heads, of slots and a dtype."""
    folder = tmp_path_factory.mktemp("attend")

    @cache
    def compiled(heads: int, topk: int, dtype: str) -> Any:
        sizes = tuple(sorted({"Hq": heads, "c": D_QK, "e": 64}.items()))
        plan = partition(listed.trace(topk=topk), Binding(dtype=dtype, sizes=sizes))
        task = next(t for t in plan.tasks if isinstance(t, AttendTask))
        assert attend_sm90.accepts(task, ARCH) is None
        knobs = attend_sm90.default(task, ARCH)
        path = Path(folder) / f"{heads}-{topk}-{dtype}.so"
        compile_source(cuda_source(attend_sm90.apply(task, knobs, ARCH), ARCH), ARCH, path)
        return tvm_ffi.load_module(str(path))["attend_1"]

    return compiled


class Guarded:
    """A tensor amid numbers that are not to be read, or memory that is not to be written."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        size = math.prod(shape)
        self.whole = torch.full((size + 4096,), math.nan, dtype=dtype)
        self.tensor = self.whole[2048 : 2048 + size].view(shape)

    def check(self) -> None:
        assert bool(self.whole[:2048].isnan().all()), "written before the tensor"
        assert bool(self.whole[-2048:].isnan().all()), "written behind the tensor"


class Call:
    """The inputs of a kernel, and its outputs, poisoned."""

    def __init__(self, heads: int, topk: int, dtype: str, *, causal: bool) -> None:
        kind = getattr(torch, dtype)
        n_q, n_k = (sum(n[i] for n in SEQUENCES) for i in range(2))
        generator = torch.Generator().manual_seed(heads + topk)
        self.q = torch.randn(n_q, heads, D_QK, generator=generator).to(kind)
        self.keys = Guarded(n_k, 1, D_QK, dtype=kind)
        self.keys.tensor[:] = torch.randn(n_k, 1, D_QK, generator=generator) / 10
        self.cu_q, self.cu_k = (
            torch.tensor([0, *(n[i] for n in SEQUENCES)]).cumsum(0).int() for i in range(2)
        )
        self.offset = torch.tensor([s - t if causal else s for t, s in SEQUENCES]).int()
        rows = [torch.rand(t, topk, generator=generator) * max(s, 1) for t, s in SEQUENCES]
        self.index = torch.cat(rows).int()
        self.out = Guarded(n_q, heads, D_V, dtype=kind)
        self.lse = Guarded(n_q, heads, dtype=torch.float32)

    def rows(self) -> list[tuple[int, int, int, int]]:
        """Return the first key, the keys, the query's position and its row, by row."""
        return [
            (int(self.cu_k[b]), s, int(self.offset[b]) + t, int(self.cu_q[b]) + t)
            for b, (n, s) in enumerate(SEQUENCES)
            for t in range(n)
        ]

    def run(self, function: Any) -> None:
        """Call the kernel and compare."""
        kv, out, lse = self.keys.tensor, self.out.tensor, self.lse.tensor
        function(self.cu_q, self.cu_k, self.offset, self.index, self.q, kv, out, lse)
        for start, count, i, row in self.rows():
            x = self.index[row].long()
            x = x[(x >= 0) & (x < count) & (x <= i)]
            keys = kv[start + x, 0].double()
            scores = self.q[row].double() @ keys.T * SCALE
            want = (scores.softmax(-1) if len(x) else scores) @ keys[:, :D_V]
            got = out[row].double()
            torch.testing.assert_close(got, want, equal_nan=True, **OUT)
            torch.testing.assert_close(
                lse[row].double(), scores.logsumexp(-1), equal_nan=True, **LSE
            )
            if len(x) and bool(want.isfinite().all()):
                distance = 1 - 2 * (got * want).sum() / (got.square() + want.square()).sum()
                assert distance < COSINE
        self.out.check()
        self.lse.check()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "-".join(map(str, k)))
def test_lists_with_anything_in_them(
    attend: Callable[..., Any], kernel: tuple[int, int, str], causal: bool
) -> None:
    call = Call(*kernel, causal=causal)
    index, topk = call.index, kernel[1]
    invalid = torch.rand(index.shape, generator=torch.Generator().manual_seed(0))
    for (_, count, i, row), share in zip(call.rows(), invalid, strict=True):
        for n, bad in enumerate((-1, -LARGEST - 1, LARGEST, count, count + 1, max(i, -1) + 1)):
            index[row, (share > n / 30) & (share < (n + 1) / 30)] = bad
    index[1, : topk // 2] = LARGEST
    index[2] = -5
    index[3, : topk - 1] = -1
    index[4, topk // 3 :] = -1
    # Key 0 of every sequence is not listed.
    index[index == 0] = -1
    for start, count in zip(call.cu_k[:-1].tolist(), (s for _, s in SEQUENCES), strict=True):
        if count:
            call.keys.tensor[start] = math.nan
    call.run(attend(*kernel))


def test_keys_that_are_not_finite_reach_those_who_list_them(attend: Callable[..., Any]) -> None:
    kernel = KERNELS[2]
    for value in (math.nan, math.inf):
        call = Call(*kernel, causal=False)
        call.index[call.index == 7] = 8
        call.index[1, 3], call.index[4, 290] = 7, 7
        call.keys.tensor[7] = value
        call.run(attend(*kernel))
