"""Load a bundle's kernel into this process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import tvm_ffi

from .bundle import open_bundle
from .errors import Errors, own_errors
from .runner import Runner


def load_library(path: Path, errors: Errors) -> Any:
    """Return a shared library of kernels, a function of each task's name."""
    try:
        return tvm_ffi.load_module(str(path))
    except (RuntimeError, OSError) as error:
        raise errors.bundle(
            f"{path} cannot be loaded: {str(error).strip().splitlines()[-1]}",
            hint="its C library or apache-tvm-ffi may be older than those it was built with",
        ) from error


def load(
    folder: str | Path, device: str | int | None = None, errors: Errors | None = None
) -> Runner:
    """Return the kernel of a bundle, its torch operator registered.

    Args:
        folder: what `export` wrote.
        device: the GPU to choose the code for, by default the current one.
        errors: what to raise.

    Raises:
        BundleError: see `open_bundle`.
    """
    raised = own_errors() if errors is None else errors
    bundle = open_bundle(folder, raised, device)
    load = functools.partial(load_library, bundle.path, raised)
    return Runner(bundle.spec, load() if bundle.spec.device == "cpu" else load, raised)
