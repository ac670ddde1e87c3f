"""Search one space: propose, prepare, measure in interleaved rounds, and let the best race again.

Every round measures each surviving candidate once, and the default with them, so that drift of the
machine touches all alike. Slow candidates leave early. Because the best of many noisy numbers looks
better than it is, the fastest ones run a final of their own against the default, and the default
keeps its place unless it is beaten by more than the noise.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Protocol

from sparsegen.errors import TuningError
from sparsegen.tuning.space import (
    Candidate,
    History,
    Measured,
    Outcome,
    Pair,
    Rejected,
    Sample,
    Space,
)

BATCH = 8
"""Most candidates prepared together; while one batch is measured nothing is compiled."""
HEATS = (2, 3, 4)
"""Rounds of a batch; after each heat the slower half leaves."""
HOPELESS = 1.5
"""A candidate this much slower than the fastest one leaves after its first heat."""
FINALISTS = 3
FINAL_ROUNDS = 15
FINAL_SHARE = 0.2
"""Share of the budget kept for the final."""
BURSTS = 3
FLOOR = 0.01
"""No win below this counts, however quiet the machine."""

Proposer = Callable[[Space, History, int, Random], list[Candidate]]


class Runner(Protocol):
    """Build, check and time candidates."""

    def prepare(
        self, candidates: Sequence[Candidate], deadline: float
    ) -> Iterator[tuple[Candidate, Rejected | None]]:
        """Build and check candidates; yield each with None when it may be timed.

        What is not ready at the deadline is not yielded.
        """

    def round(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, Sample | Rejected]:
        """Time each candidate once."""

    def burst(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, Sample | Rejected]:
        """Time each candidate after a rest; empty where that says nothing new."""

    def confirm(self, candidate: Candidate) -> Rejected | None:
        """Check a candidate once more after it ran under load, where that may tell more."""


class Observer(Protocol):
    """Watch a search."""

    def progress(self, history: History, space: Space) -> None:
        """Learn that the history has grown."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The end of a search: the candidate to use, and how it compares with the default.

    final  None when time allowed no comparison; then the candidate is the default
    noise  the relative difference below which two candidates count as equal
    """

    candidate: Candidate
    default: Candidate
    final: Measured | None
    noise: float
    why: str

    @property
    def speedup(self) -> float:
        """Return how many times faster than the default the choice is."""
        return 1.0 if self.final is None else 1 / self.final.ratio


@dataclass(kw_only=True)
class Race:
    """One search.

    Args:
        history: outcomes known from an earlier run; they are not measured again.
        record: called with each new outcome, at once.
        deadline, reserve: by `clock`; `reserve` seconds before the deadline the final starts.
    """

    space: Space
    propose: Proposer
    runner: Runner
    history: History
    record: Callable[[Candidate, Outcome], None]
    deadline: float
    reserve: float
    rng: Random
    observer: Observer | None = None
    clock: Callable[[], float] = time.monotonic
    ready: set[Candidate] = field(default_factory=set)
    """Candidates prepared in this process."""
    defaults: deque[Sample] = field(default_factory=lambda: deque(maxlen=FINAL_ROUNDS))
    """The last samples of the default."""

    def run(self) -> Choice:
        """Search until the strategy has nothing to propose or the time is up.

        Raises:
            TuningError: every candidate was rejected.
        """
        anchor = self._anchor()
        if anchor is None:
            why = "the budget ended before the default was built"
            default = self.space.default
            return Choice(candidate=default, default=default, final=None, noise=0.0, why=why)
        count = BATCH // 2
        while (start := self.clock()) < self.deadline - self.reserve:
            batch = self.propose(self.space, self.history, count, self.rng)
            if not batch:
                break
            alive = [c for c in self._prepare(batch) if c != anchor]
            # Half of what is left may go into building the next batch, the rest is for measuring.
            left = self.deadline - self.reserve - self.clock()
            pace = max(self.clock() - start, 1e-9) / len(batch)
            count = max(1, min(BATCH, int(left / 2 / pace)))
            self._heats(anchor, alive)
        return self._final(anchor)

    def _anchor(self) -> Candidate | None:
        """Return the default, prepared; or the first that works when the default does not."""
        for candidate in self.space.candidates:
            if isinstance(self.history.outcomes.get(candidate), Rejected):
                continue
            if self.clock() >= self.deadline:
                return None
            if candidate in self._prepare([candidate]):
                time_of = self.runner.round([candidate])[candidate]
                if not isinstance(time_of, Rejected):
                    self.defaults.append(time_of)
                    self._learn(candidate, Measured.of([(time_of, time_of)]))
                    return candidate
                self._learn(candidate, time_of)
        raise TuningError(
            f"all {len(self.space.candidates)} candidates were rejected",
            hint=self._why_all() + "; the records hold every reason",
        )

    def _why_all(self) -> str:
        reasons = [o for o in self.history.outcomes.values() if isinstance(o, Rejected)]
        last = reasons[-1].why.strip().splitlines()[-1] if reasons and reasons[-1].why else ""
        return f"the last one failed at stage {reasons[-1].stage!r}: {last}" if reasons else ""

    def _prepare(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        passed = [c for c in candidates if c in self.ready]
        new = [c for c in candidates if c not in self.ready]
        for candidate, rejected in self.runner.prepare(new, self.deadline):
            if rejected is None:
                self.ready.add(candidate)
                passed.append(candidate)
            else:
                self._learn(candidate, rejected)
        return passed

    def _heats(self, anchor: Candidate, alive: list[Candidate]) -> None:
        samples: dict[Candidate, list[Pair]] = {c: [] for c in alive}
        for rounds in HEATS:
            for _ in range(rounds):
                if alive and self.clock() < self.deadline - self.reserve:
                    alive = self._round(anchor, alive, samples)
            alive = [c for c in alive if samples[c]]
            if not alive:
                return
            ratios = {c: Measured.of(samples[c]).ratio for c in alive}
            order = sorted(alive, key=ratios.__getitem__)
            best = min(ratios[order[0]], *self._best_ratio())
            last = rounds == HEATS[-1] or self.clock() >= self.deadline - self.reserve
            keep = [] if last else order[: (len(order) + 1) // 2]
            keep = [c for c in keep if ratios[c] < HOPELESS * best]
            for candidate in order:
                if candidate not in keep:
                    self._learn(candidate, Measured.of(samples[candidate]))
            alive = keep

    def _best_ratio(self) -> list[float]:
        return [1.0, *(m.ratio for m in self.history.measured.values())]

    def _round(
        self,
        anchor: Candidate,
        alive: list[Candidate],
        samples: dict[Candidate, list[Pair]],
    ) -> list[Candidate]:
        times = self.runner.round(self._shuffled([anchor, *alive]))
        base = times[anchor]
        if isinstance(base, Rejected):
            raise TuningError(
                f"{anchor}, which passed every check, failed while it was timed: {base.why}",
                hint="report it with the quarantined reproduction; records keep what was measured",
            )
        self.defaults.append(base)
        for candidate in alive:
            taken = times[candidate]
            if isinstance(taken, Rejected):
                self._learn(candidate, taken)
            else:
                samples[candidate].append((taken, base))
        return [c for c in alive if not isinstance(times[c], Rejected)]

    def _shuffled(self, candidates: list[Candidate]) -> list[Candidate]:
        return self.rng.sample(candidates, len(candidates))

    def _final(self, anchor: Candidate) -> Choice:
        """Race the fastest against the default; rounds go on while there is time."""
        names = [c for c in self.history.fastest(FINALISTS + 1) if c != anchor][:FINALISTS]
        alive = [c for c in self._prepare(names) if self.history.measured[c].ratio < 1]
        if not alive:
            return self._stay("nothing was faster than the default", anchor, 0.0)
        samples: dict[Candidate, list[Pair]] = {c: [] for c in alive}
        for done in range(FINAL_ROUNDS):
            if not alive or (done >= 3 and self.clock() >= self.deadline):
                break
            alive = self._round(anchor, alive, samples)
        if not alive:
            return self._stay("the faster ones failed in the final", anchor, 0.0)
        results = {c: Measured.of(samples[c]) for c in alive}
        best = min(results, key=lambda c: results[c].ratio)
        noise = noise_of(results[best])
        wrong: Rejected | None = None
        if 1 - results[best].ratio > noise:
            bursts, wrong = self._bursts(best, anchor)
            wrong = wrong or self.runner.confirm(best)
            if wrong is None:
                final = Measured.of(samples[best], bursts)
                return Choice(
                    candidate=best, default=anchor, final=final, noise=noise, why="faster"
                )
            self._learn(best, wrong)
        gain = f"the best other candidate gains {max(0.0, 1 - results[best].ratio):.1%}, "
        why = gain + (f"but failed: {wrong.why}" if wrong else f"the noise is {noise:.1%}")
        return self._stay(why, anchor, noise)

    def _stay(self, why: str, anchor: Candidate, noise: float) -> Choice:
        """Return the choice of the default after a search."""
        bursts, _ = self._bursts(anchor, anchor)
        final = Measured.of([(s, s) for s in self.defaults], bursts)
        return Choice(candidate=anchor, default=anchor, final=final, noise=noise, why=why)

    def _bursts(
        self, candidate: Candidate, anchor: Candidate
    ) -> tuple[list[Pair], Rejected | None]:
        """Return bursts of two candidates, and why the first one failed if it did."""
        found: list[Pair] = []
        for _ in range(BURSTS):
            taken = self.runner.burst(self._shuffled(list(dict.fromkeys([candidate, anchor]))))
            own, base = taken.get(candidate), taken.get(anchor)
            if isinstance(own, Rejected):
                return [], own
            if isinstance(own, Sample) and isinstance(base, Sample):
                found.append((own, base))
        return found, None

    def _learn(self, candidate: Candidate, outcome: Outcome) -> None:
        self.history.outcomes[candidate] = outcome
        self.record(candidate, outcome)
        if self.observer is not None:
            self.observer.progress(self.history, self.space)


def noise_of(final: Measured) -> float:
    """Return twice the median absolute deviation of the ratios taken within one round."""
    deviations = [
        abs(s / a - final.ratio) for s, a in zip(final.samples, final.anchor, strict=True)
    ]
    return max(FLOOR, 2 * median(deviations))
