"""Tune a plan: every task with more than one candidate gets a share of the budget and a race."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from sparsegen.arch import Arch
from sparsegen.errors import BindingError, did_you_mean
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Task
from sparsegen.tuning import lists, records
from sparsegen.tuning.candidates import folders, space_of, toolchain
from sparsegen.tuning.isolated import Isolated
from sparsegen.tuning.job import Job
from sparsegen.tuning.machine import Machine, machine_of
from sparsegen.tuning.race import FINAL_SHARE, Choice, Proposer, Race
from sparsegen.tuning.records import Key, Origin, Record, Sizes, Writer, task_hash
from sparsegen.tuning.result import TaskResult, TuneResult, known, tuned, untuned
from sparsegen.tuning.show import Show
from sparsegen.tuning.space import Candidate, History, Outcome, Rejected, Space
from sparsegen.tuning.strategies import STRATEGIES
from sparsegen.tuning.workers import Workers

NEGLIGIBLE = 0.02
"""A task with less than this share of the time keeps its default."""
LOOKAHEAD = 6
"""Candidates of a task that are begun before they are asked for, in rounds of all builders."""


def search(
    plan: Plan,
    arch: Arch,
    sizes: Sizes,
    *,
    budget: float,
    path: Path,
    strategy: str = "evolutionary",
    distribution: str = "uniform",
    tasks: Collection[str] | None = None,
    seed: int = 0,
    show: Show | None = None,
) -> TuneResult:
    """Search for the fastest knobs of each task of a plan, and record them in `path`.

    Args:
        arch: this machine, or what it can run.
        budget: seconds, compiling included.
        distribution: where gathered keys lie; see `lists`.
        tasks: names of the tasks to tune (default: all that have a choice).

    Raises:
        BindingError: an argument is not known.
        TuningError: every candidate of a task was rejected.
    """
    started = time.monotonic()
    machine = machine_of(arch)
    if not budget > 0:
        raise BindingError(f"budget={budget!r}: a search takes a positive number of seconds")
    for name, extent in asdict(sizes).items():
        if not isinstance(extent, int) or extent < 1:
            raise BindingError(f"{extent!r} is no number of {name} rows to tune for")
    lists.label(distribution)
    names = [t.name for t in plan.tasks]
    for name in tasks or ():
        if name not in names:
            raise BindingError(
                f"{plan.program.name} has no task {name!r}", hint=did_you_mean(name, names)
            )
    propose = STRATEGIES.require(strategy).propose
    with Workers(machine.builders, machine.threads, machine.arch.kind) as workers:
        found = Search(
            plan=plan, machine=machine, sizes=sizes, distribution=distribution, propose=propose,
            path=path, workers=workers, rng=Random(seed), show=show or Show(),
            tasks=tuple(t for t in plan.tasks if tasks is None or t.name in tasks),
        )  # fmt: skip
        with found.show:
            found.begin()
            results = found.run(started + budget)
    return TuneResult(tasks=results, seconds=time.monotonic() - started, records=str(path))


@dataclass(kw_only=True)
class _Entrant:
    """A task that takes part, and what is known of it."""

    task: Task
    space: Space
    key: Key
    runner: Isolated
    history: History
    micros: float = 1.0


@dataclass(kw_only=True)
class Search:
    """The search for one plan at one size and distribution.

    tasks   of the plan that take part
    limit   of candidates of each task, which are then all measured; the time is shared out evenly.
            What an earlier run measured, and chose from, is left alone.
    serves  what the records of choices say there; see `Record`
    """

    plan: Plan
    machine: Machine
    sizes: Sizes
    distribution: str
    propose: Proposer
    path: Path
    workers: Workers
    rng: Random
    show: Show
    tasks: tuple[Task, ...]
    limit: int | None = None
    serves: str = ""
    results: dict[str, TaskResult] = field(default_factory=dict)
    entrants: list[_Entrant] = field(default_factory=list)

    def begin(self) -> None:
        """See what there is to do and, where it disturbs nobody, let builders begin with it."""
        before = records.read(self.path)
        for task in self.tasks:
            space = space_of(task, self.machine.arch)
            if self.limit is not None:
                space = space.first(min(self.limit, space.worthwhile), Random(0))
            self.results[task.name] = untuned(task, space, "there is one candidate")
            if len(space.candidates) == 1:
                continue
            entrant = self._entrant(task, space, before)
            chosen = [r for r in before if r.what == "choice" and r.key == entrant.key]
            if self.limit is not None and chosen and not space.unseen(entrant.history):
                self.results[task.name] = known(task, space, chosen[-1].candidate)
                entrant.runner.close()
            else:
                self.entrants.append(entrant)
        for entrant in self.entrants:
            entrant.runner.ahead([entrant.space.default])
        for entrant in self.entrants:
            most = LOOKAHEAD * self.machine.builders
            left = entrant.space.first(most, Random(0)).unseen(entrant.history)
            entrant.runner.ahead(left)

    def is_ready(self, *, whole: bool) -> bool:
        """Tell whether the defaults are built, or the `whole` of what will be measured."""
        return all(
            e.runner.is_ready([e.space.default, *(e.space.unseen(e.history) if whole else ())])
            for e in self.entrants
        )

    def run(self, deadline: float) -> tuple[TaskResult, ...]:
        """Tune the tasks, those that take longest first, and return results in their order."""
        try:
            with Writer(self.path) as writer:
                if self.limit is None:
                    self.show.phase("building the defaults", deadline)
                    self._probe(deadline, writer)
                self._races(deadline, writer)
        finally:
            self.close()
        return tuple(self.results[t.name] for t in self.tasks)

    def close(self) -> None:
        """Remove what the search needs no more."""
        for entrant in self.entrants:
            entrant.runner.close()

    def _races(self, deadline: float, writer: Writer) -> None:
        total = left = sum(e.micros for e in self.entrants)
        order = sorted(self.entrants, key=lambda e: -e.micros)
        for n, entrant in enumerate(order):
            share, left = entrant.micros / max(left, 1e-9), left - entrant.micros
            if entrant.micros < NEGLIGIBLE * total:
                note = f"it takes {entrant.micros / total:.1%} of the time"
                self.results[entrant.task.name] = untuned(entrant.task, entrant.space, note)
                continue
            if self.machine.arch.kind == "cuda":  # a fast kernel takes about as long to tune there
                share = max(share, 0.5 / (len(order) - n))
            choice = self._race(entrant, share, deadline, writer)
            self.results[entrant.task.name] = tuned(
                entrant.task, entrant.space, choice, entrant.history
            )

    def _entrant(self, task: Task, space: Space, before: list[Record]) -> _Entrant:
        machine, sources = self.machine, toolchain(c.schedule for c in space.candidates)
        key = Key(
            task=task_hash(task),
            sizes=self.sizes,
            distribution=lists.label(self.distribution) if task.lists else "none",
            arch=machine.arch.name,
            threads=machine.threads,
            toolchain=", ".join(filter(None, [sources, machine.compiler])),
            device=machine.device,
        )
        job = Job(
            program=self.plan.program.to_json(),
            binding=self.plan.binding.to_json(),
            task=task.name,
            arch=machine.arch.name,
            threads=machine.threads,
            sizes=self.sizes,
            distribution=self.distribution,
            folders=folders(),
        )
        runner = Isolated(job, self.workers, self.path.parent / "quarantine")
        seen = records.seen(before, key)
        history = History({c: seen[c] for c in space.candidates if c in seen})
        return _Entrant(task=task, space=space, key=key, runner=runner, history=history)

    def _probe(self, deadline: float, writer: Writer) -> None:
        """Time every default once: the budget is shared out in that proportion."""
        for entrant in self.entrants:
            entrant.micros = 0.0
            default = entrant.space.default
            if isinstance(entrant.history.outcomes.get(default), Rejected):
                continue
            for _, rejected in entrant.runner.prepare([default], deadline):
                found = rejected or entrant.runner.round([default])[default]
                if isinstance(found, Rejected):
                    entrant.history.outcomes[default] = found
                    writer.write(self._record(entrant, "candidate", default, found))
                else:
                    entrant.micros = found.micros
        # A default that does not work leaves its task without a time; it needs the search most.
        longest = max((e.micros for e in self.entrants), default=0.0)
        for entrant in self.entrants:
            entrant.micros = entrant.micros or longest or 1.0

    def _race(self, entrant: _Entrant, share: float, deadline: float, writer: Writer) -> Choice:
        now = time.monotonic()
        seconds = max(0.0, deadline - now) * share
        self.show.phase(entrant.task.name, now + seconds)
        choice = Race(
            space=entrant.space,
            propose=self.propose,
            runner=entrant.runner,
            history=entrant.history,
            record=lambda c, o: writer.write(self._record(entrant, "candidate", c, o)),
            deadline=now + seconds,
            reserve=FINAL_SHARE * seconds,
            rng=self.rng,
            observer=self.show,
        ).run()
        if choice.final is not None:
            writer.write(self._record(entrant, "choice", choice.candidate, choice.final))
        return choice

    def _record(
        self, entrant: _Entrant, what: str, candidate: Candidate, outcome: Outcome
    ) -> Record:
        origin = Origin(
            program=self.plan.program.name,
            program_hash=self.plan.program.hash,
            binding=json.loads(self.plan.binding.to_json()),
            task=entrant.task.name,
        )
        return Record(
            what=what, key=entrant.key, origin=origin, candidate=candidate, outcome=outcome,
            serves=self.serves if what == "choice" else "",
        )  # fmt: skip
