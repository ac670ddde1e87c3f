"""Compile patterns: resolve names, bind, partition, choose schedules, build or load from cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsegen.arch import Arch
from sparsegen.dsl.pattern import Hyper, Pattern
from sparsegen.errors import BindingError, InputError, did_you_mean
from sparsegen.ir.axes import Named
from sparsegen.ir.program import Program
from sparsegen.lowering.binding import DTYPES, LAYOUTS, Binding, Layout
from sparsegen.lowering.partition import partition
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.resolve import sizes_of
from sparsegen.runtime.targets import arch_of, described

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    import torch

    from sparsegen.runtime.catalog import Overrides
    from sparsegen.runtime.kernel import Kernel
    from sparsegen.tuning.result import TuneResult

log = logging.getLogger("sparsegen")

__all__ = ["Request", "arch_of", "compile", "described", "partition", "program_of", "tune"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `compile` was asked for, before the sizes are known."""

    program: Program
    arch: Arch
    binding: Binding
    schedule: Overrides = None

    def plan(self, sizes: Mapping[str, int]) -> Plan:
        """Return the tasks for these sizes."""
        known = sizes_of(self.program, sizes)
        binding = Binding(
            dtype=self.binding.dtype,
            layout=self.binding.layout,
            page_size=self.binding.page_size,
            dtypes=self.binding.dtypes,
            scale=self.binding.scale,
            sizes=tuple(sorted(known.items())),
        )
        return partition(self.program, binding)


class Specialising:
    """A kernel whose sizes its first call decides; every new set of sizes compiles one more.

    Called like a `Kernel`. Sequence lengths are no part of the sizes: they stay symbolic.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._kernels: dict[tuple[tuple[str, int], ...], Kernel] = {}

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Compute the results for these tensors, compiling for their sizes where that is new."""
        return self.specialise(*args, **keywords)(*args, **keywords)

    def specialise(self, *args: Any, **keywords: Any) -> Kernel:
        """Return the kernel for the sizes of these tensors, compiled where that is new."""
        sizes = self._sizes(args, keywords)
        key = tuple(sorted(sizes.items()))
        if key not in self._kernels:
            self._kernels[key] = _build(self.request, sizes)
        return self._kernels[key]

    def warm_up(self, *args: Any, **keywords: Any) -> None:
        """Compile for the sizes of these tensors where that is new, and see `Kernel.warm_up`."""
        self.specialise(*args, **keywords).warm_up(*args, **keywords)

    def __repr__(self) -> str:
        binding = self.request.binding
        done = len(self._kernels)
        return (
            f"<Kernel {self.request.program.name}: {binding.layout}, {binding.dtype}, "
            f"{self.request.arch.name}, specialised {done} times>"
        )

    def _sizes(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, int]:
        program, layout = self.request.program, self.request.binding.layout
        sequence = {program.query, program.key}
        given = {n.name: keywords[n.name] for n in program.inputs if n.name in keywords}
        given |= {n.name: a for n, a in zip(program.inputs, args, strict=False)}
        sizes: dict[str, int] = {}
        for node in program.inputs:
            shape = getattr(given.get(node.name), "shape", None)
            first = node.axes[0]
            on_sequence = isinstance(first, Named) and first.name in sequence
            extra = on_sequence and (
                layout == "dense" or (layout == "paged" and str(first) == program.key)
            )
            if shape is None or len(shape) != len(node.axes) + extra:
                found = "missing" if shape is None else f"of shape {list(shape)}"
                raise InputError(
                    f"{program.name}(): argument {node.name!r} is {found}, "
                    f"expected [{' '.join(map(str, node.axes))}] in the {layout} layout",
                    hint=f"pass a tensor of {len(node.axes) + extra} axes",
                )
            extents = shape[len(shape) - len(node.axes) :]
            for axis, extent in zip(node.axes, extents, strict=True):
                if isinstance(axis, Named) and axis.name not in sequence:
                    sizes.setdefault(axis.name, int(extent))
        return sizes


