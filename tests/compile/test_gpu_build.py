"""GPU kernels of published shapes, compiled for every architecture: what is in the binaries.

The snapshots hold registers, shared memory and, as the binary has them, the instructions of tensor
cores and of copies to shared memory. They are those of one release of nvcc: with another one only
spills and the kinds of instructions are looked at.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsegen import arch, patterns
from sparsegen.codegen import tvm
from sparsegen.codegen.gpu.build import launches
from sparsegen.lowering.tasks import Task
from sparsegen.patterns import Config
from sparsegen.runtime import catalog
from tests.binaries import assembled, compiler, instructions
from tests.harness import published

Chosen = tuple[Task, catalog.Choice]
RELEASE = "13.0"
ARCHS = [name for name in arch.names() if arch.get(name).kind == "cuda"]
# The first published shape of every pattern is compiled for two architectures, and at night every
# further one; that of some patterns, which together use every schedule that is not of Hopper, for
# the other architectures. For sm_80, all but some patterns of each kind wait for the night too.
EVERYTHING = ("sm_80", "sm_90")
ELSEWHERE = ("causal", "dsa", "mla_decode", "nsa")
OFTEN = (*ELSEWHERE, "mla_prefill", "sliding_window", "snapkv", "softcap", "v4_csa", "xattention")
ALWAYS = [
    (name, target)
    for target in ARCHS
    for name in {"sm_80": OFTEN, "sm_90": patterns.names()}.get(target, ELSEWHERE)
]
AT_NIGHT = [(name, "sm_80") for name in patterns.names() if name not in OFTEN]
FURTHER = [(name, target) for target in EVERYTHING for name in patterns.names()]
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
    found = {c.stem for name, target in ALWAYS for _, c in first(name, arch.get(target))}
    assert wanted <= found


@pytest.mark.parametrize(
    ("name", "target"),
    [*ALWAYS, *(pytest.param(*case, marks=pytest.mark.nightly) for case in AT_NIGHT)],
)
def test_resources(name: str, target: str, tmp_path: Path, snapshot: Callable[..., None]) -> None:
    check(first(name, arch.get(target)), target, tmp_path, snapshot)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "target"), FURTHER)
def test_further_resources(
    name: str, target: str, tmp_path: Path, snapshot: Callable[..., None]
) -> None:
    tasks = further(name, arch.get(target))
    if not tasks:
        pytest.skip("every shape has the tasks of the first one")
    check(tasks, target, tmp_path, snapshot)


@pytest.mark.parametrize(("name", "target"), PAGED)
def test_pages(name: str, target: str, tmp_path: Path, snapshot: Callable[..., None]) -> None:
    layout = {"layout": "paged", "page_size": PAGE}
    check(first(name, arch.get(target), **layout), target, tmp_path, snapshot)


def check(tasks: list[Chosen], target: str, tmp_path: Path, snapshot: Callable[..., None]) -> None:
    """Compile the kernels of tasks; none spills, and those that multiply use tensor cores."""
    gpu = arch.get(target)
    text = tvm.cuda_source(tvm.merge([c.module.apply(t, c.knobs, gpu) for t, c in tasks]), gpu)
    cubin, said = assembled(text, gpu, tmp_path)
    mix = counts(instructions(cubin))
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
    if compiler().version.startswith(RELEASE):
        snapshot("\n".join(sorted(lines)))


def first(name: str, gpu: arch.Arch, **layout: Any) -> list[Chosen]:
    """Return the tasks of a pattern's first published shape in bfloat16, with their schedules."""
    return list(chosen(name, patterns.configs(name)[0], gpu, **layout).values())


def further(name: str, gpu: arch.Arch) -> list[Chosen]:
    """Return those of the other shapes, each task once, that the first shape does not have."""
    initial, *others = (chosen(name, config, gpu) for config in patterns.configs(name))
    found: dict[Task, Chosen] = {}
    for tasks in others:
        found = tasks | found
    return [choice for task, choice in found.items() if task not in initial]


def chosen(name: str, config: Config, gpu: arch.Arch, **layout: Any) -> dict[Task, Chosen]:
    """Return the distinct tasks of a shape, nameless, and as they are compiled: named after it."""
    plan = published(name, config, dtype="bfloat16", **layout)
    shape, found = re.sub(r"\W", "_", config.name), {}
    for task, choice in zip(plan.tasks, catalog.choose_all(plan.tasks, gpu), strict=True):
        found.setdefault(
            replace(task, name=""), (replace(task, name=f"{task.name}_{shape}"), choice)
        )
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


def counts(code: str) -> dict[str, Counter[str]]:
    """Count the instructions of each kernel in what cuobjdump prints of a binary."""
    found = {}
    for part in code.split("Function : ")[1:]:
        words = re.findall(r"/\*[0-9a-f]+\*/ +(?:@\S+ +)?([A-Z0-9]+)[. ]", part)
        found[part.split(maxsplit=1)[0]] = Counter(words)
    return found
