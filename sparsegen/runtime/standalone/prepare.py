"""Compute what calls of equal shapes share: their metadata, and how large their buffers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import tvm_ffi

from .checks import DTYPES, Sizes
from .device import DeviceMetadata, Filling
from .errors import Errors
from .metadata import Arrays, Metadata
from .shapes import (
    Extent,
    asks_query,
    lasting,
    needs_stops,
    result_tensors,
    shape_of,
    view_of,
)
from .spec import Spec

Shapes = tuple[tuple[Any, ...], ...]


@dataclass(slots=True)
class Prepared:
    """What a call computes once per signature: shapes, strides, dtypes and offset of its inputs.

    arrays  the metadata, or the memory for it; None where a CPU takes what it is given
    handles  the arrays, as tasks take them for less than tensors of torch
    filling  on a GPU, how to fill the arrays
    refill  whether each call fills them, because they depend on tensors that it is given
    packed  inputs that the tasks see with another shape
    empty   inputs without elements: what the tasks see instead
    shapes  of the buffers, unless the metadata decides them
    views   of the results, unless the metadata decides them
    models  tensors of the shapes, without memory of that size: `torch.empty_like` costs half of
            `torch.empty`
    whole   the results are their buffers, as they are
    busy    there is a sequence, as far as the host knows
    """

    sizes: Sizes
    arrays: Arrays | None
    handles: tuple[Any, ...] | None
    filling: Filling | None
    refill: bool
    packed: tuple[tuple[int, tuple[int, ...]], ...]
    empty: tuple[tuple[int, torch.Tensor], ...]
    shapes: Shapes | None
    views: Shapes | None
    models: tuple[torch.Tensor, ...] = ()
    whole: bool = False
    busy: bool = False


class Preparer:
    """Prepare calls of a kernel.

    Args:
        spec: the kernel's specification.
        results: the places of the results among inputs and buffers.
        errors: what to raise.
    """

    def __init__(self, spec: Spec, results: Sequence[int], errors: Errors) -> None:
        self._spec = spec
        self._errors = errors
        self._results = tuple(n - len(spec.inputs) for n in results)
        self._dtypes = tuple(DTYPES[t.dtype] for t in spec.buffers)
        tensors = result_tensors(spec)
        distinct = len(set(self._results)) == len(self._results)
        ordered = spec.layout in ("sequence", "dense")
        # Rows behind the last sequence are cleared after the call, where there may be some.
        spaces = {t.space for t in tensors}
        self._as_they_are = distinct and (
            ordered or spaces <= {"none"} or (spec.device == "cuda" and "key" not in spaces)
        )
        self._blocks = any(t.space == "query_block" for t in tensors)
        self._stops = needs_stops(spec)
        self._asks_query = asks_query(spec)
        self._lasting = lasting(spec)

    def prepare(
        self, sizes: Sizes, args: Sequence[Any], metadata: Sequence[Any], maker: Metadata
    ) -> Prepared:
        """Return what calls with the shapes of these inputs, which are checked, share."""
        spec, device = self._spec, args[0].device
        fixed = spec.layout in ("sequence", "dense") and not isinstance(metadata[-1], torch.Tensor)
        arrays = filling = None
        if isinstance(maker, DeviceMetadata):
            filling = maker.filling(sizes, metadata, device)
            arrays = tuple([torch.empty_like(model) for model in filling.models])
            if fixed:
                maker.fill(filling, metadata, arrays)
        elif fixed:
            arrays = maker.fixed(sizes, metadata[-1])
        packed, empty = [], []
        for n, (tensor, value) in enumerate(zip(spec.inputs, args, strict=True)):
            shape = tuple(value.shape)
            if spec.layout == "dense" and tensor.space != "none":
                shape = (shape[0] * shape[1], *shape[2:])
            # Memory of no elements has no address to pass; its rows are never read.
            if value.numel() == 0:
                some = tuple(max(extent, 1) for extent in shape)
                empty.append((n, torch.zeros(some, dtype=value.dtype, device=device)))
            elif shape != tuple(value.shape):
                packed.append((n, shape))
        shapes = views = None
        if filling is not None:
            shapes, views = self._shapes_on_device(sizes, filling.extent)
        elif arrays is not None or self._lasting:
            shapes, views = self.shapes(sizes, arrays)
        handles = None if arrays is None else tuple(map(tvm_ffi.from_dlpack, arrays))
        ready = Prepared(
            sizes, arrays, handles, filling, filling is not None and not fixed,
            tuple(packed), tuple(empty), shapes, views,
        )  # fmt: skip
        ready.busy = arrays is not None and arrays[2].shape[0] > 0
        if shapes is not None and views is not None:
            ready.models = tuple(
                torch.empty((1,) * len(shape), dtype=dtype, device=device).expand(shape)
                for shape, dtype in zip(shapes, self._dtypes, strict=True)
            )
            pairs = zip(self._results, views, strict=True)
            ready.whole = self._as_they_are and all(shapes[n] == view for n, view in pairs)
        return ready

    def allocate(self, shapes: Shapes, device: torch.device) -> list[torch.Tensor]:
        """Return new buffers of these shapes."""
        pairs = zip(shapes, self._dtypes, strict=True)
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in pairs]

    def _shapes_on_device(self, sizes: Sizes, extent: Extent) -> tuple[Shapes, Shapes]:
        """Return the shapes of the buffers and results from what the host knows."""
        if self._stops and extent.stops["query"] is None and self._asks_query:
            raise self._errors.input(
                f"{self._spec.name}(): how much memory it takes depends on the values of q_offset",
                hint="pass an integer, which the host can read",
            )
        batch = sizes.batch or extent.batch - 1
        return self._shaped(sizes, extent, replace(extent, batch=batch))

    def shapes(self, sizes: Sizes, arrays: Arrays | None) -> tuple[Shapes, Shapes]:
        """Return the shapes of the buffers, none of them empty, and of the results."""
        extent = self._extent(sizes, arrays)
        return self._shaped(sizes, extent, extent)

    def _shaped(self, sizes: Sizes, extent: Extent, seen: Extent) -> tuple[Shapes, Shapes]:
        """Return the shapes of buffers of an extent, and of results as the caller sees them."""
        spec = self._spec
        shapes = tuple(
            tuple(max(n, 1) for n in shape_of(tensor, extent)) for tensor in spec.buffers
        )
        views = tuple(
            tuple(max(n, 0) for n in view_of(spec, tensor, sizes, seen))
            for tensor in result_tensors(spec)
        )
        return shapes, views

    def _extent(self, sizes: Sizes, arrays: Arrays | None) -> Extent:
        if arrays is None:
            return Extent(sizes.batch, sizes.rows_q, sizes.rows_k, {})
        cu_q, cu_k, q_off = arrays[:3]
        batch, total_k, stops = q_off.shape[0], sizes.rows_k, {"query": 0, "key": 0}
        if self._spec.layout == "paged":
            total_k = int(cu_k[-1])
        if self._stops and batch:
            stops["query"] = int((q_off + cu_q.diff()).max())
            stops["key"] = int(cu_k.diff().max())
        first = int(q_off[0]) if self._blocks else 0
        return Extent(batch, sizes.rows_q, total_k, stops, first)
