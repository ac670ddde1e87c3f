"""Register a kernel as a torch operator, for torch.compile, torch.export and tensor subclasses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import library as operators

from .checks import DTYPES, sizes_of
from .shapes import Extent, result_tensors, view_of
from .spec import Spec

if TYPE_CHECKING:
    from .runner import Runner

NAMESPACE = "sparsegen"

# An operator lives as long as its library object, and traced graphs may hold the operator.
_LIBRARIES: list[operators.Library] = []


def schema(spec: Spec) -> str:
    """Return the operator's schema: inputs, metadata, and the offset as a tensor or an integer."""
    arguments = [f"Tensor {t.name}" for t in spec.inputs]
    arguments += [f"Tensor? {name}=None" for name in spec.metadata[:-1]]
    arguments += ["Tensor? q_offsets=None", "SymInt? q_offset=None"]
    results = ["Tensor"] * len(spec.results)
    return f"{spec.op}({', '.join(arguments)}) -> ({', '.join(results)})"


def register(runner: Runner) -> Any:
    """Return the operator of a kernel, registered if this process has none of its name yet.

    The name has a hash of everything that makes the kernel, so equal names compute the same.
    """
    spec = runner.spec
    existing = getattr(getattr(torch.ops, NAMESPACE), spec.op, None)
    if existing is not None:
        return existing.default
    fragment: Any = operators.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(fragment)
    name = f"{NAMESPACE}::{spec.op}"
    fragment.define(schema(spec), tags=(torch.Tag.pt2_compliant_tag,))

    def run(*values: Any) -> Any:
        args, metadata = _split(spec, values)
        return _unwrapped(spec, runner.run(args, metadata))

    def fake(*values: Any) -> Any:
        args, metadata = _split(spec, values)
        return _unwrapped(spec, shapes_only(spec, args, metadata))

    def refuse(ctx: Any, inputs: Any, output: Any) -> None:
        raise runner.no_gradient()

    def backward(ctx: Any, *gradients: Any) -> None:
        raise runner.no_gradient()

    fragment.impl(spec.op, run, spec.device.upper())
    operators.register_fake(name, fake, lib=fragment)
    operators.register_autograd(name, backward, setup_context=refuse, lib=fragment)
    return getattr(getattr(torch.ops, NAMESPACE), spec.op).default


def _split(spec: Spec, values: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the inputs, and the metadata in the order of `spec.metadata`."""
    # The dispatcher leaves out trailing arguments that have their default.
    count = len(spec.inputs)
    full = (*values, *(None,) * (count + len(spec.metadata) + 1 - len(values)))
    *metadata, offsets, offset = full[count:]
    return tuple(full[:count]), (*metadata, offset if offsets is None else offsets)


def _unwrapped(spec: Spec, results: Any) -> Any:
    return results[0] if len(spec.results) == 1 and not spec.single else results


def shapes_only(spec: Spec, args: Sequence[torch.Tensor], metadata: Sequence[Any]) -> Any:
    """Return tensors shaped like the results; sizes may be symbolic, and new ones where only the
    metadata's values say how large a result is.
    """
    sizes = sizes_of(spec, [value.shape for value in args])
    offset, total_k = metadata[-1], sizes.rows_k
    fixed = spec.layout in ("sequence", "dense")
    batch = sizes.batch if fixed else metadata[0].shape[0] - 1
    stops: dict[str, Any] = {}
    if fixed:
        query = sizes.keys if offset is None else None
        if isinstance(offset, int | torch.SymInt):
            query = offset + sizes.queries
        stops = {"query": query, "key": sizes.keys}
    tensors = result_tensors(spec)
    if any(-1 in t.shape or t.space == "entry" for t in tensors):
        for role in ("query", "key"):
            if stops.get(role) is None:
                stops[role] = operators.get_ctx().new_dynamic_size()
    if spec.layout == "paged" and any(t.space == "key" for t in tensors):
        total_k = operators.get_ctx().new_dynamic_size()
    first = sizes.keys - sizes.queries if offset is None else offset
    extent = Extent(batch, sizes.rows_q, total_k, stops, first)
    results = tuple(
        args[0].new_empty(view_of(spec, tensor, sizes, extent), dtype=DTYPES[tensor.dtype])
        for tensor in tensors
    )
    return results[0] if spec.single else results
