"""Emit the kernel of a select task: one list after the other, from scores to indices.

An item is one list: the queries and heads that share its keys. Its scores are reduced token by
token into one row of accumulators per thread, so no more than a few rows of scores exist at a time.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sparsegen.arch import Arch
from sparsegen.codegen.cpu import scores, topk, vec
from sparsegen.codegen.cpu.accumulate import Accumulator
from sparsegen.codegen.cpu.lists import mentions
from sparsegen.codegen.cpu.rows import Sequence, declare, find_sequence, read_table
from sparsegen.codegen.cpu.scores import Lanes
from sparsegen.codegen.cpu.select_keys import Visible
from sparsegen.codegen.cpu.select_task import Item, granule, item_heads, lanes_of_pass
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.exprs import Env, emit
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
    ramp,
    store,
    workspace,
)
from sparsegen.ir.axes import Entries, Named
from sparsegen.ir.expr import (
    Apply,
    BlockOf,
    Const,
    Expr,
    Head,
    Pos,
    walk,
)
from sparsegen.lowering.tasks import SelectTask, Stage


class SelectKernel:
    """Emits the function of one task into the current builder frame."""

    def __init__(self, task: SelectTask, arch: Arch, lanes: Lanes) -> None:
        self.task, self.arch, self.lanes = task, arch, lanes
        self.heads = item_heads(task)
        self.groups = math.prod(task.groups)
        own = Stage(how="sum", keys=task.keys, norm=False)
        self.stages = task.stages or (own,)
        # Head sums of single tokens need no scores in memory at all.
        first = self.stages[0]
        self.summed = (
            first.how == "sum"
            and not task.norm
            and isinstance(first.keys[-1], Pos)
            and not any(mentions(k, Head) for k in first.keys)
            and self.heads == task.q.heads
        )
        self.per_token = task.out.rows.space == "query" or isinstance(self._query_axis(), Entries)

    def _query_axis(self) -> object:
        return self.task.q.rows.entries if self.task.q.rows.space == "entry" else None

    def emit(self) -> None:
        """Declare the arguments and emit the loop over lists."""
        self.arguments = declare(self.task)
        batch, block = self.arguments.batch, self._block()
        total = T.bind(self._first(batch) if block else batch)
        with T.parallel(total * self.groups) as n:
            index = T.bind(n // self.groups)
            group = T.bind(cast(n % self.groups, "int32"))
            if not block:
                sequence = Sequence.at(self.arguments, index)
                first, stop = sequence.q_off, sequence.q_off + sequence.n_q
                self._list(Item(sequence, group, first, stop, index, const(0, "int32")))
                return
            number = find_sequence(self.arguments, self._first, index)
            sequence = Sequence.at(self.arguments, number)
            local = T.bind(cast(index - self._first(number), "int32"))
            self._block_item(sequence, group, local, block)

    def _block(self) -> int:
        """Return how many queries share a list; 0 for all of a sequence."""
        return {"batch": 0, "query": 1}.get(self.task.out.rows.space, self.task.out.rows.block)

    def _first(self, number: Value) -> Value:
        """Return the first item (int64) of a sequence."""
        start = cast(load(self.arguments.cu_q, number), "int64")
        if self._block() == 1:
            return start
        spare = 1 if isinstance(self._query_axis(), Entries) else 2
        return start // self._block() + spare * number

    def _block_item(self, sequence: Sequence, group: Value, local: Value, block: int) -> None:
        offset, end = sequence.q_off, sequence.q_off + sequence.n_q
        out = self.task.out.rows
        if self.per_token:
            scale = block if isinstance(self._query_axis(), Entries) else 1
            position = T.bind(offset // scale + local)
            with T.If(local < sequence.count(self.task.q.rows)), T.Then():
                row = T.bind(sequence.row(out, position))
                self._list(Item(sequence, group, position, position + 1, row, position))
            return
        key = T.bind(offset // block + local)
        first = T.bind(maximum(offset, key * block))
        stop = T.bind(minimum(end, key * block + block))
        with T.If(first < stop), T.Then():
            self._list(Item(sequence, group, first, stop, T.bind(sequence.row(out, key)), key))

    # --- one list -------------------------------------------------------------------------------

    def _list(self, item: Item) -> None:
        task, sequence = self.task, item.sequence
        source = T.bind(cast(sequence.count(task.k.rows), "int64"))
        lengths = [T.bind(cast(self._length(s.keys[-1], item), "int64")) for s in self.stages]
        rows = [self._rows(s) for s in self.stages]
        size = sum((cast(n, "int64") * r for n, r in zip(lengths[1:], rows[1:], strict=True)),
                   start=lengths[0] * rows[0]) + 1  # fmt: skip
        slots = T.bind(source + 1)
        stored = 1 if self.summed else self.lanes.padded
        with (
            workspace(size, "float32") as value,
            workspace(size, "float32") as mass,
            workspace(size, "int32") as count,
            workspace(slots, "int32") as positions,
            workspace(slots * stored, "float32") as memory,
            workspace(lengths[-1] + 1, "int32") as rank,
        ):
            stages, at = [], const(0, "int64")
            for stage, n, r in zip(self.stages, lengths, rows, strict=True):
                parts = [_view(m, at, n * r, d) for m, d in
                         ((value, "float32"), (mass, "float32"), (count, "int32"))]  # fmt: skip
                stages.append(Accumulator(stage.how, r, n, *parts))
                at = T.bind(at + n * r)
            for stage_row in stages:
                stage_row.clear()
            self._reduce(item, stages, positions, memory)
            self._select(item, stages[-1], rank)

    def _rows(self, stage: Stage) -> int:
        """Return how many heads or groups of heads a stage keeps apart inside one list."""
        for key in stage.keys[:-1]:
            match key:
                case Head():
                    return self.heads
                case Apply("floordiv", (Head(), Const(int(divisor)))):
                    return max(1, self.heads // divisor)
        return 1

    def _length(self, key: Expr, item: Item) -> Value:
        """Return how many values a last key takes (int32)."""
        sequence = item.sequence
        if isinstance(key, Apply) and key.op == "sub":
            return maximum(sequence.q_off + sequence.n_q, const(0, "int32"))
        if isinstance(key, BlockOf):
            return (sequence.n_k + (key.width - 1)) // key.width
        n, shift = granule(key)
        axis = next(e.axis for e in walk(key) if isinstance(e, Pos))
        count = sequence.n_k if isinstance(axis, Named) else sequence.count(self.task.k.rows)
        return (count + (shift + n - 1)) // n

    def _reduce(
        self, item: Item, stages: list[Accumulator], positions: Memory, memory: Memory
    ) -> None:
        """Score every token of the list and reduce; flush the first stage when its row is done."""
        flushed = len(stages) == 2
        inner = next((k for k in self.stages[0].keys[:-1] if mentions(k, Pos, "query")), None)
        with T.serial(item.stop - item.first) as t:
            i = T.bind(item.first + t)
            self._token(item, i, stages[0], positions, memory)
            if flushed and inner is not None:
                here = T.bind(emit(inner, self._env(item, i)))
                after = T.bind(emit(inner, self._env(item, i + 1)))
                done = T.Or(i + 1 >= item.stop, T.Not(equal(here, after)))
                with T.If(done), T.Then():
                    self._flush(item, i, stages)
        if flushed and inner is None:
            self._flush(item, item.first, stages)
        stages[-1].finish(softmax=self.stages[-1].norm)

    def _flush(self, item: Item, i: Value, stages: list[Accumulator]) -> None:
        first, second = stages
        first.finish(softmax=self.stages[0].norm)
        n, shift = granule(self.stages[0].keys[-1])
        with T.serial(const(first.rows, "int64")) as r, T.serial(first.length) as x:
            at = r * first.length + x
            with T.If(load(first.count, at) > 0), T.Then():
                key = T.bind(maximum(cast(x, "int32") * n - shift, const(0, "int32")))
                head = self._head_of(item, cast(r, "int32"), self.stages[0])
                value = T.bind(load(first.value, at))
                self._scatter(item, i, second, self.stages[1], key, head, value)
        first.clear()

    def _head_of(self, item: Item, row: Value, stage: Stage) -> Value:
        """Return a query head that a row of a stage stands for."""
        return item.group * self.heads + row * (self.heads // self._rows(stage))

    # --- one token ------------------------------------------------------------------------------

    def _token(
        self, item: Item, i: Value, into: Accumulator, positions: Memory, memory: Memory
    ) -> None:
        task = self.task
        visible = Visible(task, self.arguments)
        count = visible.positions(item, i, self._env(item, i), positions)
        width = lanes_of_pass(task)
        with T.If(count > 0), T.Then(), T.serial(self.heads // width) as part:
            head = T.bind(item.group * self.heads + part * width)
            valid = T.bind(minimum(const(width, "int32"), const(task.q.heads, "int32") - head))
            with T.If(valid > 0), T.Then():
                self._heads(item, i, into, positions, memory, count, head, valid)

    def _heads(
        self, item: Item, i: Value, into: Accumulator, positions: Memory, memory: Memory,
        count: Value, head: Value, valid: Value,
    ) -> None:  # fmt: skip
        task, lanes, sequence = self.task, self.lanes, item.sequence
        rows = task.q.rows
        local = rows.space == "entry"
        scale = rows.entries.stride if local and rows.entries is not None else 1
        row = T.bind(sequence.row(rows, i - sequence.q_off // scale if local else i))
        wide = cast(head, "int64")
        query = scores.load_query(self.arguments, task.q, lanes, row, wide, valid)
        weights = self._weights(sequence, i, head, valid)

        def finished(slot: Value, first: int, sums: list[Value]) -> list[Value]:
            found = []
            for v, s in enumerate(sums):
                lane = (first + v) * lanes.width
                s = T.bind(s * const(task.scale, "float32", lanes.width))
                env = self._env(item, i, key=load(positions, slot))
                env = replace(env, head=head + ramp(const(lane, "int32"), lanes.width))
                for fn in (task.mod, task.act):
                    if fn is not None:
                        s = T.bind(emit(fn, replace(env, symbols={"s": s})))
                if task.weights is not None or self.summed:
                    s = T.bind(s * load(weights, lane, lanes=lanes.width))
                found.append(s)
            return found

        def add(slot: Value, first: int, sums: list[Value]) -> None:
            parts = finished(slot, first, sums)
            total = parts[0]
            for p in parts[1:]:
                total = total + p
            store(memory, load(memory, slot) + vec.total(T.bind(total)), slot)

        def keep(slot: Value, first: int, sums: list[Value]) -> None:
            for v, s in enumerate(finished(slot, first, sums)):
                store(memory, s, cast(slot, "int64") * lanes.padded + (first + v) * lanes.width)

        if self.summed:
            with T.serial(count) as slot:
                store(memory, const(0.0, "float32"), slot)
        scores.score(
            self.arguments, sequence, task.k, lanes, query, positions, count,
            cast(head // task.group, "int64"), add if self.summed else keep,
        )  # fmt: skip
        if self.summed:
            with T.serial(count) as slot:
                into.add(const(0, "int32"), load(positions, slot), load(memory, slot))
            return
        if task.norm:
            scores.softmax(lanes, memory, count, vec.exp)
        stage = self.stages[0]
        with T.serial(count) as slot, T.serial(valid) as lane:
            x = T.bind(load(memory, cast(slot, "int64") * lanes.padded + cast(lane, "int64")))
            key = T.bind(load(positions, slot))
            self._scatter(item, i, into, stage, key, T.bind(head + lane), x)

    def _weights(self, sequence: Sequence, i: Value, head: Value, valid: Value) -> Memory:
        """Return the weight of each lane; 0 in lanes without a head."""
        task = self.task
        memory = T.alloc_buffer((self.lanes.padded,), "float32")
        with T.serial(self.lanes.padded) as lane, T.If(lane < valid):
            with T.Then():
                one: Value = const(1.0, "float32")
                if task.weights is not None:
                    flat = self.arguments[task.weights].flat
                    at = sequence.row(task.weights.rows, i) * task.q.heads
                    one = vec.load_f32(flat, task.weights.dtype, at + cast(head + lane, "int64"))
                store(memory, one, lane)
            with T.Else():
                store(memory, const(0.0, "float32"), lane)
        return memory

    def _scatter(
        self, item: Item, i: Value, into: Accumulator, stage: Stage, key: Value, head: Value,
        x: Value,
    ) -> None:  # fmt: skip
        """Add a score of (head, i, key) to its group."""
        row: Value = const(0, "int32")
        if into.rows > 1:
            row = (head - item.group * self.heads) // (self.heads // into.rows)
        last = stage.keys[-1]
        if not isinstance(last, BlockOf):
            env = replace(self._env(item, i, key=key), head=head)
            into.add(row, T.bind(emit(last, env)), x)
            return
        start = T.bind(key * last.axis.stride)
        stop = T.bind(start + last.axis.width)
        low, high = T.bind(start // last.width), T.bind((stop - 1) // last.width)
        with T.serial(high - low + 1) as n:
            block = T.bind(low + n)
            value = x
            if stage.how == "sum":
                over = minimum(stop, (block + 1) * last.width) - maximum(start, block * last.width)
                value = x * (cast(over, "float32") * const(1.0 / last.axis.stride, "float32"))
            into.add(row, block, T.bind(value))

    # --- the list -------------------------------------------------------------------------------

    def _select(self, item: Item, row: Accumulator, rank: Memory) -> None:
        task = self.task
        out = self.arguments[task.out]
        extent = out.shape[-1]
        width = const(extent, "int64") if isinstance(extent, int) else extent
        base = T.bind((item.row * self.groups + cast(item.group, "int64")) * width)
        written = cell("int64", const(0, "int64"))
        with T.serial(row.length) as n:
            score = T.bind(load(row.value, n))
            value = cell("int32", topk.rank_of(score))
            if task.threshold is not None:
                with T.If(T.Not(score >= const(task.threshold, "float32"))), T.Then():
                    put(value, const(topk.NEVER, "int32"))
            if task.force is not None:
                with T.If(emit(task.force, self._list_env(item, cast(n, "int32")))), T.Then():
                    put(value, const(topk.FORCED, "int32"))
            store(rank, get(value), n)
        budget: Value | None = None
        if task.topk is not None:
            budget = T.bind(cast(emit(task.topk, self._list_env(item, None)), "int32"))
            if not isinstance(task.topk, Const):
                budget = T.bind(minimum(budget, cast(width, "int32")))

        def write(n: Value) -> None:
            with T.If(get(written) < width), T.Then():
                store(out.flat, cast(n, "int32"), base + get(written))
                put(written, get(written) + 1)

        topk.choose(topk.Row(row.value, rank, row.length), budget, task.top_p, write)
        with T.serial(width - get(written)) as n:
            store(out.flat, const(-1, "int32"), base + get(written) + n)

    def _list_env(self, item: Item, last: Value | None) -> Env:
        values = [item.group if mentions(key, Head) else item.key for key in self.task.keys[:-1]]
        env = self._env(item, item.first)
        return replace(env, key_vars=(*values, *(() if last is None else (last,))))

    def _env(self, item: Item, i: Value, key: Value | None = None) -> Env:
        sequence = item.sequence
        tables = dict(self.task.tables)

        def table(read: object, index: tuple[Value, ...]) -> Value:
            return read_table(self.arguments, tables[read.tensor.name], sequence, index)  # type: ignore[attr-defined]

        return Env(
            query=i,
            key=key,
            head=item.group * self.heads,
            query_stop=sequence.q_off + sequence.n_q,
            key_stop=sequence.count(self.task.k.rows),
            table=table,
        )


def _view(memory: Memory, first: Value, size: Value, dtype: str) -> Memory:
    return T.decl_buffer((size,), dtype, data=memory.data, elem_offset=first)
