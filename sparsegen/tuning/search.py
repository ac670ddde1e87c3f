"""Tune a plan: every task with more than one candidate gets a share of the budget and a race."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

from sparsegen import arch as archs
from sparsegen.arch import Arch
from sparsegen.errors import BindingError, did_you_mean
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Task
from sparsegen.tuning import lists, records
from sparsegen.tuning.candidates import folders, space_of, toolchain
from sparsegen.tuning.isolated import Isolated
from sparsegen.tuning.job import Job
from sparsegen.tuning.process import Workers
from sparsegen.tuning.race import FINAL_SHARE, Choice, Proposer, Race
from sparsegen.tuning.records import Key, Origin, Record, Sizes, Writer, task_hash
from sparsegen.tuning.result import TaskResult, TuneResult, tuned, untuned
from sparsegen.tuning.show import Show
from sparsegen.tuning.space import Candidate, History, Outcome, Rejected, Space
from sparsegen.tuning.strategies import STRATEGIES

NEGLIGIBLE = 0.02
"""A task with less than this share of the time keeps its default."""


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
        arch: this machine, or what it can run; `cores` says how many threads kernels use.
        budget: seconds, compiling included.
        distribution: where gathered keys lie; see `lists`.
        tasks: names of the tasks to tune (default: all that have a choice).

    Raises:
        BindingError: an argument is not known.
        TuningError: every candidate of a task was rejected.
    """
    started = time.monotonic()
    arch = _measurable(arch)
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
    found = _Search(
        plan=plan, machine=arch, sizes=sizes, distribution=distribution,
        propose=STRATEGIES.require(strategy).propose, path=path, show=show or Show(),
        deadline=started + budget, rng=Random(seed),
    )  # fmt: skip
    results = found.run(tuple(t for t in plan.tasks if tasks is None or t.name in tasks))
    return TuneResult(tasks=results, seconds=time.monotonic() - started, records=str(path))


def _measurable(arch: Arch) -> Arch:
    """Return an architecture with the cores of this machine, which must be able to run it."""
    host = archs.host()
    if arch.kind != "cpu" or not arch.features <= host.features:
        raise BindingError(
            f"{arch.name} cannot be measured here: this machine is {host.name}",
            hint=f"tune on such a machine, or for {host.name!r}",
        )
    return replace(arch, cores=host.cores)


@dataclass(kw_only=True)
class _Entrant:
    """A task that takes part, and what is known of it."""

    task: Task
    space: Space
    key: Key
    runner: Isolated
    history: History
    micros: float = 0.0


@dataclass(kw_only=True)
class _Search:
    plan: Plan
    machine: Arch
    sizes: Sizes
    distribution: str
    propose: Proposer
    path: Path
    show: Show
    deadline: float
    rng: Random

    def run(self, tasks: tuple[Task, ...]) -> tuple[TaskResult, ...]:
        """Tune the tasks, those that take longest first, and return results in their order."""
        known = records.read(self.path)
        spaces = {t.name: space_of(t, self.machine) for t in tasks}
        results = {t.name: untuned(t, spaces[t.name], "there is one candidate") for t in tasks}
        with ExitStack() as stack:
            writer = stack.enter_context(Writer(self.path))
            workers = stack.enter_context(Workers(self._threads))
            stack.enter_context(self.show)
            entrants = [
                self._entrant(t, spaces[t.name], known, workers)
                for t in tasks
                if len(spaces[t.name].candidates) > 1
            ]
            self.show.phase("building the defaults", self.deadline)
            self._probe(entrants, writer)
            total = left = sum(e.micros for e in entrants)
            for entrant in sorted(entrants, key=lambda e: -e.micros):
                share, left = entrant.micros / max(left, 1e-9), left - entrant.micros
                if entrant.micros < NEGLIGIBLE * total:
                    note = f"it takes {entrant.micros / total:.1%} of the time"
                    results[entrant.task.name] = untuned(entrant.task, entrant.space, note)
                    continue
                choice = self._race(entrant, share, writer)
                results[entrant.task.name] = tuned(
                    entrant.task, entrant.space, choice, entrant.history
                )
        return tuple(results[t.name] for t in tasks)

    @property
    def _threads(self) -> int:
        return self.machine.cores or 1

    def _entrant(self, task: Task, space: Space, known: list[Record], workers: Workers) -> _Entrant:
        key = Key(
            task=task_hash(task),
            sizes=self.sizes,
            distribution=lists.label(self.distribution) if task.lists else "none",
            arch=self.machine.name,
            threads=self._threads,
            toolchain=toolchain(c.schedule for c in space.candidates),
        )
        job = Job(
            program=self.plan.program.to_json(),
            binding=self.plan.binding.to_json(),
            task=task.name,
            arch=self.machine.name,
            threads=self._threads,
            sizes=self.sizes,
            distribution=self.distribution,
            folders=folders(),
        )
        runner = Isolated(job, workers, self.path.parent / "quarantine")
        seen = records.seen(known, key)
        history = History({c: seen[c] for c in space.candidates if c in seen})
        return _Entrant(task=task, space=space, key=key, runner=runner, history=history)

    def _probe(self, entrants: list[_Entrant], writer: Writer) -> None:
        """Time every default once: the budget is shared out in that proportion."""
        for entrant in entrants:
            default = entrant.space.default
            if isinstance(entrant.history.outcomes.get(default), Rejected):
                continue
            for _, rejected in entrant.runner.prepare([default], self.deadline):
                found = rejected or entrant.runner.round([default])[default]
                if isinstance(found, Rejected):
                    entrant.history.outcomes[default] = found
                    writer.write(self._record(entrant, "candidate", default, found))
                else:
                    entrant.micros = found
        # A default that does not work leaves its task without a time; it needs the search most.
        longest = max((e.micros for e in entrants), default=0.0)
        for entrant in entrants:
            entrant.micros = entrant.micros or longest or 1.0

    def _race(self, entrant: _Entrant, share: float, writer: Writer) -> Choice:
        now = time.monotonic()
        seconds = max(0.0, self.deadline - now) * share
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
            what=what, key=entrant.key, origin=origin, candidate=candidate, outcome=outcome
        )
