"""Write kernels as bundles that need no compiler, and open them."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from sparsegen.bundle.cpp import CppLibrary, describe_cpp
from sparsegen.errors import BundleError

if TYPE_CHECKING:
    from sparsegen.lowering.plan import Plan
    from sparsegen.runtime.portable import Library
    from sparsegen.runtime.standalone.runner import Runner
    from sparsegen.runtime.standalone.spec import Spec

__all__ = ["load", "write"]

RUNNER = "runner"  # the folder of a bundle that holds a copy of sparsegen.runtime.standalone
CPP = "cpp"  # the folder of the C++ header and its example


@dataclass(frozen=True)
class Page:
    """Everything the templates of a bundle may mention."""

    name: str
    layout: str
    dtype: str
    archs: tuple[str, ...]
    runner: str
    device: str
    inputs: tuple[tuple[str, str], ...]
    metadata: tuple[str, ...]
    torch: str
    ffi: str


@dataclass(frozen=True)
class Part:
    """A library of a bundle, the name of its file and its specification."""

    held: Library
    file: str
    spec: Spec


def write(plan: Plan, libraries: Sequence[Library], folder: str | Path) -> Path:
    """Write the libraries of a plan as a bundle and return its folder.

    Raises:
        BundleError: the folder has something in it.
    """
    from sparsegen.runtime.kernel import specify
    from sparsegen.runtime.standalone.bundle import FORMAT, MANIFEST, digest, seal

    root = Path(folder)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise BundleError(f"{root} is not an empty folder", hint="export into a new folder")
    root.mkdir(parents=True, exist_ok=True)
    # A CPU takes the first that it can run.
    libraries = sorted(libraries, key=lambda x: (-len(x.archs[0].features), x.archs[0].name))
    parts = [
        Part(library, f"kernel-{'-'.join(_names(library))}.so",
             specify(plan, library.archs[0], library.built))
        for library in libraries
    ]  # fmt: skip
    for part in parts:
        shutil.copyfile(part.held.built.path, root / part.file)
    (root / RUNNER).mkdir()
    for source in files("sparsegen.runtime.standalone").iterdir():
        if source.name.endswith(".py"):
            (root / RUNNER / source.name).write_text(source.read_text(encoding="utf-8"))
    axes = {n.name: " ".join(map(str, n.axes)) for n in plan.program.inputs}
    page = Page(
        name=plan.program.name, layout=plan.binding.layout, dtype=plan.binding.dtype,
        archs=tuple(name for part in parts for name in _names(part.held)), runner=RUNNER,
        device=parts[0].spec.device, inputs=tuple(axes.items()), metadata=parts[0].spec.metadata,
        torch=version("torch"), ffi=version("apache-tvm-ffi"),
    )  # fmt: skip
    for template, name in (("loader.py.j2", "loader.py"), ("bundle_readme.md.j2", "README.md")):
        (root / name).write_text(render(template, page))
    if page.device == "cpu":
        _write_cpp(root / CPP, parts, page)
    written = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "device": page.device,
        "libraries": [_entry(part) for part in parts],
        "requires": {"tvm_ffi": page.ffi},
        "files": [
            {"path": p, "bytes": (root / p).stat().st_size, "sha256": digest(root / p)}
            for p in written
        ],
        "provenance": {
            "binding": json.loads(plan.binding.to_json()),
            "program": json.loads(plan.program.to_json()),
            "torch": page.torch,
        },
    }
    manifest["sha256"] = seal(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return root


def _names(library: Library) -> list[str]:
    return [arch.name for arch in library.archs]


def _entry(part: Part) -> dict[str, Any]:
    """Return what the manifest says of a library."""
    library, first = part.held, part.held.archs[0]
    return {
        "archs": _names(library),
        "file": part.file,
        "features": sorted(first.features) if first.kind == "cpu" else [],
        # Kernels of a GPU are started by code for the CPU here.
        "machine": first.machine if first.kind == "cpu" else platform.machine(),
        "spec": part.spec.to_json(),
        "key": library.built.key,
        "toolchain": dict(library.built.toolchain),
        "schedules": {
            arch: {task: repr(s) for task, s in chosen.items()}
            for arch, chosen in library.schedules.items()
        },
    }


def _write_cpp(folder: Path, parts: Sequence[Part], page: Page) -> None:
    first = parts[0]
    if any(part.spec.buffers != first.spec.buffers for part in parts):
        raise BundleError(
            f"the kernels of {page.name} for {', '.join(page.archs)} take different memory, and "
            "the C++ header knows one",
            hint="export a bundle for each, or let their schedules take equal memory",
        )
    described = describe_cpp(
        first.spec, dtype=page.dtype, ffi=page.ffi,
        libraries=tuple(
            CppLibrary(", ".join(_names(p.held)), p.file,
                       tuple(sorted(p.held.archs[0].features)))
            for p in parts
        ),
    )  # fmt: skip
    folder.mkdir()
    for template, name in (
        ("bundle.h.j2", f"{page.name}.h"),
        ("example.cc.j2", "example.cc"),
        ("CMakeLists.txt.j2", "CMakeLists.txt"),
    ):
        (folder / name).write_text(render(template, described))


def load(folder: str | Path, device: str | int | None = None) -> Runner:
    """Open a bundle and return its kernel, its torch operator registered.

    Args:
        folder: what `export` wrote.
        device: the GPU to choose the code for, "cuda:1" or 1; by default the current one.

    Raises:
        BundleError: it is damaged, altered, for another processor or of another version.
    """
    from sparsegen.runtime.kernel import ERRORS
    from sparsegen.runtime.standalone.load import load as load_bundle

    return load_bundle(folder, device, ERRORS)


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
