"""Emit the kernel of a select task: score tiles of queries, reduce by key, choose.

for each item: a tile of queries with a list each, a block of queries that share one, or a sequence
    for each tile of its queries, for each part of its heads
        scores, then their groups                      (select_pass, scatter)
        groups of the first reduction, once complete, into those of the second
    for each list: choose                              (topk)

Nothing is longer than a row of scores or of groups per query of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sparsegen.arch import Arch
from sparsegen.codegen.cpu import topk
from sparsegen.codegen.cpu.attend import fold
from sparsegen.codegen.cpu.attention import Blocking
from sparsegen.codegen.cpu.reduction import ABSENT, Reducer, Rows
from sparsegen.codegen.cpu.rows import Sequence, declare
from sparsegen.codegen.cpu.scatter import blocks_of, share_of
from sparsegen.codegen.cpu.select_pass import SelectPass, view
from sparsegen.codegen.cpu.select_task import granule
from sparsegen.codegen.cpu.stream import pin
from sparsegen.codegen.cpu.tile import Tile
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.selecting import Item, Selecting
from sparsegen.codegen.tvm import (
    T,
    Value,
    broadcast,
    cast,
    const,
    load,
    maximum,
    minimum,
    ramp,
    select,
    store,
    workspace,
)
from sparsegen.ir.expr import BlockOf, Expr
from sparsegen.lowering.tasks import SelectTask, Stage


class SelectKernel(Selecting):
    """Emits the function of one task into the current builder frame."""

    def __init__(self, task: SelectTask, tile: Tile, blocking: Blocking, arch: Arch) -> None:
        super().__init__(task, tile.tokens)
        self.tile, self.blocking, self.arch = tile, blocking, arch

    # --- items ----------------------------------------------------------------------------------

    def emit(self) -> None:
        """Declare the arguments and emit the loop over items."""
        self.arguments = declare(self.task)
        count = T.bind(self.first_item(self.arguments.batch))
        with T.parallel(count * self.groups) as n:
            index = T.bind(fold(n // self.groups, count))
            group = T.bind(cast(n % self.groups, "int32"))
            self.item(index, group, self._make)

    # --- one item -------------------------------------------------------------------------------

    @contextmanager
    def _rows(self, stage: Stage, rows: int, sequence: Sequence) -> Iterator[Rows]:
        """Take memory for the groups of a stage, and clear it."""
        reducer, width = Reducer(stage.how), self.tile.width
        length = T.bind(cast(maximum(self.length(stage.keys[-1], sequence), 0), "int64"))
        pitch = T.bind(Rows.pitch_of(length, width))
        with ExitStack() as stack:
            planes = [
                stack.enter_context(workspace(rows * pitch, "float32"))
                for _ in range(reducer.planes)
            ]
            taken = Rows(reducer, rows, length, pitch, width, tuple(planes))
            taken.clear()
            yield taken

    def _make(self, item: Item) -> None:
        facts, sequence = self.facts, item.sequence
        first, *more = facts.stages
        lists = self.tile.tokens if facts.block == 1 else 1
        with (
            self._rows(first, self.slots() * facts.head_rows, sequence) as groups,
            ExitStack() as stack,
        ):
            last = groups
            if more:
                last = stack.enter_context(self._rows(more[0], lists, sequence))
            self.tiles(
                item,
                lambda start, count: self._tile(item, start, count, groups),
                lambda start: self._flush(item, start, groups, last),
            )
            last.finish(softmax=facts.stages[-1].norm)
            self._choose(item, last)

    def _tile(self, item: Item, first: Value, count: Value, groups: Rows) -> None:
        """Score a tile of queries, part by part of the heads of the lists."""
        facts, heads = self.facts, self.tile.heads
        own = T.bind(item.group * facts.heads)
        with T.serial(-(-facts.heads // heads)) as part:
            head = T.bind(own + part * heads)

            def row(t: Value, h: Value) -> Value:
                slot = (first + t) // facts.inner - first // facts.inner if facts.inner > 1 else t
                if not facts.inner:
                    slot = const(0, "int32")
                return slot * facts.head_rows + (part * heads + h) // facts.head_step

            # The last group of heads may be smaller than the others.
            with T.If(head < self.task.q.heads), T.Then():
                SelectPass(
                    self,
                    item.sequence,
                    first=first,
                    count=count,
                    head=head,
                    into=groups,
                    row=row,
                ).run()

    def _flush(self, item: Item, first: Value, groups: Rows, last: Rows) -> None:
        """Reduce the groups of the first stage again, and forget them."""
        facts = self.facts
        inner, outer = facts.stages
        groups.finish(softmax=inner.norm)
        key = outer.keys[-1]
        with T.serial(groups.rows) as r, T.serial(groups.length) as x:
            value = T.bind(load(groups.planes[0], r * groups.pitch + x))
            with T.If(T.Or(value > const(ABSENT, "float32"), T.isnan(value))), T.Then():
                row = T.bind(r // facts.head_rows) if facts.block == 1 else const(0, "int64")
                at = T.bind(cast(x, "int32"))
                found = granule(inner.keys[-1])
                if found is None:  # a distance, which only itself is a function of
                    last.add(row, at, last.reducer.lift(value))
                else:
                    n, shift = found
                    place = T.bind(maximum(at * n - shift, const(0, "int32")))
                    self._regroup(item, key, row, place, value, last)
        groups.clear()

    def _regroup(
        self, item: Item, key: Expr, row: Value, place: Value, value: Value, last: Rows
    ) -> None:
        """Add a result of the first stage, of the group that starts at key `place`, to `last`."""
        reducer = last.reducer
        if not isinstance(key, BlockOf):
            last.add(row, T.bind(emit(key, Env(key=place))), reducer.lift(value))
            return
        low, high = blocks_of(key, place)
        with T.serial(high - low + 1) as n:
            block = T.bind(low + n)
            share = share_of(key, reducer, place, block, item.sequence.n_k)
            scaled = value if share is None else T.bind(value * share)
            last.add(row, block, reducer.lift(scaled))

    # --- lists ----------------------------------------------------------------------------------

    def _choose(self, item: Item, last: Rows) -> None:
        lists = item.stop - item.first if self.facts.block == 1 else const(1, "int32")
        room = topk.Row.room(last.length, last.width)
        with workspace(T.bind(room), "int32") as rank, T.serial(lists) as n:
            start = T.bind(cast(n, "int64") * last.pitch)
            score = view(last.planes[0], start, last.pitch, "float32")
            row = topk.Row(score, rank, last.length, last.width)
            keys = self.list_keys(item, n)
            self._rank(item, row, keys)
            budget = None
            if self.task.topk is not None:
                budget = pin(cast(self.value(self.task.topk, item, keys), "int32"))
            chosen = topk.choose(row, budget, self.task.top_p)
            self._write(item, cast(n, "int64"), row, chosen)

    def _rank(self, item: Item, row: topk.Row, keys: tuple[Value, ...]) -> None:
        """Rank every key of a list: forced ones first, what is short of the threshold never."""
        task, width = self.task, row.width

        def whole(value: int) -> Value:
            return const(value, "int32", width)

        with T.serial((row.length + (width - 1)) // width) as n:
            score = T.bind(load(row.score, n * width, lanes=width))
            rank = topk.rank_of(score)
            if task.threshold is not None:
                enough = score >= const(task.threshold, "float32", width)
                rank = T.bind(select(enough, rank, whole(topk.NEVER)))
            if task.force is not None:
                last = ramp(cast(n * width, "int32"), width)
                forced = self.value(task.force, item, (*keys, last))
                rank = T.bind(select(broadcast(forced, width), whole(topk.FORCED), rank))
            store(row.rank, rank, n * width)

    def _write(self, item: Item, n: Value, row: topk.Row, chosen: Value) -> None:
        """Write the chosen keys of list `n`, and -1 behind them."""
        out = self.arguments[self.task.out]
        extent = out.shape[-1]
        width = const(extent, "int64") if isinstance(extent, int) else extent
        base = T.bind(((item.row + n) * self.groups + cast(item.group, "int64")) * width)
        count = T.bind(minimum(chosen, width))
        with T.serial(count) as x:
            store(out.flat, load(row.rank, x), base + x)
        with T.serial(width - count) as x:
            store(out.flat, const(-1, "int32"), base + count + x)
