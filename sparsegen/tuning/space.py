"""Hold the candidates of one task, what has been seen of them, and how near they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from statistics import median

Value = int | bool | str


@dataclass(frozen=True)
class Candidate:
    """A schedule with a value for each of its knobs, in the order the schedule declares them."""

    schedule: str
    knobs: tuple[tuple[str, Value], ...]

    @classmethod
    def of(cls, schedule: str, knobs: Mapping[str, Value]) -> Candidate:
        """Return the candidate of a mapping."""
        return cls(schedule, tuple(knobs.items()))

    def __str__(self) -> str:
        """Return what to paste as `schedule=`."""
        return f"sg.Schedule({', '.join([repr(self.schedule), *self.settings()])})"

    def settings(self) -> list[str]:
        """Return `knob=value` for each knob."""
        return [f"{name}={value!r}" for name, value in self.knobs]


@dataclass(frozen=True)
class Rejected:
    """A candidate that cannot be used.

    stage  "space" (a static inequality), "build", "load", "check" or "time"
    why    in words, or the last lines of what the worker said
    """

    stage: str
    why: str


@dataclass(frozen=True)
class Sample:
    """What a round says of a candidate, in microseconds, and the single calls behind that."""

    micros: float
    calls: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Samples of a candidate in microseconds, and of the default taken in the same rounds.

    The default is the anchor: machines drift, and a ratio taken within one round does not.

    burst  samples taken after a rest, where the machine can run faster than it sustains
    calls  the single calls behind each sample
    """

    samples: tuple[float, ...]
    anchor: tuple[float, ...]
    burst: tuple[float, ...] = ()
    anchor_burst: tuple[float, ...] = ()
    calls: tuple[tuple[float, ...], ...] = ()
    anchor_calls: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, pairs: Sequence[Pair], bursts: Sequence[Pair] = ()) -> Measured:
        """Return what pairs of samples say, each of the candidate and of the default."""
        own, anchor = zip(*pairs, strict=True)
        burst, anchor_burst = zip(*bursts, strict=True) if bursts else ((), ())
        some = any(s.calls for s in own)
        return cls(
            samples=tuple(s.micros for s in own),
            anchor=tuple(s.micros for s in anchor),
            burst=tuple(s.micros for s in burst),
            anchor_burst=tuple(s.micros for s in anchor_burst),
            calls=tuple(s.calls for s in own) if some else (),
            anchor_calls=tuple(s.calls for s in anchor) if some else (),
        )

    @property
    def micros(self) -> float:
        """Return the median sample."""
        return median(self.samples)

    @property
    def ratio(self) -> float:
        """Return the median of candidate / default within a round; below 1 is faster."""
        return median(s / a for s, a in zip(self.samples, self.anchor, strict=True))


Pair = tuple[Sample, Sample]
Outcome = Measured | Rejected


@dataclass
class History:
    """Map each candidate seen so far to its outcome."""

    outcomes: dict[Candidate, Outcome] = field(default_factory=dict)

    def __contains__(self, candidate: object) -> bool:
        return candidate in self.outcomes

    def __len__(self) -> int:
        return len(self.outcomes)

    @property
    def measured(self) -> dict[Candidate, Measured]:
        """Return the candidates that have samples."""
        return {c: o for c, o in self.outcomes.items() if isinstance(o, Measured)}

    def fastest(self, count: int) -> list[Candidate]:
        """Return the `count` fastest candidates, best first."""
        measured = self.measured
        return sorted(measured, key=lambda c: measured[c].ratio)[:count]


@dataclass(frozen=True)
class Space:
    """Hold the candidates of a task, the default first, and what static inequalities exclude."""

    candidates: tuple[Candidate, ...]
    excluded: tuple[tuple[Candidate, str], ...] = ()

    @property
    def default(self) -> Candidate:
        """Return the candidate used when nothing is tuned."""
        return self.candidates[0]

    def unseen(self, history: History) -> list[Candidate]:
        """Return the candidates without an outcome, in order."""
        return [c for c in self.candidates if c not in history]

    def first(self, limit: int, rng: Random) -> Space:
        """Return the space of at most `limit` candidates that are worth trying first.

        The default and what is one step from it, the first candidate of every other schedule, and
        then any, those of the default's schedule first. A smaller limit takes the same ones, fewer.
        """
        own = self.default.schedule
        others = {c.schedule: c for c in reversed(self.candidates) if c.schedule != own}
        rest = rng.sample(self.candidates, len(self.candidates))
        order = [
            self.default, *self.neighbours(self.default), *reversed(others.values()),
            *sorted(rest, key=lambda c: c.schedule != own),
        ]  # fmt: skip
        return Space(tuple(dict.fromkeys(order))[:limit], self.excluded)

    @property
    def worthwhile(self) -> int:
        """Return how many of `first` are of the default's schedule, or the first of another."""
        schedules = [c.schedule for c in self.candidates]
        return schedules.count(self.default.schedule) + len(set(schedules)) - 1

    def reasons(self) -> dict[str, int]:
        """Return how many candidates each static reason excludes, most frequent first."""
        counts: dict[str, int] = {}
        for _, reason in self.excluded:
            counts[reason] = counts.get(reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Return the candidates that differ in one knob, by one step of its values.

        In a constrained space such a step may not exist; then the nearest candidates count, in
        steps summed over all knobs.
        """
        steps: dict[int, list[Candidate]] = {}
        for other in self.candidates:
            if other.schedule == candidate.schedule and other != candidate:
                steps.setdefault(self._distance(candidate, other), []).append(other)
        return steps[min(steps)] if steps else []

    def _distance(self, a: Candidate, b: Candidate) -> int:
        """Return how many steps of knob values lie between two candidates of one schedule."""
        total = 0
        for (name, x), (_, y) in zip(a.knobs, b.knobs, strict=True):
            if isinstance(x, str):
                total += x != y
            else:
                ranks = self._ranks[a.schedule, name]
                total += abs(ranks[x] - ranks[y])
        return total

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], dict[Value, int]]:
        values: dict[tuple[str, str], set[Value]] = {}
        for candidate in self.candidates:
            for name, value in candidate.knobs:
                values.setdefault((candidate.schedule, name), set()).add(value)
        return {
            knob: {value: rank for rank, value in enumerate(sorted(found, key=_order))}
            for knob, found in values.items()
        }


def _order(value: Value) -> tuple[int, str]:
    return (0, value) if isinstance(value, str) else (int(value), "")
