"""Compile one CUDA source into a shared library that needs torch and tvm-ffi alone."""

from __future__ import annotations

import importlib.util
import os
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
_STUB = "".join(f"int {name}() {{ return 0; }}\n" for name in _DRIVER)


@dataclass(frozen=True)
class Support:
    """Everything support.cu.j2 may mention."""

    template: ClassVar[str] = "support.cu.j2"

    threads: int = 256
    """Threads of the block that fills the metadata."""


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
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    if found := shutil.which("nvcc"):
        places.append(Path(found))
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    for place in places:
        if place.is_file():
            return Toolkit(place)
    for root in _packages():
        if (place := root / "bin" / "nvcc").is_file():
            libraries = tuple(p for p in (root / "lib", root / "lib64") if p.is_dir())
            return Toolkit(place, (root / "include",), libraries)
    raise CompileError(
        "compiling for a GPU needs nvcc, the CUDA compiler, and there is none here",
        hint="install a CUDA toolkit and set CUDA_HOME, or run `pip install nvidia-cuda-nvcc "
        "nvidia-cuda-runtime nvidia-cuda-cccl`; kernels exported elsewhere with sg.export() need "
        "no compiler",
    )


def _packages() -> list[Path]:
    """Return the folders in which NVIDIA's PyPI packages put a toolkit."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    return [folder for root in roots for folder in (*sorted(root.glob("cu[0-9]*")), root)]


def compile_source(source: str, arch: Arch, path: Path) -> str:
    """Compile a CUDA source with its host launchers into the library `path`.

    Returns:
        The version of nvcc.

    Raises:
        CompileError: there is no nvcc, or it failed.
    """
    kit = toolkit()
    with tempfile.TemporaryDirectory(prefix="sparsegen-") as name:
        folder = Path(name)
        file = folder / "kernel.cu"
        file.write_text(source + render(Support()), encoding="utf-8")
        includes = [*libinfo.include_paths(), *kit.includes]
        command = [
            str(kit.nvcc), *code_options(arch), "-O3", "-std=c++17", "-w", "-shared",
            "-Xcompiler", "-fPIC", "-cudart=static",
            *(f"-I{p}" for p in includes), str(file), "-o", str(path),
            *(f"-L{p}" for p in kit.libraries),
            f"-L{Path(libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi",
        ]  # fmt: skip
        if any(f in source for f in _DRIVER):
            command += ["-L", str(_stub(folder)), "-lcuda"]
        run(command, path.name)
    return kit.version


def code_options(arch: Arch) -> list[str]:
    """Return the options that make code for one architecture."""
    name = str(arch.target["arch"]).removeprefix("sm_")
    return [f"-gencode=arch=compute_{name},code=sm_{name}"]


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
