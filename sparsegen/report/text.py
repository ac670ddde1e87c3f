"""Print an explanation, section by section."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from sparsegen.report.model import Amount

if TYPE_CHECKING:
    from sparsegen.report.model import Count, Explanation, Scheduled, TaskReport

WIDTH = 100
_WHAT = {
    "products": "matrix products",
    "pointwise": "pointwise operations",
    "memory": "bytes from memory",
}


def text(found: Explanation) -> str:
    """Return the sections of an explanation, none of whose lines needs colour."""
    sections = {
        "Program": found.program.splitlines(),
        "Tasks": _tasks(found),
        "Iteration domains": _domains(found),
        "Cost" + _each(found): _cost(found),
        "Bound": _bound(found),
        "Schedules": _schedules(found),
        "Cache, per token and layer": _cache(found),
        "A step: what the last query asks for": _step(found),
    }
    lines = [_title(found)]
    for title, body in sections.items():
        lines += ["", title, *_wrapped(f"  {line}" for line in body)]
    return "\n".join(lines)


def _title(found: Explanation) -> str:
    sizes = ", ".join(f"{letter}={size}" for letter, size in found.sizes.items())
    batch = f", {found.batch} sequences" if found.batch > 1 else ""
    return f"{found.name} on {found.arch}: {found.dtype}, {found.layout} layout; {sizes}{batch}"


def _each(found: Explanation) -> str:
    return f", each of {found.batch} sequences" if found.batch > 1 else ""


def _tasks(found: Explanation) -> Iterator[str]:
    for task in found.tasks:
        yield f"{task.name}" + (f", {task.at}" if task.at else "")
        yield from (f"  {line}" for line in task.lines)


def _domains(found: Explanation) -> Iterator[str]:
    said: set[str] = set()
    for task in found.tasks:
        for domain in task.domains:
            yield f"{task.name} over {domain.keys}"
            yield from (f"  {line}" for line in domain.ranges)
            yield f"  {_named('visible pairs of a head', domain.pairs, said)}"
            yield f"  {_named('keys that some query sees', domain.distinct, said)}"
            yield f"  keys that the last query sees: {domain.last}"
    if not any(task.domains for task in found.tasks):
        yield "no task iterates over keys"


def _named(what: str, count: Count, said: set[str]) -> str:
    """Return a count with its name; the formula behind a name is written once."""
    if not count.name:
        return f"{what}: {count}"
    if count.name in said:
        return f"{what}: {count.name} = {count.value:,}"
    said.add(count.name)
    return f"{what}, {count.name}: {count}"


def _cost(found: Explanation) -> Iterator[str]:
    for task in found.tasks:
        yield task.name
        yield from _amounts(task.cost)
        yield from (f"  assumed: {said}" for said in task.assumed)
    yield "all tasks"
    yield from _amounts({name: Amount("", x.value) for name, x in found.total.items()})
    yield f"workspace between the tasks{' of all sequences' if found.batch > 1 else ''}"
    yield f"  bytes      {found.workspace}"


def _amounts(cost: Mapping[str, Amount]) -> Iterator[str]:
    units = {"read": "bytes read", "written": "bytes written"}
    shown = {units.get(name, name): amount for name, amount in cost.items() if amount.value}
    yield from (f"  {name:<13}  {amount}" for name, amount in shown.items())


def _bound(found: Explanation) -> Iterator[str]:
    rates = found.rates
    who = "" if rates.cores is None else f" of {rates.cores} core{'s' * (rates.cores != 1)}"
    peak = (
        f"no peak of {rates.dtype} is known"
        if rates.products is None
        else f"{rates.products / 1e9:,.0f} GFLOP/s in {rates.dtype}"
    )
    yield f"peaks{who}: {peak}, {rates.memory / 1e9:,.0f} GB/s"
    for task in found.tasks:
        bound = task.bound
        assumed = ", if data is as assumed" if task.assumed else ""
        yield f"{task.name}: at least {_time(bound.seconds)}, by {_WHAT[bound.by]}{assumed}"
        times = ", ".join(
            f"{_WHAT[name]} {'unknown' if seconds is None else _time(seconds)}"
            for name, seconds in bound.times.items()
        )
        yield f"  {times}"
        ridge = "" if task.ridge is None else f" (both limits meet at {task.ridge:,.1f})"
        yield f"  {task.intensity.value:,.1f} FLOPs per byte{ridge}"
    yield f"all tasks, one after the other: at least {_time(found.seconds)}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _schedules(found: Explanation) -> Iterator[str]:
    for task in found.tasks:
        yield from _schedule(task, task.schedule)


def _schedule(task: TaskReport, chosen: Scheduled | None) -> Iterator[str]:
    if chosen is None or chosen.name is None:
        yield f"{task.name}: no schedule takes it"
    else:
        knobs = ", ".join(f"{knob}={value!r}" for knob, value in chosen.knobs.items())
        origin = {"recorded": "from a tuning record", "default": "its default"}
        yield f"{task.name}: {chosen.name}({knobs}), {origin.get(chosen.origin, chosen.origin)}"
        if chosen.source:
            yield f"  {chosen.source}"
    if chosen is not None and chosen.scratch.value:
        yield f"  scratch memory: {chosen.scratch} bytes"
    for name, reason in () if chosen is None else chosen.others:
        yield f"  not {name}: {reason}" if name else f"  {reason}"


def _cache(found: Explanation) -> Iterator[str]:
    cache = found.cache
    for kept in cache.kept:
        last = "" if kept.last is None else f"; only the last {kept.last} tokens"
        yield f"{kept.name}: {kept.elements} elements, {kept.bytes.value:,} bytes{last}"
    grows = " that grow with the sequence" if any(k.last for k in cache.kept) else ""
    yield f"together{grows}: {cache.elements} elements, {cache.bytes.value:,} bytes"
    if cache.multi_head is None or cache.saving is None:
        return
    change = f"{abs(cache.saving):.1f} % {'less' if cache.saving >= 0 else 'more'}"
    yield f"multi-head attention of this shape: {cache.multi_head} elements; this is {change}"


def _step(found: Explanation) -> Iterator[str]:
    step = found.step
    yield f"tokens read: {step.at_most}"
    if step.attended.value != step.at_most.value:
        yield f"  at this length {step.attended}: incomplete windows and missing keys are not read"
    if step.scored.value:
        yield f"keys scored to select them: {step.scored}"
    for name, amount in step.flops.items():
        yield f"FLOPs of {name}: {amount}"
    if len(step.flops) > 1:
        yield f"FLOPs: {step.total}"


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        indent = len(line) - len(line.lstrip())
        yield from textwrap.wrap(
            line, WIDTH, subsequent_indent=" " * (indent + 4), break_long_words=False,
            break_on_hyphens=False, drop_whitespace=True,
        )  # fmt: skip
