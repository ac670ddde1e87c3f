"""Breed the next candidates from the fastest ones: neighbours, crossings, and some at random."""

from random import Random

from sparsegen.tuning.space import Candidate, History, Space

_PARENTS = 5
_STRANGERS = 0.25
"""Share of candidates drawn without regard to the parents, so that no corner stays unvisited."""


def propose(space: Space, history: History, count: int, rng: Random) -> list[Candidate]:
    """Return `count` candidates not seen yet.

    The first time: half of them neighbours of the default, half drawn over the whole space. Later:
    one-knob neighbours of the fastest candidates and crossings of two of them, better parents
    first, completed at random.
    """
    left = space.unseen(history)
    if len(left) <= count:
        return left
    parents = history.fastest(_PARENTS) or [space.default]
    strangers = max(1, round(count * (_STRANGERS if len(history.fastest(2)) > 1 else 0.5)))
    chosen: dict[Candidate, None] = {}
    fresh = set(left)
    for child in _children(space, parents, rng, tries=8 * count):
        if child in fresh and len(chosen) < count - strangers:
            chosen[child] = None
    rest = [c for c in left if c not in chosen]
    return [*chosen, *rng.sample(rest, min(count - len(chosen), len(rest)))]


def _children(space: Space, parents: list[Candidate], rng: Random, tries: int) -> list[Candidate]:
    near = {parent: space.neighbours(parent) for parent in parents}
    weights = [1 / (rank + 1) for rank in range(len(parents))]
    children: list[Candidate] = []
    for _ in range(tries):
        parent, other = rng.choices(parents, weights, k=2)
        if parent != other and rng.random() < 0.3:
            crossed = {k: rng.choice((v, dict(other.knobs).get(k, v))) for k, v in parent.knobs}
            children.append(Candidate.of(parent.schedule, crossed))
        elif near[parent]:
            children.append(rng.choice(near[parent]))
    return children
