"""Measure what a call costs the host; write results with machine and date.

    python -m benchmarks.overhead [--target cpu|cuda] [--out FILE]

The problem is so small that arithmetic is nothing. `call` is the kernel as users call it,
`operator` through torch's dispatcher, `bare` the compiled function with its output allocated
beforehand. The overhead is call - bare, in microseconds, with one thread: medians and minima over
interleaved batches of calls.

On a GPU the host only launches: a call costs what it takes until it returns. A batch of calls is
short enough for the queue of the GPU, and waited for after its time is taken. `ragged` and `paged`
are calls in these layouts, whose metadata a kernel of its own makes, and `torch.add` is one kernel
of torch with its output allocated beforehand.
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
PAGE = 16
BATCHES, CALLS = 60, 500
SETTLE = 10  # batches that do not count


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = machine(1)
    name = where["arch"]
    if args.target == "cuda":
        where["gpu"] = torch.cuda.get_device_name()
        name = where["gpu"].split()[1].lower()
    ways = on_gpu() if args.target == "cuda" else on_cpu()
    report = {"machine": where, "microseconds": measure(ways)}
    for what, value in report["microseconds"].items():
        print(f"{what:10} {value['median']:6.2f} median {value['minimum']:6.2f} minimum")
    out = args.out or RESULTS / f"overhead-{name}.json"
    out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {out}")


def on_cpu() -> dict[str, Callable[[], Any]]:
    """Return the ways to call a kernel of a CPU."""
    kernel = sg.compile("causal", target="cpu", sizes=SIZES)
    q, k, v = (torch.randn(n, 1, 16) for n in (1, 4, 4))
    return ways_of(kernel, q, k, v)


def on_gpu() -> dict[str, Callable[[], Any]]:
    """Return the ways to call a kernel of a GPU, and one of torch."""

    def compiled(**options: Any) -> Any:
        return sg.compile("causal", target="cuda", dtype="bfloat16", sizes=SIZES, **options)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    q, k, v = (torch.randn(n, 1, 16, dtype=torch.bfloat16, device="cuda") for n in (1, 4, 4))
    pages = [x.new_zeros(2, PAGE, 1, 16) for x in (k, v)]
    ragged, paged = compiled(layout="ragged"), compiled(layout="paged", page_size=PAGE)
    starts = {"cu_seqlens_q": ints(0, 1), "cu_seqlens_k": ints(0, 4)}
    cache = {
        "cu_seqlens_q": ints(0, 1), "seqlens_k": ints(4), "page_table": ints(1).view(1, 1),
    }  # fmt: skip
    total = torch.empty_like(q)
    return {
        **ways_of(compiled(), q, k, v),
        "ragged": lambda: ragged(q, k, v, **starts),
        "paged": lambda: paged(q, *pages, **cache),
        "torch.add": lambda: torch.add(q, q, out=total),
    }


def ways_of(
    kernel: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """Return the ways to call a kernel of one task."""
    out = kernel(q, k, v)
    starts = [torch.tensor(x, dtype=torch.int32, device=q.device) for x in ([0, 1], [0, 4], [3])]
    task = kernel._loaded[kernel.spec.tasks[0].name]
    task(*starts, q, k, v, torch.empty_like(out))
    return {
        "call": lambda: kernel(q, k, v),
        "operator": lambda: kernel.op(q, k, v, None, None),
        "bare": lambda: task(*starts, q, k, v, out),
    }


def measure(ways: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Return the cost of each way to call, and the overhead of the first."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(BATCHES):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                way()
            samples[name].append((time.perf_counter() - start) / CALLS * 1e6)
            wait()
    found = {
        name: {"median": statistics.median(taken[SETTLE:]), "minimum": min(taken)}
        for name, taken in samples.items()
    }
    found["overhead"] = {
        kind: found["call"][kind] - found["bare"][kind] for kind in ("median", "minimum")
    }
    return found


if __name__ == "__main__":
    main()
