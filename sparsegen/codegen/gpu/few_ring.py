"""Walk a ring of slots in shared memory that groups of warps fill and use in turn."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.tvm import T, Value, cast, const


@dataclass(frozen=True)
class Ring:
    """How a chunk of keys is cut, and how many of the pieces there is room for.

    part   tiles of 64 columns of a slot
    parts  slots of a chunk
    slots  of the ring
    """

    part: int
    parts: int
    slots: int


@dataclass(frozen=True)
class Turn:
    """A place in the ring: the slot, and how often the ring was gone through before."""

    slot: Value
    round: Value


class Place:
    """A mutable place in the ring, at the first slot of a chunk."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.slot, self.round = (cell("int32", const(0, "int32")) for _ in range(2))

    def after(self, count: int) -> Turn:
        """Return the place some slots further, fewer than the ring has."""
        slots = self.ring.slots
        beyond = T.bind(get(self.slot) + count)
        over = T.bind(cast(beyond >= slots, "int32"))
        return Turn(T.bind(beyond - over * slots), T.bind(get(self.round) + over))

    def advance(self) -> None:
        """Go to the next chunk."""
        turn = self.after(self.ring.parts)
        put(self.slot, turn.slot)
        put(self.round, turn.round)
