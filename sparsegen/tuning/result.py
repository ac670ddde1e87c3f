"""Say what a search found, in words and in the line to paste."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsegen.tuning.race import Choice
from sparsegen.tuning.space import Candidate, Measured, Rejected


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The end of the search for one task.

    task      its name, and the `family` of its schedules
    choice    None when there was nothing to choose from
    measured  how many candidates have a time; `rejected` maps each stage to how many failed there
    excluded  static reasons and how many candidates each one excluded
    """

    task: str
    family: str
    candidate: Candidate
    choice: Choice | None
    measured: int = 0
    rejected: Mapping[str, int]
    excluded: Mapping[str, int]
    note: str = ""

    def __str__(self) -> str:
        """Return a few lines: the choice, the counts and the reasons."""
        lines = [f"{self.task}: {self._verdict()}"]
        failed = "".join(f", {n} failed at stage {stage!r}" for stage, n in self.rejected.items())
        if self.choice is not None:
            lines.append(f"  {self.measured} candidates measured{failed}")
        lines += [f"  {n} excluded: {reason}" for reason, n in self.excluded.items()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        choice = self.choice
        if choice is None or choice.final is None:
            return f"default kept, {self.note or (choice.why if choice else '')}"
        micros = f"{choice.final.micros:.4g} us"
        if choice.candidate == choice.default:
            return f"default kept at {micros}, {choice.why}"
        settings = ", ".join(self.candidate.settings())
        return (
            f"{choice.speedup:.2f} times as fast as the default, {micros} "
            f"(noise {choice.noise:.1%}): {settings}"
        )


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What was chosen for each task of a pattern.

    schedules  by task name, as `sg.compile(..., schedule=...)` takes them
    seconds    that the search took
    records    the file that `sg.compile` finds the choices in
    """

    tasks: tuple[TaskResult, ...]
    seconds: float
    records: str

    @property
    def speedups(self) -> dict[str, float]:
        """Return how many times faster than its default each task became."""
        return {t.task: 1.0 if t.choice is None else t.choice.speedup for t in self.tasks}

    @property
    def paste(self) -> str:
        """Return the argument that repeats the choices without any record."""
        chosen = {t.task: t.candidate for t in self.tasks if t.choice is not None}
        if len(chosen) == 1:
            return f"schedule={next(iter(chosen.values()))}"
        return "schedule={" + ", ".join(f"{k!r}: {v}" for k, v in chosen.items()) + "}"

    def __str__(self) -> str:
        """Return a report that ends with the line to paste."""
        about = [str(t) for t in self.tasks]
        return "\n".join(
            [*about, f"tuned in {self.seconds:.1f} s; records in {self.records}", self.paste]
        )


def count_rejected(outcomes: Mapping[Candidate, Measured | Rejected]) -> dict[str, int]:
    """Return how many candidates failed at each stage."""
    counts: dict[str, int] = {}
    for outcome in outcomes.values():
        if isinstance(outcome, Rejected):
            counts[outcome.stage] = counts.get(outcome.stage, 0) + 1
    return counts
