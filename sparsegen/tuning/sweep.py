"""Tune the shapes that patterns come with, one after the other, within one budget."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from sparsegen import patterns
from sparsegen.errors import SparsegenError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.resolve import sizes_of
from sparsegen.lowering.tasks import Task
from sparsegen.lowering.workspace import ITEMSIZE
from sparsegen.patterns import Config
from sparsegen.tuning import records
from sparsegen.tuning.cases import timed_sequences
from sparsegen.tuning.machine import Machine
from sparsegen.tuning.packing import shape_of
from sparsegen.tuning.records import Record, Sizes, task_hash
from sparsegen.tuning.result import TaskResult
from sparsegen.tuning.search import Search
from sparsegen.tuning.show import Show
from sparsegen.tuning.space import Measured
from sparsegen.tuning.strategies import STRATEGIES
from sparsegen.tuning.subject import Subject
from sparsegen.tuning.workers import Workers

LARGEST = 5 << 28
"""Bytes of the largest call: what is larger takes longer to make and to check than to tune."""
FIRST = ("attend", "select")
"""Families whose kernels take the time; those of the others come last."""
PAGE, SEQUENCES = 64, 32
"""Keys of a page and sequences of a call, where shapes that decode are tuned as servers run."""
CANDIDATES = 10
MOST_BEGUN = 6
"""Entries that are begun at a time: their calls lie on the disk."""
TASK_SECONDS = 15.0
"""The most that a task takes; few do."""
HURRY = 0.1
"""Share of the time at whose end nobody waits any more for all of an entry to be built."""
POLL_SECONDS = 0.1
LEAST_SECONDS = 3.0
"""An entry is not measured with less."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Tasks of a bound pattern, at a size and a distribution of indices.

    scaled  what became of the shape where it was too large, in words
    """

    name: str
    plan: Plan
    sizes: Sizes
    distribution: str
    tasks: tuple[Task, ...]
    scaled: str = ""

    def __str__(self) -> str:
        """Return the shape, the binding and the distribution."""
        s, binding = self.sizes, self.plan.binding
        return (
            f"{self.name} {binding.dtype} {binding.layout} B={s.batch} queries={s.query} "
            f"keys={s.key} {self.distribution}{self.scaled}"
        )


def entries(
    names: Sequence[str], dtype: str, distributions: Sequence[str], largest: int = LARGEST
) -> list[Entry]:
    """Return what there is to tune, the most valuable first; no task twice at one size.

    First what attends and selects in the first shape of every pattern, in the order of `names`;
    then in the other shapes, and those that decode also as batches in pages; then what gathers with
    further distributions; then everything else.
    """
    bound: list[tuple[bool, str, Plan, Sizes]] = []
    for name in names:
        for n, config in enumerate(patterns.configs(name)):
            for plan, wanted in _bindings(name, config, dtype):
                later = n > 0 or plan.binding.layout == "paged"
                bound.append((later, f"{name}/{config.name}", plan, wanted))
    bound.sort(key=lambda x: x[0])
    seen: set[tuple[str, Sizes, str]] = set()
    found: list[Entry] = []
    places = [*((d, True) for d in distributions), (distributions[0], False)]
    for distribution, first in places:
        for _, name, plan, wanted in bound:
            sizes = fitting(plan, wanted, largest)
            tasks = []
            for task in plan.tasks:
                key = (task_hash(task), sizes, distribution if task.lists else "none")
                if (task.family in FIRST) == first and key not in seen:
                    seen.add(key)
                    tasks.append(task)
            if tasks:
                scaled = "" if sizes == wanted else f" (the shape has {_told(wanted)})"
                found.append(
                    Entry(
                        name=name, plan=plan, sizes=sizes, distribution=distribution,
                        tasks=tuple(tasks), scaled=scaled,
                    )
                )  # fmt: skip
    return found


def _bindings(name: str, config: Config, dtype: str) -> Iterator[tuple[Plan, Sizes]]:
    program = patterns.load(name).trace(**config.hyper)
    letters = tuple(sorted(sizes_of(program, config.sizes).items()))
    sizes = Sizes(batch=1, query=config.sizes[program.query], key=config.sizes[program.key])
    yield partition(program, Binding(dtype=dtype, sizes=letters)), sizes
    if sizes.query == 1 and program.query != program.key:
        binding = Binding(dtype=dtype, sizes=letters, layout="paged", page_size=PAGE)
        yield partition(program, binding), replace(sizes, batch=SEQUENCES)


def fitting(plan: Plan, sizes: Sizes, largest: int) -> Sizes:
    """Halve the sequences, then the longer axis, until every call of a plan fits."""
    while max(_bytes(Subject(plan, task), sizes) for task in plan.tasks) > largest:
        if sizes.batch > 1:
            sizes = replace(sizes, batch=sizes.batch // 2)
        elif sizes.query == sizes.key:
            sizes = replace(sizes, query=sizes.query // 2, key=sizes.key // 2)
        elif sizes.key > sizes.query:
            sizes = replace(sizes, key=sizes.key // 2)
        else:
            sizes = replace(sizes, query=sizes.query // 2)
    return sizes


def _bytes(subject: Subject, sizes: Sizes) -> int:
    sequences = timed_sequences(subject, sizes)
    buffers = (*subject.task.reads, *subject.task.writes)
    return sum(
        math.prod(shape_of(b, sequences, subject.width(b, sequences))) * ITEMSIZE[b.dtype]
        for b in buffers
    )


def _told(sizes: Sizes) -> str:
    return f"B={sizes.batch} queries={sizes.query} keys={sizes.key}"


def sweep(
    found: Sequence[Entry],
    machine: Machine,
    path: Path,
    seconds: float,
    tell: Callable[[Entry, tuple[TaskResult, ...] | str], None],
    *,
    limit: int = CANDIDATES,
    serves: str = "",
) -> int:
    """Tune entries until the time is up, and record everything in `path`.

    Builders work through the entries in order, and an entry is measured when all its candidates are
    built, so that the GPU waits for nobody; towards the end, as soon as the defaults are. What an
    earlier run finished is left alone. An entry that cannot be tuned is told about, and the others
    go on.

    Args:
        tell: called with each entry, and its results or why there are none.
        limit: candidates of each task. Of schedules that are not the default only the first
            candidates take part.
        serves: see `Record`.

    Returns:
        How many entries were measured.
    """
    deadline = time.monotonic() + seconds
    propose = STRATEGIES.require("exhaustive").propose
    waiting, begun = deque(found), list[tuple[Entry, Search]]()
    reached = 0
    with Workers(machine.builders, machine.threads, machine.arch.kind) as workers, Show() as show:

        def begin(entry: Entry) -> None:
            search = Search(
                plan=entry.plan, machine=machine, sizes=entry.sizes, propose=propose,
                distribution=entry.distribution, path=path, workers=workers, show=show,
                rng=Random(0), tasks=entry.tasks, limit=limit, serves=serves,
            )  # fmt: skip
            search.begin()
            begun.append((entry, search))

        while (waiting or begun) and (now := time.monotonic()) < deadline - LEAST_SECONDS:
            idle = workers.backlog < 2 * machine.builders and len(begun) < MOST_BEGUN
            whole = deadline - now > HURRY * seconds
            ready = next((x for x in begun if x[1].is_ready(whole=whole)), None)
            try:
                if waiting and (idle or not begun):
                    entry = waiting.popleft()
                    begin(entry)
                elif ready is not None:
                    begun.remove(ready)
                    entry, search = ready
                    reached += 1
                    most = now + TASK_SECONDS * len(entry.tasks)
                    tell(entry, search.run(min(deadline, most)))
                else:
                    time.sleep(POLL_SECONDS)
            except SparsegenError as error:
                tell(entry, str(error))
        for _, search in begun:
            search.close()
    return reached


def database(known: Sequence[Record]) -> list[Record]:
    """Return what ships of records: the last choice of each key, without single calls."""
    kept = []
    for record in records.choices(known).values():
        assert isinstance(record.outcome, Measured)
        outcome = replace(record.outcome, calls=(), anchor_calls=())
        kept.append(replace(record, outcome=outcome))
    return kept
