"""CUDA sources compiled into binaries, without their host code, and what is in these."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsegen.arch import Arch
from sparsegen.codegen.gpu.build import Toolkit, code_options, kernels_of, program, run, toolkit
from sparsegen.errors import CompileError


def compiler() -> Toolkit:
    """Return the installed nvcc; a test that needs one is skipped where there is none."""
    try:
        return toolkit()
    except CompileError as error:
        pytest.skip(str(error))


def assembled(text: str, gpu: Arch, folder: Path) -> tuple[Path, str]:
    """Return the binary of the kernels of a source, and what ptxas says of them."""
    kit = compiler()
    source, cubin = folder / "kernels.cu", folder / "kernels.cubin"
    source.write_text(kernels_of(text))
    command = [
        str(kit.nvcc), *code_options(gpu), "-O3", "-std=c++17", "-w", "-Xptxas", "-v",
        *(f"-I{p}" for p in kit.includes), "-cubin", str(source), "-o", str(cubin),
    ]  # fmt: skip
    return cubin, run(command, cubin.name)


def instructions(cubin: Path) -> str:
    """Return the instructions of a binary, as text."""
    dump = program("cuobjdump")
    if dump is None:
        pytest.skip("cuobjdump, which reads binaries, is not installed")
    return run([str(dump), "-sass", str(cubin)], cubin.name)
