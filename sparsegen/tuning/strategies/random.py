"""Measure candidates in random order."""

from random import Random

from sparsegen.tuning.space import Candidate, History, Space


def propose(space: Space, history: History, count: int, rng: Random) -> list[Candidate]:
    """Return `count` candidates not seen yet, drawn without preference."""
    left = space.unseen(history)
    return rng.sample(left, min(count, len(left)))
