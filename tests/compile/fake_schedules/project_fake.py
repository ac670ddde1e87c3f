"""Multiply slowly, wrongly, forever, or not at all: what a tuner must survive."""

from collections.abc import Iterator
from dataclasses import dataclass

import tvm
from tvm.script import tirx as T

from sparsegen.arch import Arch
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import ProjectTask

FAMILY = "project"
REQUIRES: frozenset[str] = frozenset()
PRIORITY = 1000


@dataclass(frozen=True)
class Knobs:
    """Do the work `repeats` times; `fault`: "", crash, hang, wrong, bounds or build."""

    repeats: int = 8
    fault: str = ""


def accepts(task: ProjectTask, arch: Arch) -> str | None:
    return "only [H c v] weights" if task.transposed else None


def default(task: ProjectTask, arch: Arch) -> Knobs:
    return Knobs()


def space(task: ProjectTask, arch: Arch) -> Iterator[Knobs | Rejected]:
    yield Knobs()
    for fault in ("build", "crash", "hang", "wrong", "bounds"):
        yield Knobs(1, fault)
    for repeats in (4, 2, 1):
        yield Knobs(repeats)
    yield Rejected({"repeats": 16, "fault": ""}, "more than 8 repeats never help")


def apply(task: ProjectTask, knobs: Knobs, arch: Arch) -> tvm.IRModule:
    if knobs.fault == "build":
        raise ValueError("this candidate cannot be built")
    (part,) = task.x.parts
    heads, dim = task.x.heads, part.size
    wide, repeats = task.out.shape[-1], knobs.repeats
    crash, hang, bounds = (knobs.fault == f for f in ("crash", "hang", "bounds"))
    used = dim - 1 if knobs.fault == "wrong" else dim

    @T.prim_func(s_tir=True)
    def project(
        cu_q: T.handle, cu_k: T.handle, q_off: T.handle, x: T.handle, w: T.handle, out: T.handle
    ):
        batch1 = T.int64()
        batch = T.int64()
        rows = T.int64()
        T.match_buffer(cu_q, (batch1,), "int32", align=4)
        T.match_buffer(cu_k, (batch1,), "int32", align=4)
        T.match_buffer(q_off, (batch,), "int32", align=4)
        X = T.match_buffer(x, (rows, heads, dim), "float32", align=4)
        W = T.match_buffer(w, (heads, dim, wide), "float32", align=4)
        O = T.match_buffer(out, (rows, heads, wide), "float32", align=4)  # noqa: E741
        if crash:
            O[T.int64(1) << T.int64(45), 0, 0] = T.float32(0)
        if hang:
            for _n in range(T.int64(1) << T.int64(60)):
                O[0, 0, 0] = O[0, 0, 0] + T.float32(1)
        for t in range(rows):
            for h in range(heads):
                for v in range(wide):
                    O[t, h, v] = T.float32(0)
                for _r in range(repeats):
                    for c in range(used):
                        for v in range(wide):
                            O[t, h, v] = O[t, h, v] + X[t, h, c] * W[h, c, v] / T.float32(repeats)
        if bounds:
            O[rows, 0, 0] = T.float32(0)

    return tvm.IRModule({task.name: project.with_attr("global_symbol", task.name)})
