"""Multiply on a GPU slowly, wrongly, forever, out of bounds, or not at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import load_f32, store_f32
from sparsegen.codegen.gpu.launch import kernel, launch
from sparsegen.codegen.tvm import T, cast, const
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import ProjectTask

FAMILY = "project"
REQUIRES = frozenset({"cuda"})
PRIORITY = 1000
THREADS = 128


@dataclass(frozen=True)
class Knobs:
    """Do the work `repeats` times; `fault`: "", build, far, bounds, hang or wrong."""

    repeats: int = 16
    fault: str = ""


def accepts(task: ProjectTask, arch: Arch) -> str | None:
    return "only [H c v] weights" if task.transposed or len(task.x.parts) > 1 else None


def default(task: ProjectTask, arch: Arch) -> Knobs:
    return Knobs()


def space(task: ProjectTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    yield Knobs()
    for fault in ("build", "far", "bounds", "wrong", "hang"):
        yield Knobs(1, fault)
    for repeats in (8, 1):
        yield Knobs(repeats)
    yield Rejected({"repeats": 32, "fault": ""}, "more than 16 repeats never help")


def apply(task: ProjectTask, knobs: Knobs, arch: Arch) -> Any:
    if knobs.fault == "build":
        raise ValueError("this candidate cannot be built")
    (part,) = task.x.parts
    heads, columns = task.out.shape
    dim = part.size
    with kernel(task) as (builder, arguments):
        x, w, out = (arguments[b] for b in (part.buffer, task.w, task.out))
        count = out.rows * (heads * columns)
        place = launch((count + (THREADS - 1)) // THREADS, THREADS)
        n = T.bind(place.block * THREADS + cast(place.thread, "int64"))
        with T.If(n < count), T.Then():
            row, head, column = (
                T.bind(e) for e in (n // (heads * columns), n // columns % heads, n % columns)
            )
            total = cell("float32", const(0.0, "float32"))
            with T.serial(const(knobs.repeats, "int64")):
                used = dim - 1 if knobs.fault == "wrong" else dim
                with T.serial(const(used, "int64")) as k:
                    a = load_f32(x.flat, part.buffer.dtype, (row * heads + head) * dim + k)
                    b = load_f32(w.flat, task.w.dtype, (head * dim + k) * columns + column)
                    put(total, get(total) + a * b / float(knobs.repeats))
            store_f32(out.flat, task.out.dtype, get(total), n)
            if knobs.fault == "far":
                store_f32(out.flat, task.out.dtype, get(total), n + (1 << 41))
            if knobs.fault == "bounds":  # near enough to be seen by the guards
                with T.If(n < 100), T.Then():
                    store_f32(out.flat, task.out.dtype, get(total), n + count)
            if knobs.fault == "hang":
                with T.serial(const(1 << 60, "int64")) as k:
                    again = load_f32(out.flat, task.out.dtype, (n + k) % count)
                    store_f32(out.flat, task.out.dtype, again + 1.0, n)
    return builder.get()
