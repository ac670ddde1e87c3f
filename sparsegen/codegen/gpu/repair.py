"""Do tiles again whose results a faster kernel could not tell: by mma.sync, with its passes apart.

A product on tensor cores takes the values of a whole chunk, so a NaN or infinity that one row sees
reaches rows that do not see it. The faster kernel looks at its sums and puts down which of its warp
groups have one that is not finite; here, blocks take these in turn. There is seldom one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegen.codegen.cpu.rows import find_tile
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu.attend import AttendKernel, Tile
from sparsegen.codegen.gpu.attend_cut import Shape, shape_of, shared_bytes
from sparsegen.codegen.gpu.launch import launch, sync
from sparsegen.codegen.tvm import T, cast, const, load

if TYPE_CHECKING:
    from sparsegen.codegen.gpu.tiled import TiledKernel
    from sparsegen.lowering.tasks import AttendTask


def repair_shape(task: AttendTask, shared: int) -> Shape:
    """Return the cut of the kernel that repairs, which fits `shared` bytes of shared memory."""
    for keys in (32, 16):
        shape = shape_of(task, 4, 1, 1, 1, keys, 1)
        if shared_bytes(task, shape) <= shared:
            break
    return shape


def repair(kernel: TiledKernel) -> None:
    """Emit the blocks that take what was put down; the device is entered."""
    shape = repair_shape(kernel.asked, kernel.shared)
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
        token = cell("int32", const(0, "int32"))
        with T.While(get(token) < cut.tokens):
            begin = T.bind(first + (group * cut.tokens + get(token)))
            with T.If(begin < sequence.n_q), T.Then():
                Tile(slow, place, sequence, begin, head).run()
            sync()
            put(token, get(token) + shape.tokens)
        put(number, get(number) + cut.blocks)
