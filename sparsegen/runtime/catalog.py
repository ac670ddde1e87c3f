"""Choose for each task the schedule that lowers it: a file of `schedules/`, found by family."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsegen.arch import Arch
from sparsegen.errors import BindingError, UnsupportedError, did_you_mean
from sparsegen.ir.expr import Expr
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import Buffer, Task
from sparsegen.plugins import discover

_PLUGINS = discover("sparsegen.schedules", "schedule")
register_path = _PLUGINS.register_path
unregister_path = _PLUGINS.unregister_path

Knob = int | bool | str


@dataclass(frozen=True, init=False)
class Schedule:
    """Name a schedule and some of its knobs: `sg.Schedule("attend_cpu", block_q=16)`.

    Knobs that are not named keep the default that the schedule computes for the task.
    """

    name: str
    knobs: Mapping[str, Knob] = field(hash=False)

    def __init__(self, name: str, /, **knobs: Knob) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "knobs", dict(sorted(knobs.items())))

    def __repr__(self) -> str:
        settings = "".join(f", {knob}={value!r}" for knob, value in self.knobs.items())
        return f"sg.Schedule({self.name!r}{settings})"


Overrides = Schedule | Mapping[str, Schedule] | None
"""One schedule for every task of its family, or schedules by task name or by family."""


@dataclass(frozen=True)
class Choice:
    """The schedule that lowers a task, and why those before it declined."""

    stem: str
    module: ModuleType
    knobs: Any
    declined: tuple[tuple[str, str], ...] = ()

    @property
    def schedule(self) -> Schedule:
        """Return the choice as a user would write it, every knob named."""
        return Schedule(self.stem, **dataclasses.asdict(self.knobs))


def scratch(choice: Choice, task: Task, arch: Arch) -> tuple[tuple[Buffer, Expr], ...]:
    """Return the memory that a schedule takes beside the buffers of its task.

    Such a schedule has `scratch(task, knobs, arch)`: pairs of a buffer and the capacity of its
    extent -1 over Stop and Const, in the order in which they follow the arguments of the task.
    """
    asked = getattr(choice.module, "scratch", None)
    return () if asked is None else tuple(asked(task, choice.knobs, arch))


def files() -> dict[str, Path]:
    """Return the file of every schedule."""
    return _PLUGINS.files()


def family(stem: str) -> str:
    """Return the family of a schedule."""
    name: str = _PLUGINS.require(stem).FAMILY
    return name


def choose(task: Task, arch: Arch, override: Schedule | None = None) -> Choice:
    """Return the first schedule of the task's family that takes it; higher PRIORITY goes first.

    Args:
        task: what is to be lowered.
        arch: the processor to lower for.
        override: the schedule to use, and knobs that differ from its default.

    Raises:
        UnsupportedError: no schedule takes the task, or the one asked for does not.
        BindingError: the schedule or one of the knobs asked for does not exist.
    """
    if override is not None:
        return _overridden(task, arch, override)
    declined: list[tuple[str, str]] = []
    for stem, reason in _considered(task, arch):
        if reason is None:
            module = _PLUGINS[stem]
            return Choice(stem, module, module.default(task, arch), tuple(declined))
        declined.append((stem, reason))
    raise UnsupportedError(
        f"no schedule lowers {task.name} for {arch.name}",
        at=task.site,
        reasons=[f"{stem}: {reason}" for stem, reason in declined]
        or [f"there is no schedule of the family {task.family!r}"],
        hint="change the pattern or the binding as a reason says, or choose another target"
        if declined
        else "add a file of that family to schedules/",
    )


def survey(task: Task, arch: Arch) -> tuple[tuple[str, str | None], ...]:
    """Return the schedules of a task's family, in order, each with why it declines or None."""
    return tuple(_considered(task, arch))


