"""Decide which candidates to measure next, one strategy per file.

A strategy is a file with `propose(space, history, count, rng) -> list[Candidate]`: at most `count`
candidates of the space that the history does not hold; an empty list ends the search. It is a pure
function, so a search can be replayed and resumed.
"""

from sparsegen.plugins import discover

STRATEGIES = discover(__name__, "strategy")
