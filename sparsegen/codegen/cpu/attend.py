"""Compose an attend kernel: tiles over threads, key sources and clauses, split keys, merging.

for each tile of queries, and piece of its keys       (threads)
    rows into lanes
    for each source, for each clause, for each chunk of keys
        scores, score mod, masks, softmax, weighted values
    outputs out of lanes, or the partial state into a workspace that a second loop merges
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.attend_pass import Pass
from sparsegen.codegen.cpu.attention import Blocking, State
from sparsegen.codegen.cpu.lists import mentions, shared
from sparsegen.codegen.cpu.rows import (
    declare,
    find_tile,
    tiles,
)
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.tile import Tile
from sparsegen.codegen.cpu.vec import LOG2E, exp2
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    load,
    maximum,
    select,
    store,
    workspace,
)
from sparsegen.ir.expr import (
    Apply,
    Const,
    Expr,
    Head,
    Member,
)
from sparsegen.lowering.tasks import AttendTask, Lists, SelectTask, Task

# Threads to keep busy where the architecture does not say how many cores there are.
CORES = 8


@dataclass(frozen=True)
class Plan:
    """How a kernel is cut: its tiles, register blocking, and pieces a tile's keys may be cut in."""

    tile: Tile
    blocking: Blocking
    pieces: int
    copy: bool


def members(task: Task) -> list[Member]:
    """Return the selections that a task reads, driving ones and looked-up ones."""
    found = []
    for member, _ in task.lists:
        assert isinstance(member, Member)
        found.append(member)
    return found


def shared_heads(task: AttendTask | SelectTask) -> int:
    """Return how many neighbouring query heads share their key head and every list."""
    heads = task.group
    lists = dict(task.lists)
    for member in members(task):
        for stored, key in zip(lists[member].keys, member.keys[:-1], strict=True):
            if not mentions(stored, Head):
                continue
            match key:
                case Head():
                    divisor = 1
                case Apply("floordiv", (Head(), Const(int(divisor)))):
                    pass
                case _ if not mentions(key, Head):
                    continue
                case _:
                    divisor = 1
            while heads > 1 and divisor % heads:
                heads = max(n for n in range(1, heads) if heads % n == 0)
    return heads


def token_lists(task: AttendTask) -> bool:
    """Tell whether a selection that drives the iteration differs between the queries."""
    lists = dict(task.lists)
    keys = [c.keys for s in task.sources for c in s.clauses if c.keys is not None]
    return any(k.slash or not shared(lists[k.member]) for k in keys)


