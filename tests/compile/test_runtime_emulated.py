"""What calls of GPU kernels share, on an emulated GPU: arrays are reused, and never mixed up."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sparsegen import patterns
from sparsegen.errors import InputError, UnsupportedError
from sparsegen.runtime.standalone import device
from sparsegen.runtime.standalone.gpu import Gpu
from tests.emulator import emulated
from tests.harness import Case, batch, listed

LENGTHS = [[(5, 31), (9, 9)], [(9, 11), (5, 29)], [(13, 39), (1, 1)]]


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with emulated((8, 0)):
        yield


def ragged(name: str = "causal") -> list[Case]:
    config = patterns.configs(name, test=True)[0]
    options: dict[str, Any] = {"dtype": torch.bfloat16, "explicit": False}
    return [batch(name, config, "ragged", lengths, **options) for lengths in LENGTHS]


def alone(kernel: Any, case: Case) -> list[torch.Tensor]:
    """Return what a kernel computes that remembers nothing."""
    kernel._signatures.clear()
    return [x.clone() for x in listed(kernel(**case.inputs, **case.call))]


def test_metadata_of_equal_shapes_may_differ() -> None:
    cases = ragged()
    kernel = cases[0].compile("sm_80")
    want = [alone(kernel, case) for case in cases]
    kernel._signatures.clear()
    for _ in range(2):
        for case, expected in zip(cases, want, strict=True):
            got = listed(kernel(**case.inputs, **case.call))
            assert all(map(torch.equal, got, expected))
    assert len(kernel._signatures) == 1, "the shapes are equal, and made ready once"


def test_threads_do_not_fill_the_same_arrays() -> None:
    """Kernels of two threads may be on one stream: neither may fill what the other is to read."""
    cases = ragged()
    kernel = cases[0].compile("sm_80")
    kernel(**cases[0].inputs, **cases[0].call)
    # One after the other, because the emulator has one GPU for one thread.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(kernel, **cases[1].inputs, **cases[1].call).result()
    first, second = (ready.arrays for ready in kernel._signatures.values())
    assert not {x.data_ptr() for x in first} & {x.data_ptr() for x in second}


def test_a_stream_has_arrays_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsegen.runtime.standalone import runner

    config = patterns.configs("causal", test=True)[0]
    case = batch("causal", config, "dense", [(9, 31)], dtype=torch.bfloat16, explicit=False)
    kernel = case.compile("sm_80")
    for number in (0, 7, 0):
        monkeypatch.setattr(runner, "stream", lambda index, n=number: n)
        kernel(**case.inputs)
    assert len(kernel._signatures) == 2
    first, second = (ready.arrays for ready in kernel._signatures.values())
    assert first[0].data_ptr() != second[0].data_ptr()


def test_what_a_graph_captures_is_made_in_it_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsegen.runtime.standalone import runner

    config = patterns.configs("causal", test=True)[0]
    case = batch("causal", config, "dense", [(9, 31)], dtype=torch.bfloat16, explicit=False)
    kernel = case.compile("sm_80")
    kernel(**case.inputs)
    fills: list[Any] = []
    fill = kernel._metadata._fill
    kernel._metadata._fill = lambda *args: fills.append(fill(*args))
    monkeypatch.setattr(runner, "stream", lambda index: 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    remembered = dict(kernel._signatures)
    for count in (1, 2):
        kernel(**case.inputs)
        assert len(fills) == count, "each captured call makes its own"
    assert kernel._signatures == remembered
    args = [case.inputs[n] for n in kernel._names]
    key = (-1, *(x.shape for x in args))
    kernel._settled[key] = kernel._prepare(args, kernel._none)
    kernel(**case.inputs)
    assert len(fills) == 3, "what warm_up made is kept for as long as the kernel"


def test_a_gpu_that_does_not_run_the_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (case, *_) = ragged()
    kernel = case.compile("sm_80")
    for found, says in (
        (Gpu("cuda:0", "NVIDIA H100", (9, 0)), r"compiled for sm_80, and cuda:0 is NVIDIA H100"),
        (Gpu("cuda:0", "Tesla T4", (7, 5)), r"Tesla T4 of compute capability 7\.5"),
        (Gpu("cuda:0", "small", (8, 6), 1024), r"up to 1024 bytes of shared memory: it takes"),
    ):
        monkeypatch.setattr(device, "gpu", lambda where, found=found: found)
        with pytest.raises(UnsupportedError, match=says):
            kernel(**case.inputs, **case.call)


def test_a_later_call_is_checked_like_the_first() -> None:
    (case, *_) = ragged()
    kernel = case.compile("sm_80")
    want = [x.clone() for x in listed(kernel(**case.inputs, **case.call))]
    for name, x in case.inputs.items():
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        for wrong, says in (
            (x.half(), r"expected torch\.bfloat16"),
            (strided, "expected contiguous memory"),
            (x.to_sparse(), "expected a dense tensor"),
        ):
            with pytest.raises(InputError, match=says):
                kernel(**{**case.inputs, name: wrong}, **case.call)
    starts = case.call["cu_seqlens_q"]
    for wrong, says in (
        (starts.long(), r"expected torch\.int32"),
        (starts[None], "1 axes"),
        (starts.tolist(), "is a list"),
    ):
        with pytest.raises(InputError, match=says):
            kernel(**case.inputs, **{**case.call, "cu_seqlens_q": wrong})
    assert all(map(torch.equal, listed(kernel(**case.inputs, **case.call)), want))