def _considered(task: Task, arch: Arch) -> Iterator[tuple[str, str | None]]:
    modules = [(stem, _PLUGINS[stem]) for stem in _PLUGINS]
    fitting = [(stem, module) for stem, module in modules if task.family == module.FAMILY]
    for stem, module in sorted(fitting, key=lambda item: (-item[1].PRIORITY, item[0])):
        yield stem, _declines(module, task, arch)


def _declines(module: ModuleType, task: Task, arch: Arch) -> str | None:
    missing = sorted(module.REQUIRES - arch.features - {arch.kind})
    if missing:
        return f"needs {', '.join(missing)}, which {arch.name} does not have"
    reason: str | None = module.accepts(task, arch)
    return reason


def _overridden(task: Task, arch: Arch, override: Schedule) -> Choice:
    module = _PLUGINS.require(override.name)
    if task.family != module.FAMILY:
        raise BindingError(
            f"the schedule {override.name!r} lowers {module.FAMILY!r}, "
            f"but {task.name} is of the family {task.family!r}",
            at=task.site,
            hint="give it to a task of its family",
        )
    reason = _declines(module, task, arch)
    if reason is not None:
        raise UnsupportedError(
            f"{override!r} cannot lower {task.name} for {arch.name}",
            at=task.site,
            reasons=[reason],
            hint="leave the choice to sparsegen, or choose another target",
        )
    default = module.default(task, arch)
    fields = {f.name: type(getattr(default, f.name)) for f in dataclasses.fields(default)}
    for knob, value in override.knobs.items():
        if knob not in fields:
            raise BindingError(
                f"the schedule {override.name!r} has no knob {knob!r}",
                hint=did_you_mean(knob, fields),
            )
        if type(value) is not fields[knob]:
            raise BindingError(
                f"{knob}={value!r}: the knob {knob} of {override.name!r} "
                f"is a {fields[knob].__name__}",
                hint=f"its default here is {getattr(default, knob)!r}",
            )
    knobs = dataclasses.replace(default, **override.knobs)
    for candidate in module.space(task, arch) if override.knobs else ():
        if isinstance(candidate, Rejected) and _settings(candidate.knobs) == _settings(knobs):
            raise UnsupportedError(
                f"{override!r} cannot lower {task.name} for {arch.name}",
                at=task.site,
                reasons=[candidate.reason],
                hint="take knobs that the space() of the schedule gives",
            )
    return Choice(override.name, module, knobs)


def _settings(knobs: Any) -> dict[str, Knob]:
    return dict(knobs) if isinstance(knobs, Mapping) else dataclasses.asdict(knobs)


def choose_all(
    tasks: Sequence[Task], arch: Arch, overrides: Overrides = None
) -> tuple[Choice, ...]:
    """Return the choice for each task.

    Raises:
        UnsupportedError, BindingError: as for `choose`; or an override fits no task.
    """
    given = by_task(tasks, overrides)
    return tuple(choose(task, arch, given.get(task.name)) for task in tasks)


def by_task(tasks: Sequence[Task], overrides: Overrides) -> dict[str, Schedule]:
    """Return the schedules that a user asked for, by the name of the task.

    Raises:
        BindingError: an override fits no task.
    """
    if isinstance(overrides, Schedule):
        overrides = {family(overrides.name): overrides}
    given = dict(overrides or {})
    known = {task.name for task in tasks} | {task.family for task in tasks}
    for name, schedule in given.items():
        if name not in known:
            raise BindingError(
                f"{schedule!r} is given for {name!r}, but there is no such task or family",
                hint=did_you_mean(name, known),
            )
    found = {task.name: given.get(task.name, given.get(task.family)) for task in tasks}
    return {name: schedule for name, schedule in found.items() if schedule is not None}


def to_json(overrides: Overrides) -> str:
    """Return canonical JSON of what a user asked for, part of every cache key."""
    named = {"": overrides} if isinstance(overrides, Schedule) else dict(overrides or {})
    data = {name: [s.name, dict(s.knobs)] for name, s in named.items()}
    return json.dumps(data, sort_keys=True, separators=(",", ":"))