class AttendKernel:
    """Emits the function of one task into the current builder frame."""

    def __init__(self, task: AttendTask, plan: Plan, arch: Arch) -> None:
        self.task, self.plan, self.arch = task, plan, arch
        self.tile = plan.tile
        self.lists: dict[Expr, Lists] = dict(task.lists)
        self.tables = dict(task.tables)
        self.dim = sum(p.size for p in task.sources[0].v.parts)
        # Without a mod the scale is part of the exponent's rate; a mod needs it before.
        self.scaled = task.mod is not None or task.scale <= 0
        self.natural = 1.0 if self.scaled else task.scale
        self.rate = self.natural * LOG2E
        self.state_size = self.tile.rows * (self.dim + 2)

    def emit(self) -> None:
        """Declare the arguments and emit the loops."""
        self.arguments = declare(self.task)
        count = T.bind(tiles(self.arguments, self.tile.tokens))
        groups = self.task.q.heads // self.tile.heads
        items = T.bind(count * groups)
        if self.plan.pieces == 1:
            with T.parallel(items) as n:
                self._item(fold(n, items), count, None, None, None)
            return
        pieces = T.bind(cast(self._pieces(groups), "int64"))
        several = pieces > 1
        size = select(several, items * pieces * self.state_size, const(1, "int64"))
        with workspace(size, "float32") as parts:
            with T.parallel(items * pieces) as n:
                item = T.bind(fold(n % items, items))
                piece = T.bind(n // items)
                self._item(item, count, cast(piece, "int32"), cast(pieces, "int32"), parts)
            with T.If(several), T.Then(), T.parallel(items) as n:
                self._merge(fold(n, items), count, pieces, parts)

    def _pieces(self, groups: int) -> Value:
        """Return in how many pieces to cut keys so that every core has work (int32)."""
        cores = self.arch.cores or CORES
        real = cell("int64", const(0, "int64"))
        tokens = self.tile.tokens
        with T.serial(self.arguments.batch) as b:
            n_q = load(self.arguments.cu_q, b + 1) - load(self.arguments.cu_q, b)
            put(real, get(real) + cast((n_q + (tokens - 1)) // tokens, "int64") * groups)
        work = T.bind(maximum(get(real), const(1, "int64")))
        # Cut as little as makes the rounds of all cores even; with many tiles they are anyway.
        best = cell("int32", const(1, "int32"))
        with T.If(work < 4 * cores), T.Then():
            least = cell("int64", const(2**40, "int64"))
            with T.serial(self.plan.pieces) as p:
                # Time of a tile's keys cut in p + 1, in units that also charge for a cut.
                rounds = (work * (p + 1) + (cores - 1)) // cores
                time = T.bind(rounds * 64 * 60 // (p + 1) + p * 64)
                with T.If(time < get(least)), T.Then():
                    put(least, cast(time, "int64"))
                    put(best, cast(p + 1, "int32"))
        return get(best)

    def _item(
        self,
        item: Value,
        count: Value,
        piece: Value | None,
        pieces: Value | None,
        parts: Memory | None,
    ) -> None:
        sequence, first = find_tile(self.arguments, self.tile.tokens, item % count)
        with T.If(first < sequence.n_q), T.Then():
            head = T.bind(cast(item // count, "int32") * self.tile.heads)
            pass_ = Pass(self, sequence, first, head, piece, pieces)
            state = pass_.run()
            if parts is None:
                pass_.finish(state)
                return
            assert pieces is not None
            assert piece is not None
            with T.If(pieces > 1):
                with T.Then():
                    self._save(state, parts, (item * cast(pieces, "int64") + piece))
                with T.Else():
                    pass_.finish(state)

    def _save(self, state: State, parts: Memory, place: Value) -> None:
        at = T.bind(place * self.state_size)
        width = self.tile.width
        for memory, size in self._state_arrays(state):
            with T.serial(size // width) as n:
                store(parts, load(memory, n * width, lanes=width), at + n * width)
            at = at + size

    def _state_arrays(self, state: State) -> list[tuple[Memory, int]]:
        rows = self.tile.rows
        return [(state.peak, rows), (state.total, rows), (state.out, rows * self.dim)]

    def _merge(self, item: Value, count: Value, pieces: Value, parts: Memory) -> None:
        """Combine the pieces of a tile and write its outputs."""
        sequence, first = find_tile(self.arguments, self.tile.tokens, item % count)
        tile, width = self.tile, self.tile.width
        with T.If(first < sequence.n_q), T.Then():
            head = T.bind(cast(item // count, "int32") * tile.heads)
            pass_ = Pass(self, sequence, first, head, None, None)
            state = State.start(tile, self.plan.blocking, self.dim)
            by = const(self.rate, "float32", width)
            with T.serial(pieces) as piece:
                at = T.bind((item * pieces + piece) * self.state_size)
                with T.serial(tile.rows // width) as n:
                    v = n * width
                    old = T.bind(load(state.peak, v, lanes=width))
                    new = T.bind(load(parts, at + v, lanes=width))
                    peak = T.bind(maximum(old, new))
                    keep = T.bind(exp2((old - peak) * by, self.arch))
                    add = T.bind(exp2((new - peak) * by, self.arch))
                    total = load(state.total, v, lanes=width) * keep
                    total = total + load(parts, at + tile.rows + v, lanes=width) * add
                    store(state.peak, peak, v)
                    store(state.total, total, v)
                    to = T.bind(tile.place(n, self.dim, 0))
                    with T.serial(self.dim) as d:
                        o = to + d * tile.lanes
                        part = load(parts, at + 2 * tile.rows + o, lanes=width) * add
                        store(state.out, load(state.out, o, lanes=width) * keep + part, o)
            pass_.finish(state)


def fold(n: Value, count: Value) -> Value:
    """Visit items from both ends in turn, so that equal shares of `n` are equal work.

    Threads take consecutive shares, and causal work grows with the position.
    """
    return T.bind(count - 1 - n)
