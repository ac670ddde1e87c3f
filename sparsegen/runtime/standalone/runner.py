"""Run a compiled plan: check the arguments, allocate, call the tasks in order."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .checks import DTYPES, Sizes, alignment, check_inputs
from .device import DeviceMetadata
from .errors import Errors
from .metadata import Arrays, Metadata
from .op import register
from .shapes import (
    EMPTY,
    Extent,
    asks_query,
    lasting,
    needs_stops,
    result_tensors,
    shape_of,
    view_of,
)
from .spec import Spec, runs

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_dispatch_modes = torch._C._len_torch_dispatch_stack
_REMEMBERED = 256

_Shapes = tuple[tuple[Any, ...], ...]


@dataclass(slots=True)
class _Prepared:
    """What a call computes once per signature: shapes, strides, dtypes and offset of its inputs.

    arrays  the metadata, in the layouts where it follows from the shapes
    packed  inputs that the tasks see with another shape
    shapes  of the buffers, unless the metadata decides them
    views   of the results, unless the metadata decides them
    """

    sizes: Sizes
    arrays: Arrays | None
    packed: tuple[tuple[int, tuple[int, ...]], ...]
    empty: tuple[tuple[int, torch.Tensor], ...]
    shapes: _Shapes | None
    views: _Shapes | None


class Runner:
    """A kernel as a function of tensors.

    Call it with the inputs of the pattern, in order or by name, and the metadata of its layout by
    name: `cu_seqlens_q`, `cu_seqlens_k`, `seqlens_k`, `page_table` (int32) and `q_offset`, the
    absolute position of the first query of each sequence, an integer or int32 [batch]; by default
    the queries are the last positions, `keys - queries`, which may be negative: such queries stand
    before every key. Returns new tensors; rows that belong to no sequence are those of a query that
    sees nothing.

    Args:
        spec: what to check, allocate, run and return.
        library: the loaded library, a function of each task's name; for a GPU, what loads it.
        errors: the exceptions to raise.
    """

    def __init__(self, spec: Spec, library: Any, errors: Errors) -> None:
        self.spec = spec
        self._errors = errors
        self._count = len(spec.inputs)
        self._names = tuple(t.name for t in spec.inputs)
        self._none = (None,) * len(spec.metadata)
        self._library = library
        self._masks = tuple(alignment(spec, DTYPES[t.dtype]) - 1 for t in spec.inputs)
        self._signatures: dict[Any, _Prepared] = {}
        self._dtypes = tuple(DTYPES[t.dtype] for t in spec.buffers)
        place = {name: n for n, name in enumerate((*self._names, *(b.name for b in spec.buffers)))}
        self._takes = [(t.name, _taker([place[b] for b in t.buffers])) for t in spec.tasks]
        if spec.device == "cpu":
            self._load()
        tensors = result_tensors(spec)
        prefixes = [spec.results[:n] for n in range(len(spec.results))]
        self._results = tuple(
            (place[r.buffer], EMPTY[r.what], t.space, r.buffer in {x.buffer for x in before})
            for r, t, before in zip(spec.results, tensors, prefixes, strict=True)
        )
        self._blocks = any(t.space == "query_block" for t in tensors)
        self._stops = needs_stops(spec)
        self._asks_query = asks_query(spec)
        self._lasting = lasting(spec)
        self.op = register(self)

    def _load(self) -> None:
        """Look the functions up; a GPU's are loaded by the first call, which needs its driver."""
        library = self._library() if self.spec.device == "cuda" else self._library
        kind = Metadata if self.spec.device == "cpu" else DeviceMetadata
        self._metadata = kind(self.spec, library["sparsegen_metadata"], self._errors)
        self._calls: list[tuple[Callable[..., Any], Callable[[Sequence[Any]], tuple[Any, ...]]]] = [
            (library[name], take) for name, take in self._takes
        ]
        self._loaded = library

    @property
    def threads(self) -> int:
        """Return how many threads a call from here uses: `torch.set_num_threads` decides."""
        return int(self._loaded["sparsegen_threads"]())

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Compute the results for these tensors; see the class for the arguments.

        Raises:
            InputError: a tensor does not fit; the message says which, what was found and expected.
            UnsupportedError: gradients are asked for.
        """
        metadata = self._none
        if keywords or len(args) != self._count:
            args, metadata = self.bind(args, keywords)
        if torch.compiler.is_compiling() or _dispatch_modes():
            return self._dispatched(args, metadata)
        for value in args:
            if type(value) not in _PLAIN:
                if isinstance(value, torch.Tensor):
                    return self._dispatched(args, metadata)
                check_inputs(self.spec, args, self._errors)
            if value.requires_grad and torch.is_grad_enabled():
                raise self.no_gradient()
        return self.run(args, metadata)

    def _dispatched(self, args: Sequence[Any], metadata: Sequence[Any]) -> Any:
        """Run as a torch operator, which tracing and tensor subclasses see."""
        offset = metadata[-1]
        tensor = isinstance(offset, torch.Tensor)
        offsets = (offset, None) if tensor else (None, offset)
        results = self.op(*args, *metadata[:-1], *offsets)
        return (results,) if len(self._results) == 1 and not self.spec.single else results

    def bind(
        self, args: Sequence[Any], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the inputs in order and the metadata in the order of `spec.metadata`."""
        name, names = self.spec.name, self._names
        if len(args) > self._count:
            raise self._errors.input(
                f"{name}() takes {self._count} inputs ({', '.join(names)}), got {len(args)}",
                hint="pass the metadata by name",
            )
        values = list(args)
        rest = dict(keywords)
        for missing in names[len(args) :]:
            if missing not in rest:
                raise self._errors.input(
                    f"{name}(): argument {missing!r} is missing",
                    hint=f"its inputs are {', '.join(names)}",
                )
            values.append(rest.pop(missing))
        metadata = tuple(rest.pop(key, None) for key in self.spec.metadata)
        if rest:
            key = next(iter(rest))
            twice = key in names
            raise self._errors.input(
                f"{name}(): argument {key!r} is " + ("given twice" if twice else "unknown"),
                hint=f"its inputs are {', '.join(names)}; "
                f"the {self.spec.layout} layout also takes {', '.join(self.spec.metadata)}",
            )
        return tuple(values), metadata

    def no_gradient(self) -> Exception:
        """Return the error for a call that asks for gradients."""
        return self._errors.unsupported(
            f"{self.spec.name}() has no backward yet, and an input requires a gradient",
            hint="call it under torch.no_grad() or torch.inference_mode(), "
            "or pass tensors that are detached",
        )

    def run(self, args: Sequence[Any], metadata: Sequence[Any]) -> Any:
        """Run without torch's dispatcher and without asking for gradients.

        Args:
            args: the inputs, in order.
            metadata: the values of `spec.metadata`, in order; None for those not given.
        """
        offset = metadata[-1]
        tensors = isinstance(offset, torch.Tensor)
        signature: list[Any] = [None if tensors else offset, tensors]
        for value, mask in zip(args, self._masks, strict=True):
            if value.data_ptr() & mask:
                check_inputs(self.spec, args, self._errors)
            signature += (value.shape, value.stride(), value.dtype, value.device)
        key = tuple(signature)
        ready = self._signatures.get(key)
        if ready is None:
            ready = self._prepare(args, metadata)
            if len(self._signatures) >= _REMEMBERED:
                self._signatures.clear()
            self._signatures[key] = ready
        arrays, shapes, views = ready.arrays, ready.shapes, ready.views
        valid = ready.sizes.rows_q
        device = args[0].device
        if arrays is None and isinstance(self._metadata, DeviceMetadata):
            arrays, extent = self._metadata.filled(ready.sizes, metadata, device)
            shapes, views = self._shapes_on_device(ready.sizes, extent)
        elif arrays is None:
            arrays, valid = self._metadata.given(ready.sizes, metadata)
        if shapes is None or views is None:
            shapes, views = self._shapes(ready.sizes, arrays)
        values = list(args)
        for n, shape in ready.packed:
            values[n] = values[n].view(shape)
        for n, tensor in ready.empty:
            values[n] = tensor
        for shape, dtype in zip(shapes, self._dtypes, strict=True):
            values.append(torch.empty(shape, dtype=dtype, device=device))
        if arrays[2].shape[0]:
            for function, take in self._calls:
                function(*arrays, *take(values))
        return self._finish(values, views, valid, arrays)

    def _finish(self, values: list[Any], views: _Shapes, valid: int, arrays: Arrays) -> Any:
        """Return the buffers of the results as the caller sees them."""
        results = []
        for (n, empty, space, again), shape in zip(self._results, views, strict=True):
            buffer = values[n]
            if space == "query" and valid < buffer.shape[0]:
                buffer[valid:] = empty
            elif space == "key" and self.spec.device == "cuda" and self.spec.layout != "dense":
                rows = torch.arange(buffer.shape[0], device=buffer.device)
                outside = (rows >= arrays[1][-1]).view(-1, *(1 for _ in buffer.shape[1:]))
                buffer.masked_fill_(outside, empty)
            elif space == "key" and self.spec.layout == "ragged":
                buffer[int(arrays[1][-1]) :] = empty
            if buffer.shape != shape:
                buffer = buffer.view(-1)[: math.prod(shape)].view(shape)
            # Results of a torch operator share no memory.
            results.append(buffer.clone() if again else buffer)
        return results[0] if self.spec.single else tuple(results)

    def _prepare(self, args: Sequence[Any], metadata: Sequence[Any]) -> _Prepared:
        spec, device = self.spec, args[0].device
        sizes = check_inputs(spec, args, self._errors)
        if spec.device == "cuda":
            self._check_device(device)
        fixed = spec.layout in ("sequence", "dense") and not isinstance(metadata[-1], torch.Tensor)
        arrays = None
        if fixed and isinstance(self._metadata, DeviceMetadata):
            arrays = self._metadata.equal(sizes, metadata[-1], device)
        elif fixed:
            arrays = self._metadata.fixed(sizes, metadata[-1])
        packed, empty = [], []
        for n, (tensor, value) in enumerate(zip(spec.inputs, args, strict=True)):
            shape = tuple(value.shape)
            if spec.layout == "dense" and tensor.space != "none":
                shape = (shape[0] * shape[1], *shape[2:])
                packed.append((n, shape))
            # Memory of no elements has no address to pass; its rows are never read.
            if value.numel() == 0:
                some = tuple(max(extent, 1) for extent in shape)
                empty.append((n, torch.zeros(some, dtype=value.dtype, device=device)))
        shapes = views = None
        if arrays is not None and isinstance(self._metadata, DeviceMetadata):
            first = self._metadata.offset(sizes, metadata[-1])
            stops = {"query": first + sizes.queries, "key": sizes.keys}
            extent = Extent(sizes.batch, sizes.rows_q, sizes.rows_k, stops, first)
            shapes, views = self._shapes_on_device(sizes, extent)
        elif spec.device == "cpu" and (arrays is not None or self._lasting):
            shapes, views = self._shapes(sizes, arrays)
        return _Prepared(sizes, arrays, tuple(packed), tuple(empty), shapes, views)

    def _check_device(self, device: torch.device) -> None:
        """Load the functions if this GPU runs them."""
        found = torch.cuda.get_device_capability(device)
        if not runs(self.spec.capability, found):
            raise self._errors.unsupported(
                f"{self.spec.name}() was compiled for {self.spec.capability}, but {device} is "
                f"{torch.cuda.get_device_name(device)} of compute capability {found[0]}.{found[1]}",
                hint="compile it for that GPU: target='cuda' takes the one present",
            )
        if not hasattr(self, "_loaded"):
            self._load()

    def _shapes_on_device(self, sizes: Sizes, extent: Extent) -> tuple[_Shapes, _Shapes]:
        """Return the shapes of the buffers and results from what the host knows."""
        if self._stops and extent.stops["query"] is None and self._asks_query:
            raise self._errors.input(
                f"{self.spec.name}(): how much memory it takes depends on the values of q_offset",
                hint="pass an integer, which the host can read",
            )
        batch = sizes.batch or extent.batch - 1
        return self._shaped(sizes, extent, replace(extent, batch=batch))

    def _shapes(self, sizes: Sizes, arrays: Arrays | None) -> tuple[_Shapes, _Shapes]:
        """Return the shapes of the buffers, none of them empty, and of the results."""
        extent = self._extent(sizes, arrays)
        return self._shaped(sizes, extent, extent)

    def _shaped(self, sizes: Sizes, extent: Extent, seen: Extent) -> tuple[_Shapes, _Shapes]:
        """Return the shapes of buffers of an extent, and of results as the caller sees them."""
        spec = self.spec
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
        if self.spec.layout == "paged":
            total_k = int(cu_k[-1])
        if self._stops and batch:
            stops["query"] = int((q_off + cu_q.diff()).max())
            stops["key"] = int(cu_k.diff().max())
        first = int(q_off[0]) if self._blocks else 0
        return Extent(batch, sizes.rows_q, total_k, stops, first)


def _taker(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what picks the values of some places, always as a tuple."""
    if len(places) == 1:
        return lambda values: (values[places[0]],)
    return operator.itemgetter(*places)
