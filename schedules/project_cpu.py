"""Multiply by a weight on CPUs: tiles in registers for many rows, streamed weights for few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu import gemm
from sparsegen.codegen.cpu.nest import Nest, whole, workspace
from sparsegen.codegen.cpu.operands import fields
from sparsegen.codegen.cpu.rows import Arguments, Sequence, declare, find_sequence
from sparsegen.codegen.cpu.vec import float_lanes, load_f32, store_f32
from sparsegen.codegen.tvm import I, IRBuilder, Memory, T, Value, cast, const, load, minimum, store
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import ProjectTask

FAMILY = "project"
REQUIRES = frozenset({"cpu"})
PRIORITY = 0


@dataclass(frozen=True)
class Knobs:
    """Tile sizes; see `gemm.Tiling`. `panel` counts columns, `pack` copies every weight."""

    rows: int = 3
    vectors: int = 4
    chunk: int = 96
    panel: int = 512
    stream: int = 12
    group: int = 4
    pack: bool = False


def accepts(task: ProjectTask, arch: Arch) -> str | None:
    """Return None: every shape, layout and dtype is possible."""
    return None


def apply(task: ProjectTask, knobs: Knobs, arch: Arch) -> Any:
    """for rows, head, panel: pack rows; (pack weights; tiles) or stream  ->  one parallel loop"""
    nest = Nest()
    with IRBuilder() as builder, I.ir_module(), T.prim_func(s_tir=True):
        _Projection(task, knobs, arch, nest, declare(task)).emit()
    return nest.schedule(builder.get(), task.name)


@dataclass(frozen=True)
class _Projection:
    task: ProjectTask
    knobs: Knobs
    arch: Arch
    nest: Nest
    arguments: Arguments

    def emit(self) -> None:
        task, tiling = self.task, tiling_of(self.task, self.knobs, self.arch)
        heads, columns = task.out.shape
        # Heads that share the weight are as many rows more.
        per_row, weights = (heads, 1) if len(task.w.shape) == 2 else (1, heads)
        panels = tiling.panels(columns)
        count = self.arguments[task.out].rows * per_row
        jobs = (count + (tiling.chunk - 1)) // tiling.chunk * (weights * panels)
        with self.nest.jobs(task, self.arguments, jobs) as v:
            panel, weight = T.bind(v % panels), T.bind(v // panels % weights)
            first = T.bind(v // (panels * weights) * tiling.chunk)
            rows = T.bind(minimum(count - first, const(tiling.chunk, "int64")))
            x = self._packed(tiling, first, rows, per_row, weight)
            out = self.arguments[task.out]

            def result(m: Value, column: Value, value: Value) -> None:
                row = (first + m) * weights + weight
                store_f32(out.flat, task.out.dtype, value, row * columns + column)

            gemm.Gemm(
                nest=self.nest, tiling=tiling, total=task.x.dim, columns=columns, x=x,
                weight=lambda k, c, lanes: self._weight(weight, k, c, lanes),
                transposed=task.transposed, result=result,
            ).emit(rows, panel)  # fmt: skip

    def _weight(self, head: Value, k: Value, column: Value, lanes: int) -> Value:
        w = self.task.w
        outer, inner = w.shape[-2:]
        row, element = (column, k) if self.task.transposed else (k, column)
        offset = (head * outer + row) * inner + element
        return load_f32(self.arguments[w].flat, w.dtype, offset, lanes=lanes)

    def _packed(
        self, tiling: gemm.Tiling, first: Value, rows: Value, per_row: int, head: Value
    ) -> Memory:
        """Copy the rows of a job as float32, parts side by side."""
        task = self.task
        packed = workspace((tiling.chunk, task.x.dim))
        where = self._physical(tiling, first, rows, per_row)
        for n, field in enumerate(fields(self.arguments, task.x)):
            paged = field.part.buffer.rows.paged
            with self.nest.block(f"x{n}", rows, field.part.size) as (m, k):
                row = load(where, m) if paged else (first + m) // per_row
                h = (first + m) % per_row if per_row > 1 else head
                store(packed, field.read(row, h, k + field.first), m, k + field.first)
            self.nest.vectorize(f"x{n}", field.part.size, tiling.lanes)
        return packed

    def _physical(
        self, tiling: gemm.Tiling, first: Value, rows: Value, per_row: int
    ) -> Memory | None:
        """Look up the rows of paged parts; the others are packed as the output is."""
        paged = [p.buffer.rows for p in self.task.x.parts if p.buffer.rows.paged]
        if not paged:
            return None
        where = workspace((tiling.chunk,), "int64")
        cu = self.arguments.cu_k
        with self.nest.block("locate", rows) as (m,):
            # Said here, because TVM would also find the variables of the search, which live inside.
            T.reads(*map(whole, (cu, self.arguments.cu_q, self.arguments.pages)))
            T.writes(where[m])
            row = (first + m) // per_row
            number = find_sequence(self.arguments, lambda b: cast(load(cu, b), "int64"), row)
            sequence = Sequence.at(self.arguments, number)
            store(where, sequence.row(paged[0], cast(row - sequence.k_start, "int32")), m)
        return where


def tiling_of(task: ProjectTask, knobs: Knobs, arch: Arch) -> gemm.Tiling:
    """Return the tiling for these knobs."""
    lanes = float_lanes(arch)
    pack = knobs.pack or task.transposed
    return gemm.Tiling(
        lanes=lanes, rows=knobs.rows, vectors=knobs.vectors, chunk=knobs.chunk,
        strips=max(1, knobs.panel // (lanes * knobs.vectors)), stream=knobs.stream,
        group=knobs.group, depth=task.x.dim, pack=pack,
    )  # fmt: skip


def default(task: ProjectTask, arch: Arch) -> Knobs:
    """Return tiles that fill the registers, and panels that stay in the second-level cache."""
    wide = Knobs()
    return wide if _vectors(wide) <= arch.vector_registers else replace(wide, rows=6, vectors=2)


def _vectors(knobs: Knobs) -> int:
    """Return how many a tile needs at a time: sums, elements of a weight, and one of a row."""
    return knobs.rows * knobs.vectors + knobs.vectors + 1


def space(task: ProjectTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    """Yield candidates, the default first."""
    first = default(task, arch)
    yield first
    for rows, vectors in ((3, 4), (6, 2), (4, 4), (7, 4)):
        for chunk in (24, 96):
            knobs = replace(first, rows=rows, vectors=vectors, chunk=chunk // rows * rows)
            used = _vectors(knobs)
            if used > arch.vector_registers:
                reason = f"{used} vectors in use, {arch.vector_registers} registers"
                yield Rejected(asdict(knobs), reason)
            elif knobs != first:
                yield knobs
