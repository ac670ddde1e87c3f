"""Emit attention on Hopper over tiles of keys: ranges, and blocks that neighbouring tokens share.

A block of threads takes items, tiles of queries of neighbouring heads, one after the other:

    feed     one warp loads queries, then keys and values in chunks, through the copy engine
    compute  each other warp group has 64 rows, (token, head) pairs, and skips what it does not see

Lists of blocks are united first (`union`): the tokens of an item walk each block that one of them
selects once. Short blocks share a chunk, as many as it has room for; a bit for each row and block
says who sees which, and all rows of a warp group pay for a block that one of them sees. Lists of
diagonals are not walked: of every pair in a range it is asked whether it is listed (`membership`).
What tensor cores cannot do as the contract has it, a NaN among values that one row sees and another
does not, or an index listed twice, is put down and done again by `mma` at the end.
"""

from __future__ import annotations

from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.cpu.stream import Bounds
from sparsegen.codegen.cpu.vec import LOG2E
from sparsegen.codegen.gpu import pipeline, tma
from sparsegen.codegen.gpu.attend_cut import dtype_of
from sparsegen.codegen.gpu.convert import convert, converted
from sparsegen.codegen.gpu.launch import device
from sparsegen.codegen.gpu.membership import Maps, members_of, spread
from sparsegen.codegen.gpu.repair import repair
from sparsegen.codegen.gpu.ring import Ring
from sparsegen.codegen.gpu.spans import Spans
from sparsegen.codegen.gpu.tiled_compute import Compute
from sparsegen.codegen.gpu.tiled_cut import (
    ENDS,
    FACTS,
    ROWS,
    Cut,
    clauses_of,
    key_list,
    member_words,
    query_elements,
    scratch_of,
    stage_elements,
)
from sparsegen.codegen.gpu.tiled_feed import Feed
from sparsegen.codegen.gpu.union import Union
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.tvm import T, Value, cast, const, load, maximum, minimum, store
from sparsegen.lowering.tasks import AttendTask, KeySource


