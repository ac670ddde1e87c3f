"""Build a plan: choose schedules, generate one module, compile it into one shared library."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sparsegen.arch import Arch
from sparsegen.errors import CompileError, SparsegenError
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Task
from sparsegen.runtime import cache, catalog
from sparsegen.runtime.catalog import Choice, Overrides, Schedule
from sparsegen.runtime.describe import count, tensor
from sparsegen.runtime.standalone.spec import TensorSpec

log = logging.getLogger("sparsegen")

# What generates code from a plan. A change of any of these files makes new kernels.
_SOURCES = ("sparsegen.codegen", "sparsegen.lowering", "sparsegen.analysis", "sparsegen.schedules")
_TEMPLATES = ("support.cc.j2", "support.cu.j2")
_PACKAGES = ("sparsegen", "apache-tvm", "apache-tvm-ffi")


@dataclass(frozen=True)
class Built:
    """A library on disk, its key, and by task: its schedule, and the memory that one takes."""

    path: Path
    key: str
    schedules: Mapping[str, Schedule]
    toolchain: Mapping[str, str]
    scratch: Mapping[str, tuple[TensorSpec, ...]]
    codes: tuple[str, ...] = ()
    """Of a library for GPUs: what it holds; see `codegen.gpu.build.codes_of`."""
    shared: int = 0
    """Bytes of shared memory that a block of it takes."""


def build(plan: Plan, arch: Arch, overrides: Overrides = None) -> Built:
    """Return the library of a plan, from the cache or newly compiled.

    A library that is in the cache is returned without importing TVM.

    Raises:
        UnsupportedError: no schedule takes one of the tasks.
        BindingError: an override names no task, schedule or knob.
        CompileError: TVM, LLVM or the linker failed, or $SPARSEGEN_NO_JIT=1 forbids compiling.
        CacheError: the cache cannot be used.
    """
    key = key_of(plan, arch, overrides)

    def compile_into(path: Path) -> Mapping[str, Any]:
        refuse_without_jit(plan, arch)
        choices = catalog.choose_all(plan.tasks, arch, overrides)
        named = dict(zip((task.name for task in plan.tasks), choices, strict=True))
        start = time.perf_counter()
        log.info("compiling %s for %s: %s", plan.program.name, arch.name, _told(named))
        made = compile_tasks(plan, arch, choices, path)
        log.info("compiled %s in %.2f s", plan.program.name, time.perf_counter() - start)
        return notes_of(plan, arch, choices) | made

    return read(key, *cache.get_or_build(key, compile_into))


def notes_of(plan: Plan, arch: Arch, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return what a library's entry in the cache says of the schedules in it, as plain data."""
    pairs = list(zip(plan.tasks, choices, strict=True))
    return {
        "schedules": {task.name: _plain(choice.schedule) for task, choice in pairs},
        "scratch": {task.name: _scratch(task, choice, arch) for task, choice in pairs},
    }


def read(key: str, library: Path, notes: Mapping[str, Any]) -> Built:
    """Return a library of the cache."""
    schedules = {
        name: Schedule(stem, **knobs) for name, (stem, knobs) in notes["schedules"].items()
    }
    scratch = {
        name: tuple(map(TensorSpec.from_json, tensors))
        for name, tensors in notes["scratch"].items()
    }
    return Built(
        library, key, schedules, notes["toolchain"], scratch, tuple(notes["codes"]), notes["shared"]
    )


def compile_tasks(plan: Plan, arch: Arch, choices: Sequence[Choice], path: Path) -> dict[str, Any]:
    """Compile the tasks of a plan into the library `path`; return what `read` reads of it.

    Raises:
        CompileError: TVM, LLVM, nvcc or the linker failed.
    """
    # TVM takes seconds to import, and a cached kernel does not need it.
    from sparsegen.codegen import tvm

    if arch.kind == "cuda":
        return compile_cuda(source_of(plan, arch, choices), [arch], path)
    tvm.build(_module(plan, arch, choices), arch, path)
    return {"toolchain": toolchain() | {"llvm": tvm.llvm_version()}, "codes": [], "shared": 0}


def compile_cuda(
    source: str, archs: Sequence[Arch], path: Path, portable: bool = False
) -> dict[str, Any]:
    """Compile one source for several GPUs into the library `path`; return what `read` reads of it.

    Raises:
        CompileError: nvcc failed.
    """
    from sparsegen.codegen.gpu.build import codes_of, compile_source, launches

    codes = codes_of(archs, source, portable)
    made = toolchain() | {"nvcc": compile_source(source, archs[0], path, codes)}
    shared = max(launches(source).values(), default=0)
    return {"toolchain": made, "codes": list(codes), "shared": shared}


