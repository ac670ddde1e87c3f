"""Measure every candidate, in the order of the space."""

from random import Random

from sparsegen.tuning.space import Candidate, History, Space


def propose(space: Space, history: History, count: int, rng: Random) -> list[Candidate]:
    """Return the first `count` candidates not seen yet."""
    return space.unseen(history)[:count]
