"""GPU kernels of published shapes, compiled for every architecture: what is in the binaries.

The snapshots hold registers, shared memory and, as the binary has them, the instructions of tensor
cores and of copies to shared memory. They are those of one release of nvcc: with another one only
spills and the kinds of instructions are looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsegen import arch, partition, patterns
from sparsegen.codegen import tvm
from sparsegen.codegen.gpu.build import code_options, launches, program, run, toolkit
from sparsegen.errors import CompileError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.resolve import sizes_of
from sparsegen.runtime import catalog
from tests.harness import letters

RELEASE = "13.0"
ARCHS = [name for name in arch.names() if arch.get(name).kind == "cuda"]
# Together they use every schedule for GPUs: what only architecture changes is compiled for each.
CASES = [
    ("causal", "llama-3-8b", ARCHS),
    ("dsa", "deepseek-v3.2", ARCHS),
    ("nsa", "nsa-27b", ARCHS),
    ("mla_decode", "deepseek-v3", ARCHS),
    ("v4_hca", "v4-flash", ["sm_90"]),
]
# Products of warpgroups and of warps, loads of matrices, copies of threads and of the copy engine.
INSTRUCTIONS = ("HGMMA", "HMMA", "LDSM", "LDGSTS", "UTMALDG")


def test_every_schedule_is_compiled() -> None:
    wanted = {s for s in catalog.files() if s.endswith(("_gpu", "_mma", "_sm90"))}
    found = {
        c.schedule.name
        for name, config, archs in CASES
        for gpu in map(arch.get, archs)
        for c in chosen(name, config, gpu)[1]
    }
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
    dump = program("cuobjdump")
    if dump is None:
        pytest.skip("cuobjdump, which reads binaries, is not installed")
    gpu = arch.get(target)
    plan, choices = chosen(name, config, gpu)
    modules = [c.module.apply(t, c.knobs, gpu) for t, c in zip(plan.tasks, choices, strict=True)]
    source = tmp_path / "kernel.cu"
    source.write_text(tvm.cuda_source(tvm.merge(modules), gpu).partition("#include <tvm/ffi/")[0])
    cubin = tmp_path / "kernel.cubin"
    options = [str(kit.nvcc), *code_options(gpu), "-O3", "-std=c++17", "-w"]
    options += [f"-I{p}" for p in kit.includes]
    said = run([*options, "-cubin", "-Xptxas", "-v", str(source), "-o", str(cubin)], source.name)
    mix = instructions(run([str(dump), "-sass", str(cubin)], cubin.name))
    lines, shared = [], launches(tvm.cuda_source(tvm.merge(modules), gpu))
    for kernel, used in resources(said).items():
        assert used["spill"] == 0, f"{kernel} spills {used['spill']} bytes"
        told = ", ".join(f"{n} {mix[kernel][n]}" for n in INSTRUCTIONS if mix[kernel][n])
        lines.append(
            f"{kernel}: {used['registers']} registers, {used['spill']} bytes spilled, "
            f"{shared[kernel]} bytes shared; {told or 'no tensor cores'}"
        )
    for task, choice in zip(plan.tasks, choices, strict=True):
        if choice.module.FAMILY == "attend":
            # A task may have kernels that prepare its operands. Those of Hopper multiply by
            # warpgroups.
            used = sum((n for k, n in mix.items() if k.startswith(f"{task.name}_")), Counter())
            product = "HGMMA" if choice.schedule.name.endswith("_sm90") else "HMMA"
            assert used[product] > 0, (task.name, used)
            assert used["LDGSTS"] + used["UTMALDG"] > 0, (task.name, used)
    if kit.version.startswith(RELEASE):
        snapshot("\n".join(sorted(lines)))


def chosen(name: str, config: str, gpu: arch.Arch) -> tuple[Plan, tuple[catalog.Choice, ...]]:
    """Return the plan of a published shape in bfloat16, and the schedules of its tasks."""
    shape = next(c for c in patterns.configs(name) if c.name == config)
    program = patterns.load(name).trace(**shape.hyper)
    sizes = sizes_of(program, letters(program, dict(shape.sizes)))
    plan = partition(program, Binding(dtype="bfloat16", sizes=tuple(sorted(sizes.items()))))
    return plan, catalog.choose_all(plan.tasks, gpu)


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


def instructions(code: str) -> dict[str, Counter[str]]:
    """Count the instructions of each kernel in what cuobjdump prints of a binary."""
    found = {}
    for part in code.split("Function : ")[1:]:
        words = re.findall(r"/\*[0-9a-f]+\*/ +(?:@\S+ +)?([A-Z0-9]+)[. ]", part)
        found[part.split(maxsplit=1)[0]] = Counter(words)
    return found
