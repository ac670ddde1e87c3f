"""Summarise windows on a CPU: jobs of windows of one head, channels in SIMD lanes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.gemm import Tiling
from sparsegen.codegen.cpu.nest import Nest
from sparsegen.codegen.cpu.pooling import Windows
from sparsegen.codegen.cpu.rows import Arguments, Sequence, declare, find_sequence
from sparsegen.codegen.cpu.vec import float_lanes
from sparsegen.codegen.tvm import I, IRBuilder, T, Value, cast, const, load, maximum, minimum
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import CompressTask

FAMILY = "compress"
REQUIRES = frozenset({"cpu"})
PRIORITY = 0

_ROWS = 3
"""Windows whose products are accumulated at a time."""
_DEPTH = 512
"""Contracted elements of a product at a time, at most: their weights stay in a cache."""


@dataclass(frozen=True)
class Knobs:
    """How windows are cut.

    windows  of a job
    vectors  vectors of channels, or of a product's columns, that are accumulated at a time
    """

    windows: int = 8
    vectors: int = 4


def accepts(task: CompressTask, arch: Arch) -> str | None:
    """Return None: every way of pooling, shape, layout and dtype is possible."""
    return None


def default(task: CompressTask, arch: Arch) -> Knobs:
    """Return enough windows to share one read of a weight matrix, if there is one."""
    if not task.multiplies:
        return Knobs()
    return Knobs(windows=24, vectors=4 if _vectors(4) <= arch.vector_registers else 3)


def _vectors(vectors: int) -> int:
    """Return how many a product needs at a time: sums, elements of a weight, and one of a row."""
    return (_ROWS + 1) * vectors + 1


def space(task: CompressTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for windows in (6, 12, 24, 48) if task.multiplies else (1, 4, 8, 32):
        for vectors in (2, 3, 4, 8):
            knobs = Knobs(windows, vectors)
            used = _vectors(vectors)
            if task.multiplies and used > arch.vector_registers:
                reason = f"{used} vectors in use, {arch.vector_registers} registers"
                yield Rejected(asdict(knobs), reason)
            elif knobs != first:
                yield knobs


def apply(task: CompressTask, knobs: Knobs, arch: Arch) -> Any:
    """for windows, head: pool panels of channels, or multiply  ->  one parallel loop"""
    nest = Nest()
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        _emit(task, knobs, arch, nest, declare(task))
    return nest.schedule(builder.get(), task.name)


def _emit(task: CompressTask, knobs: Knobs, arch: Arch, nest: Nest, arguments: Arguments) -> None:
    heads, lanes = task.out.shape[0], float_lanes(arch)
    cu = arguments.cu_k if task.role == "key" else arguments.cu_q

    def first(number: Value) -> Value:
        start = cast(load(cu, number), "int64")
        return start // (task.entries.stride * knobs.windows) + 2 * number

    with nest.jobs(task, arguments, first(arguments.batch) * heads) as v:
        job = T.bind(v // heads)
        number = find_sequence(arguments, first, job)
        sequence = Sequence.at(arguments, number)
        entry = T.bind((job - first(number)) * knobs.windows)
        left = cast(sequence.count(task.out.rows), "int64") - entry
        zero, most = const(0, "int64"), const(knobs.windows, "int64")
        windows = Windows(
            nest=nest, task=task, arguments=arguments, sequence=sequence, head=T.bind(v % heads),
            entry=entry, count=T.bind(maximum(minimum(left, most), zero)), most=knobs.windows,
        )  # fmt: skip
        if task.multiplies:
            windows.multiply(tiling_of(task, knobs, lanes))
        else:
            windows.pool(lanes, knobs.vectors)


def tiling_of(task: CompressTask, knobs: Knobs, lanes: int) -> Tiling:
    """Return the tiling of a product of windows and a weight."""
    assert task.weight is not None
    width, inner, outer = task.weight.shape
    total = width * inner
    return Tiling(
        lanes=lanes, rows=_ROWS, vectors=knobs.vectors, chunk=knobs.windows,
        strips=max(1, outer // (lanes * knobs.vectors)), stream=_ROWS, group=1,
        depth=max(n for n in range(1, min(total, _DEPTH) + 1) if total % n == 0),
        pack=task.weight.dtype != "float32",
    )  # fmt: skip
