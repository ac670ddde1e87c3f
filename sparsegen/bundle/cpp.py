"""Describe a CPU kernel to the templates of its C++ header and example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsegen.runtime.standalone.checks import leading
from sparsegen.runtime.standalone.shapes import result_tensors
from sparsegen.runtime.standalone.spec import Count, Spec, TensorSpec

_DTYPES = {
    "float32": "{kDLFloat, 32, 1}",
    "float16": "{kDLFloat, 16, 1}",
    "bfloat16": "{kDLBfloat, 16, 1}",
    "int32": "{kDLInt, 32, 1}",
}
_INFIX = {"add": "+", "sub": "-", "mul": "*"}
_CALLS = {
    "floordiv": "floordiv",
    "mod": "floormod",
    "min": "std::min<int64_t>",
    "max": "std::max<int64_t>",
}


@dataclass(frozen=True)
class CppTensor:
    """A tensor as the header writes it down.

    axes      what the axes are called, of inputs
    extents   one C++ expression over an `Extent e` for each axis; of inputs, -1 where any will do
    rows      the kernel's rows: query | key | entry | query_block | batch | none
    view      extents of a result as the caller sees it
    empty     what rows of no sequence hold: zero | minus_infinity | minus_one
    """

    name: str
    dtype: str
    kind: str
    axes: tuple[str, ...]
    extents: tuple[str, ...]
    rows: str
    view: tuple[str, ...] = ()
    empty: str = ""


@dataclass(frozen=True)
class CppLibrary:
    """A library, what it is for, and the features that it needs of a processor."""

    arch: str
    file: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class CppPage:
    """Everything the C++ templates may mention."""

    name: str
    layout: str
    dtype: str
    ffi: str
    libraries: tuple[CppLibrary, ...]
    page: int
    step: int
    query: str
    key: str
    inputs: tuple[CppTensor, ...]
    buffers: tuple[CppTensor, ...]
    results: tuple[CppTensor, ...]
    tasks: tuple[tuple[str, tuple[int, ...]], ...]
    places: tuple[int, ...]


def describe_cpp(spec: Spec, *, dtype: str, ffi: str, libraries: tuple[CppLibrary, ...]) -> CppPage:
    """Return what the header and the example of a CPU kernel are rendered from.

    Args:
        spec: of any of the libraries.
        dtype: of the binding.
        ffi: the version of tvm-ffi.
        libraries: those to choose from, the most demanding first.
    """
    place = {t.name: n for n, t in enumerate((*spec.inputs, *spec.buffers))}
    tensors = result_tensors(spec)
    empty = {"o": "zero", "lse": "minus_infinity", "indices": "minus_one"}
    results = tuple(
        CppTensor(
            name=tensor.name,
            dtype=_DTYPES[tensor.dtype],
            kind=tensor.dtype,
            axes=(),
            extents=(),
            rows=tensor.space,
            view=_view(spec, tensor),
            empty=empty[result.what],
        )
        for tensor, result in zip(tensors, spec.results, strict=True)
    )
    return CppPage(
        name=spec.name, layout=spec.layout, dtype=dtype, ffi=ffi, libraries=libraries,
        page=spec.page, step=spec.step, query=spec.query, key=spec.key,
        inputs=tuple(_input(spec, t) for t in spec.inputs),
        buffers=tuple(_buffer(t) for t in spec.buffers),
        results=results,
        tasks=tuple((t.name, tuple(place[b] for b in t.buffers)) for t in spec.tasks),
        places=tuple(place[t.name] for t in tensors),
    )  # fmt: skip


def expression(count: Count) -> str:
    """Return a count as a C++ expression over `e`, an `Extent`."""
    if isinstance(count, int):
        return str(count)
    op, *args = count
    if op == "stop":
        return {"query": "e.stop_query", "key": "e.stop_key", "rows": "e.queries"}[args[0]]
    parts = [expression(a) for a in args]
    if op in _INFIX:
        return f"({f' {_INFIX[op]} '.join(parts)})"
    return f"{_CALLS[op]}({', '.join(parts)})"


def _input(spec: Spec, tensor: TensorSpec) -> CppTensor:
    front = leading(spec, tensor)
    fixed = [str(spec.page) if name == "page" else "-1" for name in front]
    return CppTensor(
        name=tensor.name,
        dtype=_DTYPES[tensor.dtype],
        kind=tensor.dtype,
        axes=(*front, *tensor.axes),
        extents=(*fixed, *map(str, tensor.shape)),
        rows=tensor.space,
    )


def _buffer(tensor: TensorSpec) -> CppTensor:
    return CppTensor(
        name=tensor.name,
        dtype=_DTYPES[tensor.dtype],
        kind=tensor.dtype,
        axes=(),
        extents=(*_rows(tensor), *_tail(tensor)),
        rows=tensor.space,
    )


def _tail(tensor: TensorSpec) -> tuple[str, ...]:
    return tuple(expression(tensor.capacity) if n == -1 else str(n) for n in tensor.shape)


def _rows(tensor: TensorSpec) -> tuple[str, ...]:
    """Return the rows of a buffer; see `standalone.shapes.rows`."""
    total = "e.total_q" if tensor.role == "query" else "e.total_k"
    found: dict[str, tuple[str, ...]] = {
        "query": ("e.total_q",),
        "key": ("e.total_k",),
        "entry": (f"{total} / {tensor.divisor} + e.batch",),
        "query_block": (f"e.total_q / {tensor.divisor} + 2 * e.batch",),
        "batch": ("e.batch",),
        "none": (),
    }
    return found[tensor.space]


def _view(spec: Spec, tensor: TensorSpec) -> tuple[str, ...]:
    """Return the shape of a result as the caller sees it; see `standalone.shapes.view_of`."""
    tail = _tail(tensor)
    dense = spec.layout == "dense"
    blocks = f"floordiv(e.first + e.queries - 1, {tensor.divisor})"
    views: dict[str, Any] = {
        "query": ("e.batch", "e.queries") if dense else ("e.total_q",),
        "key": ("e.batch", "e.keys") if dense else ("e.total_k",),
        "batch": () if spec.layout == "sequence" else ("e.batch",),
        "entry": (expression(tensor.visible),),
        "query_block": (f"{blocks} - floordiv(e.first, {tensor.divisor}) + 1",),
        "none": (),
    }
    return (*views[tensor.space], *tail)
