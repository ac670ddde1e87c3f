"""Score a tile of query rows against a chunk of keys: products, into shared memory as float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.launch import Place
from sparsegen.codegen.gpu.mma import UNIT, Fragments, Panel
from sparsegen.codegen.gpu.tiles import Loader, Locate
from sparsegen.codegen.tvm import Memory, T, load, scratch, store
from sparsegen.lowering.tasks import SelectTask


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut.

    tokens, heads  rows of a tile: `tokens` by `heads`
    keys           keys of a chunk, a multiple of 16
    threads        of a block
    """

    tokens: int
    heads: int
    keys: int
    threads: int

    @property
    def rows(self) -> int:
        """Return the rows of a tile, rounded up to whole fragments."""
        return -(-self.tokens * self.heads // 16) * 16

    @property
    def pitch(self) -> int:
        """Return the elements of a row of scores: odd, for rows and columns are read."""
        return self.keys + 1


def operand_type(task: SelectTask) -> str | None:
    """Return the 16-bit type that tensor cores can multiply without rounding; None without one."""
    parts = (*task.q.parts, *task.k.parts)
    found = {p.buffer.dtype for p in parts}
    exact = len(found) == 1 and all(p.fn is None for p in parts)
    return found.pop() if exact and found <= {"bfloat16", "float16"} else None


class Engine(Protocol):
    """Multiplies queries by keys."""

    def load_queries(self, locate: Locate) -> None:
        """Start to fetch the rows of a tile."""

    def load_keys(self, locate: Locate) -> None:
        """Start to fetch the keys of a chunk."""

    def multiply(self, scores: Memory) -> None:
        """Write the products [row][key], rows `Shape.pitch` apart."""


def engine_of(task: SelectTask) -> type[TensorCores] | type[CudaCores]:
    """Return what multiplies the operands of a task with float32 accuracy."""
    return CudaCores if operand_type(task) is None else TensorCores


class TensorCores:
    """Products of 16-bit numbers by mma.sync."""

    def __init__(
        self, task: SelectTask, shape: Shape, arguments: Arguments, place: Place, pool: Any
    ) -> None:
        found = operand_type(task)
        assert found is not None
        self.task, self.shape, self.place, self.dtype = task, shape, place, found
        self.deep = -(-task.q.dim // 16) * 16
        # An odd number of units, as what permutes them takes registers: threads have few.
        pitch = self.deep + UNIT
        self.queries = Panel(pool.alloc((shape.rows * pitch,), found, align=128), pitch)
        self.keys = Panel(pool.alloc((shape.keys * pitch,), found, align=128), pitch)
        self.loader = Loader(arguments, place.thread, shape.threads, found)
        self.row_warps = shape.rows // 16
        self.key_warps = min(shape.threads // 32 // self.row_warps, shape.keys // 16)
        self.width = -(-shape.keys // self.key_warps // 16) * 16
        self.acc = scratch(self.width // 2, "float32")
        self.a, self.b = scratch(4, "uint32"), scratch(4, "uint32")

    @staticmethod
    def bytes(task: SelectTask, shape: Shape) -> int:
        """Return the shared memory it takes."""
        return 2 * (shape.rows + shape.keys) * (-(-task.q.dim // 16) * 16 + UNIT)

    def clear(self) -> None:
        """Make zeros of what no operand fills: columns beside them."""
        self.loader.zero(self.queries, self.shape.rows * self.queries.pitch)
        self.loader.zero(self.keys, self.shape.keys * self.keys.pitch)

    def load_queries(self, locate: Locate) -> None:
        """Start to fetch the rows of a tile."""
        self.loader.fill(self.queries, self.shape.rows, self.task.q, locate)

    def load_keys(self, locate: Locate) -> None:
        """Start to fetch the keys of a chunk."""
        self.loader.fill(self.keys, self.shape.keys, self.task.k, locate)

    def multiply(self, scores: Memory) -> None:
        """Write the products [row][key]."""
        lane, warp = self.place.lane, self.place.warp
        row = T.bind(warp % self.row_warps * 16)
        first = T.bind(warp // self.row_warps * self.width)
        with T.If(first < self.shape.keys), T.Then():
            mma.clear(self.acc, self.width // 2)
            queries = Fragments(self.queries, lane, row)
            keys = Fragments(self.keys, lane, first, beside=True)
            a_row, b_row = queries.origin(), keys.origin()
            for k in range(self.deep // 16):
                queries.read(a_row, 0, k * 16, self.a)
                a = [self.a[n] for n in range(4)]
                for n in range(self.width // 16):
                    keys.read(b_row, n * 16, k * 16, self.b)
                    for half in range(2):
                        low, high = self.b[2 * half], self.b[2 * half + 1]
                        mma.multiply(self.acc, n * 8 + half * 4, a, low, high, self.dtype)
            with T.unroll(self.width // 8) as n, T.unroll(2) as half, T.unroll(2) as c:
                r = row + lane // 4 + 8 * half
                to = r * self.shape.pitch + (first + n * 8 + lane % 4 * 2 + c)
                store(scores, load(self.acc, n * 4 + 2 * half + c), to)


class CudaCores:
    """Products of float32 numbers: each thread keeps a square of them in registers."""

    def __init__(
        self, task: SelectTask, shape: Shape, arguments: Arguments, place: Place, pool: Any
    ) -> None:
        self.task, self.shape, self.place = task, shape, place
        pitch = self._pitch(task)
        self.queries = Panel(pool.alloc((shape.rows * pitch,), "float32", align=16), pitch)
        self.keys = Panel(pool.alloc((shape.keys * pitch,), "float32", align=16), pitch)
        self.loader = Loader(arguments, place.thread, shape.threads, "float32")
        # 16 threads beside each other along the keys; the others along the rows.
        self.along = min(shape.threads // 16, shape.rows)
        self.tall, self.wide = shape.rows // self.along, shape.keys // 16
        self.acc = scratch(self.tall * self.wide, "float32")

    @staticmethod
    def _pitch(task: SelectTask) -> int:
        return task.q.dim // 2 * 2 + 1

    @staticmethod
    def bytes(task: SelectTask, shape: Shape) -> int:
        """Return the shared memory it takes."""
        return 4 * (shape.rows + shape.keys) * CudaCores._pitch(task)

    def clear(self) -> None:
        """Do nothing: all that is read is filled."""

    def load_queries(self, locate: Locate) -> None:
        """Start to fetch the rows of a tile."""
        self.loader.fill(self.queries, self.shape.rows, self.task.q, locate)

    def load_keys(self, locate: Locate) -> None:
        """Start to fetch the keys of a chunk."""
        self.loader.fill(self.keys, self.shape.keys, self.task.k, locate)

    def multiply(self, scores: Memory) -> None:
        """Write the products [row][key]."""
        thread, shape = self.place.thread, self.shape
        row, key = T.bind(thread // 16), T.bind(thread % 16)
        with T.If(row < self.along), T.Then():
            mma.clear(self.acc, self.tall * self.wide)
            with T.serial(self.task.q.dim) as d:
                q = [
                    T.bind(
                        load(self.queries.memory, (row + r * self.along) * self.queries.pitch + d)
                    )
                    for r in range(self.tall)
                ]
                for c in range(self.wide):
                    at = (key + c * 16) * self.keys.pitch + d
                    k = T.bind(load(self.keys.memory, at))
                    for r in range(self.tall):
                        n = r * self.wide + c
                        store(self.acc, load(self.acc, n) + q[r] * k, n)
            for r in range(self.tall):
                for c in range(self.wide):
                    to = (row + r * self.along) * shape.pitch + (key + c * 16)
                    store(scores, load(self.acc, r * self.wide + c), to)
