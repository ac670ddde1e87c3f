"""Compile one CUDA source into a shared library that needs torch and tvm-ffi alone."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tvm_ffi import libinfo

from sparsegen.arch import Arch
from sparsegen.codegen.render import render
from sparsegen.errors import CompileError

# What a source that encodes tensor maps calls of the driver, which machines without a GPU lack.
_DRIVER = ("cuTensorMapEncodeTiled", "cuTensorMapReplaceAddress", "cuGetErrorString")
_HOME = Path("/usr/local/cuda")
# How instructions start that only code for one GPU may have.
_OF_ONE_GPU = ("wgmma.", "setmaxnreg.", "tcgen05.")
# How the host code begins, which follows the kernels.
_HOST = "#include <tvm/ffi/"
_STUB = "".join(f"int {name}() {{ return 0; }}\n" for name in _DRIVER)


@dataclass(frozen=True)
class Support:
    """Everything support.cu.j2 may mention."""

    template: ClassVar[str] = "support.cu.j2"

    threads: int = 256
    """Threads of the block that fills the metadata."""
    kernels: tuple[str, ...] = ()
    """The kernels of the source, to be loaded on demand."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler and the folders of headers and libraries it needs to be told."""

    nvcc: Path
    includes: tuple[Path, ...] = ()
    libraries: tuple[Path, ...] = ()

    @property
    def version(self) -> str:
        """Return what `nvcc --version` says last but one: the release."""
        text = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True)
        lines = [line for line in text.stdout.splitlines() if "release" in line]
        return lines[-1].rpartition("V")[2] if lines else "unknown"


def toolkit() -> Toolkit:
    """Return the compiler: of $CUDA_HOME, on PATH, in /usr/local/cuda, or from PyPI packages.

    Raises:
        CompileError: there is none.
    """
    place = program("nvcc")
    if place is None:
        raise CompileError(
            "compiling for a GPU needs nvcc, the CUDA compiler, and there is none here",
            hint="install a CUDA toolkit and set CUDA_HOME, or run `pip install nvidia-cuda-nvcc "
            "nvidia-cuda-runtime nvidia-cuda-cccl`; kernels exported elsewhere with sg.export() "
            "need no compiler",
        )
    root = place.parents[1]
    if root not in _packages():
        return Toolkit(place)
    libraries = tuple(p for p in (root / "lib", root / "lib64") if p.is_dir())
    return Toolkit(place, (root / "include",), libraries)


def program(name: str) -> Path | None:
    """Return a program of the CUDA toolkit, or None where there is none."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin" / name for home in homes if home]
    if found := shutil.which(name):
        places.append(Path(found))
    places.append(_HOME / "bin" / name)
    places += [root / "bin" / name for root in _packages()]
    return next((place for place in places if place.is_file()), None)


def _packages() -> list[Path]:
    """Return the folders in which NVIDIA's PyPI packages put a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return [folder for root in roots for folder in (*sorted(root.glob("cu[0-9]*")), root)]


def compile_source(source: str, arch: Arch, path: Path, codes: Sequence[str] | None = None) -> str:
    """Compile a CUDA source with its host launchers into the library `path`.

    Args:
        source: of the kernels and launchers.
        arch: the GPU to compile for, unless `codes` says more.
        path: of the library.
        codes: what the library shall hold, see `codes_of`.

    Returns:
        The version of nvcc.

    Raises:
        CompileError: there is no nvcc, or it failed.
    """
    kit = toolkit()
    codes = codes_of([arch], source) if codes is None else codes
    with tempfile.TemporaryDirectory(prefix="sparsegen-") as name:
        folder = Path(name)
        file = folder / "kernel.cu"
        support = Support(kernels=tuple(launches(source)))
        kernels = kernels_of(source)
        # The compiler of kernels would take as long over the host's headers as over a kernel.
        host = f"#ifndef __CUDA_ARCH__\n{source[len(kernels) :]}\n#endif\n"
        file.write_text(kernels + host + render(support), encoding="utf-8")
        includes = [*libinfo.include_paths(), *kit.includes]
        command = [
            str(kit.nvcc), *gencode(codes), f"--threads={len(codes)}", "-O3", "-std=c++17", "-w",
            "-shared", "-Xcompiler", "-fPIC", "-cudart=static",
            *(f"-I{p}" for p in includes), str(file), "-o", str(path),
            *(f"-L{p}" for p in kit.libraries),
            f"-L{Path(libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi",
        ]  # fmt: skip
        if any(f in source for f in _DRIVER):
            command += ["-L", str(_stub(folder)), "-lcuda"]
        run(command, path.name)
    return kit.version


def codes_of(archs: Sequence[Arch], source: str, portable: bool = False) -> tuple[str, ...]:
    """Return what a library of a source holds: machine code for each GPU.

    Code with instructions of one GPU alone, "sm_90a", runs on no other; else it also runs on
    those of a higher minor version.

    Args:
        archs: the GPUs to compile for.
        source: of the kernels.
        portable: add PTX of the newest GPU, which drivers of newer ones compile.
    """
    names = [str(arch.target["arch"]) for arch in sorted(archs, key=lambda a: a.capability)]
    if any(instruction in source for instruction in _OF_ONE_GPU):
        return tuple(names)
    plain = [name.rstrip("af") for name in names]
    return (*plain, plain[-1].replace("sm", "compute")) if portable else tuple(plain)


def gencode(codes: Sequence[str]) -> list[str]:
    """Return the options that make these codes."""
    versions = [(code.partition("_")[2], code) for code in codes]
    return [f"-gencode=arch=compute_{version},code={code}" for version, code in versions]


def code_options(arch: Arch) -> list[str]:
    """Return the options that make code for one architecture, with all of its instructions."""
    return gencode([str(arch.target["arch"])])


def kernels_of(source: str) -> str:
    """Return a source without its host code."""
    return source.partition(_HOST)[0]


def launches(source: str) -> dict[str, int]:
    """Return the bytes of shared memory that each kernel of a source is launched with."""
    found, start = {}, 0
    for launch in re.finditer(r"tvm_cuda_host_launch\(::(\w+)", source):
        before, start = source[start : launch.start()], launch.end()
        bytes_ = re.search(r"dynamicSmemBytes = (\w+);", before)
        value = bytes_ and re.search(rf"auto {bytes_[1]} = (\d+);", before)
        found[launch[1]] = int(value[1]) if value else 0
    return found


def run(command: Sequence[str], what: str) -> str:
    """Run a compiler and return what it printed.

    Raises:
        CompileError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise CompileError(
            f"nvcc failed on {what}: {said[0].strip()}",
            hint="a host compiler that this nvcc supports must be on PATH; otherwise report the "
            "pattern with this message",
        )
    return done.stdout + done.stderr


def _stub(folder: Path) -> Path:
    """Write a driver library of the right name to link against; the real one is loaded."""
    source = folder / "driver.c"
    source.write_text(_STUB, encoding="utf-8")
    library = folder / "libcuda.so"
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o"]
    run([*command, str(library)], library.name)
    return folder
