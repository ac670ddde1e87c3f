"""Answer for candidates from records, so that strategies are tried without building a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle

from sparsegen.tuning.records import Record
from sparsegen.tuning.space import Candidate, Measured, Outcome, Rejected, Sample, Space


class Replay:
    """Yield the recorded outcome of every candidate; time passes only on its own clock.

    Args:
        records: of one search, as `records.read` returns them; later lines win.
        build_seconds: what preparing one candidate costs on `clock`.
    """

    def __init__(self, records: Iterable[Record], build_seconds: float = 0.5) -> None:
        self._outcomes: dict[Candidate, Outcome] = {
            r.candidate: r.outcome for r in records if r.what == "candidate"
        }
        self._samples = {
            c: cycle(o.samples) for c, o in self._outcomes.items() if isinstance(o, Measured)
        }
        self._build = build_seconds
        self._now = 0.0

    @property
    def space(self) -> Space:
        """Return the recorded candidates in order; the first line is of the default."""
        return Space(tuple(self._outcomes))

    def clock(self) -> float:
        """Return the seconds the recorded work would have taken."""
        return self._now

    def prepare(
        self, candidates: Sequence[Candidate], deadline: float
    ) -> Iterator[tuple[Candidate, Rejected | None]]:
        """Yield each candidate with the recorded reason, or None where it was measured."""
        for candidate in candidates:
            if self._now >= deadline:
                return
            self._now += self._build
            outcome = self._outcomes[candidate]
            yield candidate, outcome if isinstance(outcome, Rejected) else None

    def round(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, Sample | Rejected]:
        """Return the next recorded sample of each candidate, starting over after the last."""
        taken = {c: next(self._samples[c]) for c in candidates}
        self._now += sum(taken.values()) * 1e-6
        return {c: Sample(micros) for c, micros in taken.items()}

    def burst(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, Sample | Rejected]:
        """Return nothing: what is replayed are rounds."""
        return {}

    def confirm(self, candidate: Candidate) -> Rejected | None:
        """Return None: what was recorded as measured was right."""
        return None
