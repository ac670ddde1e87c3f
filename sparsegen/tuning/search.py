"""Tune a pattern: every task with more than one candidate gets a share of the budget and a race."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

from sparsegen import arch as archs
from sparsegen import patterns
from sparsegen.arch import Arch
from sparsegen.dsl.pattern import Hyper, Pattern
from sparsegen.errors import BindingError
from sparsegen.ir.program import Program
from sparsegen.lowering.binding import Binding, Layout
from sparsegen.lowering.partition import partition
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Task
from sparsegen.tuning import database, records
from sparsegen.tuning.candidates import space_of
from sparsegen.tuning.isolated import Isolated
from sparsegen.tuning.process import Workers
from sparsegen.tuning.records import Key, Sizes, Writer
from sparsegen.tuning.result import TaskResult, TuneResult
from sparsegen.tuning.show import Show, quiet
from sparsegen.tuning.space import History, Space
from sparsegen.tuning.strategies import STRATEGIES

NEGLIGIBLE = 0.02
"""A task with less than this share of the time keeps its default."""


def tune(
    pattern: Pattern | Program | str,
    *,
    sizes: Mapping[str, int],
    target: str = "cpu",
    dtype: str = "float32",
    dtypes: Mapping[str, str] | None = None,
    layout: Layout = "sequence",
    page_size: int = 0,
    scale: float | None = None,
    budget: float = 60.0,
    strategy: str = "evolutionary",
    distribution: str = "uniform",
    records: str | Path | None = None,
    tasks: tuple[str, ...] | None = None,
    seed: int = 0,
    show: Show | None = None,
    **hyper: Hyper,
) -> TuneResult:
    """Search for the fastest knobs of each kernel, and record them for `sg.compile` to find.

    Every candidate is built and run in a process of its own, checked against the float64 reference
    and only then timed, in rounds that interleave it with the default. The default stays unless it
    is beaten by more than the noise.

    Args:
        pattern: a pattern, a program, or the name of a shipped pattern.
        sizes: the extent of every letter, those of the sequences too; `B` is the number of
            sequences, if it is no letter of the pattern (default 1).
        target: "cpu" or the name of an architecture this machine can run.
        budget: seconds, compiling included.
        distribution: where gathered keys lie: uniform, local, clustered or trace:FILE.npy.
        records: the file to append to and to resume from (default: the user's own).
        tasks: names of the tasks to tune (default: all with a space).

    Raises:
        BindingError: the sizes do not fit, or a name is unknown.
        TuningError: every candidate of a task was rejected.
    """
    started = time.monotonic()
    program = _program(pattern, hyper)
    plan, extents = _bind(program, sizes, dtype, dtypes or {}, layout, page_size, scale)
    machine = _machine(target)
    path = Path(records) if records is not None else database.user_file()
    search = _Search(
        plan=plan,
        machine=machine,
        sizes=extents,
        distribution=distribution,
        strategy=strategy,
        path=path,
        show=show or quiet(),
        deadline=started + budget,
        rng=Random(seed),
    )
    results = search.run(_wanted(plan, tasks))
    return TuneResult(tasks=results, seconds=time.monotonic() - started, records=str(path))


def _program(pattern: Pattern | Program | str, hyper: Mapping[str, Hyper]) -> Program:
    if isinstance(pattern, Program):
        if hyper:
            raise BindingError(
                f"{pattern.name} is traced, {', '.join(hyper)} cannot change any more",
                hint="pass the pattern instead of its program",
            )
        return pattern
    return (patterns.load(pattern) if isinstance(pattern, str) else pattern).trace(**hyper)


def _bind(
    program: Program,
    sizes: Mapping[str, int],
    dtype: str,
    dtypes: Mapping[str, str],
    layout: Layout,
    page_size: int,
    scale: float | None,
) -> tuple[Plan, Sizes]:
    sequence = (program.query, program.key)
    letters = dict(sizes)
    batch = letters.pop("B", 1) if "B" not in program.letters else 1
    missing = [letter for letter in dict.fromkeys(sequence) if letter not in letters]
    if missing:
        raise BindingError(
            f"tuning {program.name} needs the length of {', '.join(missing)}",
            hint="pass sizes={" + ", ".join(f"{m!r}: 4096" for m in missing) + ", ...}",
        )
    extents = Sizes(batch=batch, query=letters[program.query], key=letters[program.key])
    if min(dataclasses.astuple(extents)) < 1:
        raise BindingError("lengths and the number of sequences are positive")
    fixed = tuple(sorted((k, v) for k, v in letters.items() if k not in sequence))
    binding = Binding(
        dtype=dtype, layout=layout, page_size=page_size, sizes=fixed,
        dtypes=tuple(sorted(dtypes.items())), scale=scale,
    )  # fmt: skip
    return partition(program, binding), extents


def _machine(target: str) -> Arch:
    host = archs.host()
    if target == "cpu":
        return host
    machine = archs.get(target)
    missing = sorted(machine.features - host.features)
    if machine.kind != "cpu" or missing:
        raise BindingError(
            f"{target} cannot be measured here: this machine is {host.name}",
            hint=f"tune on such a machine, or for {host.name!r}",
        )
    return dataclasses.replace(machine, cores=host.cores)


def _wanted(plan: Plan, names: tuple[str, ...] | None) -> tuple[Task, ...]:
    known = {t.name: t for t in plan.tasks}
    for name in names or ():
        if name not in known:
            raise BindingError(f"no task {name!r}", hint=f"the tasks are {', '.join(known)}")
    return tuple(t for t in plan.tasks if names is None or t.name in names)


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
    strategy: str
    path: Path
    show: Show
    deadline: float
    rng: Random

    def run(self, tasks: tuple[Task, ...]) -> tuple[TaskResult, ...]:
        """Tune the tasks, those that take longest first, and return results in their order."""
        propose = STRATEGIES.require(self.strategy).propose
        known = records.read(self.path)
        spaces = {t.name: space_of(t, self.machine) for t in tasks}
        results = {t.name: _untuned(t, spaces[t.name], "there is one candidate") for t in tasks}
        open_tasks = [t for t in tasks if len(spaces[t.name].candidates) > 1]
        with ExitStack() as stack:
            writer = stack.enter_context(Writer(self.path))
            workers = stack.enter_context(Workers(self.machine.cores or 1))
            stack.enter_context(self.show)
            entrants = [self._entrant(t, spaces[t.name], known, workers) for t in open_tasks]
            self._probe(entrants, writer)
            total = sum(e.micros for e in entrants)
            left = total
            for entrant in sorted(entrants, key=lambda e: -e.micros):
                name = entrant.task.name
                share, left = entrant.micros / max(left, 1e-9), left - entrant.micros
                if entrant.micros < NEGLIGIBLE * total:
                    why = f"it takes {entrant.micros / total:.1%} of the time"
                    results[name] = _untuned(entrant.task, entrant.space, why)
                    continue
                choice = self._race(entrant, propose, share, writer)
                writer.write(self._record(entrant, "choice", choice.candidate, _final(choice)))
                results[name] = _result(entrant, choice)
        return tuple(results[t.name] for t in tasks)
