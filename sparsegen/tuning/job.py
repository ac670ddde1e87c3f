"""Say what is tuned in plain data, so that another process can do a part of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsegen import arch
from sparsegen.arch import Arch
from sparsegen.ir.program import Program
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.plan import Plan
from sparsegen.runtime import catalog
from sparsegen.tuning import cases
from sparsegen.tuning.cases import Case
from sparsegen.tuning.memory import Shape
from sparsegen.tuning.records import Sizes, task_hash
from sparsegen.tuning.space import Value
from sparsegen.tuning.subject import Subject

SEEDS = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One task of a bound program, the shape it is tuned for and the machine.

    program, binding  as JSON
    folders           of schedules beside the shipped ones
    """

    program: str
    binding: str
    task: str
    arch: str
    threads: int
    sizes: Sizes
    distribution: str
    folders: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Read what `to_json` returned."""
        fields = {**data, "sizes": Sizes(**data["sizes"]), "folders": tuple(data["folders"])}
        return cls(**fields)

    @cached_property
    def plan(self) -> Plan:
        """Return the plan the task belongs to."""
        data = json.loads(self.binding)
        pairs = {k: tuple(tuple(x) for x in data[k]) for k in ("sizes", "dtypes")}
        return partition(Program.from_json(self.program), Binding(**(data | pairs)))

    @cached_property
    def subject(self) -> Subject:
        """Return the task within its plan."""
        (task,) = (t for t in self.plan.tasks if t.name == self.task)
        return Subject(self.plan, task)

    @cached_property
    def machine(self) -> Arch:
        """Return the architecture, with the threads that are used."""
        return dataclasses.replace(arch.get(self.arch), cores=self.threads)

    def build(self, schedule: str, knobs: Mapping[str, Value], out: Path) -> Path:
        """Build the task with a schedule's knobs into the library `out`."""
        # TVM takes seconds to import, and whoever only runs kernels does not need it.
        from sparsegen.codegen import tvm as adapter
        from sparsegen.codegen.gpu.build import compile_source

        chosen = self._chosen(schedule, knobs)
        module = chosen.module.apply(self.subject.task, chosen.knobs, self.machine)
        if self.machine.kind == "cuda":
            compile_source(adapter.cuda_source(module, self.machine), self.machine, out)
            return out
        return adapter.build(module, self.machine, out)

    def scratch(self, schedule: str, knobs: Mapping[str, Value]) -> list[list[Shape]]:
        """Return the memory that a candidate takes beside its buffers, in each of the calls."""
        chosen = self._chosen(schedule, knobs)
        taken = catalog.scratch(chosen, self.subject.task, self.machine)
        subject = self.subject
        sequences = [cases.small_sequences(subject, seed) for seed in SEEDS]
        sequences.append(cases.timed_sequences(subject, self.sizes))
        return [
            [(buffer.dtype, subject.scratch(buffer, capacity, s)) for buffer, capacity in taken]
            for s in sequences
        ]

    def _chosen(self, schedule: str, knobs: Mapping[str, Value]) -> catalog.Choice:
        for folder in self.folders:
            catalog.register_path(folder)
        task = self.subject.task
        return catalog.choose(task, self.machine, catalog.Schedule(schedule, **knobs))

    @cached_property
    def kernels(self) -> tuple[object, ...]:
        """Return what decides which library a candidate becomes: all but the shape of the call."""
        task = self.subject.task
        return task_hash(task), task.name, self.arch, self.threads, self.folders

    def cases(self) -> Sequence[Case]:
        """Return the calls to check; the last one has the tuned shape."""
        small = [cases.small(self.subject, seed) for seed in SEEDS]
        return [*small, cases.timed(self.subject, self.sizes, self.distribution)]
