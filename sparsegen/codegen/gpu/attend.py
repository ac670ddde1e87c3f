"""Emit an attend kernel on mma.sync: a block per tile of rows, keys in chunks of shared memory.

for each tile of (query, head) rows                        (blocks)
    queries into shared memory
    for each source, for each clause, for each chunk of keys that holds some
        keys and values into shared memory
        scores, score mod, masks, online softmax, weighted values       (fragments)
    outputs
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.codegen.cpu.attend import shared_heads, token_lists
from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_tile
from sparsegen.codegen.cpu.stream import Bounds, cell, get, pin, put
from sparsegen.codegen.cpu.vec import LOG2E
from sparsegen.codegen.gpu import mma
from sparsegen.codegen.gpu.launch import Place, across, launch, sync
from sparsegen.codegen.gpu.mma import PAD, Panel
from sparsegen.codegen.gpu.outputs import DOWNWARD, FAST, FINITE, UPWARD, Outputs, part_of
from sparsegen.codegen.gpu.tiles import Loader, inside
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.gpu.walk import walk
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
    scratch,
    select,
    store,
)
from sparsegen.ir.expr import TRUE
from sparsegen.lowering.tasks import AttendTask, Clause, KeySource, Rows

# A score that is not there, and the running maximum before any score: exp2 of their difference is
# exactly 0.
HIDDEN = -1e30
NO_SCORE = -1e29


@dataclass(frozen=True)
class Shape:
    """How a kernel is cut.

    tokens, heads  rows of a tile: `tokens` by `heads`, at most 16 * row_warps
    row_warps      warps along the rows, 16 rows each
    columns        warps along the elements of the values
    keys           keys of a chunk
    """

    tokens: int
    heads: int
    row_warps: int
    columns: int
    keys: int

    @property
    def rows(self) -> int:
        """Return the rows of a tile, those that stand for nothing too."""
        return 16 * self.row_warps

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return 32 * self.row_warps * self.columns


def rounded(n: int, step: int) -> int:
    """Return the next multiple of `step`."""
    return -(-n // step) * step


def dtype_of(task: AttendTask) -> str | None:
    """Return the type that tensor cores multiply: that of the 16-bit inputs; None without any."""
    operands = [task.q, *(x for s in task.sources for x in (s.k, s.v))]
    found = {p.buffer.dtype for o in operands for p in o.parts} - {"float32"}
    return "bfloat16" if "bfloat16" in found else next(iter(found), None)


def shared_bytes(task: AttendTask, shape: Shape) -> int:
    """Return the shared memory a block takes."""
    deep = rounded(task.q.dim, 16) + PAD
    wide = rounded(task.sources[0].v.dim, 16 * shape.columns) + PAD
    values = 0 if all(inside(s.v, s.k) is not None for s in task.sources) else wide
    return 2 * (shape.rows * deep + shape.keys * (deep + values)) + 4 * shape.keys + 16


class AttendKernel:
    """Emits the function of one task into the current builder frame."""

    def __init__(self, task: AttendTask, shape: Shape, arguments: Arguments) -> None:
        self.task, self.shape, self.arguments = task, shape, arguments
        found = dtype_of(task)
        assert found is not None
        self.dtype = found
        self.deep = rounded(task.q.dim, 16)
        self.dim = task.sources[0].v.dim
        self.wide = rounded(self.dim, 16 * shape.columns)
        self.width = self.wide // shape.columns
        self.prefix = all(inside(s.v, s.k) is not None for s in task.sources)
        # Without a mod the scale is part of the exponent's rate; a mod needs it before.
        self.scaled = task.mod is not None or task.scale <= 0
        self.natural = 1.0 if self.scaled else task.scale
        self.rate = self.natural * LOG2E

    def emit(self) -> None:
        """Emit the launch and the body."""
        task, shape = self.task, self.shape
        groups = task.q.heads // shape.heads
        tiles = T.bind(self.arguments[task.o].rows // shape.tokens + self.arguments.batch)
        place = launch(tiles * groups, shape.threads)
        # Causal work grows with the position: the longest tiles start first.
        tile = T.bind(tiles - 1 - place.block // groups)
        sequence, first = find_tile(self.arguments, shape.tokens, tile)
        with T.If(first < sequence.n_q), T.Then():
            head = T.bind(cast(place.block % groups, "int32") * shape.heads)
            Tile(self, place, sequence, first, head).run()


class Tile:
    """The work of one block."""

    def __init__(
        self, kernel: AttendKernel, place: Place, sequence: Sequence, first: Value, head: Value
    ) -> None:
        self.kernel, self.task, self.shape = kernel, kernel.task, kernel.shape
        self.place, self.sequence, self.first, self.head = place, sequence, first, head
        shape = self.shape
        tokens = const(shape.tokens, "int32")
        self.present = T.bind(minimum(tokens, sequence.n_q - first))
        self.i_min = T.bind(sequence.q_off + first)
        self.view = ThreadView(self.task, kernel.arguments, sequence, self.i_min, self.present)
        self.lane = place.lane
        self.row = T.bind(place.warp % shape.row_warps * 16)
        self.column = T.bind(place.warp // shape.row_warps * kernel.width)
        self.loader = Loader(kernel.arguments, place.thread, shape.threads, kernel.dtype)
        self._allocate()

    def _allocate(self) -> None:
        kernel, shape = self.kernel, self.shape
        pool = T.SMEMPool()
        pitch, wide = kernel.deep + PAD, kernel.wide + PAD

        def panel(rows: int, pitch: int) -> Panel:
            return Panel(pool.alloc((rows * pitch,), kernel.dtype, align=16), pitch)

        self.queries = panel(shape.rows, pitch)
        self.keys = panel(shape.keys, pitch)
        self.values = None if kernel.prefix else panel(shape.keys, wide)
        self.position = pool.alloc((shape.keys,), "int32", align=16)
        # In shared memory, for it is asked seldom, and registers are short.
        self.mode = pool.alloc((1,), "int32", align=16)
        pool.commit()
        self.scores = scratch(shape.keys // 2, "float32")
        self.out = scratch(kernel.width // 2, "float32")
        self.peak, self.total = scratch(2, "float32"), scratch(2, "float32")
        self.a, self.b = scratch(4, "uint32"), scratch(4, "uint32")
        put(self.mode, FAST)

    def run(self) -> None:
        """Attend to every key and write the outputs."""
        shape, kernel = self.shape, self.kernel
        # Columns beside the operands, and rows of no query, count as zeros.
        self.loader.zero(self.queries, shape.rows * self.queries.pitch)
        self.loader.zero(self.keys, shape.keys * self.keys.pitch)
        if self.values is not None:
            self.loader.zero(self.values, shape.keys * self.values.pitch)
        sync()
        self.loader.fill(self.queries, shape.rows, self.task.q, self._query)
        mma.copies_done()
        again = cell("int32", const(1, "int32"))
        with T.While(get(again) > 0):
            mma.clear(self.out, kernel.width // 2)
            mma.clear(self.peak, 2, NO_SCORE)
            mma.clear(self.total, 2)
            for source in self.task.sources:
                for clause in source.clauses:
                    self._walk(source, clause)
            self._settle(again)

    def _settle(self, again: Memory) -> None:
        """Write the outputs, or what is known of them before the next pass."""
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

    # --- rows -----------------------------------------------------------------------------------

    def _token(self, row: Value) -> Value:
        """Return the local token of a row; that of the last one where there is none."""
        return minimum(row // self.shape.heads, self.present - 1)

    def _query(self, r: Value, rows: Rows) -> tuple[Value, Value, Value]:
        there = r < self.present * self.shape.heads
        position = T.bind(self.i_min + self._token(r))
        if rows.space == "entry":
            position = T.bind(self.first + self._token(r))
        return there, self.sequence.row(rows, position), self.head + r % self.shape.heads

    # --- keys -----------------------------------------------------------------------------------

    def _walk(self, source: KeySource, clause: Clause) -> None:
        key_head = T.bind(self.head // self.task.group)

        def chunk(bounds: Bounds, first: Value, count: Value) -> None:
            self._chunk(source, clause, bounds, key_head)

        walk(
            self.view, clause, source.k.rows, self.head, self.position, self.shape.keys,
            T.bind(self.place.thread), self.shape.threads, chunk,
        )  # fmt: skip

    def _chunk(self, source: KeySource, clause: Clause, bounds: Bounds, key_head: Value) -> None:
        shape = self.shape

        def key(r: Value, rows: Rows) -> tuple[Value, Value, Value]:
            j = T.bind(load(self.position, r))
            there = j >= 0
            row = self.sequence.row(rows, T.bind(maximum(j, const(0, "int32"))))
            return there, T.bind(row), key_head

        self.loader.fill(self.keys, shape.keys, source.k, key)
        values = self.values
        if values is None:
            column = inside(source.v, source.k)
            assert column is not None
            values = Panel(self.keys.memory, self.keys.pitch, column)
        else:
            self.loader.fill(values, shape.keys, source.v, key)
        mma.copies_done()
        sync()
        self._score()
        self._mask(clause, bounds)
        self._softmax()
        with T.If(T.Not(equal(get(self.mode), FAST))), T.Then():
            self._apart(values)
        self._weigh(values)

    def _score(self) -> None:
        shape = self.shape
        mma.clear(self.scores, shape.keys // 2)
        with T.unroll(self.kernel.deep // 16) as k:
            mma.load_a(self.queries, self.row, k * 16, self.lane, self.a)
            a = [self.a[n] for n in range(4)]
            with T.unroll(shape.keys // 16) as n:
                mma.load_b(self.keys, n * 16, k * 16, self.lane, self.b)
                for half in range(2):
                    low, high = self.b[2 * half], self.b[2 * half + 1]
                    mma.multiply(self.scores, n * 8 + half * 4, a, low, high, self.kernel.dtype)

    def _mask(self, clause: Clause, bounds: Bounds) -> None:
        """Apply the score mod, and hide what is not visible."""
        task, view = self.task, self.view
        rows = []
        for half in range(2):
            r = T.bind(self.row + self.lane // 4 + 8 * half)
            position = T.bind(self.i_min + self._token(r))
            rows.append((position, T.bind(self.head + r % self.shape.heads)))
        with T.unroll(self.shape.keys // 8) as n, T.unroll(2) as c:
            j = T.bind(load(self.position, n * 8 + self.lane % 4 * 2 + c))
            sure = T.bind(T.And(j >= bounds.sure_lo, j < bounds.sure_hi))
            for half, (query, head) in enumerate(rows):
                at = n * 4 + 2 * half + c
                if self.kernel.scaled:
                    score = T.bind(load(self.scores, at) * const(task.scale, "float32"))
                    if task.mod is not None:
                        score = view.number(task.mod, query, head, j, score)
                    low = const(HIDDEN, "float32")
                    store(self.scores, select(score < low, low, score), at)  # NaN stays
                if clause.residual != TRUE:
                    with T.If(T.And(j >= 0, T.Not(sure))), T.Then():
                        seen = view.value(clause.residual, query, head, j)
                        with T.If(T.Not(seen)), T.Then():
                            store(self.scores, const(HIDDEN, "float32"), at)
                with T.If(j < 0), T.Then():
                    store(self.scores, const(HIDDEN, "float32"), at)

    def _softmax(self) -> None:
        """Turn scores into weights, and shrink what was summed before."""
        rate = const(self.kernel.rate, "float32")
        for half in range(2):
            peak = cell("float32", load(self.peak, half))
            with T.unroll(self.shape.keys // 8) as n, T.unroll(2) as c:
                put(peak, maximum(get(peak), load(self.scores, n * 4 + (2 * half) + c)))
            top = T.bind(across(get(peak), maximum, 4))
            shrink = T.bind(T.exp2((load(self.peak, half) - top) * rate))
            store(self.peak, top, half)
            level = T.bind(top * rate)
            store(self.total, load(self.total, half) * shrink, half)
            with T.unroll(self.shape.keys // 8) as n, T.unroll(2) as c:
                at = n * 4 + (2 * half) + c
                weight = T.bind(T.exp2(load(self.scores, at) * rate - level))
                store(self.scores, weight, at)
                store(self.total, load(self.total, half) + weight, half)
            # Marks do not fade.
            marks = T.bind(get(self.mode) > FINITE)
            kept = T.bind(select(marks, const(1.0, "float32"), shrink))
            with T.unroll(self.kernel.width // 8) as n, T.unroll(2) as c:
                at = n * 4 + (2 * half) + c
                store(self.out, load(self.out, at) * kept, at)

    def _apart(self, values: Panel) -> None:
        """Replace values and weights by those of the pass; see `numbers`."""
        mode, shape = T.bind(get(self.mode)), self.shape
        sync()  # the values may be keys too
        columns = self.kernel.wide
        with T.serial(-(-shape.keys * columns // shape.threads)) as step:
            n = T.bind(step * shape.threads + self.place.thread)
            with T.If(n < shape.keys * columns), T.Then():
                at = T.bind(n // columns * values.pitch + (n % columns + values.first))
                x = T.bind(cast(load(values.memory, at), "float32"))
                store(values.memory, cast(part_of(x, mode), self.kernel.dtype), at)
        sync()
        with T.If(mode > FINITE), T.Then(), T.unroll(shape.keys // 2) as n:
            seen = T.bind(load(self.scores, n) > const(0.0, "float32"))
            store(self.scores, cast(seen, "float32"), n)

    def _weigh(self, values: Panel) -> None:
        dtype = self.kernel.dtype
        with T.unroll(self.shape.keys // 16) as k:
            for n, (tile, half) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
                at = k * 8 + tile * 4 + half * 2
                pair = mma.pack(load(self.scores, at), load(self.scores, at + 1), dtype)
                store(self.a, pair, n)
            a = [self.a[n] for n in range(4)]
            with T.unroll(self.kernel.width // 16) as n:
                mma.load_b_transposed(values, k * 16, self.column + n * 16, self.lane, self.b)
                for half in range(2):
                    low, high = self.b[2 * half], self.b[2 * half + 1]
                    mma.multiply(self.out, n * 8 + half * 4, a, low, high, dtype)


def shape_of(task: AttendTask, row_warps: int, keys: int) -> Shape:
    """Return a cut with so many warps along the rows, fewer where fewer rows share their keys."""
    heads = shared_heads(task)
    single = token_lists(task)
    rows = 16 * row_warps
    while heads > rows:
        heads = max(n for n in range(1, heads) if heads % n == 0)
    tokens = 1 if single else rows // heads
    warps = -(-tokens * heads // 16)
    columns = 1
    while rounded(task.sources[0].v.dim, 16 * columns) // columns > 128:
        columns *= 2
    return Shape(tokens, heads, warps, columns, keys)
