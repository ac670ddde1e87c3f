"""Kernels take memory for their outputs, not for pairs of queries and keys, nor for copies."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
import torch
import sparsegen as sg
from sparsegen import patterns

name, sizes, hyper = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3])
program = patterns.load(name).trace(**hyper)
letters = {k: v for k, v in sizes.items() if k not in "TS"}
kernel = sg.compile(program, target="cpu", sizes=letters)

def inputs():
    made = patterns.random_inputs(program, sizes)
    return {n: torch.from_numpy(x) for n, x in made.items()}

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(key + ":"))

large = inputs()
kernel(**large)  # pages of libraries are no working memory
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
out = kernel(**large)
print(status("VmHWM") - before - out.numel() * out.element_size() / 2**20)
"""
# What is freed goes back to the system at once, so that a second call shows what it takes.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
HEADS = {"Hq": 2, "Hk": 1, "D": 16, "E": 16}
CASES = {
    # 4096 x 16384 scores are 256 MiB for each head.
    "causal": ({"T": 4096, "S": 16384, **HEADS}, {}),
    "sliding_window": ({"T": 4096, "S": 16384, **HEADS}, {"window": 512}),
    # Gathered rows would be 2048 x 512 x 32 floats, 128 MiB; the lists alone are 4.
    "dsa": (
        {"T": 2048, "S": 16384, "Hq": 2, "c": 32, "Hi": 1, "e": 8},
        {"topk": 512, "d_v": 16},
    ),
    # Probabilities of entries would be 4096 x 2 x 1024 floats, 32 MiB for each head.
    "nsa": ({"T": 4096, "S": 16384, "Hq": 2, "Hk": 1, "D": 16, "E": 16}, {}),
}


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="resident memory is read from /proc, which only Linux has",
)
@pytest.mark.parametrize("name", CASES)
def test_memory_is_linear(name: str) -> None:
    sizes, hyper = CASES[name]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name, repr(sizes), repr(hyper)],
        capture_output=True,
        text=True,
        env={**os.environ, **MALLOC},
    )
    assert done.returncode == 0, done.stderr
    mib = float(done.stdout)
    assert mib < 16, f"{mib:.0f} MiB beside the output"
