"""What only a device shows: graphs, streams, offsets past 2**31, and very many rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import sparsegen as sg
from sparsegen import patterns
from tests.gpu.test_patterns_gpu import OUT_ATOL, OUT_RTOL, verify
from tests.harness import Case, batch, listed, one_sequence

pytestmark = pytest.mark.gpu

SEVERAL = ("causal", "dsa", "nsa", "vertical_slash")


@pytest.fixture(autouse=True)
def _free() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def case_of(name: str, seed: int = 0) -> Case:
    return one_sequence(name, patterns.configs(name, test=True)[0], torch.bfloat16, seed)


@pytest.mark.parametrize("name", SEVERAL)
def test_graph_capture(name: str) -> None:
    case, other = case_of(name), case_of(name, seed=1)
    kernel = case.compile("cuda")
    inputs, _ = case.to("cuda")
    kernel(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = listed(kernel(**inputs))
    for n, x in other.inputs.items():
        inputs[n].copy_(x)
    for x in captured:
        x.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    verify(other, [x.cpu() for x in captured])


def test_ragged_metadata_is_captured_and_may_change() -> None:
    config = patterns.configs("dsa", test=True)[0]
    lengths = [[(5, 31), (9, 9)], [(9, 11), (5, 29)]]
    first, second = (
        batch("dsa", config, "ragged", n, dtype=torch.bfloat16, explicit=False) for n in lengths
    )
    kernel = first.compile("cuda")
    inputs, call = first.to("cuda")
    kernel(**inputs, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = listed(kernel(**inputs, **call))
    for held, new in ((inputs, second.inputs), (call, second.call)):
        for n, x in new.items():
            held[n].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    verify(second, [x.cpu() for x in captured])


@pytest.mark.parametrize("name", SEVERAL)
def test_streams(name: str) -> None:
    cases = [case_of(name, seed) for seed in range(4)]
    kernel = cases[0].compile("cuda")
    moved = [case.to("cuda")[0] for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    got = []
    for stream, inputs in zip(streams, moved, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            got.append(listed(kernel(**inputs)))
    torch.cuda.synchronize()
    for case, results in zip(cases, got, strict=True):
        verify(case, [x.cpu() for x in results])


def large(name: str, sizes: dict[str, int], gib: float, **hyper: Any) -> tuple[Any, Any]:
    """Return a kernel and inputs on the device; skip where memory is short."""
    free, _ = torch.cuda.mem_get_info()
    if free < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of device memory, {free / 2**30:.0f} are free")
    program = patterns.load(name).trace(**hyper)
    letters = {k: v for k, v in sizes.items() if k not in (program.query, program.key)}
    kernel = sg.compile(program, target="cuda", dtype="bfloat16", sizes=letters)
    known = {**{k: v for k, v in hyper.items() if isinstance(v, int)}, **sizes}
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = {}
    for node in program.inputs:
        shape = [known[str(a)] if str(a) in known else int(str(a)) for a in node.axes]
        inputs[node.name] = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(
            generator=generator
        )
    return (program, kernel), inputs


def compare(
    program: Any,
    got: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    rows: torch.Tensor,
    offset: int,
) -> None:
    """Compare some rows, whose result depends on no other row of queries."""
    some = {}
    for node in program.inputs:
        x = inputs[node.name]
        taken = x[rows.to(x.device)] if str(node.axes[0]) == program.query else x
        some[node.name] = taken.float().cpu().numpy()
    want = sg.reference(program, some, q_offset=offset)
    found = got[rows.to(got.device)].double().cpu().numpy()
    atol, rtol = OUT_ATOL["bfloat16"], OUT_RTOL["bfloat16"]
    np.testing.assert_allclose(found, want, atol=atol, rtol=rtol)


def test_queries_past_2_31_elements() -> None:
    (program, kernel), inputs = large(
        "full", {"T": 270_000, "S": 40, "Hq": 64, "Hk": 2, "D": 128, "E": 128}, 16
    )
    assert inputs["q"].numel() > 2**31
    rows = torch.tensor([0, 1, 131_071, 262_143, 262_144, 262_145, 269_999])
    compare(program, kernel(**inputs), inputs, rows, 0)


def test_keys_past_2_31_elements() -> None:
    (_, kernel), inputs = large(
        "full", {"T": 3, "S": 1_060_000, "Hq": 16, "Hk": 16, "D": 128, "E": 128}, 16
    )
    assert inputs["k"].numel() > 2**31
    got = kernel(**inputs)
    q, k, v = (inputs[n].float() for n in ("q", "k", "v"))
    scores = torch.einsum("thd,shd->hts", q, k) * 128**-0.5
    want = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
    atol, rtol = OUT_ATOL["bfloat16"], OUT_RTOL["bfloat16"]
    torch.testing.assert_close(got.float(), want, atol=atol, rtol=rtol)


def test_lists_past_2_31_elements() -> None:
    sizes = {"T": 1_050_000, "S": 50, "Hq": 2, "c": 16, "Hi": 2, "e": 8}
    (program, kernel), inputs = large("dsa", sizes, 24, topk=2048, d_v=16)
    rows = torch.tensor([0, 1, 524_288, 1_048_575, 1_048_576, 1_049_999])
    compare(program, kernel(**inputs, q_offset=100), inputs, rows, 100)


@pytest.mark.parametrize("name", ["full", "dsa", "moba"])
def test_70_000_rows(name: str) -> None:
    config = patterns.configs(name, test=True)[0]
    sizes = {**config.sizes, "T": 70_000, "S": 45}
    (program, kernel), inputs = large(name, sizes, 4, **config.hyper)
    rows = torch.tensor([0, 1, 15, 16, 63, 64, 65_535, 65_536, 69_999])
    # Far behind every key, so that rows differ in nothing but their queries.
    offset = 4_000
    got = listed(kernel(**inputs, q_offset=offset))[0]
    compare(program, got, inputs, rows, offset)


def test_70_000_sequences() -> None:
    config = patterns.configs("dsa", test=True)[0]
    case = batch("dsa", config, "dense", [(2, 7)], dtype=torch.bfloat16, explicit=False)
    kernel = case.compile("cuda")
    inputs, _ = case.to("cuda")
    shared = {n.name for n in case.program.inputs if str(n.axes[0]) not in "TS"}
    many = {
        n: x if n in shared else x.expand(70_000, *x.shape[1:]).contiguous()
        for n, x in inputs.items()
    }
    one, all_ = kernel(**inputs), kernel(**many)
    assert torch.equal(all_, one.expand_as(all_))
