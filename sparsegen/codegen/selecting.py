"""Say what the kernels of select tasks make at a time, whatever the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparsegen.codegen.cpu.lists import mentions
from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_sequence, read_table
from sparsegen.codegen.cpu.select_task import Facts, granule, is_slash
from sparsegen.codegen.cpu.stream import pin
from sparsegen.codegen.cpu.view import stop_of
from sparsegen.codegen.exprs import CPU_FUNCTIONS, Env, Function, emit
from sparsegen.codegen.tvm import T, Value, cast, const, equal, load, maximum, minimum, select
from sparsegen.ir.expr import BlockOf, Expr, Head, Stop, Symbol, Table, rebuild
from sparsegen.lowering.tasks import Lists, SelectTask, Stage


@dataclass(frozen=True)
class Item:
    """Lists that are made together.

    group        which group of heads (int32)
    first, stop  positions of their queries (int32)
    key          value of the query key of the first list (int32); 0 where there is none
    row          row of the first list in the output (int64); further lists follow
    """

    sequence: Sequence
    group: Value
    first: Value
    stop: Value
    key: Value
    row: Value


class Selecting:
    """The items of a task.

    tokens     queries of a tile
    stride     positions that a query stands for
    groups     lists per query
    functions  elementary functions of the target
    """

    arguments: Arguments

    def __init__(
        self, task: SelectTask, tokens: int, functions: Mapping[str, Function] = CPU_FUNCTIONS
    ) -> None:
        self.task, self.tokens, self.functions = task, tokens, functions
        self.facts = Facts(task)
        self.lists: dict[Expr, Lists] = dict(task.lists)
        self.tables = dict(task.tables)
        self.groups = math.prod(task.groups)
        entries = task.q.rows.entries
        self.stride = 1 if entries is None else entries.stride

    def first_item(self, number: Value) -> Value:
        """Return the first item (int64) of a sequence: an upper bound that leaves gaps."""
        block = self.facts.block
        if block == 0:
            return number
        start = cast(load(self.arguments.cu_q, number), "int64")
        if block == 1:
            return start // (self.stride * self.tokens) + number
        return start // (self.stride * block) + 2 * number

    def item(self, index: Value, group: Value, make: Callable[[Item], None]) -> None:
        """Hand over the item of a number (int64) and a group of heads, unless it is empty."""
        number = index
        if self.facts.block:
            number = find_sequence(self.arguments, self.first_item, index)
        sequence = Sequence.at(self.arguments, number)
        local = T.bind(cast(index - self.first_item(number), "int32"))
        block, rows = self.facts.block, self.task.out.rows
        begin = T.bind(sequence.q_off // self.stride)
        end = T.bind(begin + sequence.count(self.task.q.rows))
        zero = const(0, "int32")
        if block == 0:
            make(Item(sequence, group, begin, end, zero, sequence.row(rows, zero)))
            return
        if block == 1:
            key = first = T.bind(begin + local * self.tokens)
            stop = T.bind(minimum(first + self.tokens, end))
        else:
            key = T.bind(begin // block + local)
            first = T.bind(maximum(begin, key * block))
            stop = T.bind(minimum(end, key * block + block))
        with T.If(first < stop), T.Then():
            make(Item(sequence, group, first, stop, key, T.bind(sequence.row(rows, key))))

    def tiles(
        self, item: Item, tile: Callable[[Value, Value], None], flush: Callable[[Value], None]
    ) -> None:
        """Take the queries of an item tile by tile; tiles end at multiples of their size.

        Args:
            tile: takes the first query and how many there are (int32).
            flush: takes the first query of a tile, after which the groups of the first of two
                reductions that it added to are complete.
        """
        facts, size = self.facts, self.tokens
        flushed = len(facts.stages) == 2
        if facts.block == 1:
            tile(item.first, T.bind(item.stop - item.first))
            if flushed:
                flush(item.first)
            return
        low = pin(item.first // size)
        count = pin((item.stop + (size - 1)) // size - low)
        # Nothing is left of an empty sequence.
        with T.serial(maximum(count, const(0, "int32"))) as n:
            first = pin(maximum(item.first, (low + n) * size))
            stop = pin(minimum(item.stop, (low + n) * size + size))
            with T.If(first < stop), T.Then():
                tile(first, T.bind(stop - first))
                if flushed and facts.inner:
                    done = T.Or(equal(stop % facts.inner, const(0, "int32")), stop >= item.stop)
                    with T.If(done), T.Then():
                        flush(first)
        if flushed and not facts.inner:
            flush(item.first)

    def length(self, key: Expr, sequence: Sequence) -> Value:
        """Return how many values a last key takes (int32)."""
        if is_slash(key):
            queries = T.bind(sequence.count(self.task.q.rows))
            return select(queries > 0, sequence.q_off // self.stride + queries, const(0, "int32"))
        if isinstance(key, BlockOf):
            return (sequence.n_k + (key.width - 1)) // key.width
        found = granule(key)
        assert found is not None
        n, shift = found
        return (sequence.count(self.task.k.rows) + (shift + n - 1)) // n

    def slots(self) -> int:
        """Return how many groups of queries of the first stage a tile may hold."""
        inner = self.facts.inner
        return max(1, self.tokens // inner) if inner else 1

    def stage_rows(self) -> list[tuple[int, Stage]]:
        """Return the reductions, and how many rows of groups each keeps for an item."""
        first, *more = self.facts.stages
        lists = self.tokens if self.facts.block == 1 else 1
        return [(self.slots() * self.facts.head_rows, first), *((lists, stage) for stage in more)]

    def list_keys(self, item: Item, n: Value) -> tuple[Value, ...]:
        """Return the values of the keys before the last of list `n` of an item."""
        row_key = T.bind(item.key + n)
        return tuple(item.group if mentions(k, Head) else row_key for k in self.task.keys[:-1])

    def value(self, expr: Expr, item: Item, keys: tuple[Value, ...]) -> Value:
        """Return an expression over the keys of a list, stops and tables."""
        symbols: dict[str, Value] = {}

        def rule(e: Expr) -> Expr | None:
            if not isinstance(e, Stop):
                return None
            name = f"stop {len(symbols)}"
            symbols[name] = stop_of(e, item.sequence)
            return Symbol(name)

        def table(read: Table, index: tuple[Value, ...]) -> Value:
            buffer = self.tables[read.tensor.name]
            return read_table(self.arguments, buffer, item.sequence, index)

        closed = rebuild(expr, rule)
        return emit(
            closed, Env(symbols=symbols, key_vars=keys, table=table, functions=self.functions)
        )
