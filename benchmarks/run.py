"""Time sparsegen beside the best torch formulations; write results with machine and date.

    python -m benchmarks.run [--only TEXT] [--rounds 7] [--threads 2] [--out FILE]

Variants are checked against each other before they are timed; rounds are interleaved, so drift
hits all alike; medians are reported. Peak memory is the growth of the resident set over the
inputs, read in a process of its own per variant. A wrong result is never timed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import sparsegen as sg
from benchmarks.ceiling import ceiling
from benchmarks.workloads import WORKLOADS, Workload

OURS = "sparsegen"
RESULTS = Path(__file__).parent / "results"


@sg.pattern
def window(q: "T Hq D", k: "S Hk D", v: "S Hk D", *, W=512):  # type: ignore  # noqa: F722
    """Attend to the last W keys."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) & (i - j < W))


def main() -> None:
    """Run the workloads that match and write their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run workloads whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument(
        "--memory", nargs=2, metavar=("WORKLOAD", "VARIANT"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_bytes(*args.memory))
        return
    before = ceiling(args.threads)
    rows = [measure(w, args.rounds) for w in WORKLOADS if args.only in w.name]
    report = {
        "machine": machine(args.threads),
        "ceiling": {"before": before, "after": ceiling(args.threads)},
        "workloads": rows,
    }
    show(report)
    out = args.out or RESULTS / f"cpu-{report['machine']['arch']}-{args.threads}threads.json"
    if not args.only or args.out:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(report, indent=2) + "\n")
        print(f"wrote {out}")


def variants(workload: Workload) -> dict[str, Callable[[], torch.Tensor]]:
    """Return ours and the peers as functions of nothing, over one set of inputs."""
    inputs = workload.inputs(torch.float32)
    lengths = ("T", "S")
    kernel = sg.compile(
        window if workload.pattern == "window" else workload.pattern,
        target="cpu",
        sizes={k: v for k, v in workload.sizes.items() if k not in lengths},
        **workload.hyper,
    )
    return {OURS: lambda: kernel(**inputs), **workload.peers(inputs)}


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    """Check all variants against each other, then time them in interleaved rounds."""
    functions = variants(workload)
    results = {name: fn() for name, fn in functions.items()}
    samples: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, result in results.items():
        off = (result - results[OURS]).abs().max().item()
        if off <= workload.tolerance:
            samples[name] = []
        else:
            failed[name] = f"differs from {OURS} by {off:.2e}"
    if len(samples) == 1:
        raise SystemExit(f"{workload.name}: no peer agrees: {failed}")
    slow: set[str] = set()
    for _ in range(rounds):
        for name, times in samples.items():
            if name in slow and len(times) >= 2:
                continue  # hopeless peers get two samples, not seven
            start = time.perf_counter()
            functions[name]()
            times.append(time.perf_counter() - start)
        fastest = min(min(t) for t in samples.values())
        slow = {n for n, t in samples.items() if min(t) > 4 * fastest and n != OURS}
    ms = {n: 1e3 * sorted(t)[len(t) // 2] for n, t in samples.items()}
    best = min((n for n in ms if n != OURS), key=ms.__getitem__)
    return {
        "name": workload.name,
        "pattern": workload.pattern,
        "sizes": workload.sizes,
        "hyper": workload.hyper,
        "gflop": workload.flops / 1e9,
        "ms": ms,
        "samples_ms": {n: [round(1e3 * t, 3) for t in ts] for n, ts in samples.items()},
        "best_peer": best,
        "ratio": ms[best] / ms[OURS],
        "gflops": workload.flops / ms[OURS] / 1e6,
        "wrong": failed,
        "peak_mib": {n: measured_memory(workload, n) for n in (OURS, best)},
    }


def measured_memory(workload: Workload, variant: str) -> float:
    """Return the peak memory of a variant beyond its inputs, in MiB."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "--memory", workload.name, variant],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return round(int(done.stdout.split()[-1]) / 2**20, 1)


def peak_bytes(name: str, variant: str) -> int:
    """Return by how many bytes the resident set grows over the second call of a variant.

    The first call runs on a scratch copy of nothing: it loads libraries and compiled code, which
    are no working memory. The kernel resets its high-water mark between the two calls.
    """
    workload = next(w for w in WORKLOADS if w.name == name)
    fn = variants(workload)[variant]
    fn()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = fn()
    return max(0, _status("VmHWM") - before) + 0 * result.numel()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine(threads: int) -> dict[str, Any]:
    """Describe where and when this ran."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    from sparsegen import arch

    return {
        "cpu": model,
        "arch": arch.host().name,
        "threads": threads,
        "torch": torch.__version__,
        "sparsegen": sg.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
    }


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    m = report["machine"]
    table = Table(title=f"{m['cpu']} ({m['arch']}), {m['threads']} threads, {m['date']}")
    for column in ("workload", "ours ms", "GFLOP/s", "best torch", "ms", "ratio", "peak MiB"):
        table.add_column(column)
    for r in report["workloads"]:
        peak = r["peak_mib"]
        table.add_row(
            r["name"], f"{r['ms'][OURS]:.1f}", f"{r['gflops']:.0f}", r["best_peer"],
            f"{r['ms'][r['best_peer']]:.1f}", f"{r['ratio']:.2f}x",
            f"{peak[OURS]} / {peak[r['best_peer']]}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
