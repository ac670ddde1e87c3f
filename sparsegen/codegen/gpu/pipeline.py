"""Let groups of warps work on different things: barriers in shared memory, registers of a role."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.gpu.launch import FULL
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.tvm import Memory, T, Value, cast, const

GROUP = 128  # threads of a warp group


@dataclass(frozen=True)
class Barrier:
    """A barrier in shared memory whose phases are counted; arrivals per phase are fixed."""

    memory: Memory
    arrivals: int
    number: Value | int = 0  # of a row of barriers

    @staticmethod
    def allocate(pool: Memory, arrivals: int) -> Barrier:
        """Take a barrier from the shared memory of a block."""
        return Barrier(pool.alloc((1,), "uint64", align=8), arrivals)

    @staticmethod
    def allocate_row(pool: Memory, count: int, arrivals: int) -> Row:
        """Take neighbouring barriers, of which a kernel chooses one as it runs."""
        return Row(pool.alloc((count,), "uint64", align=8), count, arrivals)

    @property
    def pointer(self) -> Value:
        """Return its address."""
        return self.memory.ptr_to([self.number])

    def init(self) -> None:
        """Set it up; one thread does."""
        ptx("mbarrier.init.shared.b64", self.pointer, const(self.arrivals, "uint32"))

    def arrive(self) -> None:
        """Arrive once."""
        ptx("mbarrier.arrive.shared.b64", self.pointer, const(1, "uint32"))

    def arrive_expecting(self, size: int) -> None:
        """Arrive once, and let the phase wait for `size` bytes of boxes too."""
        ptx("mbarrier.arrive.expect_tx.shared.b64", self.pointer, const(size, "uint32"))

    def arrive_after_copies(self) -> None:
        """Arrive when the copies this thread has started are done."""
        ptx("cp.async.mbarrier.arrive.noinc.shared.b64", self.pointer)

    def wait(self, phase: Value) -> None:
        """Wait until a phase (its number, int32) is complete; phase -1 is."""
        T.evaluate(T.cuda.mbarrier_wait(self.pointer, phase % 2))

    def wait_cluster(self, phase: Value) -> None:
        """Wait for a phase at which another block of the cluster arrives."""
        T.evaluate(T.cuda.mbarrier_wait_acquire_cluster(self.pointer, phase % 2))

    def wait_tensor(self, phase: Value) -> None:
        """Wait for a phase, and make what it announces visible to tensor cores."""
        self.wait(phase)
        fence_tensor()


@dataclass(frozen=True)
class Row:
    """Neighbouring barriers in shared memory."""

    memory: Memory
    count: int
    arrivals: int

    def __getitem__(self, number: Value | int) -> Barrier:
        return Barrier(self.memory, self.arrivals, number)

    @property
    def all(self) -> list[Barrier]:
        """Return every barrier."""
        return [self[n] for n in range(self.count)]


def fence_tensor() -> None:
    """Make this thread's writes to shared memory visible to tensor cores."""
    ptx("fence.proxy.async.shared::cta")


def lane_after(words: Sequence[Value], lane: Value) -> Value:
    """Return the number of this lane, as soon as all lanes have words of 32 bits.

    An arrival at a barrier does not wait for loads of the same thread. Where the copy engine is to
    write to what was loaded from, the lane that arrives must be one whose number needs the words.
    """
    mixed = const(0, "uint32")
    for word in words:
        mixed = T.bitwise_xor(mixed, word)
    mixed, warp = T.bind(mixed), const(32, "int32")
    same = T.bind(T.tvm_warp_shuffle(const(FULL, "uint32"), mixed, lane, warp, warp))
    return T.bind(lane + cast(T.bitwise_xor(mixed, same), "int32"))


def init(barriers: list[Barrier], thread: Value) -> None:
    """Set barriers up, for all threads of the block."""
    with T.If(thread < 1), T.Then():
        for barrier in barriers:
            barrier.init()
        publish_barriers()
    T.evaluate(T.cuda.cta_sync())


def publish_barriers() -> None:
    """Make barriers that this thread has set up visible; then all threads of the block meet."""
    ptx("fence.mbarrier_init.release.cluster")


def each_turn(
    block: Value, blocks: int, count: Value, body: Callable[[Value, Value], None]
) -> None:
    """Emit a loop over the tiles of a persistent block: body(tile, number of tiles before it).

    Causal work grows with the position: the longest tiles come first.
    """
    tile, turn = cell("int32", block), cell("int32", const(0, "int32"))
    with T.While(get(tile) < count):
        body(T.bind(count - 1 - get(tile)), T.bind(get(turn)))
        put(tile, get(tile) + blocks)
        put(turn, get(turn) + 1)


def meet(number: int, threads: int) -> None:
    """Wait at named barrier `number` for `threads` threads, those that only arrive too."""
    ptx("bar.sync", number, threads)


def pass_by(number: int, threads: int) -> None:
    """Arrive at a named barrier without waiting."""
    ptx("bar.arrive", number, threads)


def take_registers(count: int) -> None:
    """Enlarge the registers of each thread of a warp group to `count`."""
    ptx("setmaxnreg.inc.sync.aligned.u32", count)


def give_registers(count: int) -> None:
    """Shrink the registers of each thread of a warp group to `count`."""
    ptx("setmaxnreg.dec.sync.aligned.u32", count)
