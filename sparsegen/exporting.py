"""Export kernels and patterns as bundles, for one processor or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsegen.api import Specialising, overrides_of, request_of
from sparsegen.bundle import write
from sparsegen.dsl.pattern import Pattern
from sparsegen.errors import BindingError, BundleError
from sparsegen.ir.program import Program
from sparsegen.runtime.kernel import Kernel
from sparsegen.runtime.portable import build_for, of_kernel
from sparsegen.runtime.targets import archs_of

__all__ = ["export"]


def export(
    kernel: Kernel | Pattern | Program | str,
    folder: str | Path,
    target: str | Sequence[str] | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    **options: Any,
) -> Path:
    """Write a kernel as a bundle and return its folder.

    The folder, which must be empty or absent, gets shared libraries, `manifest.json` (the
    specification, hashes, provenance), `loader.py` with the runner it uses, and a README. The
    bundle runs with torch and apache-tvm-ffi alone. That of a CPU kernel has also a C++ header and
    an example with its CMakeLists.txt, which need apache-tvm-ffi alone.

    Args:
        kernel: what `compile` returned, with its sizes; or a pattern, as for `compile`.
        folder: where to.
        target: the processors to export for, such as ["sm_80", "sm_90"], all CPUs or all GPUs; by
            default the kernel's own. Whoever loads the bundle gets what fits the processor there.
            GPUs whose kernels have the same source share a library, which has PTX for newer GPUs
            too, unless it uses instructions of one GPU alone.
        sizes, options: of a pattern, as for `compile`.

    Raises:
        BundleError: the folder has something in it, or the kernel has no sizes yet.
        BindingError: the targets are of both kinds, or what `compile` refuses.
        UnsupportedError, CompileError: as for `compile`.
    """
    if isinstance(kernel, Pattern | Program | str):
        archs = archs_of("cpu" if target is None else target)
        request = request_of(kernel, archs[0].name, **options)
        if sizes is None:
            raise BindingError("a pattern is exported for sizes", hint='pass sizes={"D": 64, ...}')
        plan, asked = request.plan(sizes), request.schedule
    elif not isinstance(kernel, Kernel):
        raise BundleError(
            f"{kernel!r} is not specialised to sizes yet"
            if isinstance(kernel, Specialising)
            else f"export() takes a kernel or a pattern, not {kernel!r}",
            hint="compile it with sizes=..., or export kernel.specialise(*tensors)",
        )
    elif sizes is not None or options:
        raise BindingError(
            f"a compiled kernel takes no {', '.join(options) or 'sizes'}", hint="pass the pattern"
        )
    elif target is None:
        return write(kernel.plan, [of_kernel(kernel)], folder)
    else:
        archs, plan, asked = archs_of(target), kernel.plan, kernel.asked
    known = dict(plan.binding.sizes) if sizes is None else sizes
    wanted = [(arch, overrides_of(plan, arch, asked, known)) for arch in archs]
    return write(plan, build_for(plan, wanted), folder)
