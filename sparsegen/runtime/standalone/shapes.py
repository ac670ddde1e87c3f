"""Compute how large the buffers of a call are, for real and for symbolic sizes alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import Sizes
from .spec import Spec, TensorSpec, evaluate

# What a row of a result holds when its query sees nothing, or belongs to no sequence.
EMPTY = {"o": 0.0, "lse": float("-inf"), "indices": -1}


@dataclass(frozen=True)
class Extent:
    """What the number of rows depends on.

    total_q, total_k  packed rows
    stops             where the positions of the longest sequence end: {"query": ..., "key": ...};
                      empty where nothing asks
    first             absolute position of the first query, in the sequence layout
    """

    batch: Any
    total_q: Any
    total_k: Any
    stops: Mapping[str, Any]
    first: Any = 0


def rows(tensor: TensorSpec, extent: Extent) -> Any:
    """Return how many rows a buffer needs; see `Rows` of the plan."""
    total = extent.total_q if tensor.role == "query" else extent.total_k
    match tensor.space:
        case "query":
            return extent.total_q
        case "key":
            return extent.total_k
        case "entry":
            return total // tensor.divisor + extent.batch
        case "query_block":
            return extent.total_q // tensor.divisor + 2 * extent.batch
        case _:
            return extent.batch


def shape_of(tensor: TensorSpec, extent: Extent) -> tuple[Any, ...]:
    """Return the shape of a buffer as the tasks see it."""
    tail = (
        evaluate(tensor.capacity, extent.stops) if size == -1 else size for size in tensor.shape
    )
    if tensor.space == "none":
        return tuple(tail)
    return (rows(tensor, extent), *tail)


def view_of(spec: Spec, tensor: TensorSpec, sizes: Sizes, extent: Extent) -> tuple[Any, ...]:
    """Return the shape of a result as the caller sees it: at most as large as its buffer."""
    count, *tail = shape_of(tensor, extent)
    dense = spec.layout == "dense"
    match tensor.space:
        case "query" if dense:
            return (sizes.batch, sizes.queries, *tail)
        case "key" if dense:
            return (sizes.batch, sizes.keys, *tail)
        case "batch" if spec.layout == "sequence":
            return tuple(tail)
        case "entry":
            return (evaluate(tensor.visible, {**extent.stops, "rows": sizes.queries}), *tail)
        case "query_block":
            first, last = extent.first, extent.first + sizes.queries - 1
            blocks = last // tensor.divisor - first // tensor.divisor + 1
            return (blocks, *tail)
        case _:
            return (count, *tail)


def needs_stops(spec: Spec) -> bool:
    """Tell whether some buffer depends on the length of the longest sequence."""
    return any(-1 in t.shape for t in spec.buffers) or any(
        t.space == "entry" for t in result_tensors(spec)
    )


def asks_query(spec: Spec) -> bool:
    """Tell whether the width of some buffer depends on where the queries end."""

    def asks(count: Any) -> bool:
        return isinstance(count, tuple) and (count == ("stop", "query") or any(map(asks, count)))

    return any(asks(t.capacity) for t in spec.buffers if -1 in t.shape)


def lasting(spec: Spec) -> bool:
    """Tell whether the shapes of the inputs decide those of every buffer, without the metadata."""
    if spec.layout in ("sequence", "dense"):
        return not needs_stops(spec)
    rows_known = {"query", "none"} if spec.layout == "paged" else {"query", "key", "none"}
    return not needs_stops(spec) and all(t.space in rows_known for t in spec.buffers)


def result_tensors(spec: Spec) -> tuple[TensorSpec, ...]:
    """Return the buffers of the results, in order."""
    named = {t.name: t for t in spec.buffers}
    return tuple(named[r.buffer] for r in spec.results)
