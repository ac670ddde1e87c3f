"""Projections on tensor cores, emulated on the CPU, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from schedules import project_mma
from sparsegen import arch as archs
from sparsegen import patterns
from sparsegen.errors import CompileError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import ProjectTask
from sparsegen.patterns import Config
from tests.emulator import emulated
from tests.gpu.test_patterns_gpu import guarded, verify
from tests.harness import batch, listed

# Depths and columns that fill no chunk and no tile, in both orders of the weight.
SIZES = {"T": 37, "S": 150, "H": 3, "n": 40, "r": 8, "c": 72, "v": 24}
CONFIG = Config("odd", SIZES, patterns.configs("mla_prefill", test=True)[0].hyper)
LENGTHS = [(5, 31), (0, 0), (1, 17), (70, 300), (19, 13)]


def task(**sizes: int) -> ProjectTask:
    named = {k: v for k, v in {**SIZES, **sizes}.items() if k not in "TS"}
    binding = Binding(dtype="bfloat16", sizes=tuple(sorted(named.items())))
    plan = partition(patterns.load("mla_prefill").trace(**CONFIG.hyper), binding)
    return next(t for t in plan.tasks if isinstance(t, ProjectTask))


@pytest.mark.parametrize(
    ("layout", "dtype"), [("ragged", torch.bfloat16), ("paged", torch.float16)]
)
def test_keys_and_values_are_unfolded(layout: str, dtype: torch.dtype) -> None:
    case = batch("mla_prefill", CONFIG, layout, LENGTHS, page=16, dtype=dtype, explicit=False)
    with emulated((8, 0)), guarded(0xFF) as untouched:
        kernel = case.compile("sm_80")
        got = listed(kernel(**case.inputs, **case.call))
        untouched()
    used = {s.name for n, s in kernel.schedules.items() if n.startswith("project")}
    assert used == {"project_mma"}
    verify(case, got)


def test_takes_what_lies_in_16_bits_and_units_of_8() -> None:
    arch = archs.get("sm_80")
    assert project_mma.accepts(task(), arch) is None
    assert "parts of 70" in (project_mma.accepts(task(c=70), arch) or "")
    wide = task()
    assert "float32" in (
        project_mma.accepts(replace(wide, w=replace(wide.w, dtype="float32")), arch) or ""
    )


def test_says_what_does_not_fit() -> None:
    arch = replace(archs.get("sm_86"), shared_bytes=50_000)
    found = list(project_mma.space(task(), arch))
    assert any(isinstance(k, Rejected) and "bytes of shared memory" in k.reason for k in found)
    with pytest.raises(CompileError, match="stages"):
        project_mma.apply(task(), project_mma.Knobs(1), arch)
