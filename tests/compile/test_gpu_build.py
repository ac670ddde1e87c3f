"""GPU kernels of published shapes, compiled for every architecture: what ptxas says of them.

The snapshots hold registers, shared memory and tensor instructions of each kernel. Registers are
those of one release of nvcc: with another one only spills are looked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsegen import arch, partition, patterns
from sparsegen.codegen import tvm
from sparsegen.codegen.gpu.build import code_options, run, toolkit
from sparsegen.errors import CompileError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.resolve import sizes_of
from sparsegen.runtime import catalog
from tests.harness import letters

RELEASE = "13.0"
SPILLS = 160  # bytes, stores and loads
ARCHS = [name for name in arch.names() if arch.get(name).kind == "cuda"]
# Together they use every schedule for GPUs: what only architecture changes is compiled for each.
CASES = [
    ("causal", "llama-3-8b", ARCHS),
    ("dsa", "deepseek-v3.2", ARCHS),
    ("nsa", "nsa-27b", ["sm_80", "sm_90", "sm_120"]),
    ("mla_decode", "deepseek-v3", ["sm_80", "sm_90"]),
]
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "ldmatrix", "cp.async.cg", "cp.async.bulk.tensor")


def test_every_schedule_is_compiled() -> None:
    gpu = arch.get("sm_90")
    wanted = {s for s in catalog.files() if s.endswith(("_gpu", "_mma", "_sm90"))}
    found = {c.schedule.name for name, config, _ in CASES for c in chosen(name, config, gpu)[1]}
    assert wanted <= found


@pytest.mark.parametrize(
    ("name", "config", "target"),
    [pytest.param(n, c, a, id=f"{n}-{c}-{a}") for n, c, archs in CASES for a in archs],
)
def test_resources(
    name: str, config: str, target: str, tmp_path: Path, snapshot: Callable[..., None]
) -> None:
    try:
        kit = toolkit()
    except CompileError as error:
        pytest.skip(str(error))
    gpu = arch.get(target)
    plan, choices = chosen(name, config, gpu)
    modules = [c.module.apply(t, c.knobs, gpu) for t, c in zip(plan.tasks, choices, strict=True)]
    source = tmp_path / "kernel.cu"
    source.write_text(tvm.cuda_source(tvm.merge(modules), gpu).partition("#include <tvm/ffi/")[0])
    cubin, ptx = tmp_path / "kernel.cubin", tmp_path / "kernel.ptx"
    options = [str(kit.nvcc), *code_options(gpu), "-O3", "-std=c++17", "-w"]
    options += [f"-I{p}" for p in kit.includes]
    said = run([*options, "-cubin", "-Xptxas", "-v", str(source), "-o", str(cubin)], source.name)
    code = f"--gpu-architecture=compute_{gpu.target['arch'].removeprefix('sm_')}"
    run([str(kit.nvcc), code, *options[3:], "-ptx", str(source), "-o", str(ptx)], source.name)
    lines, shared = [], launches(gpu, modules)
    for kernel, used in resources(said).items():
        # A few values that wait for the outputs may be spilled, where 512 columns take registers.
        assert used["spill"] <= SPILLS, f"{kernel} spills {used['spill']} bytes"
        found = instructions(ptx.read_text(), kernel)
        mix = ", ".join(f"{n} {found[n]}" for n in INSTRUCTIONS if found[n])
        lines.append(
            f"{kernel}: {used['registers']} registers, {used['spill']} bytes spilled, "
            f"{shared[kernel]} bytes shared; {mix or 'no tensor cores'}"
        )
    if kit.version.startswith(RELEASE):
        snapshot("\n".join(sorted(lines)))


def chosen(name: str, config: str, gpu: arch.Arch) -> tuple[Plan, tuple[catalog.Choice, ...]]:
    """Return the plan of a published shape in bfloat16, and the schedules of its tasks."""
    shape = next(c for c in patterns.configs(name) if c.name == config)
    program = patterns.load(name).trace(**shape.hyper)
    sizes = sizes_of(program, letters(program, dict(shape.sizes)))
    plan = partition(program, Binding(dtype="bfloat16", sizes=tuple(sorted(sizes.items()))))
    return plan, catalog.choose_all(plan.tasks, gpu)


def launches(gpu: arch.Arch, modules: list[Any]) -> dict[str, int]:
    """Return the dynamic shared memory that each kernel is launched with."""
    text = tvm.cuda_source(tvm.merge(modules), gpu)
    found, start = {}, 0
    for launch in re.finditer(r"tvm_cuda_host_launch\(::(\w+)", text):
        before, start = text[start : launch.start()], launch.end()
        bytes_ = re.search(r"dynamicSmemBytes = (\w+);", before)
        value = bytes_ and re.search(rf"auto {bytes_[1]} = (\d+);", before)
        found[launch[1]] = int(value[1]) if value else 0
    return found


def resources(said: str) -> dict[str, dict[str, int]]:
    """Return registers and spills of each kernel from what ptxas prints."""
    found = {}
    for part in said.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spills = re.findall(r"(\d+) bytes spill", part)
        assert registers is not None
        found[part.partition("'")[0]] = {
            "registers": int(registers[1]),
            "spill": sum(map(int, spills)),
        }
    return found


def instructions(ptx: str, kernel: str) -> Counter[str]:
    """Count instructions of a kernel."""
    body = ptx.split(f".entry {kernel}(")[1].split(".entry ")[0]
    return Counter({n: len(re.findall(rf"\b{re.escape(n)}\b", body)) for n in INSTRUCTIONS})
