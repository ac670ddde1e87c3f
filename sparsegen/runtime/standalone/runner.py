"""Run a compiled plan: check the arguments, allocate, call the tasks in order."""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .checks import DTYPES, alignment, check_inputs
from .device import DeviceMetadata, check_device, stream
from .errors import Errors
from .metadata import Arrays, Metadata
from .op import register
from .prepare import Prepared, Preparer, Shapes
from .shapes import EMPTY, result_tensors
from .spec import Spec

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_dispatch_modes = torch._C._len_torch_dispatch_stack
_REMEMBERED = 256


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
        self._metadata_names = spec.metadata
        self._keys = frozenset(spec.metadata)
        self._none = (None,) * len(spec.metadata)
        self._library = library
        self._masks = tuple(alignment(spec, DTYPES[t.dtype]) - 1 for t in spec.inputs)
        self._on_device = spec.device == "cuda"
        self._signatures: dict[Any, Prepared] = {}
        self._settled: dict[Any, Prepared] = {}
        place = {name: n for n, name in enumerate((*self._names, *(b.name for b in spec.buffers)))}
        self._takes = [(t.name, _taker([place[b] for b in t.buffers])) for t in spec.tasks]
        if not self._on_device:
            self._load()
        prefixes = [spec.results[:n] for n in range(len(spec.results))]
        self._results = tuple(
            (place[r.buffer], EMPTY[r.what], t.space, r.buffer in {x.buffer for x in before})
            for r, t, before in zip(spec.results, result_tensors(spec), prefixes, strict=True)
        )
        places = [n for n, *_ in self._results]
        self._first, self._take_results = places[0], _taker(places)
        self._preparer = Preparer(spec, places, errors)
        self.op = register(self)

    def _load(self) -> None:
        """Look the functions up; a GPU's are loaded by the first call, which needs its driver."""
        library = self._library() if self._on_device else self._library
        kind = DeviceMetadata if self._on_device else Metadata
        self._metadata: Any = kind(self.spec, library["sparsegen_metadata"], self._errors)
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
            if len(args) == self._count and keywords.keys() <= self._keys:
                metadata = tuple([keywords.get(key) for key in self._metadata_names])
            else:
                args, metadata = self.bind(args, keywords)
        if torch.compiler.is_compiling() or _dispatch_modes():
            return self._dispatched(args, metadata)
        shapes, plain = [], True
        try:
            for value, mask in zip(args, self._masks, strict=False):
                if type(value) not in _PLAIN:
                    plain = False
                    break
                if value.requires_grad and torch.is_grad_enabled():
                    raise self.no_gradient()
                if value.data_ptr() & mask:
                    check_inputs(self.spec, args, self._errors)
                shapes.append(value.shape)
        except RuntimeError:  # a sparse tensor has no address
            check_inputs(self.spec, args, self._errors)
            raise
        if plain:
            return self._run(args, metadata, shapes)
        if not all(isinstance(value, torch.Tensor) for value in args):
            check_inputs(self.spec, args, self._errors)
        return self._dispatched(args, metadata)

    def warm_up(self, *args: Any, **keywords: Any) -> None:
        """Do now, and wait for, what a first call does besides computing.

        Without arguments, load the code into the current GPU: any call can then be captured in a
        CUDA graph, the first one too. With the arguments of a call, also prepare what calls of such
        shapes share; a graph of one then holds its kernels and nothing else. Runs no task.

        Raises:
            InputError: a tensor does not fit.
            UnsupportedError: the GPU does not run this code.
        """
        if args or keywords:
            args, metadata = self.bind(args, keywords)
            if not self._on_device:
                self._prepare(args, metadata)
                return
            ready, device = self._prepare(args, metadata), args[0].device
            if not ready.refill:
                key = (device.index, *(x.shape for x in args), *self._told(metadata))
                self._settled[key] = ready
        elif self._on_device:
            device = torch.device("cuda", torch.cuda.current_device())
        else:
            return
        self._load_for(device)
        self._loaded["sparsegen_load"](device.index)
        torch.cuda.current_stream(device).synchronize()

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
        if any(x.data_ptr() & mask for x, mask in zip(args, self._masks, strict=True)):
            check_inputs(self.spec, args, self._errors)
        return self._run(args, metadata, [x.shape for x in args])

    def _run(self, args: Sequence[Any], metadata: Sequence[Any], shapes: Sequence[Any]) -> Any:
        """Run with inputs whose addresses are checked.

        Their dtypes, devices and strides are checked in a first call of their shapes, and then by
        the tasks, which refuse others; `check_inputs` says what is wrong with them.
        """
        index = args[0].get_device()
        if index < 0 and self._on_device:
            check_inputs(self.spec, args, self._errors)  # they are on no GPU
        key: tuple[Any, ...] = (index, *shapes)
        if metadata is not self._none:
            key += self._told(metadata)
        if not self._on_device:
            ready = self._signatures.get(key)
        elif (current := stream(index)) and torch.cuda.is_current_stream_capturing():
            # A graph keeps addresses, not tensors; what is made here, its replays make again.
            ready = self._settled.get(key) or self._prepare(args, metadata)
        else:
            # What one stream makes, another may not see yet; a thread refills what it has made.
            owner = 0 if metadata is self._none else threading.get_ident()
            key = (current, owner, key)
            ready = self._signatures.get(key)
        if ready is None:
            ready = self._remember(key, args, metadata)
        arrays: Any = ready.arrays
        handles: Any = ready.handles
        views, valid = ready.views, ready.sizes.rows_q
        if ready.refill:
            self._metadata.fill(ready.filling, metadata, handles)
        elif arrays is None:
            arrays, valid = self._metadata.given(ready.sizes, metadata)
            handles = arrays
        values = [*args]
        for n, tensor in ready.empty:
            check_inputs(self.spec, args, self._errors)  # no task will see them
            values[n] = tensor
        if views is not None:
            for model in ready.models:
                values.append(torch.empty_like(model))
        else:
            rows, views = self._preparer.shapes(ready.sizes, arrays)
            values += self._preparer.allocate(rows, args[0].device)
        if ready.busy or arrays[2].shape[0]:
            try:
                for n, shape in ready.packed:
                    values[n] = values[n].view(shape)
                for function, take in self._calls:
                    function(*handles, *take(values))
            except Exception:
                check_inputs(self.spec, args, self._errors)
                raise
        if ready.whole:
            return values[self._first] if self.spec.single else self._take_results(values)
        return self._finish(values, views, valid, arrays)

    def _told(self, metadata: Sequence[Any]) -> tuple[Any, ...]:
        """Return what the keywords of a call decide before their elements are read."""
        known = metadata if self._on_device else metadata[-1:]
        return tuple(map(_described, known)) if any(x is not None for x in known) else ()

    def _remember(
        self, key: tuple[Any, ...], args: Sequence[Any], metadata: Sequence[Any]
    ) -> Prepared:
        """Prepare calls of a new signature."""
        ready = self._settled.get(key[-1]) if self._on_device else None
        ready = ready or self._prepare(args, metadata)
        if len(self._signatures) >= _REMEMBERED:
            self._signatures.clear()
        self._signatures[key] = ready
        return ready

    def _prepare(self, args: Sequence[Any], metadata: Sequence[Any]) -> Prepared:
        sizes = check_inputs(self.spec, args, self._errors)
        if self._on_device:
            self._load_for(args[0].device)
        return self._preparer.prepare(sizes, args, metadata, self._metadata)

    def _load_for(self, device: torch.device) -> None:
        """Load the functions if this GPU runs them."""
        check_device(self.spec, device, self._errors)
        if not hasattr(self, "_loaded"):
            self._load()

    def _finish(self, values: list[Any], views: Shapes, valid: int, arrays: Arrays) -> Any:
        """Return the buffers of the results as the caller sees them."""
        results = []
        for (n, empty, space, again), shape in zip(self._results, views, strict=True):
            buffer = values[n]
            if space == "query" and valid < buffer.shape[0]:
                buffer[valid:] = empty
            elif space == "key" and self._on_device and self.spec.layout in ("ragged", "paged"):
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


def _described(value: Any) -> Any:
    """Return what a keyword of a call decides, and never its elements."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.data_ptr() & 3
    # True and 1.0 equal 1.
    return type(value), value if isinstance(value, int) else None


def _taker(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what picks the values of some places, always as a tuple."""
    if len(places) == 1:
        return lambda values: (values[places[0]],)
    return operator.itemgetter(*places)
