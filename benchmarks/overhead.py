"""Measure what a call costs beside the kernel itself; write results with machine and date.

    python -m benchmarks.overhead [--out FILE]

The problem is so small that arithmetic is nothing. `call` is the kernel as users call it,
`operator` through torch's dispatcher, `bare` the compiled function with its output allocated
beforehand. The overhead is call - bare, in microseconds, with one thread: medians and minima over
interleaved batches of calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sparsegen as sg
from benchmarks.run import RESULTS, machine

SIZES = {"Hq": 1, "Hk": 1, "D": 16, "E": 16}


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {"machine": machine(1), "microseconds": measure()}
    for name, value in report["microseconds"].items():
        print(f"{name:10} {value['median']:6.2f} median {value['minimum']:6.2f} minimum")
    out = args.out or RESULTS / f"overhead-{report['machine']['arch']}.json"
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {out}")


def measure() -> dict[str, dict[str, float]]:
    """Return the cost of each way to call, and the overhead of the first."""
    kernel = sg.compile("causal", target="cpu", sizes=SIZES)
    q, k, v = (torch.randn(n, 1, 16) for n in (1, 4, 4))
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0, 4], [3])]
    out = torch.empty(1, 1, 16)
    library = kernel._loaded
    task = library[kernel.spec.tasks[0].name]
    ways: dict[str, Callable[[], Any]] = {
        "call": lambda: kernel(q, k, v),
        "operator": lambda: kernel.op(q, k, v, None, None),
        "bare": lambda: task(*starts, q, k, v, out),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(60):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(500):
                way()
            samples[name].append((time.perf_counter() - start) / 500 * 1e6)
    found = {
        name: {"median": statistics.median(taken[10:]), "minimum": min(taken)}
        for name, taken in samples.items()
    }
    found["overhead"] = {
        kind: found["call"][kind] - found["bare"][kind] for kind in ("median", "minimum")
    }
    return found


if __name__ == "__main__":
    main()
