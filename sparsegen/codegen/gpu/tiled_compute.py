"""Compute `tiled` attention: scores, weights and sums of 64 rows, by each warp group for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.cpu.vec import LOG2E, load_f32
from sparsegen.codegen.gpu import mma, wgmma
from sparsegen.codegen.gpu.launch import FULL, across, add
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.ring import Cursor
from sparsegen.codegen.gpu.tiled_cut import (
    CLAUSE_BIT,
    MASKED,
    ROWS,
    SKIP,
    member_words,
)
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import (
    Memory,
    T,
    Value,
    cast,
    const,
    equal,
    load,
    maximum,
    scratch,
    select,
    store,
)
from sparsegen.ir.expr import TRUE

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel

NEVER = float("-inf")
LOW = -1e30  # a maximum before any score
LN2 = 0.6931471805599453
_ONCE = """
__device__ __forceinline__ int sparsegen_exchange(int* p, int x) { return atomicExch(p, x); }
"""


@dataclass(frozen=True)
class _Chunk:
    """A chunk: its first key, its clause, and where lists have one, whether the two rows list it."""

    start: Value
    number: Value
    seen: list[Value] | None


class Compute:
    """A warp group that computes."""

    def __init__(self, kernel: TiledKernel) -> None:
        self.kernel, self.cut, self.task = kernel, kernel.cut, kernel.task
        self.group, self.warp, self.lane = kernel.group, kernel.warp, kernel.lane
        cut = self.cut
        self.out = scratch(kernel.dim // 2, "float32")
        self.scores = scratch(cut.keys // 2, "float32")
        self.weights = scratch(cut.keys // 4, "uint32")
        self.resident = scratch(max(16 * cut.resident, 1), "uint32")
        self.peak, self.total, self.shrink = (scratch(2, "float32") for _ in range(3))
        self.moved = cell("int32", const(0, "int32"))
        self.at, self.before = Cursor(cut.stages), cell("int32", const(0, "int32"))
        self.before_parity = cell("int32", const(0, "int32"))
        self.item_at = Cursor(cut.queries)
        self.turn, self.left, self.held = (cell("int32", const(0, "int32")) for _ in range(3))
        self.status = cell("int32", const(SKIP, "int32"))
        first = self.group * (ROWS * self.task.q.dim)
        zero = const(0, "int32")
        self.q = wgmma.descriptor(wgmma.ALONG, kernel.queries.ptr_to([first]))
        self.k = wgmma.descriptor(wgmma.ALONG, kernel.keys.ptr_to([zero]))
        self.v = wgmma.descriptor(wgmma.across(cut.keys), kernel.values.ptr_to([zero]))

    def run(self) -> None:
        """Emit the loop over items."""
        kernel = self.kernel
        going = cell("int32", const(1, "int32"))
        with T.While(get(going) > 0):
            kernel.item_ready.wait(self.item_at)
            base = T.bind(get(self.turn) % kernel.info_slots * kernel.info_words)
            put(going, self._uniform(kernel.fact(base, "there")))
            with T.If(get(going) > 0), T.Then():
                self._item(base)
                self.item_at.advance()
                put(self.turn, get(self.turn) + 1)

    def _item(self, base: Value) -> None:
        kernel, cut = self.kernel, self.cut
        sequence = kernel.sequence(base)
        self.base, self.head = base, kernel.fact(base, "head")
        self.view, self.present = kernel.group_view(
            sequence, kernel.fact(base, "first"), self.group
        )
        self.rows = [T.bind(self.warp * 16 + self.lane // 4 + 8 * half) for half in range(2)]
        put(self.left, self._uniform(kernel.fact(base, "chunks")))
        put(self.held, const(1, "int32"))
        for n in range(kernel.dim // 2):
            store(self.out, const(0.0, "float32"), n)
        for half in range(2):
            store(self.peak, const(LOW, "float32"), half)
            store(self.total, const(0.0, "float32"), half)
        if cut.resident:
            self._load_resident()
        with T.While(get(self.left) > 0):
            self._peek()
            with T.If(get(self.status) > 0):
                with T.Then():
                    if cut.ahead:
                        self._run_ahead()
                    else:
                        self._one()
                with T.Else():
                    self._skip()
        self._finish(sequence)

    # --- chunks ---------------------------------------------------------------------------------

    def _peek(self) -> None:
        """Wait for the keys of the next chunk, if there is one, and see what to do with it."""
        kernel = self.kernel
        put(self.status, const(SKIP, "int32"))
        with T.If(get(self.left) > 0), T.Then():
            kernel.keys_ready.wait(self.at)
            word = self._uniform(load(kernel.meta, self.at.stage * kernel.meta_words + 1))
            mine = T.bitwise_and(T.shift_right(word, 2 * self.group), const(3, "int32"))
            put(self.status, mine)

    def _next(self) -> None:
        self.at.advance()
        put(self.left, get(self.left) - 1)

    def _skip(self) -> None:
        kernel = self.kernel
        # Values of the stage must not be asked for again before the last reader has them.
        kernel.values_ready.wait(self.at)
        self._release(kernel.keys_free, self.at.stage)
        self._release(kernel.values_free, self.at.stage)
        self._next()

    def _one(self) -> None:
        """Take the chunk at hand, from scores to sums."""
        kernel = self.kernel
        chunk = self._read()
        wgmma.begin()
        self._score(clear=True)
        wgmma.commit()
        wgmma.wait(0)
        wgmma.hold(self.scores, self.cut.keys // 2)
        self._scored()
        if chunk.seen is None:
            self._weigh_rows(chunk)
        else:
            with T.If(self._any(T.Or(*chunk.seen))):
                with T.Then():
                    self._weigh_rows(chunk)
                with T.Else():
                    for n in range(self.cut.keys // 4):
                        store(self.weights, const(0, "uint32"), n)
        kernel.values_ready.wait(self.at)
        self._hold()
        wgmma.begin()
        self._sum(self.at.stage)
        wgmma.commit()
        wgmma.wait(0)
        self._hold()
        self._release(kernel.values_free, self.at.stage)
        self._next()

    def _weigh_rows(self, chunk: _Chunk) -> None:
        self._hide(chunk)
        self._softmax()
        self._shrink_sums()
        self._pack()

    def _run_ahead(self) -> None:
        """Take chunks as long as they are wanted, each one's scores beside the last one's sums."""
        kernel = self.kernel
        chunk = self._read()
        wgmma.begin()
        self._score(clear=True)
        wgmma.commit()
        wgmma.wait(0)
        wgmma.hold(self.scores, self.cut.keys // 2)
        self._scored()
        self._hide(chunk)
        self._softmax()
        self._shrink_sums()
        self._pack()
        self._remember()
        self._next()
        self._peek()
        with T.While(get(self.status) > 0):
            # Before any product: no wait may stand between the products of one group.
            self._wait_values()
            chunk = self._read()
            self._hold()
            wgmma.begin()
            self._score(clear=True)
            wgmma.commit()
            self._sum(get(self.before))
            wgmma.commit()
            wgmma.wait(1)
            wgmma.hold(self.scores, self.cut.keys // 2)
            self._scored()
            self._hide(chunk)
            self._softmax()
            wgmma.wait(0)
            self._hold()
            self._release(kernel.values_free, get(self.before))
            self._shrink_sums()
            self._pack()
            self._remember()
            self._next()
            self._peek()
        self._wait_values()
        self._hold()
        wgmma.begin()
        self._sum(get(self.before))
        wgmma.commit()
        wgmma.wait(0)
        self._hold()
        self._release(kernel.values_free, get(self.before))

    def _give_queries_back(self) -> None:
        with T.If(get(self.held) > 0), T.Then():
            self._release(self.kernel.item_free, self.item_at.stage)
            put(self.held, const(0, "int32"))

    def _scored(self) -> None:
        """Give back what the scores were made of."""
        self._release(self.kernel.keys_free, self.at.stage)
        with T.If(get(self.left) < 2), T.Then():
            self._give_queries_back()

    def _remember(self) -> None:
        put(self.before, self.at.stage)
        put(self.before_parity, self.at.parity)

    def _wait_values(self) -> None:
        pointer = self.kernel.values_ready.pointer(get(self.before))
        T.evaluate(T.cuda.mbarrier_wait(pointer, get(self.before_parity)))

    def _release(self, ring: object, stage: Value) -> None:
        with T.If(self.lane < 1), T.Then():
            ring.arrive(stage)  # type: ignore[attr-defined]

    def _hold(self) -> None:
        wgmma.hold(self.out, self.kernel.dim // 2)

    # --- products -------------------------------------------------------------------------------

    def _score(self, *, clear: bool) -> None:
        """Start the products of queries and the keys of the stage at hand."""
        cut, dim = self.cut, self.task.q.dim
        stage = cast(self.at.stage, "uint64") * const(cut.keys * dim * 2 >> 4, "uint64")
        # A compiler that knows the descriptors keeps one per product in registers, and spills.
        q, k = wgmma.opaque(self._queries()), wgmma.opaque(self.k + stage)
        for panel in range(dim // 64):
            for depth in range(4):
                b = k + const((panel * cut.keys * 128 + depth * 32) >> 4, "uint64")
                if panel < cut.resident:
                    n = 16 * panel + 4 * depth
                    a: Value | list[Value] = [self.resident[n + i] for i in range(4)]
                else:
                    a = q + const((panel * TILE * 2 + depth * 32) >> 4, "uint64")
                wgmma.product(self.scores, cut.keys, a, b, self.kernel.dtype, clear=clear)
                clear = False

    def _queries(self) -> Value:
        """Return the descriptor of the queries at hand."""
        if self.cut.queries == 1:
            return self.q
        size = self.cut.groups * ROWS * self.task.q.dim * 2 >> 4
        return self.q + cast(self.item_at.stage, "uint64") * const(size, "uint64")

    def _sum(self, stage: Value) -> None:
        """Start the products of weights and the values of a stage."""
        cut, dim = self.cut, self.kernel.dim
        step = cast(stage, "uint64") * const(cut.keys * dim * 2 >> 4, "uint64")
        v = wgmma.opaque(self.v + step)
        for depth in range(cut.keys // 16):
            a = [self.weights[4 * depth + i] for i in range(4)]
            b = v + const(depth * 16 * 128 >> 4, "uint64")
            wgmma.product(self.out, dim, a, b, self.kernel.dtype, b_across=True)

    def _load_resident(self) -> None:
        """Load the first panels of the queries as A operands."""
        row = T.bind(self.warp * 16 + self.lane % 16)
        for panel in range(self.cut.resident):
            for depth in range(4):
                piece = 2 * depth + self.lane // 16
                group = self.item_at.stage * self.cut.groups + self.group
                at = (group * (self.task.q.dim // 64) + panel) * TILE
                pointer = self.kernel.queries.ptr_to([at + wgmma.swizzled(row, piece)])
                n = 16 * panel + 4 * depth
                registers = [self.resident[n + i] for i in range(4)]
                ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *registers, pointer)

    # --- scores ---------------------------------------------------------------------------------

    def _token(self, half: int) -> Value:
        """Return the token of a row, in its warp group; of whole warps where heads allow it."""
        if self.cut.heads % 16 == 0:
            return T.bind(self.warp * 16 // self.cut.heads)
        return T.bind(self.rows[half] // self.cut.heads)

    def _read(self) -> _Chunk:
        """Read what the feed tells about the chunk at hand, before its keys are given back."""
        kernel, words = self.kernel, member_words(self.cut)
        meta = T.bind(self.at.stage * kernel.meta_words)
        start = T.bind(load(kernel.meta, meta))
        number = T.bind(T.shift_right(load(kernel.meta, meta + 1), CLAUSE_BIT))
        if not kernel.listed:
            return _Chunk(start, number, None)
        found = []
        for half in range(1 if self.cut.heads % 16 == 0 else 2):
            token = self._token(half)
            word = load(kernel.meta, meta + 2 + (self.group * words + token // 32))
            bit = T.bitwise_and(T.shift_right(word, token % 32), const(1, "int32")) > 0
            # In a range, all rows take part.
            for n, (_, clause) in enumerate(kernel.clauses):
                if clause.keys is None:
                    bit = T.Or(bit, equal(number, const(n, "int32")))
            found.append(T.bind(bit))
        return _Chunk(start, number, (found * 2)[:2])

    def _hide(self, chunk: _Chunk) -> None:
        """Apply the score mod, and hide what rows do not see."""
        kernel = self.kernel
        if kernel.scaled:
            self._modify(chunk.start)
        with T.If(equal(get(self.status), const(MASKED, "int32"))), T.Then():
            for n in range(len(kernel.clauses)):
                if len(kernel.clauses) == 1:
                    self._mask(n, chunk.start)
                else:
                    with T.If(equal(chunk.number, const(n, "int32"))), T.Then():
                        self._mask(n, chunk.start)
        # Where a warp is one token, and takes chunks one by one, it has left out what it skips.
        if chunk.seen is not None and not (self.cut.heads % 16 == 0 and not self.cut.ahead):
            with T.If(T.Not(T.And(*chunk.seen))), T.Then():
                for n, half, _ in self._elements():
                    hidden = const(NEVER, "float32")
                    store(self.scores, select(chunk.seen[half], load(self.scores, n), hidden), n)

    def _elements(self) -> list[tuple[int, int, int]]:
        """Return the registers of scores: their number, half of the rows, and key of a group of 8."""
        return [
            (4 * j + 2 * half + c, half, 8 * j + c)
            for j in range(self.cut.keys // 8) for c in range(2) for half in range(2)
        ]  # fmt: skip

    def _key(self, start: Value, key: int) -> Value:
        return T.bind(start + (key + self.lane % 4 * 2))

    def _position(self, half: int) -> tuple[Value, Value]:
        """Return the absolute position of a row's query, and its head."""
        token = T.bind(self.rows[half] // self.cut.heads)
        head = T.bind(self.head + (self.rows[half] - token * self.cut.heads))
        return T.bind(self.view.i_min + token), head

    def _modify(self, start: Value) -> None:
        task = self.task
        places = [self._position(half) for half in range(2)]
        for n, half, key in self._elements():
            score = T.bind(load(self.scores, n) * const(task.scale, "float32"))
            if task.mod is not None:
                query, head = places[half]
                score = self.view.number(task.mod, query, head, self._key(start, key), score)
            store(self.scores, score, n)

    def _mask(self, n: int, start: Value) -> None:
        kernel = self.kernel
        _, clause = kernel.clauses[n]
        hull = kernel.hull(self.base, self.group, n)
        places = [self._position(half) for half in range(2)]
        for at, half, key in self._elements():
            j = self._key(start, key)
            visible = T.And(j >= hull.lo, j < hull.hi)
            if clause.residual != TRUE:
                query, head = places[half]
                visible = T.And(visible, self.view.value(clause.residual, query, head, j))
            hidden = const(NEVER, "float32")
            store(self.scores, select(visible, load(self.scores, at), hidden), at)

    def _softmax(self) -> None:
        """Turn scores into weights; say how the sums shrink."""
        rate = const(self.kernel.rate, "float32")
        scores, tops = self.scores, []
        for half in range(2):
            mine = [n for n, h, _ in self._elements() if h == half]
            top = load(scores, mine[0])
            for n in mine[1:]:
                top = T.bind(maximum(top, load(scores, n)))
            top = across(top, maximum, 4)
            tops.append(T.bind(maximum(load(self.peak, half), top * rate)))
        growth = maximum(*(tops[half] - load(self.peak, half) for half in range(2)))
        put(
            self.moved,
            cast(self._any(growth > const(float(self.cut.patience), "float32")), "int32"),
        )
        with T.If(get(self.moved) > 0), T.Then():
            for half in range(2):
                ptx("ex2.approx.ftz.f32", self.shrink[half], load(self.peak, half) - tops[half])
                store(self.peak, tops[half], half)
                store(self.total, load(self.total, half) * load(self.shrink, half), half)
        for n, half, _ in self._elements():
            ptx("ex2.approx.ftz.f32", scores[n], load(scores, n) * rate - load(self.peak, half))
            store(self.total, load(self.total, half) + load(scores, n), half)

    def _shrink_sums(self) -> None:
        with T.If(get(self.moved) > 0), T.Then():
            for n in range(self.kernel.dim // 2):
                store(self.out, load(self.out, n) * load(self.shrink, n // 2 % 2), n)

    def _pack(self) -> None:
        for tile in range(self.cut.keys // 64 or 1):
            wgmma.pack_columns(
                self.weights, self.scores, self.kernel.dtype, 16 * tile, 32 * tile,
                min(self.cut.keys, 64),
            )  # fmt: skip

    def _any(self, flag: Value) -> Value:
        return T.bind(
            T.cuda.ballot_sync(const(FULL, "uint32"), cast(flag, "int32")) > const(0, "uint32")
        )

    def _uniform(self, value: Value) -> Value:
        """Return a value that all lanes have, in a way that tells the compiler so."""
        zero, warp = const(0, "int32"), const(32, "int32")
        return pin(T.tvm_warp_shuffle(const(FULL, "uint32"), value, zero, warp, warp))

    # --- outputs --------------------------------------------------------------------------------

    def _finish(self, sequence: object) -> None:
        """Write the outputs of an item, or put down that it must be done again."""
        kernel, task, cut = self.kernel, self.task, self.cut
        self._give_queries_back()
        zero, odd = const(0.0, "float32"), cell("float32", const(0.0, "float32"))
        first = kernel.fact(self.base, "first") + self.group * cut.tokens
        for half in range(2):
            token = T.bind(self.rows[half] // cut.heads)
            head = T.bind(self.head + (self.rows[half] - token * cut.heads))
            total = across(load(self.total, half), add, 4)
            peak = T.bind(load(self.peak, half))
            whole = total
            if task.sink is not None:
                sink = load_f32(
                    kernel.arguments[task.sink].flat, task.sink.dtype, cast(head, "int64")
                )
                whole = T.bind(total + T.exp2(sink * const(LOG2E, "float32") - peak))
            some = T.bind(T.Not(equal(total, zero)))
            scale = pin(select(some, const(1.0, "float32") / whole, zero))
            with T.If(token < self.present), T.Then():
                for n in range(kernel.dim // 2):
                    if n // 2 % 2 == half:
                        self._notice(odd, load(self.out, n))
                self._notice(odd, total)
                row = sequence.q_start + cast(first + token, "int64")  # type: ignore[attr-defined]
                at = T.bind(row * task.q.heads + cast(head, "int64"))
                self._write(half, at, scale)
                if task.lse is not None:
                    with T.If(self.lane % 4 < 1), T.Then():
                        lse = T.log(total) + peak * const(LN2, "float32")
                        lse = select(some, lse, const(NEVER, "float32"))
                        store(kernel.arguments[task.lse].flat, lse, at)
        wrong = T.bind(T.Not(equal(get(odd), zero)))
        if kernel.listed:
            bits = T.shift_right(kernel.fact(self.base, "twice"), self.group)
            wrong = T.Or(wrong, T.bitwise_and(bits, const(1, "int32")) > 0)
        with T.If(self._any(wrong)), T.Then(), T.If(self.lane < 1), T.Then():
            self._put_down()

    def _notice(self, odd: Memory, x: Value) -> None:
        """Add a zero to `odd`, or NaN for what is not finite; as PTX, since 0 * x is no 0."""
        ptx("fma.rn.f32", odd[0], x, const(0.0, "float32"), odd[0])

    def _write(self, half: int, row: Value, scale: Value) -> None:
        """Write the elements of a row that this thread has."""
        flat, dim = self.kernel.arguments[self.task.o].flat, self.kernel.dim
        for j in range(dim // 8):
            n = 4 * j + 2 * half
            pair = mma.pack(
                load(self.out, n) * scale, load(self.out, n + 1) * scale, self.kernel.dtype
            )
            at = row * dim + cast(8 * j + self.lane % 4 * 2, "int64")
            ptx("st.global.b32", flat.ptr_to([at]), pair)

    def _put_down(self) -> None:
        """Put the rows of this warp group on the list of what is done again, once."""
        kernel = self.kernel
        before = T.bind(
            T.cuda.func_call(
                "sparsegen_exchange", kernel.told.ptr_to([self.group]), get(self.turn),
                source_code=_ONCE, return_type="int32",
            )
        )  # fmt: skip
        with T.If(T.Not(equal(before, get(self.turn)))), T.Then():
            place = T.bind(T.cuda.atomic_add(kernel.state.ptr_to([1]), const(1, "int32")))
            entry = kernel.fact(self.base, "entry") + self.group
            store(kernel.again, entry, cast(place, "int64"))
