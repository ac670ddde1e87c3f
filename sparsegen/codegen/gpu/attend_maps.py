"""Emit attention on mma.sync over a range of keys, of whose pairs maps say which are listed."""

from __future__ import annotations

from sparsegen.codegen.cpu.rows import Arguments, Sequence
from sparsegen.codegen.gpu.attend import AttendKernel, Tile
from sparsegen.codegen.gpu.attend_cut import Shape
from sparsegen.codegen.gpu.launch import device, launch
from sparsegen.codegen.gpu.membership import Maps, spread
from sparsegen.codegen.gpu.repair import run_parts, small_shape
from sparsegen.codegen.gpu.view import ThreadView
from sparsegen.codegen.tvm import T, Value, const
from sparsegen.lowering.tasks import AttendTask


class MappedKernel:
    """Emits the function of a task: maps, then tiles; those of lists with an item twice at last.

    asked  the task with its lists, which counts how often they have an item
    shape  of a tile of the task whose lists are spread
    shared bytes of shared memory
    """

    def __init__(self, asked: AttendTask, shape: Shape, arguments: Arguments, shared: int) -> None:
        self.task, self.arguments = spread(asked), arguments
        self.maps = Maps(self.task, arguments)
        self.fast = AttendKernel(self.task, shape, arguments, self.maps)
        counting = small_shape(asked, shape.row_warps, shape.tiles, shared)
        assert counting.heads == shape.heads
        self.slow = AttendKernel(asked, counting, arguments)

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
                if twice:
                    tokens = self.fast.shape.tokens
                    run_parts(kernel, place, sequence, first, head, tokens)
                else:
                    Tile(kernel, place, sequence, first, head).run()

        self.fast.each(place, tiles, body)
