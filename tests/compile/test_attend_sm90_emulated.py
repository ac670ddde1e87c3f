"""Attention in a latent space on Hopper against the float64 reference, emulated on the CPU."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import sparsegen as sg
from sparsegen.patterns import Config
from tests.emulator import emulated
from tests.gpu.test_patterns_gpu import guarded, verify
from tests.harness import Case, batch, listed

LENGTHS = [(2, 200), (0, 5), (1, 1), (3, 64), (2, 0), (1, 129)]


@sg.pattern
def causal(q: sg.Tensor["T H c"], kv: sg.Tensor["S 1 c"], *, d_v=128):
    i, j = sg.index(q, kv)
    o = sg.attend(q, kv, kv[..., :d_v], where=j <= i)
    return o, o.lse


@sg.pattern
def window(q: sg.Tensor["T H c"], kv: sg.Tensor["S 1 c"], sink: sg.Tensor["H"], *, d_v=128):
    i, j = sg.index(q, kv)
    where = (j <= i) & ((i - j < 70) | (j < 9))
    o = sg.attend(q, kv, kv[..., :d_v], where=where, sink=sink)
    return o, o.lse


@sg.pattern
def joined(
    q_c: sg.Tensor["T H c"],
    q_r: sg.Tensor["T H r"],
    c: sg.Tensor["S 1 c"],
    r: sg.Tensor["S 1 r"],
    x: sg.Tensor["T 1 e"],
    y: sg.Tensor["S 1 e"],
    sink: sg.Tensor["H"],
    *,
    topk=150,
):
    i, j = sg.index(q_c, c)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    q, k = sg.cat(q_c, q_r), sg.cat(c, r)
    o = sg.attend(q, k, c, where=(j <= i) & sel[i, j], sink=sink)
    return o, o.lse


def run(case: Case) -> list[Any]:
    """Call the kernel of a case twice, in guarded memory of NaN; check that repeats are equal."""
    with emulated((9, 0)):
        kernel = case.compile("sm_90")
        assert kernel.schedules["attend_1"].name == "attend_sm90"
        results = []
        for _ in range(2):
            with guarded(0xFF) as untouched:
                results.append(listed(kernel(**case.inputs, **case.call)))
                untouched()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), "repeats differ"
    verify(case, results[0])
    return results[0]


@pytest.mark.parametrize("heads", [5, 16, 24, 40])
@pytest.mark.parametrize("layout", ["ragged", "paged"])
def test_ranges(heads: int, layout: str) -> None:
    config = Config("", {"T": 1, "S": 1, "H": heads, "c": 192})
    run(batch(causal, config, layout, LENGTHS, page=16, dtype=torch.bfloat16))


@pytest.mark.parametrize(("heads", "c", "d_v"), [(9, 576, 512), (128, 576, 512), (33, 256, 256)])
def test_widths(heads: int, c: int, d_v: int) -> None:
    config = Config("", {"T": 1, "S": 1, "H": heads, "c": c}, {"d_v": d_v})
    run(batch(causal, config, "paged", [(1, 130), (2, 3)], page=64, dtype=torch.bfloat16))


@pytest.mark.parametrize("heads", [3, 65])
def test_more_tokens_than_blocks(heads: int) -> None:
    config = Config("", {"T": 1, "S": 1, "H": heads, "c": 192})
    run(batch(causal, config, "ragged", [(280, 290), (1, 7)], dtype=torch.float16))


@pytest.mark.parametrize("heads", [16, 40])
@pytest.mark.parametrize("layout", ["ragged", "paged"])
def test_several_ranges_and_a_sink(heads: int, layout: str) -> None:
    config = Config("", {"T": 1, "S": 1, "H": heads, "c": 128})
    run(batch(window, config, layout, LENGTHS, page=4, dtype=torch.bfloat16))


@pytest.mark.parametrize("heads", [16, 40])
@pytest.mark.parametrize("layout", ["ragged", "paged"])
def test_lists_of_joined_operands_and_a_sink(heads: int, layout: str) -> None:
    config = Config("", {"T": 1, "S": 1, "H": heads, "c": 128, "r": 64, "e": 8})
    run(batch(joined, config, layout, LENGTHS, page=8, dtype=torch.float16))


@pytest.mark.parametrize("heads", [16, 40])
def test_latent_queries_that_were_projected(heads: int) -> None:
    sizes = {"T": 1, "S": 1, "H": heads, "n": 16, "r": 64, "c": 128, "v": 16}
    config = Config("", sizes)
    run(batch("mla_decode", config, "paged", LENGTHS, page=16, dtype=torch.bfloat16))


@pytest.mark.parametrize("heads", [16, 40])
def test_lists_of_blocks_beside_a_window(heads: int) -> None:
    @sg.pattern
    def blocks(
        q: sg.Tensor["T H c"], kv: sg.Tensor["S 1 c"], x: sg.Tensor["T 1 e"], y: sg.Tensor["S 1 e"]
    ):
        i, j = sg.index(q, kv)
        s = sg.score(x, y, where=j <= i)
        sel = sg.select(sg.reduce(s, "max", by=(i, j // 32)), topk=3)
        return sg.attend(q, kv, kv[..., :128], where=(j <= i) & (sel[i, j // 32] | (i - j < 50)))

    config = Config("", {"T": 1, "S": 1, "H": heads, "c": 192, "e": 8})
    run(batch(blocks, config, "ragged", LENGTHS, dtype=torch.bfloat16))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("heads", [8, 40])
def test_what_is_not_finite_reaches_those_who_see_it(heads: int, value: float) -> None:
    config = Config("", {"T": 1, "S": 1, "H": heads, "c": 192})
    case = batch(causal, config, "ragged", [(2, 90), (1, 70)], dtype=torch.bfloat16)
    case.inputs["kv"][80] = value
    want = []
    offset = 0
    with np.errstate(all="ignore"):
        for t, s in ((2, 90), (1, 70)):
            q0 = 0 if offset == 0 else 2
            one = {"q": case.inputs["q"][q0 : q0 + t], "kv": case.inputs["kv"][offset : offset + s]}
            got = sg.reference(
                case.program, {n: x.float().numpy() for n, x in one.items()}, q_offset=s - t
            )
            want.append(listed(got))
            offset += s
    run(replace(case, want=[np.concatenate(parts) for parts in zip(*want, strict=True)]))


@pytest.mark.parametrize("boxes", [True, False])
@pytest.mark.parametrize("layout", ["ragged", "paged"])
def test_boxes(boxes: bool, layout: str) -> None:
    sizes = {"T": 1, "S": 1, "H": 70, "n": 16, "r": 64, "c": 128, "v": 16}
    lengths = [*LENGTHS, (140, 150), (0, 0)]
    case = batch("mla_decode", Config("", sizes), layout, lengths, page=64, dtype=torch.bfloat16)
    schedule = {"attend": sg.Schedule("attend_sm90", boxes=boxes)}
    run(replace(case, options={**case.options, "schedule": schedule}))
