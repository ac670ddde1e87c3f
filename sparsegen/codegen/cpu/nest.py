"""Write loop nests as blocks of `tvm.s_tir`, and transform them with a schedule.

A block says what is computed for each point of its axes; how the loops around it run is decided
afterwards, by steps given to `Nest.after`. Blocks inside a `Nest.scope` are one stage pipeline of
their own: nothing outside disturbs the dataflow checks that the transformations need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.tvm import IRModule, Memory, Schedule, T, Value, const
from sparsegen.lowering.tasks import Task

Step = Callable[[Any], None]
"""A transformation: takes a `tvm.s_tir.Schedule`."""
Extent = int | Value


class Nest:
    """The blocks of one function, by name, and what is to be done with them."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    @contextmanager
    def block(self, name: str, *extents: Extent, reduce: int = 0) -> Iterator[tuple[Value, ...]]:
        """Open a loop per extent and a block in the innermost, and give the block's axes (int64).

        Args:
            name: unique in the function.
            extents: trip counts, outermost first.
            reduce: how many of the last axes are reduced over.
        """
        sizes = [const(n, "int64") if isinstance(n, int) else n for n in extents]
        spatial = len(sizes) - reduce
        with T.grid(*sizes) if sizes else nullcontext([]) as loops:
            loops = [loops] if len(sizes) == 1 else list(loops)
            with T.sblock(name):
                kinds = [T.axis.spatial] * spatial + [T.axis.reduce] * reduce
                yield tuple(
                    kind(size, loop) for kind, size, loop in zip(kinds, sizes, loops, strict=True)
                )

    @contextmanager
    def jobs(self, task: Task, arguments: Arguments, count: Value) -> Iterator[Value]:
        """Open a parallel loop of `count` jobs around a scope, and give the job's number (int64).

        The scope is said to touch all of every tensor, since values bound in it have no meaning
        in its head, where TVM would put the parts it finds.
        """
        with T.parallel(count) as loop, T.sblock("job"):
            job = T.axis.spatial(count, loop)
            T.reads(*(whole(arguments[b].flat) for b in task.reads))
            T.writes(*(whole(arguments[b].flat) for b in task.writes))
            yield job

    @contextmanager
    def scope(self, name: str, *extents: Extent) -> Iterator[tuple[Value, ...]]:
        """Open loops around a block that holds other blocks, which are transformed on their own."""
        with self.block(name, *extents) as axes:
            yield axes

    def after(self, step: Step) -> None:
        """Do `step` once the function is complete."""
        self._steps.append(step)

    def vectorize(self, name: str, extent: int, lanes: int) -> None:
        """Vectorize the innermost loop, of `extent`, by as many of `lanes` as divide it."""
        width = math.gcd(extent, lanes)

        def step(sch: Any) -> None:
            *_, inner = sch.get_loops(sch.get_sblock(name))
            if width == extent:
                sch.vectorize(inner)
            elif width >= MIN_LANES:
                _, vector = sch.split(inner, [None, width])
                sch.vectorize(vector)

        self.after(step)

    def schedule(self, module: Any, name: str) -> Any:
        """Return `module` with the steps done to its function `name`."""
        sch = Schedule(module)
        sch.work_on(name)
        for step in self._steps:
            step(sch)
        return IRModule(dict(sch.mod.functions_items()))


def registers(shape: tuple[int, ...], dtype: str = "float32") -> Memory:
    """Return an array of less than `STACK_BYTES` that LLVM may keep in registers."""
    return T.sblock_alloc_buffer(shape, dtype)


def workspace(shape: tuple[int, ...], dtype: str = "float32") -> Memory:
    """Return an array on the heap.

    Its scope sets it apart from `registers`: TVM would let arrays of one scope share memory, and
    an array that shares with a large one is on the heap too.
    """
    return T.sblock_alloc_buffer(shape, dtype, scope="local")


def whole(memory: Memory) -> Any:
    """Return the region of all of a flat array."""
    return memory[0 : memory.shape[0]]


STACK_BYTES = 1024
"""TVM puts arrays of this size or more on the heap."""

MIN_LANES = 4
"""Narrower loops are left to LLVM, which vectorizes them with a remainder."""
