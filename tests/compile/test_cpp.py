"""The C++ header of a bundle: its example builds with CMake and computes what Python computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cmake
import numpy as np
import pytest
import torch

import sparsegen as sg
from sparsegen import arch, patterns
from sparsegen.runtime.standalone.checks import leading

CMAKE = Path(cmake.CMAKE_BIN_DIR) / "cmake"
PAGE, KEYS = 16, 300
CASES = {
    "dsa": ("sequence", "float32"),
    "nsa": ("ragged", "bfloat16"),
    "moba": ("paged", "float16"),
    "snapkv": ("dense", "float32"),
    "document": ("ragged", "float32"),
    "seer": ("ragged", "float32"),  # compressed queries
}
MAIN = """
#include <cstdio>
#include "causal.h"
using namespace sparsegen::causal;
int main() {
  Kernel kernel(BUNDLE);
  const DLDataType type = {kDLFloat, 32, 1};
  auto q = detail::make(detail::Allocated(), {3, HQ, D}, type);
  auto k = detail::make(detail::Allocated(), {5, HK, D}, type);
  auto v = detail::make(detail::Allocated(), {4, HK, DV}, type);
  try {
    kernel(detail::raw(q), detail::raw(k), detail::raw(v));
  } catch (const std::invalid_argument& error) {
    std::puts(error.what());
    return 0;
  }
  return 1;
}
"""


def compiled(name: str, layout: str, dtype: str) -> Any:
    config = patterns.configs(name, test=True)[0]
    return sg.compile(
        name,
        target="cpu",
        layout=layout,
        dtype=dtype,
        page_size=PAGE if layout == "paged" else 0,
        sizes={k: v for k, v in config.sizes.items() if k not in "TS"},
        **config.hyper,
    )


def build(folder: Path, *flags: str) -> Path:
    out = folder.parent / "build"
    for command in (
        [CMAKE, "-S", folder / "cpp", "-B", out, f"-DPython_EXECUTABLE={sys.executable}", *flags],
        [CMAKE, "--build", out],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return out / "example"


def made_up(shape: tuple[int, ...], dtype: str, state: int) -> torch.Tensor:
    """Repeat the numbers of the example."""
    states = np.empty(int(np.prod(shape)), np.uint32)
    for n in range(states.size):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        states[n] = state
    if dtype == "int32":
        return torch.from_numpy(((states >> 8) % 4).astype(np.int32).reshape(shape))
    x = ((states >> 8).astype(np.float32) / np.float32(2**24) - np.float32(0.5)).reshape(shape)
    if dtype == "bfloat16":
        x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return torch.from_numpy(x).to(getattr(torch, dtype))


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("name", CASES)
def test_the_example_computes_the_same(name: str, tmp_path: Path) -> None:
    layout, dtype = CASES[name]
    kernel = compiled(name, layout, dtype)
    folder = sg.export(kernel, tmp_path / "bundle")
    example = build(folder, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror")
    done = subprocess.run([example, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    spec = kernel.spec
    queries, pages = KEYS if spec.query == spec.key else 5, -(-KEYS // PAGE)
    extents = {"batch": 1, "pages": pages, "page": PAGE, spec.key: KEYS, spec.query: queries}
    inputs = [
        made_up((*(extents[axis] for axis in leading(spec, t)), *t.shape), t.dtype, n + 1)
        for n, t in enumerate(spec.inputs)
    ]
    given: dict[str, Any] = {}
    if layout in ("ragged", "paged"):
        given["cu_seqlens_q"] = int32([0, queries])
    if layout == "ragged":
        given["cu_seqlens_k"] = int32([0, KEYS])
    if layout == "paged":
        given |= {"seqlens_k": int32([KEYS]), "page_table": int32([list(range(pages))[::-1]])}
    want = kernel(*inputs, **given)
    for n, result in enumerate(want if isinstance(want, tuple) else (want,)):
        found = (tmp_path / f"result_{n}.bin").read_bytes()
        assert found == result.contiguous().view(torch.uint8).numpy().tobytes()
        assert result.float().abs().max() > 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    kernel = compiled("causal", "sequence", "float32")
    folder = sg.export(kernel, tmp_path / "bundle")
    (heads, size), (key_heads, values) = kernel.spec.inputs[0].shape, kernel.spec.inputs[2].shape
    (folder / "cpp" / "example.cc").write_text(MAIN)
    example = build(
        folder, f"-DCMAKE_CXX_FLAGS=-DHQ={heads} -DHK={key_heads} -DD={size} -DDV={values}"
    )
    done = subprocess.run([example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("causal(): argument 'v' has shape [4,"), done.stdout
    assert "S is 5 elsewhere" in done.stdout


def test_the_header_chooses_a_library(tmp_path: Path) -> None:
    host = arch.host().name
    if host == "generic":
        pytest.skip("this CPU is as any other")
    config = patterns.configs("causal", test=True)[0]
    sizes = {k: v for k, v in config.sizes.items() if k not in "TS"}
    folder = sg.export("causal", tmp_path / "bundle", ["generic", host], sizes=sizes)
    header = folder / "cpp" / "causal.h"
    text = header.read_text()
    assert f"layout sequence, float32, for {host}, generic.\n" in text
    best = f'{{"{host}", "kernel-{host}.so", {{'
    assert text.count(best) == 1
    # The first library that the processor runs is loaded, and no other.
    for name, edited in ((host, text), ("generic", text.replace(best, best + '"nope", '))):
        header.write_text(edited)
        example = build(folder)
        other = folder / f"kernel-{host if name == 'generic' else 'generic'}.so"
        other.rename(folder / "aside")
        done = subprocess.run([example, tmp_path], capture_output=True, text=True)
        (folder / "aside").rename(other)
        assert done.returncode == 0, done.stderr
    header.write_text(edited.replace('"generic", "kernel-generic.so", {', '"generic", "", {"none"'))
    done = subprocess.run([build(folder)], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"no code for this processor: {host} needs nope; generic needs none" in done.stderr
