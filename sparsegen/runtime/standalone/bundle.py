"""Open a bundle: refuse what is damaged, foreign or of another version, before anything is loaded.

Nothing in a bundle is unpickled, and no file outside its folder is read. The hashes find accidents,
not an author who computes them again: load bundles of people you trust, as any library.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from .errors import Errors
from .gpu import OLDEST, best, gpu, unfit
from .spec import Spec

FORMAT = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Bundle:
    """An intact bundle: its manifest, and of the library to load here the specification, the path
    and the architectures it is for."""

    folder: Path
    manifest: Mapping[str, Any]
    spec: Spec
    path: Path
    archs: tuple[str, ...]


def digest(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(manifest: Mapping[str, Any]) -> str:
    """Return the sha256 of everything else a manifest says, in its canonical JSON."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_bundle(folder: str | Path, errors: Errors, device: str | int | None = None) -> Bundle:
    """Return the bundle in a folder.

    Args:
        folder: what `export` wrote.
        errors: what to raise.
        device: the GPU to choose a library for, by default the current one.

    Raises:
        BundleError (`errors.bundle`): it is no bundle, truncated, altered, of another format
            version, built for another processor or another tvm-ffi.
    """
    root = Path(folder).resolve()
    manifest = _read_manifest(root, errors)
    try:
        _check_files(root, manifest["files"], errors)
        _check_ffi(root, manifest["requires"]["tvm_ffi"], errors)
        libraries = manifest["libraries"]
        specs = [Spec.from_json(library["spec"]) for library in libraries]
        paths = [_inside(root, library["file"], errors) for library in libraries]
        hashed = {entry["path"] for entry in manifest["files"]}
        for library in libraries:
            if library["file"] not in hashed:
                raise _altered(root, f"{library['file']} has no hash", errors)
        if manifest["device"] == "cpu":
            if device is not None:
                raise errors.bundle(
                    f"the bundle {root} is for CPUs, and device={device!r} was asked for",
                    hint="load it without device=",
                )
            n = _for_this_cpu(root, libraries, errors)
        else:
            n = _for_a_gpu(root, libraries, specs, device, errors)
        return Bundle(root, manifest, specs[n], paths[n], tuple(libraries[n]["archs"]))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise _altered(
            root, f"its manifest misses or mistypes a field ({error})", errors
        ) from error


def _read_manifest(root: Path, errors: Errors) -> Mapping[str, Any]:
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise errors.bundle(
            f"{root} is no bundle: {MANIFEST} cannot be read ({error.strerror})",
            hint="pass the folder that sg.export() wrote",
        ) from error
    except ValueError as error:
        raise _altered(root, f"{MANIFEST} is not JSON ({error})", errors) from error
    if not isinstance(manifest, dict):
        raise _altered(root, f"{MANIFEST} is not an object", errors)
    if manifest.get("format") != FORMAT:
        raise errors.bundle(
            f"{root} has bundle format {manifest.get('format')!r}, this loader reads {FORMAT}",
            hint="export the kernel again, or use the loader inside the bundle",
        )
    if manifest.get("sha256") != seal(manifest):
        raise _altered(root, f"the content of {MANIFEST} was changed", errors)
    return manifest


def _altered(root: Path, what: str, errors: Errors) -> Exception:
    return errors.bundle(
        f"the bundle {root} is damaged: {what}", hint="copy it again, or export the kernel again"
    )


def _inside(root: Path, name: str, errors: Errors) -> Path:
    """Return the path of a file of the bundle; names that lead out of its folder are refused."""
    parts = PurePosixPath(name)
    path = root.joinpath(*parts.parts)
    outside = parts.is_absolute() or ".." in parts.parts or "\\" in name or not parts.parts
    if outside or not path.resolve().is_relative_to(root):
        raise errors.bundle(
            f"the bundle {root} names a file outside its folder: {name!r}",
            hint="do not use this bundle: it was tampered with",
        )
    return path


def _check_files(root: Path, files: Sequence[Mapping[str, Any]], errors: Errors) -> None:
    for entry in files:
        path = _inside(root, entry["path"], errors)
        if not path.is_file():
            raise _altered(root, f"{entry['path']} is missing", errors)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise _altered(
                root, f"{entry['path']} has {size} bytes instead of {entry['bytes']}", errors
            )
        if digest(path) != entry["sha256"]:
            raise _altered(root, f"the content of {entry['path']} was changed", errors)


def _check_ffi(root: Path, wanted: str, errors: Errors) -> None:
    found = version("apache-tvm-ffi")
    if found.split(".")[:2] != wanted.split(".")[:2]:
        raise errors.bundle(
            f"the bundle {root} needs apache-tvm-ffi {wanted}, but {found} is installed",
            hint=f'run `pip install "apache-tvm-ffi=={wanted}"`',
        )


def _for_this_cpu(root: Path, libraries: Sequence[Mapping[str, Any]], errors: Errors) -> int:
    """Return the place of the first library, the most specific ones standing first, that runs."""
    flags, machine = cpu_flags(), platform.machine()
    reasons = []
    for n, library in enumerate(libraries):
        missing = sorted(set(library["features"]) - flags)
        names = ", ".join(library["archs"])
        if library["machine"] not in (None, machine):
            reasons.append(f"{names} is for {library['machine']}, this is {machine}")
        elif missing:
            reasons.append(f"{names} needs {', '.join(missing)}")
        else:
            return n
    raise errors.bundle(
        f"no library of the bundle {root} runs on this processor: {'; '.join(reasons)}",
        hint="export it again with target=[...] that names this processor",
    )


def _for_a_gpu(
    root: Path,
    libraries: Sequence[Mapping[str, Any]],
    specs: Sequence[Spec],
    device: str | int | None,
    errors: Errors,
) -> int:
    """Return the place of the library that fits a GPU best.

    That is the one of its own code, or else of the newest older GPU whose code runs on it: machine
    code before PTX, which its driver compiles.
    """
    held = "; ".join(
        f"{', '.join(library['archs'])} ({', '.join(spec.codes)})"
        for library, spec in zip(libraries, specs, strict=True)
    )
    machine, made = platform.machine(), libraries[0]["machine"]
    if made != machine:
        raise errors.bundle(
            f"the bundle {root} was exported on {made}, and this is {machine}: its kernels are "
            f"started by code for {made}",
            hint=f"export it again on a machine of {machine}",
        )
    if not torch.cuda.is_available():
        raise errors.bundle(
            f"the bundle {root} is for GPUs, {held}, and torch sees no GPU",
            hint="install torch for CUDA and a driver, or export it for target='cpu'",
        )
    try:
        found = gpu(device)
    except (RuntimeError, AssertionError) as error:
        raise errors.bundle(
            f"there is no GPU {device!r} here ({str(error).splitlines()[0]})",
            hint=f"torch sees {torch.cuda.device_count()}",
        ) from error
    reasons = [unfit(spec.codes, spec.shared, found) for spec in specs]
    ranks = {n: best(specs[n].codes, found) for n, why in enumerate(reasons) if why is None}
    if ranks:
        return max(ranks, key=lambda n: ranks[n] or ())
    old = found.capability < OLDEST
    raise errors.bundle(
        f"no library of the bundle {root}, which holds {held}, runs here: {reasons[-1]}",
        hint=f"sparsegen compiles for compute capability {OLDEST[0]}.{OLDEST[1]} and newer: use "
        "another GPU"
        if old
        else f"export it again with target=[..., {found.arch!r}]",
    )


def cpu_flags() -> frozenset[str]:
    """Return the feature flags the operating system reports of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
