"""Compile the CUDA source of a kernel for the CPU, and run it on CPU tensors."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tvm_ffi import libinfo, load_module

from sparsegen.arch import Arch
from sparsegen.codegen.gpu.build import Support, run
from sparsegen.codegen.render import render
from sparsegen.codegen.tvm import cuda_source
from sparsegen.lowering.tasks import Buffer, Task
from sparsegen.runtime import kernel
from sparsegen.runtime.build import toolchain
from sparsegen.runtime.standalone.gpu import Gpu
from tests.emulator.ptx import translate_assembly

INCLUDE = Path(__file__).parent / "include"
CORE = Path(__file__).parent / "core" / "emulator.cc"
HEADERS = Path(__file__).parent / "core" / "headers.h"
_SOURCES = {".py", ".h", ".cc"}
_OPTIONS = ["-std=c++17", "-w", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]


def translate(source: str) -> str:
    """Return a CUDA source as C++ for the emulator."""
    source = re.sub(
        r"extern __shared__ [^;]*?(\w+)\[\];", r"unsigned char* \1 = emu::shared;", source
    )
    source = re.sub(
        r"(\w+)<<<(.*?), (\w+), 0, stream>>>\((\w+)\);",
        r"emu::launch(\2, \3, 0, [=] { \1(\4); });", source,
    )  # fmt: skip
    # The launcher compares device types with the number of kDLCUDA.
    source = re.sub(r"\b2 == (\(*\(DLTensor\*\)[^;{}]*?device_type)", r"1 == \1", source)
    source = re.sub(r"(device_type\)*) == 2\b", r"\1 == 1", source)
    return translate_assembly(source)


@cache
def _digest() -> str:
    """Identify the emulator, what it is compiled with, and the processor it is compiled for."""
    version = run(["g++", "-dumpfullversion"], "g++")
    machine = run(["g++", "-march=native", "-Q", "--help=target"], "g++")
    hashes = sha256(" ".join([*_compiler(), version, machine]).encode())
    for file in sorted(p for p in Path(__file__).parent.rglob("*") if p.suffix in _SOURCES):
        hashes.update(file.read_bytes())
    return hashes.hexdigest()


def _shared(name: str, command: Sequence[str]) -> Path:
    """Return what a command writes with `-o`; the first process that asks runs it."""
    # Not sparsegen's cache, of which some tests have one each.
    caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = caches / "sparsegen-emulator" / _digest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / name
            run([*command, "-o", str(made)], name)
            made.replace(file)
    return file


@cache
def _core() -> Path:
    """Return the object file that all kernels are linked with."""
    options = ["-O2", "-march=native", "-fvisibility=hidden", "-c"]
    return _shared("emulator.o", ["g++", *_OPTIONS, *options, str(CORE)])


@cache
def _headers() -> Path:
    """Return the headers that all kernels include, which lie beside what they are compiled to."""
    compiled = _shared("headers.h.gch", [*_compiler(), "-x", "c++-header", str(HEADERS)])
    return Path(shutil.copy(HEADERS, compiled.parent))


def _compiler() -> list[str]:
    # A kernel runs once or twice, in less time than any optimisation takes.
    folders = (f"-I{p}" for p in (INCLUDE, *libinfo.include_paths()))
    return ["g++", *_OPTIONS, "-O0", *folders]


def build(source: str, path: Path) -> None:
    """Compile the C++ that `translate` returned into the library `path`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cc"
        file.write_text(source)
        inputs = ["-include", str(_headers()), str(file), str(_core())]
        run([*_compiler(), "-shared", *inputs, "-o", str(path)], path.name)


def compile_source(source: str, arch: Arch, path: Path, codes: Any = None) -> str:
    """Do what `sparsegen.codegen.gpu.build.compile_source` does, for the emulator."""
    build(translate(source + render(Support())), path)
    return "emulator"


def compile_task(schedule: Any, task: Task, knobs: Any, arch: Arch, path: Path) -> Any:
    """Return the function of a task, and the buffers that its schedule takes beside those of it."""
    compile_source(cuda_source(schedule.apply(task, knobs, arch), arch), arch, path)
    buffers = [buffer for buffer, _ in schedule.scratch(task, knobs, arch)]
    return load_module(str(path))[task.name], buffers


def unwritten(
    buffers: Sequence[Buffer], queries: int, keys: int, batch: int, capacity: int
) -> list[torch.Tensor]:
    """Return memory for buffers of int32, whose extent -1 becomes `capacity`."""
    found = []
    for buffer in buffers:
        blocks = queries // buffer.rows.block + 2 * batch
        stride = 1 if buffer.rows.entries is None else buffer.rows.entries.stride
        entries = keys // stride + batch
        spaces = {"none": (), "batch": (batch,), "query_block": (blocks,), "entry": (entries,)}
        rows = spaces[buffer.rows.space]
        shape = [capacity if n == -1 else n for n in buffer.shape]
        found.append(torch.full((*rows, *shape), -1, dtype=torch.int32))
    return found


def _version() -> dict[str, str]:
    """Return what keys of the cache add, so that nobody takes an emulated kernel for another."""
    return {**toolchain(), "emulator": _digest()}


class _Device(str):
    """Is a GPU, but takes tensors of the CPU."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


@contextmanager
def emulated(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Let kernels for GPUs of a compute capability run; they must be compiled and called inside."""
    describe = kernel.describe

    def described(*args: Any) -> Any:
        spec = describe(*args)
        return replace(spec, device=_Device(spec.device)) if spec.device == "cuda" else spec

    found = Gpu("cuda:0", "an emulator", capability)
    stream = SimpleNamespace(synchronize=lambda: None)
    with (
        mock.patch("sparsegen.codegen.gpu.build.compile_source", compile_source),
        mock.patch("sparsegen.runtime.build.toolchain", _version),
        mock.patch.object(kernel, "describe", described),
        mock.patch("sparsegen.runtime.standalone.device.gpu", return_value=found),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
    ):
        yield
