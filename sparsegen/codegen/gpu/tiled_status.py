"""Say in `tiled` attention what the warp groups do with a chunk: skip it, take it, or mask it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.gpu.launch import across, signed
from sparsegen.codegen.gpu.tiled_cut import (
    CLAUSE_BIT,
    MASKED,
    SHORT,
    SKIP,
    SURE,
    Cut,
    group_words,
)
from sparsegen.codegen.tvm import Memory, T, Value, const, equal, load, select

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel
    from sparsegen.codegen.gpu.tiled_items import Item


def status_of(
    kernel: TiledKernel, item: Item, number: int, j: Value, words: Memory | None, end: Value | None
) -> Value:
    """Return what the groups do with a chunk of a clause, the number of the clause above it.

    Args:
        j: the first key of the chunk, or of its block.
        words: of a listed block: behind the first one, who sees it.
        end: of the range that the chunk is of, if it is of one.
    """
    cut = kernel.cut
    found = const(number << CLAUSE_BIT, "int32")
    for g in range(cut.groups):
        mine = _of_group(kernel, item, g, number, j, words)
        found = T.bitwise_or(found, T.shift_left(mine, 2 * g))
    if cut.tail and end is not None:
        short = select(end - j <= cut.tail, const(SHORT, "int32"), const(0, "int32"))
        found = T.bitwise_or(found, short)
    found = T.bind(found)
    return _together(cut, found) if cut.parts > 1 and words is not None else found


def _of_group(
    kernel: TiledKernel, item: Item, g: int, number: int, j: Value, words: Memory | None
) -> Value:
    cut, hull = kernel.cut, item.hulls[g][number]
    end = j + (cut.keys if words is None else cut.block)
    wanted = T.And(hull.lo < end, hull.hi > j)
    sure = T.And(j >= hull.sure_lo, end <= hull.sure_hi)
    if words is not None:
        bits, each = const(0, "int32"), group_words(cut)
        for word in range(g * each, (g + 1) * each):
            bits = T.bitwise_or(bits, load(words, 1 + word))
        if not each:
            mask = (2**cut.tokens - 1) << g * cut.tokens
            bits = T.bitwise_and(load(words, 1), const(signed(mask), "int32"))
        wanted = T.And(wanted, T.Not(equal(bits, const(0, "int32"))))
    some = select(sure, const(SURE, "int32"), const(MASKED, "int32"))
    return T.bind(select(wanted, some, const(SKIP, "int32")))


def _together(cut: Cut, status: Value) -> Value:
    """Return what to do with a chunk, from what lanes say of its blocks.

    It is taken if a block is wanted, and masked if a wanted one is.
    """
    found = across(status, T.bitwise_or, cut.boxes)
    every = sum(MASKED << 2 * g for g in range(cut.groups))
    masked = T.bitwise_and(found, const(every, "int32"))
    return T.bind(T.bitwise_and(found, T.bitwise_not(masked * (SURE // MASKED))))
