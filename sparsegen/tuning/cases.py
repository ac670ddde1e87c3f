"""Make calls of one task with the results they must give: small odd ones, and the tuned shape.

The float64 oracle runs the pattern around the task. Values that other tasks would hand over come
from the oracle in a small case; in the timed one they are drawn, selections among them from the
index distribution at hand, and a sample of query rows is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsegen.lowering.tasks import Buffer
from sparsegen.tuning import lists
from sparsegen.tuning.packing import Array, Sequences, empty, pack, rounded
from sparsegen.tuning.records import Sizes
from sparsegen.tuning.subject import DISTINCT, Span, Subject, tiled

_CHUNK = 4
"""Query rows checked together at the tuned shape."""
# Operands that another task leaves in float32 become 16 bits for tensor cores, and where scores are
# spread widely, a weight errs by several units of that.
_ROUNDED = 2.5
_TOLERANCE = {"float32": 2e-4, "float16": 4e-3, "bfloat16": 2e-2}
_LARGEST_SHARED = 700
"""Rows of a small case whose queries and keys are one axis: all pairs are evaluated."""


@dataclass(frozen=True)
class Expected:
    """What rows of one output must hold.

    rows       places along the (flattened) first axis
    tolerance  relative to the value plus the magnitude of its row, or of all if that is larger; for
               indices, the share of lists that may differ in a few keys because their scores are no
               exact float32 numbers
    """

    output: int
    rows: Array
    values: Array
    tolerance: float


@dataclass(frozen=True)
class Case:
    """One call: inputs and poisoned outputs in the order of the arguments, and what must come out.

    dtypes  of inputs and outputs; bfloat16 is kept as uint16
    """

    name: str
    dtypes: tuple[str, ...]
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    expected: tuple[Expected, ...]

    @property
    def bytes(self) -> int:
        """Return how much memory the call may touch."""
        return sum(x.nbytes for x in (*self.inputs, *self.outputs))

    def save(self, path: Path) -> Path:
        """Write the case for the worker: arrays, and the rest as JSON.

        Outputs are poison of one value, so their shapes will do.
        """
        about = {
            "name": self.name,
            "dtypes": self.dtypes,
            "inputs": len(self.inputs),
            "shapes": [x.shape for x in self.outputs],
            "expected": [[e.output, e.tolerance] for e in self.expected],
        }
        arrays = [*self.inputs, *(x.reshape(-1)[:1] for x in self.outputs)]
        for e in self.expected:
            arrays += [e.rows, e.values]
        np.savez(path, np.array(json.dumps(about)), *arrays)
        return path

    @classmethod
    def load(cls, path: Path) -> Case:
        """Read what `save` wrote."""
        with np.load(path) as file:
            about, *arrays = (file[f"arr_{n}"] for n in range(len(file.files)))
        meta: dict[str, Any] = json.loads(str(about))
        many, inputs = len(meta["dtypes"]), meta["inputs"]
        expected = [
            Expected(output, arrays[many + 2 * n], arrays[many + 2 * n + 1], tolerance)
            for n, (output, tolerance) in enumerate(meta["expected"])
        ]
        return cls(
            name=meta["name"],
            dtypes=tuple(meta["dtypes"]),
            inputs=tuple(arrays[:inputs]),
            outputs=tuple(
                np.broadcast_to(x if 0 in shape else x[0], shape)
                for x, shape in zip(arrays[inputs:many], meta["shapes"], strict=True)
            ),
            expected=tuple(expected),
        )


def small(subject: Subject, seed: int) -> Case:
    """Return a call of several short sequences; the oracle computes everything.

    Among them: one without queries, more queries than keys, one query, and enough keys that
    budgets and windows leave some out.
    """
    sequences = small_sequences(subject, seed)
    exact = subject.is_exact()
    inputs = subject.inputs(sequences, seed, grid=exact)
    runs = [
        subject.oracle(arrays, offset)
        for arrays, offset in zip(inputs, sequences.offsets, strict=True)
    ]
    reads = {b.name: [subject.value(run, b) for run in runs] for b in subject.task.reads}
    expected = [
        _expected(
            subject, n, ((s, 0, subject.value(run, b)) for s, run in enumerate(runs)), sequences,
            exact and all(np.array_equal(x, rounded(x, b.dtype)) for x in reads.get(b.name, ())),
        )
        for n, b in enumerate(subject.task.writes)
    ]  # fmt: skip
    name = f"queries {sequences.queries}, keys {sequences.keys}"
    return _case(subject, name, reads, expected, sequences)


def small_sequences(subject: Subject, seed: int) -> Sequences:
    """Return the sequences of a small call."""
    reach = subject.reach()
    lengths = [((67, 5, 0, 9), (70, reach, 9, 5)), ((1, 33, 2), (reach + 2, 300, 2))][seed % 2]
    queries, keys = lengths
    if subject.shared:
        queries = keys = (67, 1, min(reach, _LARGEST_SHARED) - seed)
    return _sequences(subject, queries, keys, seed)


def timed(subject: Subject, sizes: Sizes, distribution: str, seed: int = 0) -> Case:
    """Return a call of the tuned shape; the last query rows and some in the middle are checked.

    Where rows do not stand for themselves (sums over queries, self-attention), none are.
    """
    sequences = timed_sequences(subject, sizes, seed)
    rng = np.random.default_rng(seed)
    inputs = subject.large(sequences, seed)
    made = {name: [arrays[name] for arrays in inputs] for name in inputs[0]}
    for buffer in subject.task.reads:
        if not subject.is_input(buffer):
            made[buffer.name] = [
                _drawn(subject, buffer, b, sequences, distribution, rng)
                for b in range(len(sequences))
            ]
    b, expected = sizes.batch - 1, []
    step = max(subject.align(), _CHUNK)
    for start in _sample(subject, sizes.query, step):
        stop = min(start + step, sizes.query)
        span = Span(b, start, stop, sequences.offsets[b], sizes.key)
        run = subject.part({name: values[b] for name, values in made.items()}, span)
        expected += [
            _expected(subject, n, [(b, start, subject.value(run, out))], sequences, False)
            for n, out in enumerate(subject.task.writes)
        ]
    reads = {buffer.name: made[buffer.name] for buffer in subject.task.reads}
    name = f"{sizes.batch} x {sizes.query} queries, {sizes.key} keys"
    return _case(subject, name, reads, expected, sequences)


def timed_sequences(subject: Subject, sizes: Sizes, seed: int = 0) -> Sequences:
    """Return the sequences of the timed call."""
    return _sequences(subject, [sizes.query] * sizes.batch, [sizes.key] * sizes.batch, seed)


def _sequences(
    subject: Subject, queries: Iterable[int], keys: Iterable[int], seed: int
) -> Sequences:
    binding = subject.plan.binding
    return Sequences.of(
        tuple(queries), tuple(keys), page=binding.page_size if binding.layout == "paged" else 0,
        align=subject.align(), rng=np.random.default_rng(seed),
    )  # fmt: skip


def _drawn(
    subject: Subject, buffer: Buffer, b: int, sequences: Sequences, distribution: str,
    rng: np.random.Generator,
) -> Array:  # fmt: skip
    """Draw what another task would hand over."""
    node, what = subject.made[buffer.name]
    if what == "indices":
        select = subject.maker(node)
        low, high, many = subject.eligible(select, b, sequences)
        width = subject.width(buffer, sequences)
        return lists.draw(distribution, low, high, many, select.groups, width, rng)
    count = subject.count(buffer, b, sequences)
    shape = (count, *buffer.shape)
    drawn = rng.standard_normal(min(math.prod(shape), DISTINCT)).astype(np.float32)
    return tiled(np.resize(drawn, shape), buffer.dtype)


def _sample(subject: Subject, queries: int, step: int) -> list[int]:
    alone = all(b.rows.space in ("query", "query_block") for b in subject.task.writes)
    if subject.shared or not alone:
        return []
    last = (queries - 1) // step * step
    # Where the end of the queries counts, a part that stops earlier means something else.
    return [last] if subject.knows_end() else sorted({last, last // 2 // step * step})


def _expected(
    subject: Subject, output: int, values: Iterable[tuple[int, int, Array]], sequences: Sequences,
    exact: bool,
) -> Expected:  # fmt: skip
    """Place the values (sequence, first row, array) of one output."""
    buffer = subject.task.writes[output]
    width = subject.width(buffer, sequences)
    places, found = [], []
    for b, start, value in values:
        count = subject.count(buffer, b, sequences)
        first = start
        if buffer.rows.space == "query_block":
            base = sequences.offsets[b]
            first = (base + start) // buffer.rows.block - base // buffer.rows.block
        places.append(sequences.rows(buffer.rows, b, count)[first : first + len(value)])
        if buffer.dtype == "int32" and value.shape[-1] != width:
            missing = [(0, 0)] * (value.ndim - 1) + [(0, width - value.shape[-1])]
            value = np.pad(value, missing, constant_values=-1)
        found.append(value)
    tolerance = 0.0 if exact else 0.02
    if buffer.dtype != "int32":
        reads = {b.dtype for b in (buffer, *subject.task.reads)} & _TOLERANCE.keys()
        tolerance = max(_TOLERANCE[dtype] for dtype in reads)
        if subject.rounds():
            tolerance *= _ROUNDED
    return Expected(output, np.concatenate(places), np.concatenate(found), tolerance)


def _case(
    subject: Subject, name: str, reads: Mapping[str, list[Array]], expected: list[Expected],
    sequences: Sequences,
) -> Case:  # fmt: skip
    task = subject.task
    meta = sequences.metadata()
    packed = [pack(b, reads[b.name], sequences, subject.width(b, sequences)) for b in task.reads]
    outputs = [empty(b, sequences, subject.width(b, sequences)) for b in task.writes]
    return Case(
        name=name,
        dtypes=("int32",) * len(meta) + tuple(b.dtype for b in (*task.reads, *task.writes)),
        inputs=(*meta, *packed),
        outputs=tuple(outputs),
        expected=tuple(expected),
    )
