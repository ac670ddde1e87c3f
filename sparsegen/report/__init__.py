"""Explain what becomes of a pattern: tasks, domains, costs, bounds, schedules and caches.

Nothing is compiled and no GPU is needed. Costs are those of one sequence; bounds are for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsegen.analysis.roofline import rates
from sparsegen.api import described, request_of
from sparsegen.errors import BindingError
from sparsegen.lowering.binding import Layout
from sparsegen.lowering.resolve import unknown_size
from sparsegen.report.figures import Figures
from sparsegen.report.model import Explanation
from sparsegen.report.schedules import scheduled

if TYPE_CHECKING:
    from sparsegen.dsl.pattern import Pattern
    from sparsegen.ir.program import Program
    from sparsegen.runtime.catalog import Overrides

__all__ = ["Explanation", "explain"]


def explain(
    pattern: Pattern | Program | str,
    target: str = "cpu",
    *,
    sizes: Mapping[str, int],
    dtype: str = "float32",
    layout: Layout = "sequence",
    page_size: int = 0,
    dtypes: Mapping[str, str] | None = None,
    schedule: Overrides = None,
    **hyper: Any,
) -> Explanation:
    """Return what `compile` would make of a pattern, and what that costs; print it to read it.

    Args:
        pattern, dtype, layout, page_size, dtypes, schedule, hyper: as for `compile`.
        target: as for `compile`, or any CPU: this machine need not be one.
        sizes: the extents of all letters, the sequence axes included; `B`, if it is no letter of
            the pattern, is the number of sequences (default 1).

    Raises:
        BindingError: a name or value does not fit the pattern, or a size is missing.
        UnsupportedError: the pattern cannot be split into tasks. A task that no schedule takes is
            no error: the explanation says why.
    """
    request = request_of(
        pattern, dtype=dtype, layout=layout, page_size=page_size, dtypes=dtypes,
        schedule=schedule, **hyper,
    )  # fmt: skip
    program, arch = request.program, described(target)
    letters, batch = _sizes(program, sizes)
    plan = request.plan(
        {name: size for name, size in letters.items() if name not in (program.query, program.key)}
    )
    speed = rates(arch, dtype)
    figures = Figures(plan, letters, batch, speed)
    from sparsegen.tuning.database import recorded

    found = recorded(plan, arch, letters | {"B": batch}) if schedule is None else {}
    chosen = scheduled(plan, arch, schedule, found, figures)
    return Explanation(
        program=str(program),
        name=program.name,
        arch=arch.name,
        rates=speed,
        dtype=dtype,
        layout=layout,
        sizes=letters,
        batch=batch,
        tasks=tuple(
            replace(task, schedule=schedule)
            for task, schedule in zip(figures.tasks(), chosen, strict=True)
        ),
        total=figures.total(),
        seconds=figures.seconds(),
        workspace=figures.workspace(),
        cache=figures.cache(),
        step=figures.step(),
    )


def _sizes(program: Program, given: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Return the sizes of all letters and the number of sequences."""
    if not isinstance(given, Mapping):
        raise BindingError(
            f"sizes={given!r} is a {type(given).__name__}", hint='pass sizes={"T": 1, ...}'
        )
    fixed = {
        name: value
        for name, value in program.hyper
        if name in program.letters - {program.query, program.key} and isinstance(value, int)
    }
    known = dict(given)
    batch = known.pop("B", 1) if "B" not in program.letters else 1
    for name in known:
        if name not in program.letters:
            raise BindingError(
                f"{program.name} has no axis {name}",
                hint=unknown_size(program, name, program.letters),
            )
    known = {**fixed, **known}
    if missing := sorted(program.letters - known.keys()):
        raise BindingError(
            f"explaining {program.name} needs the sizes of {', '.join(missing)}",
            hint="pass sizes={" + ", ".join(f"{m!r}: ..." for m in missing) + "}",
        )
    for name, size in {**known, "B": batch}.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise BindingError(f"{name}={size!r}: an extent is a positive integer")
    return known, batch