def source_of(plan: Plan, arch: Arch, choices: Sequence[Choice]) -> str:
    """Return the CUDA source of a plan.

    Raises:
        CompileError: a schedule or TVM failed.
    """
    from sparsegen.codegen import tvm

    return tvm.cuda_source(_module(plan, arch, choices), arch)


def _module(plan: Plan, arch: Arch, choices: Sequence[Choice]) -> Any:
    from sparsegen.codegen import tvm

    pairs = zip(plan.tasks, choices, strict=True)
    return tvm.merge([_applied(task, choice, arch) for task, choice in pairs])


def _scratch(task: Task, choice: Choice, arch: Arch) -> list[dict[str, Any]]:
    """Return the memory that a schedule takes beside the buffers of its task, as plain data."""
    found = catalog.scratch(choice, task, arch)
    return [asdict(tensor(buffer, capacity=count(expr))) for buffer, expr in found]


def _applied(task: Task, choice: Choice, arch: Arch) -> Any:
    try:
        return choice.module.apply(task, choice.knobs, arch)
    except SparsegenError:
        raise
    # A schedule may be a user's file, and knobs may be values that no schedule thought of.
    except Exception as error:
        raise CompileError(
            f"{choice.schedule!r} failed on {task.name}: {type(error).__name__}: {error}",
            at=task.site,
            hint="choose other knobs; the exception above this one shows where the schedule failed",
        ) from error


def refuse_without_jit(plan: Plan, arch: Arch) -> None:
    """Refuse to compile where $SPARSEGEN_NO_JIT forbids it.

    Raises:
        CompileError: it does.
    """
    if os.environ.get("SPARSEGEN_NO_JIT") == "1":
        raise CompileError(
            f"{plan.program.name} for {arch.name} is not in the cache {cache.root()}, "
            "and SPARSEGEN_NO_JIT=1 forbids compiling",
            hint="compile it once where that is allowed and share SPARSEGEN_CACHE_DIR, "
            "or ship a bundle: sg.export(kernel, folder) there, sg.load(folder) here",
        )


def _told(choices: Mapping[str, Choice]) -> str:
    return ", ".join(f"{name} by {choice.schedule!r}" for name, choice in choices.items())


def _plain(schedule: Schedule) -> tuple[str, dict[str, Any]]:
    return schedule.name, dict(schedule.knobs)


def key_of(plan: Plan, arch: Arch, overrides: Overrides = None) -> str:
    """Return the name of a library: a hash of everything it is made from.

    That is the program, the binding and the dtypes of the plan's buffers, the schedules asked for,
    the target, the versions of the toolchain and the sources that generate code.
    """
    parts = {
        "program": plan.program.to_json(),
        "binding": plan.binding.to_json(),
        "buffers": [[b.name, b.dtype] for t in plan.tasks for b in (*t.reads, *t.writes)],
        "schedules": catalog.to_json(overrides),
        "arch": [arch.name, arch.kind, sorted(arch.features), dict(arch.target)],
        "toolchain": toolchain(),
        "sources": [_sources(), *(digest(path.read_bytes()) for path in _extra_schedules())],
    }
    return digest(json.dumps(parts, sort_keys=True).encode())


def toolchain() -> dict[str, str]:
    """Return the versions of the packages that make a library."""
    return {name: version(name) for name in _PACKAGES}


@functools.cache
def _sources() -> str:
    """Return a hash of the sources that generate code; a process runs the ones it started with."""
    hashes = hashlib.sha256()
    for package in _SOURCES:
        for name, file in sorted(_python_files(files(package), package)):
            hashes.update(f"{name}\0{digest(file.read_bytes())}\n".encode())
    for name in _TEMPLATES:
        hashes.update(files("sparsegen.templates").joinpath(name).read_bytes())
    return hashes.hexdigest()


def _python_files(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _python_files(entry, f"{prefix}.{entry.name}")
        elif entry.name.endswith(".py"):
            yield f"{prefix}.{entry.name}", entry


def _extra_schedules() -> list[Path]:
    """Return the files of folders that were registered beside the shipped ones."""
    shipped = files("sparsegen.schedules")
    return [path for path in catalog.files().values() if path.parent != Path(str(shipped))]


def digest(data: bytes) -> str:
    """Return the sha256 of data, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
