"""Emit an attend kernel on mma.sync: a block per tile of rows, keys in chunks of shared memory.

for each tile of (query, head) rows                        (blocks)
    queries into shared memory, or on into registers
    for each source, for each clause, for each chunk of keys that holds some
        start to copy the keys and values of a later chunk
        scores, score mod, masks, online softmax, weighted values       (fragments)
    outputs
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_tile
from sparsegen.codegen.cpu.stream import Bounds, cell, get, pin, put
from sparsegen.codegen.cpu.vec import LOG2E
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.attend_cut import (
    Shape,
    ahead,
    dtype_of,
    held,
    inner,
    packs,
    pitches,
    rounded,
    short,
    width_of,
)
from sparsegen.codegen.gpu.chunks import Chunks, Ring
from sparsegen.codegen.gpu.launch import Place, device, launch, sync
from sparsegen.codegen.gpu.masks import Mask
from sparsegen.codegen.gpu.membership import Maps
from sparsegen.codegen.gpu.mma import Panel
from sparsegen.codegen.gpu.outputs import DOWNWARD, FAST, FINITE, UPWARD, Outputs, part_of
from sparsegen.codegen.gpu.softmax import Exchange, Softmax
from sparsegen.codegen.gpu.spans import Spans
from sparsegen.codegen.gpu.tiles import Loader
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.tvm import (
    T,
    Value,
    cast,
    const,
    equal,
    load,
    maximum,
    minimum,
    select,
    store,
)
from sparsegen.lowering.tasks import AttendTask, Clause, KeySource, Rows


class AttendKernel:
    """Emits the function of one task into the current builder frame."""

    def __init__(
        self, task: AttendTask, shape: Shape, arguments: Arguments, maps: Maps | None = None,
        spans: Spans | None = None,
    ) -> None:  # fmt: skip
        self.task, self.shape, self.arguments = task, shape, arguments
        self.maps, self.spans = maps, spans
        found = dtype_of(task)
        assert found is not None
        self.dtype = found
        self.deep = rounded(task.q.dim, 16)
        self.dim = task.sources[0].v.dim
        self.width = width_of(task, shape.columns)
        self.wide = self.width * shape.columns
        self.held = held(task, shape)  # times 16 columns of the queries, in registers
        self.short, self.packs = short(task, shape), packs(task, shape)
        # Without a mod the scale is part of the exponent's rate; a mod needs it before.
        self.scaled = task.mod is not None or task.scale <= 0
        self.natural = 1.0 if self.scaled else task.scale
        self.rate = self.natural * LOG2E

    def emit(self) -> None:
        """Emit the launch and the body, after those that narrow ranges."""
        tiles = self.tiles()
        if self.spans is not None:
            self.spans.emit()
        with device():
            place = launch(self.blocks(tiles), self.shape.threads, entered=True)
            self.each(place, tiles, lambda *tile: Tile(self, place, *tile).run())

    def tiles(self) -> Value:
        """Return an upper bound of the tiles of tokens (int64)."""
        return T.bind(self.arguments[self.task.o].rows // self.shape.tokens + self.arguments.batch)

    def blocks(self, tiles: Value) -> Value:
        """Return the blocks that take so many tiles of tokens, one for each group of heads."""
        return tiles * (self.task.q.heads // self.shape.heads)

    def each(
        self, place: Place, tiles: Value, body: Callable[[Sequence, Value, Value], None]
    ) -> None:
        """Emit `body` for the tile of a block, if it has one: sequence, first token and head."""
        task, shape = self.task, self.shape
        # Blocks beside each other read the same keys, then those of one head.
        beside = max(task.group // shape.heads, 1)
        # Causal work grows with the position: the longest tiles start first.
        some = maximum(tiles, const(1, "int64"))
        tile = pin(tiles - 1 - place.block // beside % some)
        sequence, first = find_tile(self.arguments, shape.tokens, tile)
        with T.If(first < sequence.n_q), T.Then():
            group = place.block // (some * beside) * beside + place.block % beside
            head = pin(cast(group, "int32") * shape.heads)
            body(sequence, first, head)


class Tile:
    """The work of one block."""

    def __init__(
        self, kernel: AttendKernel, place: Place, sequence: Sequence, first: Value, head: Value
    ) -> None:
        self.kernel, self.task, self.shape = kernel, kernel.task, kernel.shape
        self.place, shape = place, kernel.shape
        self.lane = pin(place.lane)
        self.row = pin(place.warp % shape.row_warps * (16 * shape.tiles))
        self.part = pin(place.warp // shape.row_warps)
        self.column = pin(self.part * kernel.width)
        self.loader = Loader(kernel.arguments, place.thread, shape.threads, kernel.dtype)
        self._allocate()
        self.softmax = Softmax(self)
        put(self.mode, FAST)
        for n, x in enumerate((sequence.number, sequence.q_start, sequence.k_start)):
            store(self.wide, x, n)
        for n, x in enumerate((sequence.n_q, sequence.n_k, sequence.q_off, first, head)):
            store(self.narrow, x, n)

    def _enter(self) -> None:
        """Read what block this is from shared memory.

        So that nothing of it waits in registers between passes, nor for the outputs.
        """
        sync()
        number, q_start, k_start = (pin(load(self.wide, n)) for n in range(3))
        n_q, n_k, q_off, self.first, self.head = (pin(load(self.narrow, n)) for n in range(5))
        self.sequence = Sequence(self.kernel.arguments, number, q_start, k_start, n_q, n_k, q_off)
        self.present = pin(minimum(const(self.shape.tokens, "int32"), n_q - self.first))
        self.i_min = pin(q_off + self.first)
        self.view = ThreadView(
            self.task, self.kernel.arguments, self.sequence, self.i_min, self.present
        )

    def _allocate(self) -> None:
        kernel, shape, task = self.kernel, self.shape, self.task
        pool = T.SMEMPool()
        deep, wide, extra = pitches(task, shape.columns)

        def panel(rows: int, pitch: int, first: int = 0) -> Panel:
            return Panel(pool.alloc((rows * pitch,), kernel.dtype, align=128), pitch, first)

        self.queries = panel(shape.rows, deep)
        self.keys = panel(shape.stages * shape.keys, wide)
        found = inner(task)
        self.joint = found is not None
        if found is not None:
            self.values = Panel(self.keys.memory, wide, found[0])
        else:
            self.values = panel(shape.stages * shape.keys, extra)
        self.exchange = None
        if shape.columns > 1:
            self.exchange = Exchange(self, pool)
        self.ring = Ring.allocate(pool, task, shape.keys, ahead(task, shape.stages) + 1)
        # In shared memory, for they are asked seldom, and registers are short.
        self.mode, self.again = (pool.alloc((1,), "int32", align=4) for _ in range(2))
        self.wide = pool.alloc((3,), "int64", align=8)
        self.narrow = pool.alloc((5,), "int32", align=4)
        self.ends = pool.alloc((2,), "int32", align=4)
        pool.commit()

    def run(self) -> None:
        """Attend to every key and write the outputs."""
        self._zero()
        self._enter()
        self.loader.fill(self.queries, self.shape.rows, self.task.q, self._query)
        mma.copies_started()
        if self.kernel.held:
            mma.copies_done()
            sync()
            self.softmax.hold()
        again = self.again
        put(again, const(1, "int32"))
        with T.While(get(again) > 0):
            self._enter()
            self.softmax.clear()
            clauses = ((s, c) for s in self.task.sources for c in s.clauses)
            for n, (source, clause) in enumerate(clauses):
                spans = self.kernel.spans
                bounds = None if spans is None else spans.bounds(self.sequence, self.first, 0, n)
                self._walk(source, clause, bounds)
            self.softmax.finish()
            self._settle()

    def _zero(self) -> None:
        """Make zeros of columns beside the operands: they take part in products."""
        shape, task = self.shape, self.task
        panels = [(self.queries, shape.rows, task.q.dim)]
        panels += [(self.keys, shape.stages * shape.keys, s.k.dim) for s in task.sources[:1]]
        if not self.joint:
            panels.append((self.values, shape.stages * shape.keys, self.kernel.dim))
        wanting = [(panel, rows) for panel, rows, dim in panels if dim < panel.pitch]
        for panel, rows in wanting:
            self.loader.zero(panel, rows * panel.pitch)
        if wanting:
            sync()

    def _settle(self) -> None:
        """Write the outputs, or what is known of them before the next pass."""
        self._enter()
        again = self.again
        outputs = Outputs(self)
        mode = pin(get(self.mode))
        sync()
        with T.If(T.Or(equal(mode, FAST), equal(mode, FINITE))):
            with T.Then():
                put(again, const(0, "int32"))
                with T.If(equal(mode, FAST)), T.Then():
                    wrong = T.bind(outputs.any_not_finite())
                    put(again, cast(T.cuda.syncthreads_or(wrong), "int32"))
                with T.If(get(again) > 0):
                    with T.Then():
                        put(self.mode, UPWARD)
                    with T.Else():
                        outputs.write(mode)
            with T.Else():
                outputs.mark(mode)
                put(self.mode, select(equal(mode, UPWARD), DOWNWARD, FINITE))
        # All write the same, and none reads before.
        sync()

    # --- rows -----------------------------------------------------------------------------------

    def queries_at(self) -> tuple[Value, Value, Value]:
        """Return the position of the first query, the last token, and the first head.

        From shared memory, so that what follows from them does not wait in registers either.
        """
        n_q, q_off, first, head = (pin(load(self.narrow, n)) for n in (0, 2, 3, 4))
        last = minimum(const(self.shape.tokens - 1, "int32"), n_q - first - 1)
        return pin(q_off + first), pin(last), head

    def _query(self, r: Value, rows: Rows) -> tuple[Value, Value, Value]:
        there = r < self.present * self.shape.heads
        token = pin(minimum(r // self.shape.heads, self.present - 1))
        position = pin((self.first if rows.space == "entry" else self.i_min) + token)
        return there, self.sequence.row(rows, position), self.head + r % self.shape.heads

    # --- keys -----------------------------------------------------------------------------------

    def _walk(self, source: KeySource, clause: Clause, bounds: Bounds | None) -> None:
        """Visit the chunks of a clause; copies of later ones go on meanwhile.

        Args:
            bounds: of a range, where they are known.
        """
        shape = self.shape
        chunks = Chunks(
            self.view, source, clause, self.head, self.ring, shape.keys,
            self.place.thread, shape.threads, self.ends, lean=self.kernel.short, bounds=bounds,
        )  # fmt: skip
        lead, head = ahead(self.task, shape.stages), pin(self.head // self.task.group)
        mask = Mask(self, source, clause, chunks)
        split = shape.stages == 1 and not self.joint
        if chunks.ring is not None:
            for n in range(lead):
                chunks.find(const(n, "int32"))
                chunks.publish(const(n, "int32"))
            sync()

        def copy(chunk: Value, *, keys: bool = True, values: bool = True) -> None:
            with _if(chunk < chunks.number), _if(_present(chunks, chunk)):
                stage = pin(chunk % shape.stages)
                locate = chunks.locate(chunk, head)
                if keys:
                    panel = self.keys.at(stage * (shape.keys * self.keys.pitch))
                    self.loader.fill(panel, shape.keys, source.k, locate)
                if values and not self.joint:
                    panel = self.values.at(stage * (shape.keys * self.values.pitch))
                    self.loader.fill(panel, shape.keys, source.v, locate)
            mma.copies_started()

        for n in range(1 if split else shape.stages - 1):
            copy(const(n, "int32"), values=not split)
        step = cell("int32", const(0, "int32"))
        with T.While(get(step) < chunks.number):
            chunk = pin(get(step))
            chunks.find(chunk + lead)
            if shape.stages == 1 and not split:
                copy(chunk)
            mma.copies_done(max(shape.stages - 2, 0))
            sync()
            if split:
                copy(chunk, keys=False)
            elif shape.stages > 1:
                copy(pin(chunk + (shape.stages - 1)))
            some = _present(chunks, chunk)
            base = pin(chunk % shape.stages * shape.keys)
            with _if(some):
                if mask.pairwise:
                    with T.If(chunks.masked(chunk) > 0), T.Then():
                        mask.look(chunk)
                self.softmax.score(base * self.keys.pitch)
            if split:
                mma.copies_done()
                sync()
                copy(pin(chunk + 1), values=False)
            with _if(some):
                mask.modify(chunk)
                with T.If(chunks.masked(chunk) > 0), T.Then():
                    mask.apply(chunk)
                self._add(base * self.values.pitch)
            chunks.publish(chunk + lead)
            if shape.stages == 1 and not split:
                sync()
            put(step, chunk + 1)
        mma.copies_done()
        sync()

    def _add(self, base: Value) -> None:
        """Add the values of a chunk by its scores."""
        self.softmax.normalize()
        if self.kernel.packs:
            with T.If(get(self.mode) > FINITE), T.Then():
                self.softmax.mark()
            self.softmax.pack()
        with T.If(T.Not(equal(get(self.mode), FAST))), T.Then():
            self._apart(self.values.at(base))
        self.softmax.share()
        self.softmax.weigh(base)

    def _apart(self, values: Panel) -> None:
        """Replace values and weights by those of the pass; see `outputs`."""
        mode, shape, wide = pin(get(self.mode)), self.shape, self.kernel.wide
        sync()  # the values may be keys too
        with T.serial(-(-shape.keys * wide // shape.threads)) as step:
            n = pin(step * shape.threads + self.place.thread)
            with T.If(n < shape.keys * wide), T.Then():
                at = pin(values.index(n // wide, n % wide))
                x = T.bind(cast(load(values.memory, at), "float32"))
                store(values.memory, cast(part_of(x, mode), self.kernel.dtype), at)
        sync()
        if not self.kernel.packs:
            with T.If(mode > FINITE), T.Then():
                self.softmax.mark()


def _present(chunks: Chunks, chunk: Value) -> Value | None:
    some = chunks.some(chunk)
    return None if some is None else some > 0


def _if(condition: Value | None) -> AbstractContextManager[object]:
    """Emit the body under a condition, if there is one."""
    return nullcontext() if condition is None else _Branch(condition)


class _Branch:
    """An `if` without an `else`."""

    def __init__(self, condition: Value) -> None:
        self.frames = (T.If(condition), T.Then())

    def __enter__(self) -> None:
        for frame in self.frames:
            frame.__enter__()

    def __exit__(self, *error: object) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*error)
