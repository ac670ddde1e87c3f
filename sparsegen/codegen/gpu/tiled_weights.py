"""Turn scores into weights in `tiled` attention: score mods, what rows see, the online softmax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.stream import cell, get, pin, put
from sparsegen.codegen.gpu import wgmma
from sparsegen.codegen.gpu.launch import FULL, across
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.tiled_cut import CLAUSE_BIT, MASKED, SHORT, member_bit
from sparsegen.codegen.gpu.tiled_pairs import Pairs
from sparsegen.codegen.tvm import (
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
from sparsegen.ir.expr import TRUE, Const

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled_compute import Compute

NEVER = float("-inf")
LOW = -1e30  # a maximum before any score
_CHAINS = 4  # partial maxima and sums of a row, which do not wait for each other


@dataclass(frozen=True)
class Chunk:
    """What is told about a chunk: `starts`, `number` and `short` in lane 0, or by `hear` in all.

    starts  for each listed block, where the chunk would start if it lay where the block does
    number  its clause
    short   not 0 if nobody sees keys behind the first `tail` ones; None where all are alike
    seen    where it is listed, for either of the two rows: whether it lists each block; where that
            is the same for all rows of a warp, in lane 0, and not in others
    """

    starts: list[Value]
    number: Value
    short: Value | None
    seen: list[list[Value]] | None

    def some(self) -> Value:
        """Tell whether a row lists a block."""
        assert self.seen is not None
        return reduce(T.Or, chain(*self.seen))

    def all(self) -> Value:
        """Tell whether both rows list all blocks."""
        assert self.seen is not None
        return reduce(T.And, chain(*self.seen))


class Weights:
    """The scores of a warp group and what becomes of them, 64 rows by the keys of a chunk."""

    def __init__(self, compute: Compute) -> None:
        self.compute, self.kernel, self.cut = compute, compute.kernel, compute.cut
        self.keys = keys = self.cut.keys
        self.scores, self.packed = scratch(keys // 2, "float32"), scratch(keys // 4, "uint32")
        self.peak, self.total, self.shrink = (scratch(2, "float32") for _ in range(3))
        self.moved = cell("int32", const(0, "int32"))
        self.pairs = Pairs(self)

    @contextmanager
    def only(self, keys: int) -> Iterator[None]:
        """Take the first keys of a chunk alone, in what is emitted inside."""
        self.keys = keys
        yield
        self.keys = self.cut.keys

    def start(self) -> None:
        """Forget the item before."""
        for half in range(2):
            store(self.peak, const(LOW, "float32"), half)
            store(self.total, const(0.0, "float32"), half)

    def hold(self) -> None:
        """Keep reads of the scores behind the wait for their products."""
        wgmma.hold(self.scores, self.keys // 2)

    def elements(self) -> list[tuple[int, int, int]]:
        """Return the registers of scores: number, half of the rows, key before that of the lane."""
        return [
            (4 * j + 2 * half + c, half, 8 * j + c)
            for j in range(self.keys // 8) for c in range(2) for half in range(2)
        ]  # fmt: skip

    # --- what rows see --------------------------------------------------------------------------

    def fact(self, word: Value | int) -> Value:
        """Return a word of what the feed tells about the chunk at hand; in lanes but the first, 0.

        That lane gives the chunk back. Were all to read, racecheck would not see that they have:
        of a meeting of lanes that are together anyhow the assembler leaves nothing. And votes on
        what one lane has are sooner there than what it would tell the others.
        """
        kernel, found = self.kernel, cell("int32", const(0, "int32"))
        with T.If(self.compute.lane < 1), T.Then():
            put(found, load(kernel.meta, self.compute.at.stage * kernel.meta_words + word))
        return get(found)

    def hear(self, chunk: Chunk) -> Chunk:
        """Return what the first lane knows about a chunk, for all lanes."""
        number = uniform(chunk.number) if len(self.kernel.clauses) > 1 else const(0, "int32")
        return replace(chunk, starts=[uniform(start) for start in chunk.starts], number=number)

    def masked(self) -> Value:
        """Tell whether the warp group takes the chunk at hand, and some row does not see all."""
        return self.any(equal(self.compute.status, const(MASKED, "int32")))

    def read(self) -> Chunk:
        """Read what the feed tells about the chunk at hand, before its keys are given back."""
        kernel = self.kernel
        starts = [self.fact(n * kernel.block_words) for n in range(self.cut.parts)]
        word = T.bind(get(self.compute.word))
        number = T.bind(T.shift_right(word, CLAUSE_BIT))
        short = T.bitwise_and(word, const(SHORT, "int32")) if self.cut.tail else None
        if not kernel.listed:
            return Chunk(starts, number, short, None)
        found = []
        for half in range(1 if self._warps_are_tokens else 2):
            found.append(self._listed(number, half))
        return Chunk(starts, number, short, (found * 2)[:2])

    def _listed(self, number: Value, half: int) -> list[Value]:
        """Tell which blocks of a chunk a row lists."""
        kernel, parts = self.kernel, self.cut.parts
        word, bit = member_bit(self.cut, self.compute.group, self._token(half))
        found = []
        if not self._alone and len(kernel.clauses) > 1:
            number = uniform(number)
        for n in range(parts):
            members = self.fact(n * kernel.block_words + 2 + word)
            if not self._alone:
                members = uniform(members)
            sees = T.bitwise_and(T.shift_right(members, bit), const(1, "int32")) > 0
            # In a range, all rows take part.
            for k, (_, clause) in enumerate(kernel.clauses):
                if clause.keys is None:
                    sees = T.Or(sees, equal(number, const(k, "int32")))
            found.append(T.And(self.compute.lane < 1, sees) if self._alone else sees)
        if parts == 1:
            return [T.bind(found[0])]
        # One register for all, until scores are there.
        zero, bits = const(0, "int32"), const(0, "int32")
        for n, sees in enumerate(found):
            bits = T.bitwise_or(bits, select(sees, const(1 << n, "int32"), zero))
        bits = T.bind(bits)
        return [T.bitwise_and(bits, const(1 << n, "int32")) > 0 for n in range(parts)]

    @property
    def _warps_are_tokens(self) -> bool:
        return self.cut.heads % 16 == 0

    @property
    def _alone(self) -> bool:
        """Tell whether a warp is one token, and takes blocks one by one or passes over them."""
        return self._warps_are_tokens and not self.cut.ahead and self.cut.parts == 1

    def _token(self, half: int) -> Value:
        """Return the token of a row, in its warp group."""
        if self._warps_are_tokens:
            return T.bind(self.compute.warp * 16 // self.cut.heads)
        return T.bind(self.compute.rows[half] // self.cut.heads)

    def position(self, half: int) -> tuple[Value, Value]:
        """Return the absolute position of a row's query, and its head."""
        token = self._token(half)
        head = self.compute.head + (self.compute.rows[half] - token * self.cut.heads)
        return T.bind(self.compute.view.i_min + token), T.bind(head)

    def hide(self, chunk: Chunk) -> None:
        """Apply the score mod, and hide what rows do not see."""
        kernel = self.kernel
        if kernel.scaled:
            self._modify(chunk)
        with T.If(self.masked()), T.Then():
            chunk = self.hear(chunk)
            for n in range(len(kernel.clauses)):
                if len(kernel.clauses) == 1:
                    self._mask(n, chunk)
                else:
                    with T.If(equal(chunk.number, const(n, "int32"))), T.Then():
                        self._mask(n, chunk)
        if chunk.seen is not None and not self._alone:
            with T.If(T.Not(chunk.all())), T.Then():
                for n, half, key in self.elements():
                    self._keep(n, chunk.seen[half][key // self.cut.block])

    def _keep(self, n: int, visible: Value) -> None:
        hidden = const(NEVER, "float32")
        store(self.scores, select(visible, load(self.scores, n), hidden), n)

    def _modify(self, chunk: Chunk) -> None:
        task = self.kernel.task
        places = [self.position(half) for half in range(2)]
        if task.mod is not None:
            chunk = self.hear(chunk)
        for n, half, key in self.elements():
            score = T.bind(load(self.scores, n) * const(task.scale, "float32"))
            if task.mod is not None:
                query, head = places[half]
                start = chunk.starts[key // self.cut.block]
                j = T.bind(start + (key + self.compute.lane % 4 * 2))
                score = self.compute.view.number(task.mod, query, head, j, score)
            store(self.scores, score, n)

    def _mask(self, n: int, chunk: Chunk) -> None:
        source, clause = self.kernel.clauses[n]
        if n in self.pairs.clauses:
            for at, half, key in self.elements():
                self._keep(at, self.pairs.visible(half, key))
            return
        places = [self.position(half) for half in range(2)]
        firsts = [T.bind(start + self.compute.lane % 4 * 2) for start in chunk.starts]
        if len(source.clauses) == 1 and clause.exact:
            # One query sees a range: compare keys, which are constants, with its ends. Of several
            # clauses, the later ones leave out what the earlier ones have for the whole group.
            view = self.compute.view
            length = T.bind(view.sequence.count(source.k.rows))
            ends = []
            for query, _ in places:
                seen = view._hull(clause, length, query, query)
                ends.append([(T.bind(seen.lo - x), T.bind(seen.hi - x)) for x in firsts])
            for at, half, key in self.elements():
                low, high = ends[half][key // self.cut.block]
                visible = high > key
                if clause.hull.lo != (Const(0),):
                    visible = T.And(low <= key, visible)
                self._keep(at, visible)
            return
        hull = self.kernel.hull(self.compute.base, self.compute.group, n)
        for at, half, key in self.elements():
            j = T.bind(firsts[key // self.cut.block] + key)
            visible = T.And(j >= hull.lo, j < hull.hi)
            if clause.residual != TRUE:
                query, head = places[half]
                seen = self.compute.view.value(clause.residual, query, head, j)
                visible = T.And(visible, seen)
            self._keep(at, visible)

    # --- softmax --------------------------------------------------------------------------------

    def soften(self) -> None:
        """Turn scores into weights; `shrink` says how the sums shrink, where they have to."""
        rate = const(self.kernel.rate, "float32")
        scores, tops = self.scores, []
        for half in range(2):
            mine = [load(scores, n) for n, h, _ in self.elements() if h == half]
            top = across(_together(mine, maximum), maximum, 4)
            tops.append(T.bind(maximum(load(self.peak, half), top * rate)))
        growth = maximum(*(tops[half] - load(self.peak, half) for half in range(2)))
        patience = const(float(self.cut.patience), "float32")
        put(self.moved, cast(self.any(growth > patience), "int32"))
        with T.If(get(self.moved) > 0), T.Then():
            for half in range(2):
                ptx("ex2.approx.ftz.f32", self.shrink[half], load(self.peak, half) - tops[half])
                store(self.peak, tops[half], half)
                store(self.total, load(self.total, half) * load(self.shrink, half), half)
        for n, half, _ in self.elements():
            ptx("ex2.approx.ftz.f32", scores[n], load(scores, n) * rate - load(self.peak, half))
        for half in range(2):
            mine = [load(scores, n) for n, h, _ in self.elements() if h == half]
            store(self.total, load(self.total, half) + _together(mine, lambda a, b: a + b), half)

    def shrink_sums(self) -> None:
        """Make the sums fit the new maximum."""
        with T.If(get(self.moved) > 0), T.Then():
            for n in range(self.kernel.dim // 2):
                out = load(self.compute.out, n) * load(self.shrink, n // 2 % 2)
                store(self.compute.out, out, n)

    def pack(self) -> None:
        """Round the weights into A operands."""
        wgmma.pack_tile(self.packed, self.scores, self.kernel.dtype, columns=self.keys)

    def clear(self) -> None:
        """Make all weights zero."""
        for n in range(self.cut.keys // 4):
            store(self.packed, const(0, "uint32"), n)

    def any(self, flag: Value) -> Value:
        """Tell whether a flag holds in some lane of the warp."""
        votes = T.cuda.ballot_sync(const(FULL, "uint32"), cast(flag, "int32"))
        return T.bind(votes > const(0, "uint32"))


def uniform(value: Value) -> Value:
    """Return a value that all lanes have, in a way that tells the compiler so."""
    zero, warp = const(0, "int32"), const(32, "int32")
    return pin(T.tvm_warp_shuffle(const(FULL, "uint32"), value, zero, warp, warp))


def _together(values: list[Value], combine: object) -> Value:
    """Combine numbers in a few chains side by side, and those in the end."""
    chains = values[:_CHAINS]
    for n, value in enumerate(values[_CHAINS:]):
        chains[n % _CHAINS] = T.bind(combine(chains[n % _CHAINS], value))  # type: ignore[operator]
    while len(chains) > 1:
        pairs = zip(chains[::2], chains[1::2], strict=True)
        chains = [T.bind(combine(a, b)) for a, b in pairs]  # type: ignore[operator]
    return chains[0]
