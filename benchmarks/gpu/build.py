"""Compile the attend tasks of the suite into a folder that a GPU machine can time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from datetime import date
from fnmatch import fnmatch
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu import suite
from benchmarks.gpu.workload import Shape, Workload, chosen
from sparsegen import arch as archs
from sparsegen.errors import BindingError
from sparsegen.lowering.tasks import AttendTask, Buffer, Task
from sparsegen.runtime import catalog
from sparsegen.runtime.describe import count, tensor

MANIFEST = "manifest.json"
Job = tuple[Path, str, Shape, "Variant", str, dict[str, Any]]
RUNNER = "runner"  # a copy of sparsegen.runtime.standalone, which says how large buffers are


@dataclass(frozen=True)
class Variant:
    """A way to compile kernels: a label, and a schedule with some of its knobs or the default.

    kernels  a glob of the names it is for
    """

    label: str
    schedule: str = ""
    knobs: tuple[tuple[str, catalog.Knob], ...] = ()
    kernels: str = "*"

    @staticmethod
    def parse(text: str) -> Variant:
        """Read `[KERNELS=]LABEL[:SCHEDULE[:KNOB=VALUE,...]]`."""
        head, _, rest = text.partition(":")
        kernels, given, label = head.rpartition("=")
        schedule, _, knobs = rest.partition(":")
        pairs = [pair.partition("=") for pair in knobs.split(",") if pair]
        return Variant(
            label, schedule, tuple((k, _value(v)) for k, _, v in pairs), kernels if given else "*"
        )

    @property
    def override(self) -> catalog.Schedule | None:
        """Return what to ask the catalogue for."""
        return catalog.Schedule(self.schedule, **dict(self.knobs)) if self.schedule else None


def _value(text: str) -> catalog.Knob:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.lstrip("-").isdigit() else text


def build(
    folder: Path,
    workloads: Iterable[Workload],
    variants: Iterable[Variant] = (Variant("default"),),
    *,
    target: str = "sm_90",
    jobs: int = 1,
) -> bool:
    """Compile every kernel that the workloads need, in every variant that is for it.

    Returns:
        Whether all were compiled.
    """
    asked = list(workloads)
    manifest = read(folder)
    known = {w["name"]: w for w in manifest["workloads"]} | {w.name: w.to_json() for w in asked}
    write(folder, manifest | {"workloads": list(known.values())})
    shapes = {w.kernel: suite.SHAPES[w.kernel] for w in asked}
    return build_shapes(folder, shapes, variants, target=target, jobs=jobs)


def build_shapes(
    folder: Path,
    shapes: Mapping[str, Shape],
    variants: Iterable[Variant],
    *,
    target: str = "sm_90",
    jobs: int = 1,
) -> bool:
    """Compile kernels by name, in every variant that is for them; return whether all went well.

    What the folder has of other labels stays, so that several trees can build into one. A kernel
    whose source has not changed is not compiled again. A failure is noted and stops nothing. One
    job works in this process, several each in their own.
    """
    manifest = read(folder) | {"target": target, "date": date.today().isoformat()}
    copy_runner(folder / RUNNER)
    todo = []
    for variant in variants:
        for name in shapes:
            if fnmatch(name, variant.kernels):
                kernel = manifest["kernels"].setdefault(name, {"shape": {}, "variants": {}})
                kernel["shape"] = asdict(shapes[name])
                old = kernel["variants"].get(variant.label, {})
                todo.append((folder, name, shapes[name], variant, target, old))
    fine = True
    for name, variant, entry in _each(todo, jobs):
        fine = fine and "error" not in entry
        manifest["kernels"][name]["variants"][variant.label] = entry
        write(folder, manifest)
        said = entry.get("error") or f"{entry['schedule']} {entry['knobs']}, {entry['built']}"
        print(f"{name} {variant.label}: {said}", flush=True)
    return fine


def _each(todo: Sequence[Job], jobs: int) -> Iterator[tuple[str, Variant, dict[str, Any]]]:
    """Yield what became of each job, as soon as it is known."""
    if jobs <= 1 or len(todo) <= 1:
        for job in todo:
            yield job[1], job[3], compiled(*job)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=context) as pool:
        running = {pool.submit(compiled, *job): job for job in todo}
        for done in as_completed(running):
            _, name, _, variant, _, _ = running[done]
            try:
                yield name, variant, done.result()
            # A worker that dies takes the pool with it, and all that it was still to do.
            except BrokenProcessPool as error:
                yield name, variant, {"error": f"{type(error).__name__}: {error}"}


def compiled(
    folder: Path, kernel: str, shape: Shape, variant: Variant, target: str, old: dict[str, Any]
) -> dict[str, Any]:
    """Compile one variant of a kernel; return what the manifest says of it."""
    try:
        return _compiled(folder, kernel, shape, variant, target, old)
    # Whatever a schedule raises, the other kernels are still wanted.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _compiled(
    folder: Path, name: str, shape: Shape, variant: Variant, target: str, old: dict[str, Any]
) -> dict[str, Any]:
    from sparsegen.codegen import tvm
    from sparsegen.codegen.gpu.build import compile_source

    start = time.perf_counter()
    arch = archs.get(target)
    task = next(t for t in suite.of(shape).plan.tasks if isinstance(t, AttendTask))
    choice = catalog.choose(task, arch, variant.override)
    module = choice.module.apply(task, choice.knobs, arch)
    file = f"{name}.{variant.label}.so"
    library = folder / file
    if arch.kind == "cuda":
        source = tvm.cuda_source(module, arch)
        key = hashlib.sha256(source.encode()).hexdigest()
        same = old.get("source") == key and library.is_file()
        if not same:
            compile_source(source, arch, library)
            (folder / f"{name}.{variant.label}.cu").write_text(source)
    else:
        key, same = "", False
        tvm.build(module, arch, library)
    return {
        "file": file,
        "function": task.name,
        "schedule": choice.stem,
        "knobs": asdict(choice.knobs),
        "declined": [list(x) for x in choice.declined],
        "arguments": [*_arguments(task), *scratch_of(choice, task, arch)],
        "source": key,
        "commit": commit(),
        "built": "as before" if same else f"compiled in {time.perf_counter() - start:.0f} s",
    }


def _arguments(task: AttendTask) -> Iterator[dict[str, Any]]:
    """Yield what the function takes after the metadata: each buffer and the part it plays."""
    (source,) = task.sources
    parts: dict[str, str] = {task.o.name: "o"}
    if task.lse is not None:
        parts[task.lse.name] = "lse"
    parts |= {lists.buffer.name: "list" for _, lists in task.lists}
    parts |= {buffer.name: "doc" for _, buffer in task.tables}
    # Values that are the first elements of the keys come with them.
    for part, operand in (("v", source.v), ("k", source.k), ("q", task.q)):
        parts |= {p.buffer.name: part for p in operand.parts}
    for buffer in (*task.reads, *task.writes):
        yield _argument(parts[buffer.name], buffer, 0)


def scratch_of(choice: catalog.Choice, task: Task, arch: archs.Arch) -> Iterator[dict[str, Any]]:
    """Yield the memory that a schedule takes behind the other arguments."""
    for buffer, capacity in catalog.scratch(choice, task, arch):
        yield _argument("scratch", buffer, count(capacity))


def _argument(part: str, buffer: Buffer, capacity: Any) -> dict[str, Any]:
    return {"part": part, "tensor": asdict(tensor(buffer, capacity=capacity))}


def read(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder, an empty one if there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {"workloads": [], "kernels": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{MANIFEST}.new"
    new.write_text(json.dumps(manifest, indent=1) + "\n")
    new.replace(folder / MANIFEST)


def copy_runner(folder: Path) -> None:
    """Copy what says how large buffers are, which needs torch and tvm-ffi alone."""
    folder.mkdir(exist_ok=True)
    for source in files("sparsegen.runtime.standalone").iterdir():
        if source.name.endswith(".py"):
            (folder / source.name).write_text(source.read_text(encoding="utf-8"))


def commit() -> str:
    """Return the commit of this tree, with a plus if it has changed since."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "-uno") else "")


def matching(only: str) -> list[Workload]:
    """Return the workloads that are asked for: see `named`; all if nothing is.

    Raises:
        BindingError: there are none.
    """
    found = chosen(suite.WORKLOADS, only)
    if not found:
        raise BindingError(
            f"no workload is called {only!r}",
            hint=f"they are {', '.join(w.name for w in suite.WORKLOADS)}",
        )
    return found


def processors() -> int:
    """Return how many kernels to compile at once."""
    return len(os.sched_getaffinity(0))
