"""Measure what the processor does at most: multiply-adds alone, and torch's matrix product."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Twelve chains of vectors hide the latency of a multiply-add on every processor there is.
SOURCE = """
typedef float vec __attribute__((vector_size(64)));
void run(long rounds, int threads, float *out) {
  #pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    vec a[12], x = (vec){} + 0.999f, y = (vec){} + 1e-6f;
    #pragma GCC unroll 12
    for (int n = 0; n < 12; ++n) a[n] = (vec){} + (float)n;
    for (long r = 0; r < rounds; ++r) {
      #pragma GCC unroll 12
      for (int n = 0; n < 12; ++n) a[n] = a[n] * x + y;
    }
    vec sum = a[0];
    #pragma GCC unroll 12
    for (int n = 1; n < 12; ++n) sum += a[n];
    out[t] = sum[0] + sum[15];
  }
}
"""
FLOPS = 12 * 16 * 2  # of a round, in one thread
SIDE = 2048


def ceiling(threads: int, tries: int = 7) -> dict[str, float]:
    """Return the median GFLOP/s in float32 of multiply-adds alone and of torch's matrix product."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(SOURCE)
        flags = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
        subprocess.run(["cc", *flags, source, "-o", library], check=True)
        run = ctypes.CDLL(str(library)).run
        out = (ctypes.c_float * threads)()
        rounds = 20_000_000
        run(ctypes.c_long(rounds // 10), threads, out)
        peak = [
            threads * rounds * FLOPS / seconds(lambda: run(ctypes.c_long(rounds), threads, out))
            for _ in range(tries)
        ]
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    torch.mm(a, b)
    product = [2 * SIDE**3 / seconds(lambda: torch.mm(a, b)) for _ in range(tries)]
    return {
        "fma_gflops": round(statistics.median(peak) / 1e9, 1),
        "torch_matmul_gflops": round(statistics.median(product) / 1e9, 1),
    }


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
