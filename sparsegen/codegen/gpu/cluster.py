"""Let the two blocks of a cluster work together: who they are, barriers, copies for both.

Both reach into each other's shared memory, where everything has the same place. So neither may
begin before the other's barriers are set up, nor end while the other still reaches for it.
"""

from __future__ import annotations

from sparsegen.codegen.cpu.stream import get
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.gpu.pipeline import Barrier
from sparsegen.codegen.tvm import T, Value, const, scratch

SIZE = 2  # blocks
BOTH = 0b11  # of them, as a mask
COPY = (
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
)
"""Copies a box to one place in the shared memory of both blocks; barriers there learn of it."""


def enter(block: Value) -> Value:
    """Make clusters of the grid; return the number of this block in its cluster (int32)."""
    T.cta_id_in_cluster([SIZE])
    return T.bind(block % SIZE)


def meet() -> None:
    """Wait for all threads of both blocks, and see what they wrote to shared memory."""
    ptx("barrier.cluster.arrive.release.aligned")
    ptx("barrier.cluster.wait.acquire.aligned")


def arrive(barrier: Barrier, rank: Value) -> None:
    """Arrive once at the barrier that the block `rank` (int32) has at this place."""
    address = scratch(1, "uint32")
    here = T.cuda.cvta_generic_to_shared(barrier.pointer)
    ptx("mapa.shared::cluster.u32", address[0], here, T.Cast("uint32", rank))
    ptx("mbarrier.arrive.release.cluster.shared::cluster.b64", get(address), const(1, "uint32"))
