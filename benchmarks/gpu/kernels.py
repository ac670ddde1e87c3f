"""Load the kernels of a folder and call them: needs torch and tvm-ffi, not sparsegen."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.problem import Problem
from benchmarks.gpu.workload import Shape, Workload


class Folder:
    """What `build` wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        self.workloads = [Workload(**w) for w in self.manifest["workloads"]]
        self.shapes = {
            name: Shape(**kernel["shape"]) for name, kernel in self.manifest["kernels"].items()
        }
        self._loaded: dict[tuple[str, str], Kernel] = {}

    def variants(self, kernel: str) -> dict[str, dict[str, Any]]:
        """Return what is known of the variants of a kernel, by label."""
        found: dict[str, dict[str, Any]] = (
            self.manifest["kernels"].get(kernel, {}).get("variants", {})
        )
        return found

    def load(self, kernel: str, label: str) -> Kernel:
        """Return a variant of a kernel.

        Raises:
            RuntimeError: it was not built.
        """
        key = (kernel, label)
        if key not in self._loaded:
            entry = self.variants(kernel).get(label, {"error": "it was not built"})
            if "error" in entry:
                raise RuntimeError(f"{kernel}, {label}: {entry['error']}")
            self._loaded[key] = Kernel(self.path, self.shapes[kernel], entry)
        return self._loaded[key]

    def kernel_of(self, shape: Shape) -> str | None:
        """Return the name of the kernel of a shape."""
        return next((name for name, held in self.shapes.items() if held == shape), None)


class Kernel:
    """A function of the metadata, the inputs, the outputs and scratch memory."""

    def __init__(self, folder: Path, shape: Shape, entry: dict[str, Any]) -> None:
        import tvm_ffi

        self.shape = shape
        self.function = tvm_ffi.load_module(str(folder / entry["file"]))[entry["function"]]
        self.runner = runner(folder / "runner")
        self.arguments = [
            (a["part"], self.runner.spec.TensorSpec.from_json(a["tensor"]))
            for a in entry["arguments"]
        ]

    def scratch(self, extent: Any, device: str) -> list[Tensor]:
        """Return the memory that the schedule takes beside inputs and outputs, of no values."""
        found = []
        for part, spec in self.arguments:
            if part == "scratch":
                shape = [max(n, 1) for n in self.runner.shapes.shape_of(spec, extent)]
                found.append(torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device))
        return found

    def bind(self, given: dict[str, Tensor], scratch: list[Tensor]) -> list[Tensor]:
        """Return the arguments behind the metadata, in order."""
        left = list(scratch)
        return [left.pop(0) if part == "scratch" else given[part] for part, _ in self.arguments]

    def dtype(self, part: str) -> torch.dtype | None:
        """Return the dtype in which the kernel takes a tensor; None if it takes none."""
        found = (spec.dtype for name, spec in self.arguments if name == part)
        name = next(found, None)
        return None if name is None else getattr(torch, name)

    def extent(self, batch: int, queries: int, keys: int, last: int, longest: int) -> Any:
        """Return what sizes of buffers depend on.

        Args:
            batch, queries, keys: of the packed sequences.
            last: where the positions of the queries end.
            longest: how many keys the longest sequence has.
        """
        stops = {"query": last, "key": longest}
        return self.runner.shapes.Extent(batch, queries, keys, stops)


def runner(folder: Path) -> ModuleType:
    """Import the folder's copy of sparsegen.runtime.standalone."""
    name = f"sparsegen_benchmark_runner_{abs(hash(str(folder.resolve()))):x}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        for part in ("spec", "shapes"):
            importlib.import_module(f"{name}.{part}")
    return sys.modules[name]


class Call:
    """A kernel with the tensors of a problem; call it to launch, then read `o` and `lse`."""

    def __init__(self, kernel: Kernel, problem: Problem) -> None:
        shape, device = problem.shape, problem.device
        self.problem = problem
        self.o = torch.empty(
            problem.rows, shape.heads, shape.d_v, dtype=kernel.dtype("o"), device=device
        )
        self.lse = torch.empty(problem.rows, shape.heads, device=device)
        offsets = torch.tensor(problem.offsets, dtype=torch.int32, device=device)
        metadata = [problem.cu_q, problem.cu_k, offsets]
        if problem.table is not None:
            metadata.append(problem.table)
        extent = kernel.extent(
            len(problem.lengths),
            problem.rows,
            problem.ends[1][-1],
            max(o + t for o, (t, _) in zip(problem.offsets, problem.lengths, strict=True)),
            max(s for _, s in problem.lengths),
        )
        self.scratch = kernel.scratch(extent, device)
        given = {"o": self.o, "lse": self.lse}
        for part, held in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
            dtype = kernel.dtype(part)
            if dtype is not None:
                given[part] = held.to(dtype).contiguous()
        if shape.page:
            for part in {"k", "v"} & given.keys():
                given[part] = given[part].unflatten(0, (-1, shape.page))
        if problem.list is not None:
            given["list"] = problem.list
        if problem.doc is not None:
            given["doc"] = problem.doc
        self.function = kernel.function
        self.arguments = [*metadata, *kernel.bind(given, self.scratch)]

    def __call__(self) -> None:
        """Launch the kernel."""
        self.function(*self.arguments)

    def poison(self) -> None:
        """Fill outputs with NaN, and scratch memory with ones of every bit."""
        self.o.fill_(float("nan"))
        self.lse.fill_(float("nan"))
        for held in self.scratch:
            held.view(torch.uint8).fill_(255)
