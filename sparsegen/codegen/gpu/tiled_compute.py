"""Compute `tiled` attention: scores, weights and sums of 64 rows, by each warp group for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu import pipeline, wgmma
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.ring import Cursor, Ring
from sparsegen.codegen.gpu.tiled_cut import SKIP, query_elements
from sparsegen.codegen.gpu.tiled_outputs import finish
from sparsegen.codegen.gpu.tiled_weights import Chunk, Weights, uniform
from sparsegen.codegen.gpu.wgmma import TILE
from sparsegen.codegen.tvm import T, Value, cast, const, scratch, store

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel


class Compute:
    """A warp group that computes."""

    def __init__(self, kernel: TiledKernel) -> None:
        self.kernel, self.cut, self.task = kernel, kernel.cut, kernel.task
        self.group, self.warp, self.lane = kernel.group, kernel.warp, kernel.lane
        cut, zero = self.cut, const(0, "int32")
        self.at, self.item_at = Cursor(cut.stages), Cursor(cut.queries)
        # What warp groups do with the chunk at hand, as lane 0 knows; whether this one takes it.
        self.word, self.wanted = (cell("int32", const(SKIP, "int32")) for _ in range(2))
        self.out = scratch(kernel.dim // 2, "float32")
        self.resident = scratch(max(16 * cut.resident, 1), "uint32")
        self.weights = Weights(self)
        # The chunk before, whose sums are not computed yet; the number of the item, the chunks it
        # has left, and whether its queries are still needed.
        self.before, self.before_parity, self.turn, self.left, self.held = (
            cell("int32", zero) for _ in range(5)
        )
        first = self.group * query_elements(self.task, cut)
        values = kernel.chunks.ptr_to([cut.keys * self.task.q.dim])
        self.q = wgmma.descriptor(wgmma.ALONG, kernel.queries.ptr_to([first]))
        self.k = wgmma.descriptor(wgmma.ALONG, kernel.chunks.ptr_to([zero]))
        self.v = wgmma.descriptor(wgmma.across(cut.keys), values)

    def run(self) -> None:
        """Emit the loop over items."""
        kernel = self.kernel
        going = cell("int32", const(1, "int32"))
        with T.While(get(going) > 0):
            kernel.item_ready.wait(self.item_at)
            base = T.bind(get(self.turn) % kernel.info_slots * kernel.info_words)
            put(going, uniform(kernel.fact(base, "there")))
            with T.If(get(going) > 0), T.Then():
                self._item(base)
                self.item_at.advance()
                put(self.turn, get(self.turn) + 1)

    def _item(self, base: Value) -> None:
        kernel, cut = self.kernel, self.cut
        sequence = kernel.sequence(base)
        self.base, self.head = base, kernel.fact(base, "head")
        first = kernel.fact(base, "first")
        self.view, self.present = kernel.group_view(sequence, first, self.group)
        self.rows = [T.bind(self.warp * 16 + self.lane // 4 + 8 * half) for half in range(2)]
        put(self.left, uniform(kernel.fact(base, "chunks")))
        put(self.held, const(1, "int32"))
        for n in range(kernel.dim // 2):
            store(self.out, const(0.0, "float32"), n)
        self.weights.start()
        if cut.resident:
            self._load_resident()
        with T.While(get(self.left) > 0):
            self._peek()
            with T.If(get(self.wanted) > 0):
                with T.Then():
                    if cut.ahead:
                        self._run_ahead()
                    else:
                        self._one()
                with T.Else():
                    self._skip()
        self._give_queries_back()
        finish(self, sequence)

    # --- chunks ---------------------------------------------------------------------------------

    def _peek(self) -> None:
        """Wait for the keys of the next chunk, if there is one, and see what to do with it."""
        kernel = self.kernel
        put(self.wanted, const(0, "int32"))
        with T.If(get(self.left) > 0), T.Then():
            kernel.keys_ready.wait(self.at)
            put(self.word, self.weights.fact(1))
            put(self.wanted, cast(self.weights.any(self.status > SKIP), "int32"))

    @property
    def status(self) -> Value:
        """Return what this warp group does with the chunk at hand, in lane 0; SKIP in others."""
        return T.bitwise_and(T.shift_right(get(self.word), 2 * self.group), const(3, "int32"))

    def _next(self) -> None:
        self.at.advance()
        put(self.left, get(self.left) - 1)

    def _skip(self) -> None:
        kernel = self.kernel
        if not self.cut.joint:
            # Values of the stage must not be asked for again before the last reader has them.
            kernel.values_ready.wait(self.at)
        self._pass(self.lane)
        put(self.left, get(self.left) - 1)

    def _pass(self, lane: Value) -> None:
        """Let go of the chunk at hand, when the number of the lane is known."""
        if not self.cut.joint:
            self._release(self.kernel.keys_free, self.at.stage, lane)
        self._release(self.kernel.values_free, self.at.stage, lane)
        self.at.advance()

    def _one(self) -> None:
        """Take the chunk at hand, from scores to sums."""
        weights = self.weights
        chunk = weights.read()
        weights.pairs.ask(chunk)
        if chunk.short is not None:
            with T.If(weights.any(chunk.short > 0)):
                with T.Then(), weights.only(self.cut.tail):
                    self._take(chunk)
                with T.Else():
                    self._take(chunk)
        else:
            self._take(chunk)
        self._next()

    def _take(self, chunk: Chunk) -> None:
        """Score the chunk at hand, and add its values."""
        kernel, weights = self.kernel, self.weights
        self._score_alone()
        if chunk.seen is None:
            self._weigh(chunk)
        else:
            with T.If(weights.any(chunk.some())):
                with T.Then():
                    self._weigh(chunk)
                with T.Else():
                    weights.clear()
        if not self.cut.joint:
            kernel.values_ready.wait(self.at)
        self._sum_alone(self.at.stage)

    def _run_ahead(self) -> None:
        """Take chunks as long as they are wanted, each one's scores beside the last one's sums."""
        kernel, weights = self.kernel, self.weights
        chunk = weights.read()
        weights.pairs.ask(chunk)
        self._score_alone()
        self._weigh(chunk)
        self._remember()
        self._next()
        self._peek()
        with T.While(get(self.wanted) > 0):
            # Before any product: no wait may stand between the products of one group.
            self._wait_values()
            chunk = weights.read()
            weights.pairs.ask(chunk)
            self._hold()
            wgmma.begin()
            self._score()
            wgmma.commit()
            self._sum(get(self.before))
            wgmma.commit()
            wgmma.wait(1)
            weights.hold()
            self._scored()
            weights.hide(chunk)
            weights.soften()
            wgmma.wait(0)
            self._hold()
            self._release(kernel.values_free, get(self.before))
            weights.shrink_sums()
            weights.pack()
            self._remember()
            self._next()
            self._peek()
        self._wait_values()
        self._sum_alone(get(self.before))

    def _score_alone(self) -> None:
        wgmma.begin()
        self._score()
        wgmma.commit()
        wgmma.wait(0)
        self.weights.hold()
        self._scored()

    def _weigh(self, chunk: Chunk) -> None:
        self.weights.hide(chunk)
        self.weights.soften()
        self.weights.shrink_sums()
        self.weights.pack()

    def _sum_alone(self, stage: Value) -> None:
        self._hold()
        wgmma.begin()
        self._sum(stage)
        wgmma.commit()
        wgmma.wait(0)
        self._hold()
        self._release(self.kernel.values_free, stage)

    # --- who waits for whom ---------------------------------------------------------------------

    def _scored(self) -> None:
        """Give back what the scores were made of."""
        if not self.cut.joint:
            self._release(self.kernel.keys_free, self.at.stage)
        with T.If(get(self.left) < 2), T.Then():
            self._give_queries_back()

    def _give_queries_back(self) -> None:
        with T.If(get(self.held) > 0), T.Then():
            self.kernel.item_free.arrive(self.item_at.stage)
            put(self.held, const(0, "int32"))

    def _remember(self) -> None:
        put(self.before, self.at.stage)
        put(self.before_parity, self.at.parity)

    def _wait_values(self) -> None:
        if self.cut.joint:
            return
        pointer = self.kernel.values_ready.pointer(get(self.before))
        T.evaluate(T.cuda.mbarrier_wait(pointer, get(self.before_parity)))

    def _release(self, ring: Ring, stage: Value, lane: Value | None = None) -> None:
        """Let go of a stage; one lane does, the one that has read what was told about it."""
        with T.If((self.lane if lane is None else lane) < 1), T.Then():
            ring.arrive(stage)

    def _hold(self) -> None:
        wgmma.hold(self.out, self.kernel.dim // 2)

    # --- products -------------------------------------------------------------------------------

    def _score(self) -> None:
        """Start the products of queries and the keys of the stage at hand."""
        cut, dim = self.cut, self.task.q.dim
        stage = cast(self.at.stage, "uint64") * const(self.kernel.stage * 2 >> 4, "uint64")
        # A compiler that knows the descriptors keeps one per product in registers, and spills.
        q, k = wgmma.opaque(self._queries()), wgmma.opaque(self.k + stage)
        for panel in range(dim // 64):
            for depth in range(4):
                b = k + const((panel * cut.keys * 128 + depth * 32) >> 4, "uint64")
                if panel < cut.resident:
                    n = 16 * panel + 4 * depth
                    a: Value | list[Value] = [self.resident[n + i] for i in range(4)]
                else:
                    further = (panel - cut.resident) * TILE * 2 + depth * 32
                    a = q + const(further >> 4, "uint64")
                clear = panel == depth == 0
                scores = self.weights.scores
                wgmma.product(scores, self.weights.keys, a, b, self.kernel.dtype, clear=clear)

    def _queries(self) -> Value:
        """Return the descriptor of the queries at hand."""
        if self.cut.queries == 1:
            return self.q
        size = self.cut.groups * query_elements(self.task, self.cut) * 2 >> 4
        return self.q + cast(self.item_at.stage, "uint64") * const(size, "uint64")

    def _sum(self, stage: Value) -> None:
        """Start the products of weights and the values of a stage."""
        step = cast(stage, "uint64") * const(self.kernel.stage * 2 >> 4, "uint64")
        v = wgmma.opaque(self.v + step)
        for depth in range(self.weights.keys // 16):
            a = [self.weights.packed[4 * depth + i] for i in range(4)]
            b = v + const(depth * 16 * 128 >> 4, "uint64")
            wgmma.product(self.out, self.kernel.dim, a, b, self.kernel.dtype, b_across=True)

    def _load_resident(self) -> None:
        """Take the first panels of the queries, as A operands, from the first chunk of an item."""
        kernel = self.kernel
        kernel.keys_ready.wait(self.at)
        row = T.bind(self.warp * 16 + self.lane % 16)
        first = T.bind(self.at.stage * kernel.stage + self.group * (self.cut.resident * TILE))
        for panel in range(self.cut.resident):
            for depth in range(4):
                piece = 2 * depth + self.lane // 16
                at = first + panel * TILE + wgmma.swizzled(row, piece)
                pointer = kernel.chunks.ptr_to([at])
                n = 16 * panel + 4 * depth
                registers = [self.resident[n + i] for i in range(4)]
                ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *registers, pointer)
        if not self.cut.joint:
            kernel.values_ready.wait(self.at)
        words = [self.resident[n] for n in range(16 * self.cut.resident)]
        self._pass(pipeline.lane_after(words, self.lane))
