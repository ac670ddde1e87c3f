"""Export kernels as bundles that need no compiler, and open them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from sparsegen.bundle.cpp import describe_cpp
from sparsegen.errors import BundleError

if TYPE_CHECKING:
    from sparsegen.runtime.kernel import Kernel
    from sparsegen.runtime.standalone.runner import Runner

__all__ = ["export", "load"]

RUNNER = "runner"  # the folder of a bundle that holds a copy of sparsegen.runtime.standalone
CPP = "cpp"  # the folder of the C++ header and its example


@dataclass(frozen=True)
class Page:
    """Everything the templates of a bundle may mention."""

    name: str
    layout: str
    dtype: str
    arch: str
    runner: str
    device: str
    inputs: tuple[tuple[str, str], ...]
    metadata: tuple[str, ...]
    torch: str
    ffi: str


def export(kernel: Kernel, folder: str | Path) -> Path:
    """Write a kernel as a bundle and return its folder.

    The folder, which must be empty or absent, gets the shared library, `manifest.json` (the
    specification, hashes, provenance), `loader.py` with the runner it uses, and a README. The
    bundle runs with torch and apache-tvm-ffi alone. That of a CPU kernel has also a C++ header and
    an example with its CMakeLists.txt, which need apache-tvm-ffi alone.

    Raises:
        BundleError: the folder has something in it, or the kernel has no sizes yet.
    """
    from sparsegen.runtime.standalone.bundle import FORMAT, MANIFEST, digest, seal

    if not hasattr(kernel, "spec"):
        raise BundleError(
            f"{kernel!r} is not specialised to sizes yet",
            hint="compile it with sizes=..., or export kernel.specialise(*tensors)",
        )
    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise BundleError(f"{root} is not an empty folder", hint="export into a new folder")
    root.mkdir(parents=True, exist_ok=True)
    arch, plan = kernel.arch, kernel.plan
    library = f"kernel-{arch.name}.so"
    shutil.copyfile(kernel.library, root / library)
    (root / RUNNER).mkdir()
    for source in files("sparsegen.runtime.standalone").iterdir():
        if source.name.endswith(".py"):
            (root / RUNNER / source.name).write_text(source.read_text(encoding="utf-8"))
    axes = {n.name: " ".join(map(str, n.axes)) for n in plan.program.inputs}
    page = Page(
        name=plan.program.name, layout=plan.binding.layout, dtype=plan.binding.dtype,
        arch=arch.name, runner=RUNNER, device=arch.kind, inputs=tuple(axes.items()),
        metadata=kernel.spec.metadata,
        torch=version("torch"), ffi=version("apache-tvm-ffi"),
    )  # fmt: skip
    for template, name in (("loader.py.j2", "loader.py"), ("bundle_readme.md.j2", "README.md")):
        (root / name).write_text(render(template, page))
    if arch.kind == "cpu":
        _write_cpp(root / CPP, kernel, library, page)
    written = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "spec": kernel.spec.to_json(),
        "libraries": [
            {
                "arch": arch.name,
                "file": library,
                "features": sorted(arch.features) if arch.kind == "cpu" else [],
                "machine": arch.machine,
                "code": kernel.spec.capability,
            }
        ],
        "requires": {"tvm_ffi": page.ffi},
        "files": [
            {"path": p, "bytes": (root / p).stat().st_size, "sha256": digest(root / p)}
            for p in written
        ],
        "provenance": {
            "key": kernel.built.key,
            "toolchain": dict(kernel.built.toolchain),
            "schedules": {n: repr(s) for n, s in kernel.schedules.items()},
            "binding": json.loads(plan.binding.to_json()),
            "program": json.loads(plan.program.to_json()),
            "torch": page.torch,
        },
    }
    manifest["sha256"] = seal(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return root


def _write_cpp(folder: Path, kernel: Kernel, library: str, page: Page) -> None:
    arch = kernel.arch
    described = describe_cpp(
        kernel.spec, dtype=page.dtype, arch=arch.name, ffi=page.ffi, library=library,
        features=tuple(sorted(arch.features)),
    )  # fmt: skip
    folder.mkdir()
    for template, name in (
        ("bundle.h.j2", f"{page.name}.h"),
        ("example.cc.j2", "example.cc"),
        ("CMakeLists.txt.j2", "CMakeLists.txt"),
    ):
        (folder / name).write_text(render(template, described))


def load(folder: str | Path) -> Runner:
    """Open a bundle and return its kernel, its torch operator registered.

    Raises:
        BundleError: it is damaged, altered, for another processor or of another version.
    """
    from sparsegen.runtime.kernel import ERRORS
    from sparsegen.runtime.standalone.load import load as load_bundle

    return load_bundle(folder, ERRORS)


def render(template: str, context: Any) -> str:
    """Render a template; a name that the context lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparsegen.templates", ""),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(vars(context) | {"zip": zip})
