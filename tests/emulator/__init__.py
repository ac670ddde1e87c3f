"""Compile the CUDA source of a kernel for the CPU, and run it on CPU tensors."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tvm_ffi import libinfo

from sparsegen.arch import Arch
from sparsegen.codegen.gpu.build import Support, run
from sparsegen.codegen.render import render
from sparsegen.runtime import kernel
from sparsegen.runtime.standalone.gpu import Gpu

INCLUDE = Path(__file__).parent / "include"
# Instructions, by how they start: what the emulator calls for them, given their operands in order.
_PTX = (
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.", "mma"),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.(trans\.)?shared", "ldmatrix"),
    (r"cp\.async\.cg\.shared\.global", "copy"),
    (r"cp\.async\.(commit|wait)_group", ""),
)


def translate(source: str) -> str:
    """Return a CUDA source as C++ for the emulator."""
    source = re.sub(
        r"extern __shared__ [^;]*?(\w+)\[\];", r"unsigned char* \1 = emu::shared;", source
    )
    source = re.sub(
        r"(\w+)<<<(.*?), (\w+), 0, stream>>>\((\w+)\);",
        r"emu::launch((int)(\2), \3, 0, [=] { \1(\4); });", source,
    )  # fmt: skip
    # The launcher compares device types with the number of kDLCUDA.
    source = re.sub(r"\b2 == (\(*\(DLTensor\*\)[^;{}]*?device_type)", r"1 == \1", source)
    source = re.sub(r"(device_type\)*) == 2\b", r"\1 == 1", source)
    lines = []
    head = ""
    for line in source.splitlines():
        if line.startswith("__forceinline__ __device__"):
            head = line
        lines.append(_statement(line, head) if "asm volatile(" in line else line)
    return "\n".join(lines)


def _statement(line: str, head: str) -> str:
    operands = re.findall(r"(\w+)\s*(?:,|\)\s*\{)", head[head.index("(") :])
    for pattern, call in _PTX:
        found = re.search(pattern, line)
        if found is None:
            continue
        kind = {"mma": found.groups()[:1] == ("bf16",), "ldmatrix": found.groups()[:1] != (None,)}
        flag = f"<{str(kind[call]).lower()}>" if call in kind else ""
        return f"  emu::{call}{flag}({', '.join(operands)});" if call else "  ;"
    raise NotImplementedError(line)


def compile_source(source: str, arch: Arch, path: Path, codes: Any = None) -> str:
    """Do what `sparsegen.codegen.gpu.build.compile_source` does, for the emulator."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cc"
        file.write_text(translate(source + render(Support())))
        includes = [INCLUDE, *libinfo.include_paths()]
        command = [
            "g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fno-strict-aliasing",
            *(f"-I{p}" for p in includes), str(file), "-o", str(path),
        ]  # fmt: skip
        run(command, path.name)
    return "emulator"


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
        mock.patch.object(kernel, "describe", described),
        mock.patch("sparsegen.runtime.standalone.device.gpu", return_value=found),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
    ):
        yield
