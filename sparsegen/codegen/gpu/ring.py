"""Pass tiles of shared memory from a group that fills them to groups that use them, in a ring."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.tvm import Memory, T, Value, const, equal


@dataclass(frozen=True)
class Ring:
    """A barrier for each stage of a ring; each completes once a round."""

    memory: Memory
    stages: int
    arrivals: int

    @staticmethod
    def allocate(pool: Memory, stages: int, arrivals: int) -> Ring:
        """Take the barriers from the shared memory of a block."""
        return Ring(pool.alloc((stages,), "uint64", align=8), stages, arrivals)

    def pointer(self, stage: Value) -> Value:
        """Return the address of a barrier."""
        return self.memory.ptr_to([stage])

    def init(self) -> None:
        """Set the barriers up; one thread does."""
        for stage in range(self.stages):
            pointer = self.pointer(const(stage, "int32"))
            ptx("mbarrier.init.shared.b64", pointer, const(self.arrivals, "uint32"))

    def wait(self, at: Cursor) -> None:
        """Wait until the stage was arrived at in this round."""
        T.evaluate(T.cuda.mbarrier_wait(self.pointer(at.stage), at.parity))

    def wait_before(self, at: Cursor) -> None:
        """Wait until the stage was arrived at in the round before; in the first there is none."""
        parity = T.bitwise_xor(at.parity, const(1, "int32"))
        T.evaluate(T.cuda.mbarrier_wait(self.pointer(at.stage), parity))

    def arrive(self, stage: Value) -> None:
        """Arrive once."""
        ptx("mbarrier.arrive.shared.b64", self.pointer(stage), const(1, "uint32"))

    def expect(self, stage: Value, size: Value | int) -> None:
        """Arrive once, and let the stage wait for so many bytes of the copy engine too."""
        wanted = const(size, "uint32") if isinstance(size, int) else size
        ptx("mbarrier.arrive.expect_tx.shared.b64", self.pointer(stage), wanted)


class Cursor:
    """A place in a ring: its stage, and whether the number of rounds before is odd."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self._stage, self._parity = (cell("int32", const(0, "int32")) for _ in range(2))

    @property
    def stage(self) -> Value:
        """Return the stage (int32)."""
        return get(self._stage)

    @property
    def parity(self) -> Value:
        """Return the parity of the round (int32)."""
        return get(self._parity)

    def advance(self) -> None:
        """Go to the next stage."""
        put(self._stage, self.stage + 1)
        with T.If(equal(self.stage, const(self.stages, "int32"))), T.Then():
            put(self._stage, const(0, "int32"))
            put(self._parity, T.bitwise_xor(self.parity, const(1, "int32")))