class TiledKernel:
    """Emits the function of one task into the current builder frame."""

    def __init__(self, asked: AttendTask, cut: Cut, arguments: Arguments, shared: int) -> None:
        self.asked, self.cut, self.arguments, self.shared = asked, cut, arguments, shared
        task = spread(asked)
        found = dtype_of(task)
        assert found is not None
        self.dtype = found
        # The task over operands that the copy engine can load.
        self.task, self.copies = converted(task, found)
        self.dim = task.sources[0].v.dim
        self.clauses = clauses_of(self.task)
        self.listed = key_list(task) is not None
        self.heads = task.q.heads // cut.heads
        # Without a mod the scale is part of the exponent's rate; a mod needs it before.
        self.scaled = task.mod is not None or task.scale <= 0
        self.rate = (1.0 if self.scaled else task.scale) * LOG2E
        buffers = {b.name.removeprefix(f"{task.name}_"): b for b, _ in scratch_of(task, cut)}
        self.state, self.again = (arguments[buffers[n]].flat for n in ("state", "again"))
        self.united = arguments[buffers["united"]] if self.listed else None
        self.maps = Maps(self.task, arguments) if members_of(self.task) else None
        self.spans = Spans.of(task, arguments, cut.tokens, cut.groups)
        self.info_words = len(FACTS) + cut.groups * ENDS * len(self.clauses)
        # Groups that have given the queries of an item back still read what was told about it.
        self.info_slots = cut.queries + 1
        # What is told about a chunk, for each of its blocks: where it starts, what the warp groups
        # do with the chunk, and who sees the block.
        self.block_words = 2 + (member_words(cut) if self.listed else 0)
        self.meta_words = cut.parts * self.block_words

    def emit(self) -> None:
        """Emit the launches: lists and counters, attention, repairs."""
        cut = self.cut
        self.tiles = T.bind(
            self.arguments[self.task.o].rows // cut.all_tokens + self.arguments.batch
        )
        self.items = T.bind(self.tiles * self.heads)
        sources = self._maps()
        convert(self.arguments, self.copies, cut.blocks)
        if self.maps is not None:
            self.maps.emit()
        if self.spans is not None:
            self.spans.emit()
        with device():
            if self.listed:
                Union(self).emit()
            else:
                T.cta_id([1])
                thread = T.thread_id([32])
                with T.If(thread < 2), T.Then():
                    store(self.state, const(0, "int32"), thread)
        with device(), T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}):
            self._attend(*sources)
        with device():
            repair(self)

    def _maps(self) -> tuple[tma.Source, list[tuple[tma.Source, tma.Source]]]:
        cut, spare = self.cut, self.state

        def keys(source: KeySource) -> tuple[tma.Source, tma.Source]:
            k, v = (
                tma.Source.make(x, self.arguments, spare, heads=1, rows=cut.box, pitch=cut.keys)
                for x in (source.k, source.v)
            )
            return k, v

        queries = tma.Source.make(
            self.task.q, self.arguments, spare, heads=cut.heads, rows=cut.tokens, pitch=ROWS,
            apart=cut.resident > 0,
        )  # fmt: skip
        return queries, [keys(s) for s in self.task.sources]

    def _attend(self, queries: tma.Source, sources: list[tuple[tma.Source, tma.Source]]) -> None:
        cut = self.cut
        T.cta_id([cut.blocks])
        group = T.warpgroup_id([cut.groups + 1])
        self.warp, self.lane = T.warp_id_in_wg([4]), T.lane_id([32])
        thread = T.thread_id([cut.threads])
        self.group = group
        self._allocate()
        with T.If(thread < 1), T.Then():
            for ring in self.rings:
                ring.init()
            for n in range(cut.groups):
                store(self.told, const(-1, "int32"), n)
            pipeline.publish_barriers()
        T.evaluate(T.cuda.cta_sync())
        with T.If(group >= cut.groups):
            with T.Then():
                pipeline.give_registers(cut.copy)
                with T.If(self.warp < 1), T.Then():
                    if cut.boxes > 1:
                        Feed(self, queries, sources).run()
                    else:
                        elected = T.bind(T.cuda.elect_sync())
                        with T.If(elected > const(0, "uint32")), T.Then():
                            Feed(self, queries, sources).run()
            with T.Else():
                pipeline.take_registers(cut.compute)
                Compute(self).run()

    def _allocate(self) -> None:
        cut, pool = self.cut, T.SMEMPool()
        stages, dtype = cut.stages, self.dtype
        size = cut.queries * cut.groups * query_elements(self.task, cut)
        self.queries = pool.alloc((max(size, 1),), dtype, align=1024)
        # Chunks, keys before values.
        self.stage = stage_elements(self.task, cut)
        self.chunks = pool.alloc((stages * self.stage,), dtype, align=1024)
        self.meta = pool.alloc((stages * self.meta_words,), "int32", align=16)
        self.info = pool.alloc((self.info_slots * self.info_words,), "int32", align=16)
        self.told = pool.alloc((cut.groups,), "int32", align=16)
        readers = 4 * cut.groups
        self.keys_ready = Ring.allocate(pool, stages, cut.boxes)
        self.values_free = Ring.allocate(pool, stages, readers)
        self.item_ready = Ring.allocate(pool, cut.queries, 1)
        # What is told about an item is read by all threads, and each of them says that it is done.
        self.item_free = Ring.allocate(pool, cut.queries, 32 * readers)
        self.rings = [self.keys_ready, self.values_free, self.item_ready, self.item_free]
        self.values_ready, self.keys_free = self.keys_ready, self.values_free
        if not cut.joint:
            self.values_ready = Ring.allocate(pool, stages, cut.boxes)
            self.keys_free = Ring.allocate(pool, stages, readers)
            self.rings += [self.values_ready, self.keys_free]
        pool.commit()

    # --- what the feed tells ---------------------------------------------------------------------

    def fact(self, base: Value, name: str) -> Value:
        """Read a word about the item whose words start at `base`."""
        return T.bind(load(self.info, base + FACTS.index(name)))

    def sequence(self, base: Value) -> Sequence:
        """Read the sequence of an item."""
        names = ("number", "q_start", "k_start", "n_q", "n_k", "q_off")
        number, q_start, k_start, n_q, n_k, q_off = (self.fact(base, n) for n in names)
        return Sequence(
            arguments=self.arguments, number=T.bind(cast(number, "int64")),
            q_start=T.bind(cast(q_start, "int64")), k_start=T.bind(cast(k_start, "int64")),
            n_q=n_q, n_k=n_k, q_off=q_off,
        )  # fmt: skip

    def hull_at(self, base: Value, group: Value | int, clause: int) -> Value:
        """Return where the words of a hull start, in those of an item."""
        return base + ((group * len(self.clauses) + clause) * ENDS + len(FACTS))

    def hull(self, base: Value, group: Value, clause: int) -> Bounds:
        """Read the keys that some token of a warp group sees, and those that all of them see."""
        at = T.bind(self.hull_at(base, group, clause))
        return Bounds(*(T.bind(load(self.info, at + n)) for n in range(ENDS)))

    def group_view(
        self, sequence: Sequence, first: Value, group: Value | int
    ) -> tuple[ThreadView, Value]:
        """Return what expressions mean at the rows of a warp group, and how many tokens exist."""
        begin = T.bind(first + group * self.cut.tokens)
        present = T.bind(
            maximum(
                minimum(sequence.n_q - begin, const(self.cut.tokens, "int32")), const(0, "int32")
            )
        )
        some = maximum(present, const(1, "int32"))
        i_min = T.bind(sequence.q_off + begin)
        return ThreadView(self.task, self.arguments, sequence, i_min, T.bind(some)), present
