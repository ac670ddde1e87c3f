"""Offer TVM to the rest of the project: the only module that imports it.

TVM's Python names move with every release and its two libraries are one ABI, so the versions are
pinned here and whatever code generators need is re-exported from here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparsegen.arch import Arch
from sparsegen.codegen.support import link_options
from sparsegen.errors import CompileError

PINS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}


def _check_pins() -> None:
    for package, pinned in PINS.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found != pinned:
            raise CompileError(
                f"kernels are generated with {package} {pinned}, but {found} is installed",
                hint=f'run `pip install "{package}=={pinned}"`',
            )


_check_pins()

import tvm  # noqa: E402
from tvm import tirx  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.script.ir_builder import ir as I  # noqa: E402
from tvm.script.ir_builder import tirx as T  # noqa: E402

IRModule = tvm.IRModule
Target = tvm.target.Target
Schedule = tvm.s_tir.Schedule

# It shrinks buffers to the region in use, which ours are already, and takes 2/3 of all the time.
_USELESS = ["s_tir.CompactBufferAllocation"]

_CPU = 1  # DLPack's device type

# TVM is untyped: these name what a value stands for, for the reader.
Value = Any
"""A scalar or vector expression of a kernel."""
Memory = Any
"""A buffer of a kernel: an argument or scratch."""

__all__ = [
    "PINS",
    "I",
    "IRBuilder",
    "IRModule",
    "Memory",
    "Schedule",
    "T",
    "Target",
    "Value",
    "assembly",
    "broadcast",
    "build",
    "cast",
    "compile_module",
    "const",
    "cuda_source",
    "device_code",
    "dtype_of",
    "equal",
    "gather",
    "lanes_of",
    "llvm_version",
    "load",
    "maximum",
    "merge",
    "minimum",
    "ramp",
    "reinterpret",
    "scratch",
    "select",
    "shuffle",
    "store",
    "target_of",
    "tirx",
    "tvm",
]  # fmt: skip


def dtype_of(x: Value) -> str:
    """Return the element type of an expression, without lanes: "float32", "int64", "bool"."""
    return str(x.ty).partition("x")[0]


def lanes_of(x: Value) -> int:
    """Return the number of lanes of an expression; 1 for a scalar."""
    return int(str(x.ty).partition("x")[2] or 1)


def const(value: float | int | bool, dtype: str, lanes: int = 1) -> Value:
    """Return a constant of `dtype`, repeated in `lanes` lanes."""
    scalar = tirx.const(value, dtype)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def broadcast(x: Value, lanes: int) -> Value:
    """Repeat a scalar in `lanes` lanes; expressions that have them already are unchanged."""
    return x if lanes == 1 or lanes_of(x) == lanes else tirx.Broadcast(x, lanes)


def ramp(base: Value, lanes: int, stride: Value = 1) -> Value:
    """Return base, base + stride, ... in `lanes` lanes."""
    return base if lanes == 1 else tirx.Ramp(base, stride, lanes)


def cast(x: Value, dtype: str) -> Value:
    """Convert an expression to `dtype`, keeping its lanes; a Python number becomes a constant."""
    if isinstance(x, int | float):
        return const(x, dtype)
    lanes = lanes_of(x)
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", x)


def select(condition: Value, yes: Value, no: Value) -> Value:
    """Choose per lane; both sides are evaluated, so neither may read out of bounds."""
    return tirx.Select(condition, yes, no)


def maximum(a: Value, b: Value) -> Value:
    """Return the larger value per lane; where `a` is NaN, `b`."""
    return tirx.Max(a, b)


def minimum(a: Value, b: Value) -> Value:
    """Return the smaller value per lane; where `a` is NaN, `b`."""
    return tirx.Min(a, b)


def reinterpret(x: Value, dtype: str) -> Value:
    """Read the bits of each lane as another type of the same size."""
    lanes = lanes_of(x)
    return T.reinterpret(dtype if lanes == 1 else f"{dtype}x{lanes}", x)


def shuffle(a: Value, b: Value, picks: list[int]) -> Value:
    """Return lanes of `a` and `b`; pick n is lane n of `a`, or lane n - lanes(a) of `b`."""
    return tirx.Shuffle([a, b], [const(n, "int32") for n in picks])


def load(buffer: Memory, *index: Value, lanes: int = 1) -> Value:
    """Read `lanes` consecutive elements, starting at `index`."""
    return tirx.BufferLoad(buffer, [*index[:-1], ramp(index[-1], lanes)])


def gather(buffer: Memory, index: Value) -> Value:
    """Read one element per lane of `index` from a flat buffer."""
    return tirx.BufferLoad(buffer, [index])


def equal(a: Value, b: Value) -> Value:
    """Compare per lane (`==` of two expressions is for Python conditions)."""
    return tirx.EQ(a, b)


def store(buffer: Memory, value: Value, *index: Value) -> None:
    """Write a scalar, or consecutive lanes starting at `index`."""
    T.buffer_store(buffer, value, [*index[:-1], ramp(index[-1], lanes_of(value))])


_SCOPE: ContextVar[str] = ContextVar("scope", default="global")


def scratch(size: int, dtype: str) -> Memory:
    """Allocate `size` elements of a thread's own: its registers or stack."""
    return T.alloc_buffer((size,), dtype, scope=_SCOPE.get())


