"""Score one query token against a list of keys: heads in SIMD lanes, keys broadcast from memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.cpu.operands import fields
from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.cpu.vec import accumulators, load_f32, spread
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import Memory, T, Value, broadcast, cast, const, load, minimum, store
from sparsegen.lowering.tasks import Operand

Sink = Callable[[Value, int, list[Value]], None]
"""Takes a slot (int32), the first vector of the lanes at hand, and their dot products."""


@dataclass(frozen=True)
class Lanes:
    """`heads` query heads in `vectors` vectors of `width` lanes; lanes beyond them are zero.

    keys  keys of a register tile
    """

    heads: int
    width: int
    keys: int

    @property
    def vectors(self) -> int:
        """Return how many vectors hold the heads."""
        return -(-self.heads // self.width)

    @property
    def padded(self) -> int:
        """Return the lanes of all vectors."""
        return self.vectors * self.width


def load_query(
    arguments: Arguments, q: Operand, lanes: Lanes, row: Value, head: Value, valid: Value
) -> Memory:
    """Return the query of `valid` heads (int32) from `head` (int64) on, as [dim][lane]."""
    memory = T.alloc_buffer((q.dim * lanes.padded,), "float32")
    for field in fields(arguments, q):
        with T.serial(field.part.size) as d, T.serial(lanes.padded) as lane:
            at = (d + field.first) * lanes.padded + lane
            with T.If(lane < valid):
                with T.Then():
                    h = head + cast(lane, "int64")
                    store(memory, field.read(row, h, cast(d, "int64") + field.first), at)
                with T.Else():
                    store(memory, const(0.0, "float32"), at)
    return memory


def score(
    arguments: Arguments,
    sequence: Sequence,
    k: Operand,
    lanes: Lanes,
    query: Memory,
    positions: Memory,
    count: Value,
    head: Value,
    sink: Sink,
) -> None:
    """Call `sink` with q . k of every lane, for each of `count` (int32) > 0 positions.

    Args:
        head: of the keys, int64.
    """
    keys = lanes.keys
    step = min(lanes.vectors, 4)
    for first in range(0, lanes.vectors, step):
        vectors = min(step, lanes.vectors - first)
        with T.serial((count + (keys - 1)) // keys) as tile:
            sums = accumulators(keys * vectors, lanes.width)
            for total in sums:
                store(total, const(0.0, "float32", lanes.width), 0)
            slots = [T.bind(minimum(tile * keys + r, count - 1)) for r in range(keys)]
            at = 0
            for part in k.parts:
                heads, dim = part.buffer.shape[-2:]
                flat = arguments[part.buffer].flat
                bases = []
                for slot in slots:
                    row = sequence.row(part.buffer.rows, load(positions, slot))
                    inner = (head if heads > 1 else const(0, "int64")) * dim + part.start
                    bases.append(T.bind(row * (heads * dim) + inner))
                with T.serial(part.size) as d:
                    element = (d + at) * lanes.padded + first * lanes.width
                    qs = [
                        T.bind(load(query, element + v * lanes.width, lanes=lanes.width))
                        for v in range(vectors)
                    ]
                    for r, base in enumerate(bases):
                        x = load_f32(flat, part.buffer.dtype, base + cast(d, "int64"))
                        if part.fn is not None:
                            x = emit(part.fn, Env(symbols={"x": T.bind(x)}))
                        wide = T.bind(broadcast(x, lanes.width))
                        for v, qv in enumerate(qs):
                            total = sums[r * vectors + v]
                            store(total, load(total, 0, lanes=lanes.width) + qv * wide, 0)
                at += part.size
            for r in range(keys):
                slot = T.bind(tile * keys + r)
                with T.If(slot < count), T.Then():
                    found = [
                        T.bind(load(sums[r * vectors + v], 0, lanes=lanes.width))
                        for v in range(vectors)
                    ]
                    sink(slot, first, found)


def softmax(lanes: Lanes, scores: Memory, count: Value, exp: Callable[[Value], Value]) -> None:
    """Normalise [count][lane] scores over the slots, lane by lane."""
    width = lanes.width
    for v in range(lanes.vectors):
        top, total = accumulators(2, width)
        store(top, const(-1e30, "float32", width), 0)
        store(total, const(0.0, "float32", width), 0)
        with T.serial(count) as slot:
            x = load(scores, _at(lanes, slot, v), lanes=width)
            store(top, T.max(load(top, 0, lanes=width), x), 0)
        with T.serial(count) as slot:
            x = load(scores, _at(lanes, slot, v), lanes=width)
            p = T.bind(exp(x - load(top, 0, lanes=width)))
            store(scores, p, _at(lanes, slot, v))
            store(total, load(total, 0, lanes=width) + p, 0)
        rate = T.bind(spread(const(1.0, "float32"), width) / load(total, 0, lanes=width))
        with T.serial(count) as slot:
            x = load(scores, _at(lanes, slot, v), lanes=width)
            store(scores, x * rate, _at(lanes, slot, v))


def _at(lanes: Lanes, slot: Value, vector: int) -> Value:
    return cast(slot, "int64") * lanes.padded + vector * lanes.width