def compile(
    pattern: Pattern | Program | str,
    target: str = "cpu",
    *,
    dtype: str | torch.dtype = "float32",
    layout: Layout = "sequence",
    page_size: int = 0,
    sizes: Mapping[str, int] | None = None,
    dtypes: Mapping[str, str | torch.dtype] | None = None,
    schedule: Overrides = None,
    **hyper: Any,
) -> Any:
    """Return the kernel of a pattern: a callable over torch tensors.

    Args:
        pattern: a pattern, a program, or the name of a shipped pattern.
        target: "cpu" for this machine or "cuda" for the GPU in it; or the name of an architecture:
            a CPU that this machine can run, or a GPU ("sm_80", "sm_90", "cuda:sm_120"), for which
            any machine with nvcc compiles.
        dtype: of inputs and outputs: float32, bfloat16 or float16, or torch's; accumulation is in
            float32.
        layout: "sequence" (inputs as declared), "dense" (a batch axis in front), "ragged" (packed,
            with cu_seqlens) or "paged" (keys in pages); see `Kernel`.
        page_size: keys per page, in the paged layout.
        sizes: extents of the letters other than the sequence axes. Without them, each call with new
            sizes compiles a kernel (or takes it from the cache). Lengths of the sequence axes may
            be given too: the kernel takes any, but they say which tuned size is nearest.
        dtypes: of single inputs, by name.
        schedule: how to lower: one `Schedule`, or several by task name or family; by default what
            `tune` recorded for the task on this processor, what sparsegen comes with for it or for
            its architecture, or the knobs that the schedule computes.
        **hyper: hyperparameters of the pattern. `scale`, where the pattern has no hyperparameter of
            that name, is the softmax scale of every verb that states none.

    Raises:
        BindingError: a name or value does not fit the pattern.
        UnsupportedError: no schedule takes a task; the message names the limit and the user's line.
        CompileError: generated code did not compile.
    """
    request = request_of(
        pattern, target, dtype=dtype, layout=layout, page_size=page_size, dtypes=dtypes,
        schedule=schedule, **hyper,
    )  # fmt: skip
    if sizes is None:
        return Specialising(request)
    if not isinstance(sizes, Mapping):
        raise BindingError(
            f"sizes={sizes!r} is a {type(sizes).__name__}", hint='pass sizes={"D": 64, ...}'
        )
    return _build(request, sizes)


def request_of(
    pattern: Pattern | Program | str,
    target: str = "cpu",
    *,
    dtype: str | torch.dtype = "float32",
    layout: Layout = "sequence",
    page_size: int = 0,
    dtypes: Mapping[str, str | torch.dtype] | None = None,
    schedule: Overrides = None,
    **hyper: Any,
) -> Request:
    """Return what `compile` was asked for, checked; the arguments are those of `compile`."""
    program, scale = program_of(pattern, **hyper)
    if isinstance(schedule, str):
        raise BindingError(
            f"schedule={schedule!r} is a name", hint=f"pass schedule=sg.Schedule({schedule!r})"
        )
    named, single = _name_of(dtype), {n: _name_of(x) for n, x in (dtypes or {}).items()}
    for what, value, known in (("dtype", named, DTYPES), ("layout", layout, LAYOUTS)):
        if value not in known:
            raise BindingError(
                f"{what}={value!r} is not known",
                hint=did_you_mean(str(value), known) or f"{what}s are {', '.join(known)}",
            )
    if page_size and layout != "paged":
        raise BindingError(
            f"page_size={page_size} with layout={layout!r}", hint='only layout="paged" has pages'
        )
    names = {n.name for n in program.inputs if n.kind == "float"}
    for name, value in single.items():
        if name not in names:
            raise BindingError(
                f"{program.name} has no floating-point input {name!r}",
                hint=did_you_mean(name, names),
            )
        if value not in DTYPES:
            raise BindingError(
                f"the dtype {value!r} of {name!r} is not known", hint=f"use {', '.join(DTYPES)}"
            )
    binding = Binding(
        dtype=named, layout=layout, page_size=page_size, scale=scale,
        dtypes=tuple(sorted(single.items())),
    )  # fmt: skip
    return Request(program=program, arch=arch_of(target), binding=binding, schedule=schedule)


