"""Say what a search found, in words and in the line to paste."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsegen.lowering.tasks import Task
from sparsegen.runtime.catalog import Schedule
from sparsegen.tuning.race import Choice
from sparsegen.tuning.space import Candidate, History, Rejected, Space

_REASONS = 3  # that are told in full


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The end of the search for one task.

    choice    None when there was nothing to choose from, or too little to gain; `note` says why
    measured  how many candidates have a time; `rejected` maps each stage to how many failed there
    excluded  static reasons and how many candidates each one excluded
    """

    task: str
    candidate: Candidate
    choice: Choice | None
    measured: int
    rejected: Mapping[str, int]
    excluded: Mapping[str, int]
    note: str = ""

    def __str__(self) -> str:
        """Return a few lines: the choice, the counts and the reasons."""
        lines = [f"{self.task}: {self._verdict()}"]
        failed = "".join(f", {n} failed at stage {stage!r}" for stage, n in self.rejected.items())
        if self.choice is not None:
            lines.append(f"  {self.measured} candidates measured{failed}")
        reasons = list(self.excluded.items())
        lines += [f"  {n} excluded: {reason}" for reason, n in reasons[:_REASONS]]
        rest = sum(n for _, n in reasons[_REASONS:])
        if rest:
            lines.append(f"  {rest} excluded for {len(reasons) - _REASONS} other reasons")
        return "\n".join(lines)

    def _verdict(self) -> str:
        choice = self.choice
        if choice is None or choice.final is None:
            return f"default kept, {choice.why if choice else self.note}"
        micros = f"{choice.final.micros:.4g} us"
        if choice.candidate == choice.default:
            return f"default kept at {micros}, {choice.why}"
        return f"{choice.speedup:.2f}x the default, {micros} (noise {choice.noise:.1%})"


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What was chosen for each task, the `seconds` it took, and the file that records it."""

    tasks: tuple[TaskResult, ...]
    seconds: float
    records: str

    @property
    def speedups(self) -> dict[str, float]:
        """Return how many times faster than its default each task became."""
        return {t.task: 1.0 if t.choice is None else t.choice.speedup for t in self.tasks}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Return the choices by task name, as `sg.compile(..., schedule=...)` takes them."""
        return {
            t.task: Schedule(t.candidate.schedule, **dict(t.candidate.knobs))
            for t in self.tasks
            if t.choice is not None
        }

    @property
    def paste(self) -> str:
        """Return the argument of `sg.compile` that repeats the choices without any record."""
        chosen = self.schedules
        if len(chosen) == 1 and len(self.tasks) == 1:
            return f"schedule={next(iter(chosen.values()))!r}"
        return "schedule={" + ", ".join(f"{k!r}: {v!r}" for k, v in chosen.items()) + "}"

    def __str__(self) -> str:
        """Return a report that ends with the line to paste."""
        took = f"tuned in {self.seconds:.1f} s; records in {self.records}"
        return "\n".join([*map(str, self.tasks), took, self.paste])


def tuned(task: Task, space: Space, choice: Choice, history: History) -> TaskResult:
    """Return the result of a search."""
    rejected: dict[str, int] = {}
    for outcome in history.outcomes.values():
        if isinstance(outcome, Rejected):
            rejected[outcome.stage] = rejected.get(outcome.stage, 0) + 1
    return TaskResult(
        task=task.name, candidate=choice.candidate, choice=choice,
        measured=len(history.measured), rejected=rejected, excluded=space.reasons(),
    )  # fmt: skip


def known(task: Task, space: Space, candidate: Candidate) -> TaskResult:
    """Return the result for a task whose search was finished in an earlier run."""
    return replace(untuned(task, space, "chosen in an earlier run"), candidate=candidate)


def untuned(task: Task, space: Space, note: str) -> TaskResult:
    """Return the result for a task that keeps its default without a search."""
    return TaskResult(
        task=task.name, candidate=space.default, choice=None, note=note, measured=0, rejected={},
        excluded={},
    )  # fmt: skip
