"""Narrow ranges of keys on GPUs by what integer tables say, before attention walks them.

Of every 64 keys a launch notes the least and the greatest entry of each table. The next one does so
for the tokens of each tile, and asks of all keys it might see, 64 at a time, whether some pair may
be visible, and whether all must be. Attention then walks from the first such keys to the last, and
masks nothing in a stretch whose pairs are all visible. Packed documents are walked one by one that
way, whatever their number; ids out of order only cost time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_sequence, find_tile, first_tile
from sparsegen.codegen.cpu.stream import Bounds, cell, get, put
from sparsegen.codegen.gpu.launch import across, device, launch
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.narrowing import KEYS, at_keys, names_of, narrowed, seen, tables_of
from sparsegen.codegen.tvm import T, Value, cast, const, load, maximum, minimum, select, store
from sparsegen.ir.axes import Entries, Named
from sparsegen.ir.expr import Const, Expr, Table
from sparsegen.lowering.tasks import AttendTask, Buffer, Clause, Rows

_WARPS = 8
_ENDS = 4  # words of bounds
_LAST = 2**31 - 1


def _at_keys(task: AttendTask) -> list[Table]:
    return at_keys(tables_of([c for _, _, c in narrowed(task)]))


def span_buffers(task: AttendTask, tokens: int, groups: int) -> list[tuple[Buffer, Expr]]:
    """Return the memory of the bounds of each tile, and of what is noted about keys.

    Args:
        tokens: of a group.
        groups: that make a tile; each has bounds of its own.
    """
    found, count, tables = [], len(narrowed(task)), len(_at_keys(task))
    if count:
        rows = Rows(space="query_block", block=tokens * groups)
        found.append(_buffer(task, "hulls", (groups * count, _ENDS), rows))
    if tables:
        entries = Entries(Named("keys"), KEYS, KEYS, partial=True)
        rows = Rows(space="entry", entries=entries, role="key")
        found.append(_buffer(task, "noted", (tables, 2), rows))
    return [(buffer, Const(0)) for buffer in found]


def _buffer(task: AttendTask, name: str, shape: tuple[int, ...], rows: Rows) -> Buffer:
    return Buffer(name=f"{task.name}_{name}", dtype="int32", shape=shape, rows=rows)


class Spans:
    """The bounds of the ranges that tables narrow, for each group of tokens of a tile."""

    def __init__(self, task: AttendTask, arguments: Arguments, tokens: int, groups: int) -> None:
        self.task, self.arguments, self.tokens, self.groups = task, arguments, tokens, groups
        self.ranges, self.at_keys = narrowed(task), _at_keys(task)
        memory = [arguments[buffer] for buffer, _ in span_buffers(task, tokens, groups)]
        # What is noted of tables comes last, if some are read at keys.
        self.hulls, self.noted = memory[0], memory[-1]

    @staticmethod
    def of(task: AttendTask, arguments: Arguments, tokens: int, groups: int) -> Spans | None:
        """Return the spans of a task, None if tables narrow none of its ranges."""
        return Spans(task, arguments, tokens, groups) if narrowed(task) else None

    def emit(self) -> None:
        """Emit the launches."""
        if self.at_keys:
            with device():
                self._note()
        with device():
            self._find()

    def bounds(
        self, sequence: Sequence, first: Value, group: Value | int, number: int
    ) -> Bounds | None:
        """Return the keys of a clause that a group of the tile may see, from token `first` on.

        None where the clause of this number is not narrowed.
        """
        numbers = [n for n, _, _ in self.ranges]
        if number not in numbers:
            return None
        base = self._base(sequence, first, group) + numbers.index(number) * _ENDS
        return Bounds(*(T.bind(load(self.hulls.flat, base + n)) for n in range(_ENDS)))

    def _base(self, sequence: Sequence, first: Value, group: Value | int) -> Value:
        """Return where the bounds of a group start (int64)."""
        size = self.tokens * self.groups
        tile = first_tile(self.arguments, size, sequence.number) + cast(first // size, "int64")
        return T.bind((tile * self.groups + group) * (len(self.ranges) * _ENDS))

    def _warp(self, count: Value) -> tuple[Value, Value]:
        """Launch a warp for each of so many things; return its number (int64) and the lane."""
        place = launch((count + (_WARPS - 1)) // _WARPS, 32 * _WARPS, entered=True)
        return T.bind(place.block * _WARPS + cast(place.warp, "int64")), T.bind(place.lane)

    # --- keys -----------------------------------------------------------------------------------

    def _note(self) -> None:
        """Note the least and the greatest entry of each 64 keys."""
        arguments = self.arguments
        number, lane = self._warp(self.noted.rows)

        def first(b: Value) -> Value:
            return cast(load(arguments.cu_k, b), "int64") // KEYS + b

        sequence = Sequence.at(arguments, find_sequence(arguments, first, number))
        block = T.bind(cast(number - first(sequence.number), "int32"))
        with T.If(block * KEYS < sequence.n_k), T.Then():
            view = ThreadView(self.task, arguments, sequence, sequence.q_off, const(1, "int32"))
            base = self._noted_at(sequence, block)
            for n, table in enumerate(self.at_keys):
                last, values = T.bind(sequence.n_k - 1), []
                for part in range(0, KEYS, 32):
                    j = minimum(block * KEYS + (part + lane), last)
                    values.append(_read(view, table, T.bind(j)))
                ends = across(minimum(*values), minimum), across(maximum(*values), maximum)
                with T.If(lane < 1), T.Then():
                    for k, end in enumerate(ends):
                        store(self.noted.flat, end, base + (2 * n + k))

    def _noted_at(self, sequence: Sequence, block: Value) -> Value:
        """Return where the entries of 64 keys start (int64)."""
        return T.bind(sequence.row(self.noted.buffer.rows, block) * (len(self.at_keys) * 2))

    # --- tiles ----------------------------------------------------------------------------------

    def _find(self) -> None:
        """Find the bounds of each group of each tile, a warp for each."""
        arguments, size = self.arguments, self.tokens * self.groups
        count = (arguments[self.task.o].rows // size + arguments.batch) * self.groups
        number, lane = self._warp(count)
        with T.If(number < count), T.Then():
            sequence, first = find_tile(arguments, size, T.bind(number // self.groups))
            with T.If(first < sequence.n_q), T.Then():
                group = T.bind(cast(number % self.groups, "int32"))
                begin = T.bind(first + group * self.tokens)
                present = T.bind(minimum(sequence.n_q - begin, const(self.tokens, "int32")))
                base = self._base(sequence, first, group)
                for n in range(len(self.ranges)):
                    at = T.bind(base + n * _ENDS)
                    with T.If(present > 0):
                        with T.Then():
                            i_min = T.bind(sequence.q_off + begin)
                            view = ThreadView(self.task, arguments, sequence, i_min, present)
                            self._store(self._narrow(view, n, lane), at, lane)
                        with T.Else():
                            none = [const(x, "int32") for x in (0, 0, 0, -1)]
                            self._store(Bounds(*none), at, lane)

    def _store(self, bounds: Bounds, at: Value, lane: Value) -> None:
        with T.If(lane < 1), T.Then():
            for n, end in enumerate(bounds.ends):
                store(self.hulls.flat, end, at + n)

    def _narrow(self, view: ThreadView, number: int, lane: Value) -> Bounds:
        """Return the bounds of a range for the tokens of a view."""
        _, source, clause = self.ranges[number]
        length = T.bind(view.sequence.count(source.k.rows))
        hull = view._hull(clause, length, view.i_min, view.symbols["i_max"])
        symbols = self._of_queries(view, clause, lane)
        ask = partial(self._ask, view, clause, hull, symbols)
        begin = T.bind(hull.lo // KEYS)
        lo, hi, sure = (cell("int32", const(n, "int32")) for n in (_LAST, 0, -1))

        def each(body: Callable[[Value], None]) -> None:
            block = cell("int32", begin + lane)
            with T.While(get(block) * KEYS < hull.hi):
                body(T.bind(get(block)))
                put(block, get(block) + 32)

        def reach(block: Value) -> None:
            may, must = ask(block)
            with T.If(may), T.Then():
                put(lo, minimum(get(lo), block * KEYS))
                put(hi, maximum(get(hi), (block + 1) * KEYS))
            with T.If(must), T.Then():
                put(sure, maximum(get(sure), block))

        each(reach)
        last = across(get(sure), maximum)
        gap = cell("int32", begin - 1)

        def interrupt(block: Value) -> None:
            _, must = ask(block)
            with T.If(T.And(block < last, T.Not(must))), T.Then():
                put(gap, maximum(get(gap), block))

        # All pairs are visible from behind the last keys before them of which that is not so.
        with T.If(last >= 0), T.Then():
            each(interrupt)
        after = across(get(gap), maximum)
        end = T.bind(minimum(across(get(hi), maximum), hull.hi))
        return Bounds(
            T.bind(minimum(maximum(across(get(lo), minimum), hull.lo), end)),
            end,
            T.bind(maximum((after + 1) * KEYS, hull.lo)),
            T.bind(select(last >= 0, minimum((last + 1) * KEYS, hull.hi), const(-1, "int32"))),
        )

    def _of_queries(self, view: ThreadView, clause: Clause, lane: Value) -> dict[str, Value]:
        """Return the ends of the tables that are read at queries, by name."""
        found: dict[str, Value] = {}
        for table in tables_of([clause]):
            if table in self.at_keys:
                continue
            values = []
            for part in range(0, self.tokens, 32):
                token = minimum(part + lane, view.present - 1)
                values.append(_read(view, table, T.bind(view.i_min + token)))
            low = high = values[0]
            for x in values[1:]:
                low, high = minimum(low, x), maximum(high, x)
            both = across(low, minimum), across(high, maximum)
            found |= zip(names_of(table), both, strict=True)
        return found

    def _ask(
        self, view: ThreadView, clause: Clause, hull: Bounds, symbols: dict[str, Value],
        block: Value,
    ) -> tuple[Value, Value]:  # fmt: skip
        """Tell whether some pair of a tile and 64 keys may be visible, and whether all must."""
        known = dict(symbols)
        known["j_min"] = T.bind(maximum(block * KEYS, hull.lo))
        known["j_max"] = T.bind(minimum(block * KEYS + (KEYS - 1), hull.hi - 1))
        for n, table in enumerate(self.at_keys):
            base = self._noted_at(view.sequence, block)
            both = [T.bind(load(self.noted.flat, base + (2 * n + k))) for k in range(2)]
            known |= zip(names_of(table), both, strict=True)
        zero = const(0, "int32")
        may, must = (view.value(e, zero, zero, zero, **known) for e in seen(clause))
        return may, must


def _read(view: ThreadView, table: Table, position: Value) -> Value:
    """Read a table at a position of a query or a key."""
    return view.value(table, position, const(0, "int32"), position)
