"""Emit the kernel of a select task: blocks that take items in turn, each with memory of its own.

for each item: a tile of queries with a list each, a block of queries that share one, or a sequence
    for each tile of its queries, for each part of its heads
        scores, then their groups                      (score, select_pass)
        groups of the first reduction, once complete, into those of the second
    for each list: choose                              (topk)

Scores of one chunk of keys are in shared memory at a time; what a block keeps in global memory is a
row of groups per query of a tile and reduction, however many queries there are.
"""

from __future__ import annotations

from sparsegen.codegen.cpu.reduction import ABSENT
from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.scatter import blocks_of, share_of
from sparsegen.codegen.cpu.select_task import granule, is_slash
from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.cpu.topk import FORCED, NEVER, rank_of
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.gpu.block import Block, divided
from sparsegen.codegen.gpu.groups import Groups, gather, reducer_of
from sparsegen.codegen.gpu.launch import FUNCTIONS, Place, launch, sync
from sparsegen.codegen.gpu.score import Shape, engine_of
from sparsegen.codegen.gpu.select_pass import SelectPass
from sparsegen.codegen.gpu.topk import BINS, Chooser, Ranks
from sparsegen.codegen.selecting import Item, Selecting
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    equal,
    load,
    maximum,
    minimum,
    select,
)
from sparsegen.ir.expr import BlockOf, Const, Expr, Role, Stop, apply, walk
from sparsegen.lowering.tasks import Buffer, SelectTask, Stage

RESIDENT = 2  # blocks of a multiprocessor


def shared_bytes(task: SelectTask, shape: Shape) -> int:
    """Return the shared memory a block takes, some padding included."""
    scores = 4 * (shape.rows * shape.pitch + shape.keys + 3 * shape.rows + BINS)
    return engine_of(task).bytes(task, shape) + scores + Block.bytes(shape.threads) + 128


def memory_of(task: SelectTask, shape: Shape, blocks: int) -> tuple[Buffer, Expr]:
    """Return the memory of `blocks` blocks: float32 [blocks, elements], and how many elements."""
    kernel = Selecting(task, shape.tokens)
    total: Expr = Const(0)
    for rows, stage in kernel.stage_rows():
        wide = apply(
            "mul", _longest(kernel, stage.keys[-1]), Const(rows * reducer_of(stage.how).planes)
        )
        total = apply("add", total, wide)
    if task.top_p is not None:
        total = apply("add", total, _longest(kernel, kernel.facts.stages[-1].keys[-1]))
    return Buffer(name=f"{task.name}_groups", dtype="float32", shape=(blocks, -1)), total


def _longest(kernel: Selecting, key: Expr) -> Expr:
    """Return the most values a last key takes in a sequence, over its stops."""
    task = kernel.task

    def stop(role: Role) -> Expr:
        axis = next(e.axis for e in walk(task.last) if isinstance(e, Stop))
        rows = task.q.rows if role == "query" else task.k.rows
        entries = rows.entries if rows.space == "entry" else None
        return Stop(role, entries or axis)

    if is_slash(key):
        return stop("query")
    if isinstance(key, BlockOf):
        whole: Expr = Stop("key", key.axis.parent)
        n, shift = key.width, 0
    else:
        found = granule(key)
        assert found is not None
        whole, (n, shift) = stop("key"), found
    return apply("floordiv", apply("add", whole, Const(shift + n - 1)), Const(n))