def _name_of(dtype: str | torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16, without importing torch."""
    return str(dtype).removeprefix("torch.")


def program_of(pattern: Pattern | Program | str, **hyper: Any) -> tuple[Program, float | None]:
    """Return the program of a pattern, and the scale where that is no hyperparameter of it."""
    if isinstance(pattern, str):
        from sparsegen import patterns

        pattern = patterns.load(pattern)
    if not isinstance(pattern, Pattern | Program):
        raise BindingError(
            f"compile() takes a pattern, not a {type(pattern).__name__}",
            hint="decorate the function with @sg.pattern",
        )
    own = pattern.hyper if isinstance(pattern, Pattern) else {}
    scale = None if "scale" in own else hyper.pop("scale", None)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise BindingError(f"scale={scale!r}: the scale is a number")
    if isinstance(pattern, Pattern):
        program = pattern.trace(**_plain(hyper))
    elif hyper:
        raise BindingError(
            f"a program is already traced and takes no {', '.join(hyper)}",
            hint="pass hyperparameters with the pattern",
        )
    else:
        program = pattern
    return program, None if scale is None else float(scale)


def _plain(hyper: dict[str, Any]) -> dict[str, Hyper]:
    for name, value in hyper.items():
        if not isinstance(value, int | float | bool | str | None):
            raise BindingError(
                f"{name}={value!r}: a hyperparameter is a number, a string, a boolean or None"
            )
    return hyper


def _build(request: Request, sizes: Mapping[str, int]) -> Kernel:
    from sparsegen.runtime.kernel import compile_plan

    plan = request.plan(sizes)
    overrides = overrides_of(plan, request.arch, request.schedule, sizes)
    return compile_plan(plan, request.arch, overrides, request.schedule)


def overrides_of(
    plan: Plan, arch: Arch, asked: Overrides, sizes: Mapping[str, int] | None = None
) -> Overrides:
    """Return the schedules asked for, or else those that are recorded; see `database.recorded`."""
    if asked is not None:
        return asked
    from sparsegen.tuning.database import recorded

    found = recorded(plan, arch, sizes)
    for name, choice in found.items():
        log.info("%s of %s: %r, %s", name, plan.program.name, choice.schedule, choice)
    return {name: choice.schedule for name, choice in found.items()}


def tune(
    pattern: Pattern | Program | str,
    target: str = "cpu",
    *,
    sizes: Mapping[str, int],
    dtype: str | torch.dtype = "float32",
    layout: Layout = "sequence",
    page_size: int = 0,
    dtypes: Mapping[str, str | torch.dtype] | None = None,
    budget: float = 60.0,
    strategy: str = "evolutionary",
    distribution: str = "uniform",
    records: str | Path | None = None,
    tasks: Collection[str] | None = None,
    seed: int = 0,
    **hyper: Any,
) -> TuneResult:
    """Search for the fastest schedule of each kernel of a pattern; `compile` finds the records.

    Candidates are built and run in processes of their own, checked against the float64 reference
    before they are timed, and timed in rounds beside the default, which stays unless it is beaten
    by more than the noise. On a terminal a line shows how far the search is.

    Args:
        pattern, target, dtype, layout, page_size, dtypes, hyper: as for `compile`.
        sizes: the extents of all letters, the sequence axes included; `B`, if it is no letter of
            the pattern, is the number of sequences (default 1).
        budget: seconds, compiling included.
        strategy: "evolutionary", "random", "exhaustive" or another file of tuning/strategies.
        distribution: where gathered keys lie: "uniform", "local", "clustered" or "trace:FILE.npy"
            with indices [rows, ..., width] recorded from a model.
        records: the file to append to and to resume from (default: the user's own, which `compile`
            reads).
        tasks: names of the tasks to tune (default: all that have a choice).

    Raises:
        BindingError: a name or value does not fit the pattern or this machine.
        TuningError: every candidate of a task was rejected, or the records cannot be read.
    """
    from pathlib import Path

    from sparsegen.tuning import database
    from sparsegen.tuning.records import Sizes
    from sparsegen.tuning.search import search

    request = request_of(
        pattern, target, dtype=dtype, layout=layout, page_size=page_size, dtypes=dtypes, **hyper
    )
    program, letters = request.program, dict(sizes)
    batch = letters.pop("B", 1) if "B" not in program.letters else 1
    axes = dict.fromkeys((program.query, program.key))
    if missing := [letter for letter in axes if letter not in letters]:
        raise BindingError(
            f"tuning {program.name} needs the length of {', '.join(missing)}",
            hint=f"pass sizes={{{missing[0]!r}: 4096, ...}}",
        )
    lengths = {letter: letters.pop(letter) for letter in axes}
    return search(
        request.plan(letters),
        request.arch,
        Sizes(batch=batch, query=lengths[program.query], key=lengths[program.key]),
        budget=budget,
        strategy=strategy,
        distribution=distribution,
        path=Path(records) if records is not None else database.user_file(),
        tasks=tasks,
        seed=seed,
    )
