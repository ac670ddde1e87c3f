"""Emit attention on mma.sync over a range of keys, of whose pairs maps say which are listed."""

from __future__ import annotations

from dataclasses import replace

from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu.attend import AttendKernel, Tile
from sparsegen.codegen.gpu.attend_cut import Shape, shape_of, shared_bytes
from sparsegen.codegen.gpu.launch import Place, device, launch, sync
from sparsegen.codegen.gpu.membership import Maps
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.tvm import T, Value, const
from sparsegen.lowering.tasks import AttendTask


class MappedKernel:
    """Emits the function of a task: maps, then tiles; those of lists with an item twice at last.

    asked  the task with its lists, which counts how often they have an item
    task   the same, its lists spread
    """

    def __init__(
        self, asked: AttendTask, task: AttendTask, shape: Shape, arguments: Arguments, shared: int
    ) -> None:
        self.task, self.shape, self.arguments = task, shape, arguments
        self.maps = Maps(task, arguments)
        self.fast = AttendKernel(task, shape, arguments, self.maps)
        self.slow = AttendKernel(asked, counting_shape(asked, shape, shared), arguments)

    def emit(self) -> None:
        """Emit the launches."""
        self.maps.emit()
        tiles = self.fast.tiles()
        with device():
            self._launch(self.fast, tiles, twice=False)
        with device():
            self._launch(self.slow, tiles, twice=True)

    def _launch(self, kernel: AttendKernel, tiles: Value, *, twice: bool) -> None:
        """Emit a launch over the tiles of the fast kernel, of which one takes some."""
        place = launch(self.fast.blocks(tiles), kernel.shape.threads, entered=True)

        def body(sequence: Sequence, first: Value, head: Value) -> None:
            position, one = T.bind(sequence.q_off + first), const(1, "int32")
            view = ThreadView(self.task, self.arguments, sequence, position, one)
            found = self.maps.twice(view, head)
            with T.If(found if twice else T.Not(found)), T.Then():
                self._run(kernel, place, sequence, first, head)

        self.fast.each(place, tiles, body)

    def _run(
        self, kernel: AttendKernel, place: Place, sequence: Sequence, first: Value, head: Value
    ) -> None:
        """Emit a tile of the fast kernel, which the slow one takes in parts."""
        if kernel is self.fast:
            Tile(kernel, place, sequence, first, head).run()
            return
        token = cell("int32", const(0, "int32"))
        with T.While(get(token) < self.shape.tokens):
            begin = T.bind(first + get(token))
            with T.If(begin < sequence.n_q), T.Then():
                Tile(kernel, place, sequence, begin, head).run()
            sync()
            put(token, get(token) + kernel.shape.tokens)


def counting_shape(asked: AttendTask, shape: Shape, shared: int) -> Shape:
    """Return a cut with the heads of `shape` that fits `shared` bytes of shared memory."""
    least = shape_of(asked, shape.row_warps, shape.tiles, 1, 1, 16, 1)
    assert least.heads == shape.heads
    least = replace(least, keys=16 * least.columns)
    double = replace(least, keys=2 * least.keys)
    return double if shared_bytes(asked, double) <= shared else least
