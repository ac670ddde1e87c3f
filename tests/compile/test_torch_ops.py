"""Kernels as torch operators: opcheck, torch.compile with dynamic shapes, torch.export."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import library as operators

import sparsegen as sg
from sparsegen import patterns
from sparsegen.runtime.standalone.checks import leading


def kernel_of(name: str, layout: str = "sequence", config: int = 0) -> Any:
    found = patterns.configs(name, test=True)[config]
    return sg.compile(
        name,
        target="cpu",
        layout=layout,
        page_size=8 if layout == "paged" else 0,
        sizes={k: v for k, v in found.sizes.items() if k not in "TS"},
        **found.hyper,
    )


def tensors(kernel: Any, **extents: int) -> list[torch.Tensor]:
    """Return random inputs; `extents` are those of the axes before the fixed ones."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for tensor in kernel.spec.inputs:
        shape = (*(extents[n] for n in leading(kernel.spec, tensor)), *tensor.shape)
        made.append(torch.randn(shape, generator=generator))
    return made


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


CALLS: dict[str, tuple[str, dict[str, int], tuple[Any, ...]]] = {
    "sequence": ("sequence", {"T": 7, "S": 23}, (None, 16)),
    "dense": ("dense", {"batch": 2, "T": 7, "S": 23}, (None, None)),
    "ragged": (
        "ragged",
        {"T": 9, "S": 31},
        (int32([0, 2, 2, 9]), int32([0, 9, 11, 31]), None, None),
    ),
    "paged": (
        "paged",
        {"T": 5, "pages": 6, "page": 8},
        (int32([0, 1, 5]), int32([13, 20]), int32([[5, 0, 0], [3, 1, 2]]), None, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", CALLS)
@pytest.mark.parametrize("name", ["dsa", "sliding_window", "snapkv"])
def test_opcheck(name: str, layout: str) -> None:
    kernel = kernel_of(name, layout)
    how, extents, metadata = CALLS[layout]
    assert how == layout
    operators.opcheck(kernel.op, (*tensors(kernel, **extents), *metadata))


@pytest.mark.parametrize("name", ["dsa", "sliding_window", "nsa"])
def test_one_graph_serves_all_lengths(name: str) -> None:
    kernel = kernel_of(name)
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def call(*inputs: torch.Tensor) -> Any:
        return kernel(*inputs) * 2

    for queries, keys in ((19, 23), (29, 31), (37, 47)):
        inputs = tensors(kernel, T=queries, S=keys)
        assert torch.equal(call(*inputs), kernel(*inputs) * 2)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["dsa", "sliding_window"])
def test_export_with_dynamic_lengths(name: str) -> None:
    kernel = kernel_of(name)

    class Module(torch.nn.Module):
        def forward(self, inputs: list[torch.Tensor]) -> Any:
            return kernel(*inputs) + 1

    queries, keys = torch.export.Dim("T", min=2, max=512), torch.export.Dim("S", min=2, max=512)
    sequence = {kernel.spec.query: queries, kernel.spec.key: keys}
    shapes = [
        {0: sequence[leading(kernel.spec, t)[0]]} if t.space != "none" else None
        for t in kernel.spec.inputs
    ]
    exported = torch.export.export(
        Module(), (tensors(kernel, T=19, S=23),), dynamic_shapes=(shapes,), strict=False
    )
    inputs = tensors(kernel, T=13, S=57)
    assert torch.equal(exported.module()(inputs), kernel(*inputs) + 1)


def test_the_operator_of_a_bundle(tmp_path: Any) -> None:
    kernel = kernel_of("dsa")
    loaded = sg.load(sg.export(kernel, tmp_path / "bundle"))
    operators.opcheck(loaded.op, (*tensors(kernel, T=7, S=23), None, None))


def test_dtypes_of_torch_are_taken() -> None:
    sizes = {"Hq": 2, "Hk": 1, "D": 8, "E": 8}
    kernel = sg.compile("causal", dtype=torch.bfloat16, dtypes={"q": torch.float32}, sizes=sizes)
    assert [x.dtype for x in kernel.spec.inputs] == ["float32", "bfloat16", "bfloat16"]
    with pytest.raises(sg.errors.BindingError, match="dtype='float64' is not known"):
        sg.compile("causal", dtype=torch.float64)


def test_calls_that_do_not_fit() -> None:
    kernel = kernel_of("causal")
    q, k, v = tensors(kernel, T=7, S=23)
    memory = ctypes.create_string_buffer(q.numel() * 4 + 8)
    start = ctypes.addressof(memory) % 4 + 1
    odd = torch.frombuffer(memory, dtype=torch.float32, count=q.numel(), offset=start).view_as(q)
    with pytest.raises(sg.errors.InputError, match=r"has shape .* S is 22, but 23 in 'k'"):
        kernel(q, k, v[:-1])
    with pytest.raises(sg.errors.InputError, match="is on meta"):
        kernel(q.to("meta"), k, v)
    with pytest.raises(sg.errors.InputError, match="is a int, expected a torch"):
        kernel(q, k, 3)
    with pytest.raises(sg.errors.InputError, match="address that is no multiple"):
        kernel(odd, k, v)
    with pytest.raises(sg.errors.UnsupportedError, match="no backward yet"):
        kernel(q.requires_grad_(), k, v)


@pytest.mark.parametrize("layout", ["sequence", "dense", "ragged"])
def test_queries_that_start_no_window_are_refused(layout: Any) -> None:
    """SeerAttention pools queries by blocks, here of five."""
    config = patterns.configs("seer", test=True)[0]
    sizes = {n: x for n, x in config.sizes.items() if n not in "TS"}
    kernel = sg.compile("seer", layout=layout, sizes=sizes, **config.hyper)
    assert kernel.spec.step == 5
    inputs = tensors(kernel, batch=2, T=7, S=17)
    given = {}
    if layout == "ragged":
        given = {"cu_seqlens_q": int32([0, 0, 7]), "cu_seqlens_k": int32([0, 3, 17])}
    batch = {"sequence": 1, "dense": 2, "ragged": 2}[layout]
    kernel(*inputs, **given, q_offset=10)
    kernel(*inputs, **given, q_offset=int32([10] * batch))
    for offset in (11, int32([11] * batch)):
        with pytest.raises(sg.errors.InputError, match="position 11 do not start a block of 5"):
            kernel(*inputs, **given, q_offset=offset)
    if layout == "ragged":  # 14 keys less 7 queries; the empty sequence has no first query
        with pytest.raises(sg.errors.InputError, match="position 7 do not start"):
            kernel(*inputs, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": int32([1, 2, 2, 9])}, "starts with 1, not 0"),
        ({"cu_seqlens_q": int32([0, 5, 2, 9])}, "decreases"),
        ({"cu_seqlens_q": int32([0, 2, 2, 10])}, "ends at 10, but there are 9 rows"),
        ({"cu_seqlens_k": int32([0, 9, 11, 99])}, "ends at 99, but there are 31 rows"),
        ({"cu_seqlens_k": int32([0, 31])}, "describes 1 sequences"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 2, 9])}, r"is torch\.int64, expected torch\.int32"),
        ({"cu_seqlens_q": None}, "'cu_seqlens_q' is missing"),
    ],
)
def test_ragged_metadata_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    kernel = kernel_of("causal", "ragged")
    good = {"cu_seqlens_q": int32([0, 2, 2, 9]), "cu_seqlens_k": int32([0, 9, 11, 31])}
    inputs = tensors(kernel, T=9, S=31)
    kernel(*inputs, **good)
    with pytest.raises(sg.errors.InputError, match=message):
        kernel(*inputs, **{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_table": int32([[5, 6, 0], [3, 1, 2]])}, "names a page outside 0 ... 5"),
        ({"page_table": int32([[-1, 0, 0], [3, 1, 2]])}, "names a page outside"),
        ({"seqlens_k": int32([13, 25])}, "holds 25 tokens"),
        ({"seqlens_k": int32([-1, 20])}, "negative length"),
        ({"page_table": None}, "'page_table' is missing"),
    ],
)
def test_paged_metadata_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    kernel = kernel_of("causal", "paged")
    cu_q, lengths, table, *_ = CALLS["paged"][2]
    good = {"cu_seqlens_q": cu_q, "seqlens_k": lengths, "page_table": table}
    inputs = tensors(kernel, T=5, pages=6, page=8)
    kernel(*inputs, **good)
    with pytest.raises(sg.errors.InputError, match=message):
        kernel(*inputs, **{**good, **change})
