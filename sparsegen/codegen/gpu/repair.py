"""Do tiles again whose results a faster kernel could not tell: by mma.sync, with its passes apart.

A product on tensor cores takes the values of a whole chunk, so a NaN or infinity that one row sees
reaches rows that do not see it. The faster kernel looks at its sums and puts down which of its warp
groups have one that is not finite; here, blocks take these in turn. There is seldom one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.rows import Sequence, find_tile
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu.attend import AttendKernel, Tile
from sparsegen.codegen.gpu.attend_cut import Shape, shape_of, shared_bytes
from sparsegen.codegen.gpu.launch import Place, launch, sync
from sparsegen.codegen.tvm import T, Value, cast, const, load

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel
    from sparsegen.lowering.tasks import AttendTask


def small_shape(task: AttendTask, row_warps: int, tiles: int, shared: int) -> Shape:
    """Return a cut with so many warps along the rows for `shared` bytes of shared memory."""
    least = shape_of(task, row_warps, tiles, 1, 1, 16, 1)
    least = replace(least, keys=16 * least.columns)
    double = replace(least, keys=2 * least.keys)
    return double if shared_bytes(task, double) <= shared else least


def run_parts(
    kernel: AttendKernel, place: Place, sequence: Sequence, first: Value, head: Value, tokens: int
) -> None:
    """Emit the work of a block on so many tokens, from local token `first` on, tile by tile."""
    token = cell("int32", const(0, "int32"))
    with T.While(get(token) < tokens):
        begin = T.bind(first + get(token))
        with T.If(begin < sequence.n_q), T.Then():
            Tile(kernel, place, sequence, begin, head).run()
        sync()
        put(token, get(token) + kernel.shape.tokens)


def repair(kernel: TiledKernel) -> None:
    """Emit the blocks that take what was put down; the device is entered."""
    shape = small_shape(kernel.asked, 4, 1, kernel.shared)
    # There is a block per multiprocessor: the compiler need not spare registers for more.
    with T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1}):
        _repair(kernel, shape)


def _repair(kernel: TiledKernel, shape: Shape) -> None:
    cut, task = kernel.cut, kernel.asked
    place = launch(const(cut.blocks, "int64"), shape.threads, entered=True)
    slow = AttendKernel(task, shape, kernel.arguments)
    count = T.bind(load(kernel.state, 1))
    number = cell("int32", cast(place.block, "int32"))
    with T.While(get(number) < count):
        entry = T.bind(load(kernel.again, cast(get(number), "int64")))
        group, item = T.bind(entry % cut.groups), T.bind(cast(entry // cut.groups, "int64"))
        head = T.bind(cast(item // kernel.tiles, "int32") * cut.heads)
        sequence, first = find_tile(kernel.arguments, cut.all_tokens, item % kernel.tiles)
        run_parts(slow, place, sequence, T.bind(first + group * cut.tokens), head, cut.tokens)
        put(number, get(number) + cut.blocks)
