"""What a call does on a device besides computing: it waits for nothing, and a graph can hold it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import sparsegen as sg
from sparsegen import patterns
from sparsegen.errors import InputError, UnsupportedError
from tests.gpu.test_device import SEVERAL, case_of
from tests.gpu.test_patterns_gpu import verify
from tests.harness import Case, batch, listed

pytestmark = pytest.mark.gpu

LAYOUTS = ("sequence", "dense", "ragged", "paged")
ELSEWHERE = "sm_120"  # what a device here does not run
FRESH = """
import torch
import sparsegen as sg
from tests.gpu.test_device import case_of
from tests.gpu.test_patterns_gpu import verify

case = case_of("causal")
kernel = case.compile("cuda")
inputs, _ = case.to("cuda")
kernel.warm_up()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = kernel(**inputs)
out.fill_(7)
graph.replay()
torch.cuda.synchronize()
verify(case, [out.cpu()])
"""


def in_layout(layout: str, seed: int = 0) -> Case:
    if layout == "sequence":
        return case_of("dsa", seed)
    config = patterns.configs("dsa", test=True)[0]
    lengths = [(5, 31), (9, 9)] if layout != "dense" else [(9, 31), (9, 31)]
    return batch("dsa", config, layout, lengths, dtype=torch.bfloat16, seed=seed, explicit=False)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make torch refuse what lets the host wait for a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this mode is a prototype, torch says
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(kernel: Any, **call: Any) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        results = listed(kernel(**call))
    return graph, results


def test_the_first_kernel_of_a_process_is_captured_after_warm_up() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_call_waits(layout: str) -> None:
    case = in_layout(layout)
    kernel = case.compile("cuda")
    inputs, call = case.to("cuda")
    kernel.warm_up()
    with no_waiting():
        first = listed(kernel(**inputs, **call))
        again = listed(kernel(**inputs, **call))
    for results in (first, again):
        verify(case, [x.cpu() for x in results])


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("known", [False, True], ids=["code", "shapes"])
def test_a_first_call_is_captured(name: str, known: bool) -> None:
    case, other = case_of(name), case_of(name, seed=1)
    kernel = case.compile("cuda")
    inputs, _ = case.to("cuda")
    kernel.warm_up(**(inputs if known else {}))
    filled = []
    fill = kernel._metadata._fill
    kernel._metadata._fill = lambda *args: filled.append(fill(*args))
    graph, captured = capture(kernel, **inputs)
    # What is known before needs no kernel in the graph.
    assert len(filled) == (0 if known else 1)
    for x in (case, other):
        for n, value in x.inputs.items():
            inputs[n].copy_(value)
        for result in captured:
            result.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        verify(x, [result.cpu() for result in captured])


def test_a_graph_outlives_the_memory_of_calls() -> None:
    """Shapes are forgotten after some; a graph still has the addresses of what belongs to them."""
    case = case_of("causal")
    kernel = case.compile("cuda")
    inputs, _ = case.to("cuda")
    kernel(**inputs)
    graphs = [capture(kernel, **inputs)]
    kernel.warm_up(**inputs)
    graphs.append(capture(kernel, **inputs))
    for rows in range(1, 600):
        kernel(inputs["q"][:1].expand(rows, -1, -1).contiguous(), inputs["k"], inputs["v"])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    garbage = [torch.full((64,), -1, dtype=torch.int32, device="cuda") for _ in range(4096)]
    for graph, captured in graphs:
        captured[0].fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        verify(case, [captured[0].cpu()])
    assert len(garbage) == 4096


def test_a_stream_waits_for_no_other() -> None:
    case = case_of("causal")
    kernel = case.compile("cuda")
    inputs, _ = case.to("cuda")
    kernel.warm_up()
    late, soon = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(late):
        torch.cuda._sleep(2_000_000_000)
        after = listed(kernel(**inputs))
    with torch.cuda.stream(soon):
        before = listed(kernel(**inputs))
    soon.synchronize()
    assert not late.query(), "the other stream was to sleep for longer"
    verify(case, [x.cpu() for x in before])
    late.synchronize()
    verify(case, [x.cpu() for x in after])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_comes_from_torch(layout: str) -> None:
    case = in_layout(layout)
    kernel = case.compile("cuda")
    inputs, call = case.to("cuda")
    kernel(**inputs, **call)
    torch.cuda.synchronize()

    def elsewhere() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def taken() -> int:
        before = elsewhere()
        for _ in range(200):
            kernel(**inputs, **call)
        torch.cuda.synchronize()
        return elsewhere() - before

    allocated = torch.cuda.memory_allocated()
    # Other processes may take memory of the device, but not at every time.
    assert any(taken() == 0 for _ in range(20))
    assert torch.cuda.memory_allocated() == allocated, "a call keeps memory"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_devices(layout: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    case = in_layout(layout)
    kernel = case.compile("cuda")
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        inputs, call = case.to(device)
        results = listed(kernel(**inputs, **call))
        assert {str(x.device) for x in results} == {device}
        assert torch.cuda.current_device() == 0
        verify(case, [x.cpu() for x in results])
    first = next(iter(inputs))
    with pytest.raises(InputError, match=r"is on cuda:"):
        kernel(**{**inputs, first: inputs[first].to("cuda:0")}, **call)
    kernel = case.compile("cuda")
    with torch.cuda.device(1):
        kernel.warm_up()
        graph, captured = capture(kernel, **inputs, **call)
        graph.replay()
        torch.cuda.synchronize()
    verify(case, [x.cpu() for x in captured])


@pytest.mark.parametrize("layout", ["sequence", "dense"])
def test_a_later_call_is_checked_like_the_first(layout: str) -> None:
    case = in_layout(layout)
    kernel = case.compile("cuda")
    inputs, _ = case.to("cuda")
    kernel(**inputs)
    for name in (next(iter(inputs)), [*inputs][-1]):
        x = inputs[name]
        strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        moved = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape)
        for wrong, says in (
            (x.half(), r"expected torch\.bfloat16"),
            (strided, "expected contiguous memory"),
            (moved, "no multiple"),
            (x.cpu(), "is on cpu"),
            (x.to("meta"), "is on meta"),
            (x.to_sparse(), "expected a dense tensor"),
        ):
            with pytest.raises(InputError, match=says):
                kernel(**{**inputs, name: wrong})
    verify(case, [y.cpu() for y in listed(kernel(**inputs))])


def test_code_for_another_gpu_is_refused() -> None:
    if torch.cuda.get_device_capability() >= (12, 0):
        pytest.skip(f"this device may run code for {ELSEWHERE}")
    case = case_of("causal")
    kernel = case.compile(ELSEWHERE)
    inputs, _ = case.to("cuda")
    here = "{}.{}".format(*torch.cuda.get_device_capability())
    for call in (lambda: kernel(**inputs), lambda: kernel.warm_up()):
        with pytest.raises(
            UnsupportedError, match=rf"compiled for {ELSEWHERE}, and cuda:0 is .* {here}"
        ):
            call()


def test_bundles_choose_the_code_of_the_device(tmp_path: Any) -> None:
    case = case_of("causal")
    inputs, _ = case.to("cuda")
    options = {"target": ["sm_80", "sm_86", "sm_90"], **case.options}
    loaded = sg.load(sg.export(case.program, tmp_path / "several", **options))
    verify(case, [loaded(**inputs).cpu()])


def test_bundles_run_by_ptx_on_a_newer_device(tmp_path: Any) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a device that does not run machine code for sm_80")
    case = case_of("causal")
    inputs, _ = case.to("cuda")
    loaded = sg.load(sg.export(case.program, tmp_path / "old", ["sm_80"], **case.options))
    assert loaded.spec.codes == ("sm_80", "compute_80")
    verify(case, [loaded(**inputs).cpu()])
