"""Describe to the runner what a kernel takes, allocates, runs and returns: plain data, JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

# An integer, ("stop", role), or an operator and its arguments.
Count = int | tuple[Any, ...]

_OPERATORS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "min": lambda a, b: min(a, b),
    "max": lambda a, b: max(a, b),
}
OPERATORS = frozenset(_OPERATORS)


def evaluate(count: Count, stops: Mapping[str, Any]) -> Any:
    """Return the value of a count; `stops` has the end of each role's positions."""
    if isinstance(count, int):
        return count
    op, *args = count
    if op == "stop":
        return stops[args[0]]
    return _OPERATORS[op](*(evaluate(a, stops) for a in args))


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A buffer of the plan.

    axes     what its axes are called, of inputs; the letters of the pattern
    shape    extents after the rows (all of them for space "none"); -1: `capacity` elements
    space    query | key | entry | query_block | batch | none: how many rows it has
    role     query | key: the sequence axis that entries are made of
    divisor  stride of entries, positions per query block
    visible  of entries: how many there are, over the stops
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    space: str
    axes: tuple[str, ...] = ()
    role: str = "key"
    divisor: int = 1
    paged: bool = False
    visible: Count = 0
    capacity: Count = 0

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TensorSpec:
        """Read plain JSON data, as `dataclasses.asdict` makes it."""
        return TensorSpec(**_frozen(data))


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A function of the library and the buffers it takes after the metadata."""

    name: str
    buffers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ResultSpec:
    """A value the kernel returns; `what` is "o", "lse" or "indices"."""

    buffer: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything the runner needs.

    op       name of the torch operator, unique to the mathematics, binding, schedule and target
    layout   sequence | dense | ragged | paged
    page     tokens of a page, in the paged layout
    query, key  letters of the two sequence axes; equal for self-attention over one axis
    single   return the value itself instead of a tuple
    device   cpu | cuda: where its tensors are
    codes    what its library holds for GPUs: machine code, "sm_80", or that of one GPU alone,
             "sm_90a", or PTX for it and newer ones, "compute_80"
    shared   bytes of shared memory that a block takes
    """

    name: str
    op: str
    layout: str
    page: int
    query: str
    key: str
    single: bool
    inputs: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    tasks: tuple[TaskSpec, ...]
    results: tuple[ResultSpec, ...]
    device: str = "cpu"
    codes: tuple[str, ...] = ()
    shared: int = 0

    @property
    def metadata(self) -> tuple[str, ...]:
        """Return the keywords a call takes beside its inputs; `q_offset` is always optional."""
        return {
            "ragged": ("cu_seqlens_q", "cu_seqlens_k", "q_offset"),
            "paged": ("cu_seqlens_q", "seqlens_k", "page_table", "q_offset"),
        }.get(self.layout, ("q_offset",))

    @property
    def step(self) -> int:
        """Return what query offsets are multiples of: windows of compressed queries start there."""
        strides = (t.divisor for t in self.buffers if t.space == "entry" and t.role == "query")
        return math.lcm(*strides)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Spec:
        """Read what `to_json` wrote; TypeError or KeyError when it does not fit."""
        rest = {k: v for k, v in data.items() if not isinstance(v, list)}
        return Spec(
            inputs=tuple(map(TensorSpec.from_json, data["inputs"])),
            buffers=tuple(map(TensorSpec.from_json, data["buffers"])),
            tasks=tuple(TaskSpec(**_frozen(t)) for t in data["tasks"]),
            results=tuple(ResultSpec(**r) for r in data["results"]),
            codes=tuple(data["codes"]),
            **rest,
        )


def _frozen(data: Mapping[str, Any]) -> dict[str, Any]:
    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return {k: freeze(v) for k, v in data.items()}
