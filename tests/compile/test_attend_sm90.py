"""Attention over lists of keys on Hopper: what is taken, and what the compiler makes of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tvm_ffi import libinfo

from schedules import attend_sm90
from sparsegen import arch as archs
from sparsegen import patterns
from sparsegen.codegen.gpu.build import code_options, program, run, toolkit
from sparsegen.codegen.tvm import cuda_source
from sparsegen.errors import CompileError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.tasks import AttendTask

ARCH = archs.get("sm_90")


def task(heads: int = 128, topk: int = 2048, c: int = 576, **options: Any) -> AttendTask:
    sizes = tuple(sorted({"Hq": heads, "c": c, "Hi": 64, "e": 128}.items()))
    program = patterns.load("dsa").trace(topk=topk)
    plan = partition(program, Binding(**{"dtype": "bfloat16", "sizes": sizes, **options}))
    return next(t for t in plan.tasks if isinstance(t, AttendTask))


def built(one: AttendTask, folder: Path) -> tuple[Path, str]:
    """Return the binary of a task, and what ptxas says of it."""
    try:
        kit = toolkit()
    except CompileError as error:
        pytest.skip(str(error))  # CUDA code needs nvcc
    source, cubin = folder / "kernel.cu", folder / "kernel.cubin"
    source.write_text(cuda_source(attend_sm90.apply(one, attend_sm90.Knobs(), ARCH), ARCH))
    includes = [f"-I{p}" for p in (*libinfo.include_paths(), *kit.includes)]
    said = run(
        [
            str(kit.nvcc), *code_options(ARCH), "-O3", "-std=c++17", "-w", "-Xptxas", "-v",
            *includes, "-cubin", str(source), "-o", str(cubin),
        ],
        cubin.name,
    )  # fmt: skip
    return cubin, said


@pytest.mark.parametrize("heads", [128, 64, 37, 1])
def test_takes_any_number_of_heads(heads: int) -> None:
    assert attend_sm90.accepts(task(heads), ARCH) is None


def test_refuses_with_a_reason() -> None:
    assert "float32" in (attend_sm90.accepts(task(dtype="float32"), ARCH) or "")
    assert "64 elements" in (attend_sm90.accepts(task(c=520), ARCH) or "")
    paged = task(layout="paged", page_size=64)
    assert "pages" in (attend_sm90.accepts(paged, ARCH) or "")


def test_registers_of_the_groups_fit_a_block() -> None:
    with pytest.raises(CompileError, match="registers of the three groups"):
        attend_sm90.apply(task(), attend_sm90.Knobs(216, 96), ARCH)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 37, "topk": 200, "dtype": "float16"},
        {"layout": "paged", "page_size": 64},
    ],
    ids=["bfloat16", "float16", "paged"],
)
def test_nothing_spills(options: dict[str, Any], tmp_path: Path) -> None:
    _, said = built(task(**options), tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "C7510" not in said, "products are serialised"
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None
    assert int(registers[1]) <= 168


def test_multiplies_on_tensor_cores(tmp_path: Path) -> None:
    dump = program("cuobjdump")
    if dump is None:
        pytest.skip("cuobjdump, which reads binaries, is not installed")
    cubin, _ = built(task(), tmp_path)
    code = subprocess.run([dump, "-sass", cubin], capture_output=True, text=True, check=True)
    assert code.stdout.count("HGMMA") >= 100
    assert "LDGSTS" in code.stdout
