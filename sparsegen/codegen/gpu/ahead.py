"""Ask for keys in L2 one step before they are copied, so that copies wait for no other memory."""

from __future__ import annotations

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu.gather import Gather
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.slots import Slots, page_of, row_of
from sparsegen.codegen.tvm import T, Value, cast, const, maximum, minimum
from sparsegen.lowering.tasks import AttendTask


class Ahead:
    """Brings the rows of the next step into L2 while those of this one are copied.

    A thread cares for `unit` neighbouring keys of a range, or for one slot of lists. What it needs
    to know arrives over two steps: `fetch` reads slots, `resolve` looks pages up, `issue` asks.
    """

    def __init__(self, gather: Gather, slots: Slots, keys: int) -> None:
        self.gather, self.slots, self.keys = gather, slots, keys
        self.kind = gather.source.k.rows
        self.unit = unit_of(gather.task)
        self.raw, self.page = (cell("int32", const(-1, "int32")) for _ in range(2))
        self.key = cell("int32", const(-1, "int32"))

    def fetch(self, start: Value) -> None:
        """Start to read what this thread cares for in the step whose first slot is `start`."""
        put(self.raw, const(-1, "int32"))
        thread = self.gather.thread
        with T.If(thread <= self.keys // self.unit), T.Then():
            if self.unit == 1:
                with T.If(thread < self.keys), T.Then():
                    put(self.raw, self.slots.raw(T.bind(start + thread)))
            else:
                bounds = self.slots.stretches[0].bounds
                begin = T.bind(bounds.lo + start)
                first = T.bind((begin // self.unit + thread) * self.unit)
                first = T.bind(maximum(first, bounds.lo))
                end = minimum(begin + self.keys, bounds.hi)
                with T.If(first < end), T.Then():
                    put(self.raw, first)

    def resolve(self, start: Value) -> None:
        """Start to look pages up."""
        raw = T.bind(get(self.raw))
        key = raw
        if self.unit == 1:
            key = self.slots.key(T.bind(start + self.gather.thread), raw, check=False)
        put(self.key, key)
        if self.kind.paged:
            with T.If(key >= 0), T.Then():
                put(self.page, page_of(self.slots.view.sequence, self.kind, key))

    def issue(self) -> None:
        """Ask for the rows."""
        key = T.bind(get(self.key))
        with T.If(key >= 0), T.Then():
            page = get(self.page) if self.kind.paged else None
            row = T.bind(row_of(self.slots.view.sequence, self.kind, key, page))
            count: Value = const(1, "int32")
            if self.unit > 1:
                end = minimum((key // self.unit + 1) * self.unit, self.slots.stretches[0].bounds.hi)
                count = T.bind(end - key)
            for buffer in {p.buffer.name: p.buffer for p in self.gather.source.k.parts}.values():
                dim = buffer.shape[-1]
                source = self.gather.arguments[buffer].flat.ptr_to([row * dim])
                size = cast(count * (dim * 2), "uint32")
                ptx("cp.async.bulk.prefetch.L2.global", source, size)


def unit_of(task: AttendTask) -> int:
    """Return how many neighbouring keys lie side by side in memory; 1 where lists choose them."""
    (source,) = task.sources
    if len(source.clauses) > 1 or source.clauses[0].keys is not None:
        return 1
    page = source.k.rows.page if source.k.rows.paged else 64
    return max(n for n in range(1, 65) if page % n == 0 and 64 % n == 0)