@contextmanager
def device_code() -> Iterator[None]:
    """Let `scratch` mean the registers of a GPU thread for the body of a `with`."""
    token = _SCOPE.set("local")
    try:
        yield
    finally:
        _SCOPE.reset(token)


@contextmanager
def workspace(size: Value, dtype: str) -> Iterator[Memory]:
    """Take `size` (int64) elements of the heap for the body of a `with`.

    An `alloc_buffer` whose extent is only known at run time is moved ahead of what its extent is
    computed from.
    """
    bits = {"float32": 32, "int32": 32, "int64": 64}[dtype]
    code = 2 if dtype == "float32" else 0
    nbytes = tirx.Cast("uint64", size * (bits // 8))
    data = T.bind(T.TVMBackendAllocWorkspace(_CPU, 0, nbytes, code, bits))
    yield T.decl_buffer((size,), dtype, data=data)
    T.evaluate(T.TVMBackendFreeWorkspace(_CPU, 0, data))


def merge(modules: list[Any]) -> Any:
    """Return one module that holds the functions of all `modules`."""
    functions: dict[Any, Any] = {}
    for module in modules:
        for variable, function in module.functions_items():
            functions[variable.name_hint] = function
    return IRModule(functions)


def target_of(arch: Arch) -> Any:
    """Return TVM's target for an architecture."""
    target = dict(arch.target)
    if arch.kind == "cpu" and arch.cores is not None:
        target["num-cores"] = arch.cores
    return Target(target)


def compile_module(module: Any, arch: Arch) -> Any:
    """Compile an IRModule for `arch` and return the executable.

    Raises:
        CompileError: TVM or LLVM refused the generated code.
    """
    target = target_of(arch)
    try:
        with target, tvm.transform.PassContext(disabled_pass=_USELESS):
            return tvm.compile(module, target=target)
    # TVM raises its C++ errors as many unrelated Python types.
    except Exception as error:
        names = ", ".join(sorted(v.name_hint for v in module.get_global_vars()))
        raise CompileError(
            f"TVM failed on {names} for {arch.name}: {str(error).strip().splitlines()[-1]}",
            hint="set TVM_BACKTRACE=1 for its stack, and report the pattern with this message",
        ) from error


def build(module: Any, arch: Arch, path: Path) -> Path:
    """Compile an IRModule for `arch` into the shared library `path` and return `path`.

    The library of a CPU runs its parallel loops itself, on the OpenMP threads of the process, and
    needs libtvm_ffi only.

    Raises:
        CompileError: TVM, LLVM or the linker failed.
    """
    executable = compile_module(module, arch)
    try:
        with tempfile.TemporaryDirectory(prefix="sparsegen-") as folder:
            options = link_options(Path(folder)) if arch.kind == "cpu" else []
            executable.export_library(str(path), options=options)
    except Exception as error:
        raise CompileError(
            f"linking {path.name} failed: {error}",
            hint="a C++ compiler (g++ or clang++) must be on PATH, and the folder writable",
        ) from error
    return path


def cuda_source(module: Any, arch: Arch) -> str:
    """Return the CUDA source of a module: its kernels, and the launchers that check arguments.

    Raises:
        CompileError: TVM refused the generated code.
    """
    from tvm.backend.cuda import export_cuda_host

    try:
        built = tirx.build(module, target_of(arch), pipeline="tirx")
        return str(export_cuda_host(built))
    # TVM raises its C++ errors as many unrelated Python types.
    except Exception as error:
        names = ", ".join(sorted(v.name_hint for v in module.get_global_vars()))
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise CompileError(
            f"TVM failed on {names} for {arch.name}: {lines[0] if lines else type(error).__name__}",
            hint="set TVM_BACKTRACE=1 for its stack, and report the pattern with this message",
        ) from error


def llvm_version() -> str:
    """Return the version of the LLVM inside TVM."""
    return str(tvm.target.codegen.llvm_version_major())


def assembly(module: Any, arch: Arch) -> str:
    """Return the assembly LLVM makes of a module, to count its instructions."""
    return str(compile_module(module, arch).mod.inspect_source("asm"))