class SelectKernel(Selecting):
    """Emits the function of one task into the current builder frame."""

    def __init__(
        self, task: SelectTask, shape: Shape, arguments: Arguments, memory: Buffer
    ) -> None:
        super().__init__(task, shape.tokens, FUNCTIONS)
        self.shape, self.arguments, self.memory = shape, arguments, memory

    def emit(self) -> None:
        """Emit the launch and the loop over items."""
        task, shape = self.task, self.shape
        rows = self.arguments[task.q.parts[0].buffer].rows
        count = self.arguments.batch
        if self.facts.block == 1:
            count = rows // shape.tokens + count
        elif self.facts.block:
            count = rows // self.facts.block + 2 * count
        items = T.bind(count * self.groups)
        T.device_entry()
        # Else the compiler spares registers for blocks that are never there.
        with T.attr({"tirx.launch_bounds_min_blocks_per_sm": RESIDENT}):
            self._emit(items)

    def _emit(self, items: Value) -> None:
        blocks = self.memory.shape[0]
        place = launch(minimum(items, const(blocks, "int64")), self.shape.threads, entered=True)
        self._allocate(place)
        width = self.arguments[self.memory].shape[-1]
        self.base = T.bind(place.block * width)
        at = cell("int64", place.block)
        with T.While(get(at) < items):
            # Causal work grows with the position: the longest items come first.
            index = T.bind(items - 1 - get(at))
            group = T.bind(cast(index % self.groups, "int32"))
            self.item(T.bind(index // self.groups), group, self._make)
            put(at, get(at) + blocks)

    def _allocate(self, place: Place) -> None:
        task, shape = self.task, self.shape
        pool = T.SMEMPool()
        self.block = Block.allocate(place, shape.threads, pool)
        self.engine = engine_of(task)(task, shape, self.arguments, place, pool)
        self.scores = pool.alloc((shape.rows * shape.pitch,), "float32", align=16)
        self.position = pool.alloc((shape.keys,), "int32", align=16)
        self.factors = pool.alloc((shape.rows,), "float32", align=16)
        self.tops = pool.alloc((shape.rows,), "float32", align=16)
        self.totals = pool.alloc((shape.rows,), "float32", align=16)
        self.chooser = Chooser(self.block, pool.alloc((BINS,), "int32", align=16))
        pool.commit()
        self.engine.clear()

    # --- one item -------------------------------------------------------------------------------

    def _make(self, item: Item) -> None:
        facts = self.facts
        flat = self.arguments[self.memory].flat
        base, rows = self.base, []
        for count, stage in self.stage_rows():
            length = maximum(self.length(stage.keys[-1], item.sequence), const(0, "int32"))
            found = Groups(reducer_of(stage.how), flat, base, count, T.bind(cast(length, "int64")))
            base = T.bind(base + found.size)
            rows.append(found)
        sync()  # the item before may still be read
        for groups in rows:
            groups.clear(self.block)
        first, last = rows[0], rows[-1]
        self.tiles(
            item,
            lambda start, count: self._tile(item, start, count, first),
            lambda start: self._flush(item, first, last),
        )
        last.finish(self.block, softmax=facts.stages[-1].norm)
        self._choose(item, last, base)

    def _tile(self, item: Item, first: Value, count: Value, into: Groups) -> None:
        """Score a tile of queries, part by part of the heads of the lists."""
        heads = self.shape.heads
        with T.serial(-(-self.facts.heads // heads)) as part:
            # The last group of heads may be smaller than the others.
            head = T.bind(item.group * self.facts.heads + part * heads)
            with T.If(head < self.task.q.heads), T.Then():
                SelectPass(self, item, first=first, count=count, part=part, into=into).run()

    def _flush(self, item: Item, groups: Groups, last: Groups) -> None:
        """Reduce the groups of the first stage again, and forget them."""
        inner, outer = self.facts.stages
        groups.finish(self.block, softmax=inner.norm)
        lane = self.block.place.lane
        per_list = self.facts.head_rows if self.facts.block == 1 else groups.rows
        with self.block.each(last.length * last.rows, lanes=32) as n:
            row, to = divided(n, last.length)
            to = pin(cast(to, "int32"))
            begin, end = self._inner(inner, outer.keys[-1], to)
            begin = pin(maximum(begin, const(0, "int32")))
            length = cast(groups.length, "int32")
            size = pin(maximum(minimum(end, length) - begin, const(0, "int32")))

            def element(m: Value) -> Value:
                which, at = divided(m, size)
                at = T.bind(begin + at)
                value = T.bind(groups.read(T.bind(row * per_list + which), at))
                return self._regrouped(item, inner, outer, at, to, value)

            state = gather(last.reducer, T.bind(size * per_list), element, lane, 32)
            with T.If(equal(lane, const(0, "int32"))), T.Then():
                last.add(row, to, state)
        sync()
        groups.clear(self.block)

    def _inner(self, inner: Stage, key: Expr, to: Value) -> tuple[Value, Value]:
        """Return groups begin <= x < end of the first reduction among which are those of `to`."""
        found = granule(inner.keys[-1])
        if found is None:  # a distance, which only itself is a function of
            return to, to + 1
        n, shift = found
        if isinstance(key, BlockOf):
            first, after = to * key.width, (to + 1) * key.width
            stride, width = key.axis.stride, key.axis.width
            return (first - width) // stride + 1, (after + (stride - 1)) // stride
        outer = granule(key)
        assert outer is not None
        m, c = outer
        return (to * m - c + shift) // n - 1, ((to + 1) * m - c + shift) // n + 2

    def _regrouped(
        self, item: Item, inner: Stage, outer: Stage, at: Value, to: Value, value: Value
    ) -> Value:
        """Return a result of the first reduction as group `to` of the second sees it."""
        key, found = outer.keys[-1], granule(inner.keys[-1])
        if found is None:
            return value
        n, shift = found
        place = T.bind(maximum(at * n - shift, const(0, "int32")))
        if isinstance(key, BlockOf):
            low, high = blocks_of(key, place)
            ours = T.And(to >= low, to <= high)
            share = share_of(key, reducer_of(outer.how), place, to, item.sequence.n_k)
            value = value if share is None else T.bind(value * share)
        else:
            ours = equal(emit(key, Env(key=place)), to)
        return T.bind(select(ours, value, const(ABSENT, "float32")))

    # --- lists ----------------------------------------------------------------------------------

    def _choose(self, item: Item, last: Groups, free: Value) -> None:
        task, out = self.task, self.arguments[self.task.out]
        extent = out.shape[-1]
        width = const(extent, "int64") if isinstance(extent, int) else extent
        lists = item.stop - item.first if self.facts.block == 1 else const(1, "int32")
        with T.serial(lists) as n:
            start = T.bind(last.at(n, const(0, "int64")))
            # Ranks replace the scores, unless these are needed again.
            base = start if task.top_p is None else free
            ranks = Ranks(last.flat, base, last.length)
            keys = self.list_keys(item, n)
            sync()
            self._rank(item, last.flat, start, ranks, keys)
            sync()
            count = cell("int32", self.chooser.valid(ranks))
            if task.top_p is not None:
                put(
                    count,
                    self.chooser.of_mass(ranks, lambda x: load(last.flat, start + x), task.top_p),
                )
            if task.topk is not None:
                budget = pin(cast(self.value(task.topk, item, keys), "int32"))
                put(count, minimum(get(count), maximum(budget, const(0, "int32"))))
            row = ((item.row + cast(n, "int64")) * self.groups) + cast(item.group, "int64")
            self.chooser.write(ranks, T.bind(get(count)), out.flat, T.bind(row * width), width)

    def _rank(
        self, item: Item, flat: Memory, start: Value, ranks: Ranks, keys: tuple[Value, ...]
    ) -> None:
        """Rank every key of a list: forced ones first, what is short of the threshold never."""
        task = self.task
        with self.block.each(ranks.length) as n:
            score = T.bind(load(flat, start + n))
            rank = rank_of(score)
            if task.threshold is not None:
                enough = score >= const(task.threshold, "float32")
                rank = T.bind(select(enough, rank, const(NEVER, "int32")))
            if task.force is not None:
                forced = self.value(task.force, item, (*keys, T.bind(cast(n, "int32"))))
                rank = T.bind(select(forced, const(FORCED, "int32"), rank))
            ranks.put(n, rank)
