"""Emit a projection on mma.sync: tiles of rows by columns of a head, depths in a ring of chunks."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_sequence
from sparsegen.codegen.cpu.stream import pin
from sparsegen.codegen.cpu.vec import store_f32
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.launch import launch, sync
from sparsegen.codegen.gpu.mma import UNIT, Fragments, Panel, ptx
from sparsegen.codegen.tvm import T, Value, cast, const, load, minimum, scratch, select
from sparsegen.lowering.tasks import Part, ProjectTask, Rows

THREADS = 128
ROWS, COLUMNS, DEPTH = 128, 64, 64  # of a tile, and of a chunk
_WARP_ROWS = ROWS // 4


@dataclass(frozen=True)
class Field:
    """A part of the rows that are projected: its depths, and its chunks among all."""

    part: Part
    first: int
    chunks: range


def fields_of(task: ProjectTask) -> list[Field]:
    """Return the parts of the rows, in order."""
    found, first, chunk = [], 0, 0
    for part in task.x.parts:
        count = -(-part.size // DEPTH)
        found.append(Field(part, first, range(chunk, chunk + count)))
        first, chunk = first + part.size, chunk + count
    return found


def shared_bytes(stages: int) -> int:
    """Return the shared memory a block takes."""
    return 2 * stages * (ROWS + COLUMNS) * DEPTH


class Projection:
    """Emits the function of one task into the current builder frame."""

    def __init__(self, task: ProjectTask, stages: int, arguments: Arguments) -> None:
        self.task, self.stages, self.arguments = task, stages, arguments
        self.dtype, self.fields = task.w.dtype, fields_of(task)
        self.chunks = self.fields[-1].chunks.stop
        self.heads, self.columns = task.out.shape

    def emit(self) -> None:
        """Emit the launch and the body."""
        across = -(-self.columns // COLUMNS)
        rows = self.arguments[self.task.out].rows
        tiles = T.bind((rows + (ROWS - 1)) // ROWS)
        place = launch(tiles * (self.heads * across), THREADS)
        self.thread, self.lane = place.thread, place.lane
        first = T.bind(place.block // (self.heads * across) * ROWS)
        self.head = T.bind(place.block // across % self.heads)
        self.column = T.bind(cast(place.block % across, "int32") * COLUMNS)
        self.present = T.bind(cast(minimum(rows - first, const(ROWS, "int64")), "int32"))
        self.row = first
        pool = T.SMEMPool()
        self.x = Panel(pool.alloc((self.stages * ROWS * DEPTH,), self.dtype, align=128), DEPTH)
        size = self.stages * COLUMNS * DEPTH
        pitch = DEPTH if self.task.transposed else COLUMNS
        self.w = Panel(pool.alloc((size,), self.dtype, align=128), pitch)
        pool.commit()
        self.acc = scratch(_WARP_ROWS * COLUMNS // 32, "float32")
        self.a, self.b = scratch(4, "uint32"), scratch(4, "uint32")
        mma.clear(self.acc, _WARP_ROWS * COLUMNS // 32)
        with T.If(self.present > 0), T.Then():
            self._run(place.warp)

    def _run(self, warp: Value) -> None:
        self.rows = self._source_rows()
        side = {"transposed": True} if not self.task.transposed else {"beside": True}
        x = Fragments(self.x, self.lane, pin(warp * _WARP_ROWS))
        w = Fragments(self.w, self.lane, **side)
        for chunk in range(self.stages - 1):
            if chunk < self.chunks:
                self._load(const(chunk, "int32"))
            ptx("cp.async.commit_group")
        with T.serial(self.chunks) as chunk:
            later = T.bind(chunk + (self.stages - 1))
            with T.If(later < self.chunks), T.Then():
                self._load(later)
            ptx("cp.async.commit_group")
            ptx("cp.async.wait_group", self.stages - 1)
            sync()
            stage = T.bind(chunk % self.stages)
            self._multiply(x, w, stage)
            sync()
        self._write(warp)

    def _source_rows(self) -> dict[bool, list[Value]]:
        """Return the rows that this thread copies from, of buffers in pages and of others."""
        found: dict[bool, list[Value]] = {}
        for field in self.fields:
            rows = field.part.buffer.rows
            if rows.paged not in found:
                found[rows.paged] = [
                    self._source_row(rows, n) for n in range(ROWS * UNIT // THREADS)
                ]
        return found

    def _source_row(self, rows: Rows, n: int) -> Value:
        local = minimum(self.thread // UNIT + n * (THREADS // UNIT), self.present - 1)
        row = pin(self.row + cast(local, "int64"))
        if not rows.paged:
            return row
        ends = self.arguments.cu_k
        number = find_sequence(self.arguments, lambda b: cast(load(ends, b), "int64"), row)
        sequence = Sequence.at(self.arguments, number)
        # Rows behind the last sequence stand for no key, and are computed from its first one.
        local = T.bind(row - sequence.k_start)
        inside = T.bind(select(local < cast(sequence.n_k, "int64"), local, const(0, "int64")))
        return pin(sequence.row(rows, cast(inside, "int32")))

    def _load(self, chunk: Value) -> None:
        """Start to copy a chunk of the rows and of the weight."""
        stage = T.bind(chunk % self.stages)
        for field in self.fields:
            inside = T.And(chunk >= field.chunks.start, chunk < field.chunks.stop)
            with T.If(inside), T.Then():
                depth = T.bind((chunk - field.chunks.start) * DEPTH)
                self._load_rows(field, depth, stage)
                self._load_weight(field, depth, stage)

    def _load_rows(self, field: Field, depth: Value, stage: Value) -> None:
        part, panel = field.part, self.x.at(stage * (ROWS * DEPTH))
        heads, dim = part.buffer.shape[-2:]
        flat = self.arguments[part.buffer].flat
        column = T.bind(self.thread % UNIT * UNIT)
        near = T.bind(minimum(depth + column, const(part.size - UNIT, "int32")))
        there = T.bind(depth + column < part.size)
        for n, row in enumerate(self.rows[part.buffer.rows.paged]):
            base = row * heads + self.head if heads > 1 else row
            source = flat.ptr_to([base * dim + cast(near + part.start, "int64")])
            to = panel.pointer(self.thread // UNIT + n * (THREADS // UNIT), column)
            mma.copy_16_bytes(to, source, there)

    def _load_weight(self, field: Field, depth: Value, stage: Value) -> None:
        task, panel = self.task, self.w.at(stage * (COLUMNS * DEPTH))
        flat, (outer, inner) = self.arguments[task.w].flat, task.w.shape[-2:]
        base = self.head * (outer * inner) if len(task.w.shape) == 3 else const(0, "int64")
        unit = T.bind(self.thread % UNIT * UNIT)
        for n in range(COLUMNS * UNIT // THREADS):
            line = T.bind(self.thread // UNIT + n * (THREADS // UNIT))
            k, column = (unit, line) if task.transposed else (line, unit)
            there = T.And(depth + k < field.part.size, self.column + column < self.columns)
            # Units start at multiples of 8, and so do the ends of what they are read from.
            k = minimum(
                depth + k, const(field.part.size - (UNIT if task.transposed else 1), "int32")
            )
            last = self.columns - (1 if task.transposed else UNIT)
            column = minimum(self.column + column, const(last, "int32"))
            where = (column, k + field.first) if task.transposed else (k + field.first, column)
            source = flat.ptr_to([base + cast(where[0] * inner + where[1], "int64")])
            mma.copy_16_bytes(panel.pointer(line, unit), source, T.bind(there))

    def _multiply(self, x: Fragments, w: Fragments, stage: Value) -> None:
        rows, weight = x.origin(stage * (ROWS * DEPTH)), w.origin(stage * (COLUMNS * DEPTH))
        for k in range(0, DEPTH, 16):
            for r in range(0, _WARP_ROWS, 16):
                x.read(rows, r, k, self.a)
                a = [self.a[n] for n in range(4)]
                for c in range(0, COLUMNS, 16):
                    where = (c, k) if self.task.transposed else (k, c)
                    w.read(weight, *where, self.b)
                    for half in range(2):
                        at = (r // 16 * (COLUMNS // 8) + c // 8 + half) * 4
                        low, high = self.b[2 * half], self.b[2 * half + 1]
                        mma.multiply(self.acc, at, a, low, high, self.dtype)

    def _write(self, warp: Value) -> None:
        out = self.task.out
        flat = self.arguments[out].flat

        for r in range(0, _WARP_ROWS, 8):
            row = T.bind(warp * _WARP_ROWS + (r + self.lane // 4))
            with T.If(row < self.present), T.Then():
                whole = (self.row + cast(row, "int64")) * self.heads + self.head
                for c in range(COLUMNS // 8):
                    at = (r // 16 * (COLUMNS // 8) + c) * 4 + r // 8 % 2 * 2
                    column = T.bind(self.column + (8 * c + self.lane % 4 * 2))
                    with T.If(column < self.columns), T.Then():
                        to = T.bind(whole * self.columns + cast(column, "int64"))
                        for n in range(2):
                            store_f32(flat, out.dtype, load(self.acc, at + n), to + n)
