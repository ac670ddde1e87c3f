"""GPU kernels of published shapes, compiled for every architecture: what is in the binaries.

The snapshots hold registers, shared memory and, as the binary has them, the instructions of tensor
cores and of copies to shared memory. They are those of one release of nvcc: with another one only
spills and the kinds of instructions are looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sparsegen import arch, partition, patterns
from sparsegen.codegen import tvm
from sparsegen.codegen.gpu.build import code_options, launches, program, run, toolkit
from sparsegen.errors import CompileError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.resolve import sizes_of
from sparsegen.lowering.tasks import Task
from sparsegen.runtime import catalog
from tests.harness import letters

RELEASE = "13.0"
ARCHS = [name for name in arch.names() if arch.get(name).kind == "cuda"]
# Every published shape is compiled for two architectures, and the first one of some patterns, which
# together use every schedule that is not of Hopper, for the others.
EVERYTHING = ("sm_80", "sm_90")
ELSEWHERE = ("causal", "dsa", "mla_decode", "nsa")
CASES = [
    (name, target)
    for target in ARCHS
    for name in (patterns.names() if target in EVERYTHING else ELSEWHERE)
]
# Where keys lie in pages, the first shape of a few patterns is compiled as well.
PAGE = 64
PAGED = [
    ("document", "sm_90"), ("dsa", "sm_90"), ("sliding_window", "sm_90"),
    ("causal", "sm_80"), ("document", "sm_80"), ("nsa", "sm_80"),
]  # fmt: skip
# Products of warpgroups and of warps, loads of matrices, copies of threads and of the copy engine.
INSTRUCTIONS = ("HGMMA", "HMMA", "LDSM", "LDGSTS", "UTMALDG")


def test_every_schedule_is_compiled() -> None:
    wanted = {s for s in catalog.files() if s.endswith(("_gpu", "_mma", "_sm90"))}
    found = {c.stem for name, target in CASES for _, c in distinct(name, arch.get(target))}
    assert wanted <= found


@pytest.mark.parametrize(("name", "target"), CASES)
def test_resources(name: str, target: str, tmp_path: Path, snapshot: Callable[..., None]) -> None:
    check(list(distinct(name, arch.get(target))), target, tmp_path, snapshot)


@pytest.mark.parametrize(("name", "target"), PAGED)
def test_pages(name: str, target: str, tmp_path: Path, snapshot: Callable[..., None]) -> None:
    check(list(distinct(name, arch.get(target), paged=True)), target, tmp_path, snapshot)


def check(
    tasks: list[tuple[Task, catalog.Choice]],
    target: str,
    tmp_path: Path,
    snapshot: Callable[..., None],
) -> None:
    """Compile the kernels of tasks; none spills, and those that multiply use tensor cores."""
    try:
        kit = toolkit()
    except CompileError as error:
        pytest.skip(str(error))
    dump = program("cuobjdump")
    if dump is None:
        pytest.skip("cuobjdump, which reads binaries, is not installed")
    gpu = arch.get(target)
    text = tvm.cuda_source(tvm.merge([c.module.apply(t, c.knobs, gpu) for t, c in tasks]), gpu)
    source, cubin = tmp_path / "kernels.cu", tmp_path / "kernels.cubin"
    source.write_text(text.partition("#include <tvm/ffi/")[0])
    options = [str(kit.nvcc), *code_options(gpu), "-O3", "-std=c++17", "-w"]
    options += [f"-I{p}" for p in kit.includes]
    said = run([*options, "-cubin", "-Xptxas", "-v", str(source), "-o", str(cubin)], source.name)
    mix = instructions(run([str(dump), "-sass", str(cubin)], cubin.name))
    found, lines, shared = resources(said), [], launches(text)
    for kernel, used in found.items():
        told = ", ".join(f"{n} {mix[kernel][n]}" for n in INSTRUCTIONS if mix[kernel][n])
        lines.append(
            f"{kernel}: {used['registers']} registers, {used['spill']} bytes spilled, "
            f"{shared[kernel]} bytes shared; {told or 'no tensor cores'}"
        )
    assert not {k: used["spill"] for k, used in found.items() if used["spill"]}
    for task, choice in tasks:
        if choice.module.FAMILY == "attend":
            # A task may have kernels that prepare its operands. Those of Hopper multiply by
            # warpgroups.
            used = sum(
                (n for k, n in mix.items() if k.startswith(f"{task.name}_kernel")), Counter()
            )
            product = "HGMMA" if choice.stem.endswith("_sm90") else "HMMA"
            assert used[product] > 0, (task.name, used)
            assert used["LDGSTS"] + used["UTMALDG"] > 0, (task.name, used)
    if kit.version.startswith(RELEASE):
        snapshot("\n".join(sorted(lines)))


def distinct(
    name: str, gpu: arch.Arch, *, paged: bool = False
) -> Iterator[tuple[Task, catalog.Choice]]:
    """Yield the tasks of a pattern's published shapes in bfloat16, with their schedules.

    Their names say which shape is the first that has them; a task of several is yielded once.
    """
    seen: set[Task] = set()
    layout = {"layout": "paged", "page_size": PAGE} if paged else {}
    every = gpu.name in EVERYTHING and not paged
    for config in patterns.configs(name)[: None if every else 1]:
        program = patterns.load(name).trace(**config.hyper)
        sizes = sizes_of(program, letters(program, dict(config.sizes)))
        binding = Binding(dtype="bfloat16", sizes=tuple(sorted(sizes.items())), **layout)
        plan = partition(program, binding)
        for task, choice in zip(plan.tasks, catalog.choose_all(plan.tasks, gpu), strict=True):
            nameless = replace(task, name="")
            if nameless not in seen:
                seen.add(nameless)
                shape = re.sub(r"\W", "_", config.name)
                yield replace(task, name=f"{task.name}_{shape}"), choice


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
