"""Profile one kernel of the GPU benchmarks with Nsight Compute; write what bounds it.

    python -m benchmarks.profile_gpu FOLDER WORKLOAD OUT.json [--label default] [--raw OUT.csv]

FOLDER is what `python -m benchmarks.gpu build` wrote. Needs a GPU, ncu, torch and tvm-ffi. Clocks
are left as they are. Of every kernel that the call launches: time, how busy the tensor cores,
shared memory, L2 and device memory were, registers and occupancy, and why warps waited.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables", "WarpStateStats", "LaunchStats", "Occupancy",
)  # fmt: skip
# Names of metrics differ between GPUs and versions, so they are found by what they contain.
METRICS = {
    "launch": r"launch__(registers_per_thread|grid_size|block_size|shared_mem_per_block_\w+)$",
    "occupancy": r"sm__warps_active\.avg\.pct_of_peak_sustained_active$",
    "tensor": r"pipe_tensor\w*\.(avg|sum)\.pct_of_peak_sustained_(active|elapsed)$",
    "issue": r"(sm__inst_issued|sm__issue_active|smsp__issue_active)\S*pct\S*$",
    "shared": r"(mem_shared|data_bank|l1tex__throughput|l1tex__data_pipe)\S*pct\S*$",
    "l2": r"lts__(throughput|t_sectors|t_bytes|t_sector_hit_rate|lts2xbar\w*)\S*(pct\S*|second)$",
    "memory": r"dram__(throughput|bytes|cycles_active)\S*(pct\S*|second)$",
}
STALL = re.compile(r"issue_stalled_(\w+?)_per_(?:issue_active|warp_active)\.(?:ratio|pct)$")
TOP = 6


def main() -> int:
    """Profile what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("workload")
    parser.add_argument("out", type=Path)
    parser.add_argument("--label", default="default")
    parser.add_argument("--raw", type=Path, help="keep everything that ncu reports here")
    args = parser.parse_args()
    if shutil.which("ncu") is None:
        print("ncu, the command line of Nsight Compute, is not on PATH", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="sparsegen-") as name:
        raw = args.raw or Path(name) / "raw.csv"
        command = [
            "ncu", "--clock-control", "none", "--profile-from-start", "off",
            *(word for section in SECTIONS for word in ("--section", section)),
            "--csv", "--page", "raw", "--log-file", str(raw),
            sys.executable, "-m", "benchmarks.gpu", "call", str(args.folder), args.workload,
            "--label", args.label,
        ]  # fmt: skip
        done = subprocess.run(command, check=False)
        lines = raw.read_text().splitlines() if raw.is_file() else []
    kernels = list(read(lines))
    if done.returncode or not kernels:
        print("\n".join(lines[-20:]), file=sys.stderr)
        return 1
    report = {"workload": args.workload, "label": args.label, "kernels": kernels}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for kernel in kernels:
        print(json.dumps(kernel, indent=1))
    return 0


def read(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield what is to be known of each kernel of a table of ncu."""
    table = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(table) < 3:
        return
    names, units = table[:2]
    for values in table[2:]:
        yield summary(dict(zip(names, values, strict=True)), dict(zip(names, units, strict=True)))


def summary(values: Mapping[str, str], units: Mapping[str, str]) -> dict[str, Any]:
    """Return groups of the metrics of a kernel, and the reasons for which most warps waited."""
    numbers = {name: found for name, x in values.items() if (found := _number(x)) is not None}
    taken = "gpu__time_duration.sum"
    groups: dict[str, Any] = {
        "kernel": values.get("Kernel Name", ""),
        "time": [numbers.get(taken), units.get(taken, "")],
    }
    for group, pattern in METRICS.items():
        groups[group] = {
            name: [x, units.get(name, "")]
            for name, x in numbers.items()
            if re.search(pattern, name)
        }
    stalls = {m[1]: x for name, x in numbers.items() if (m := STALL.search(name))}
    order = sorted(stalls, key=stalls.__getitem__, reverse=True)
    groups["stalls"] = {reason: stalls[reason] for reason in order[:TOP]}
    return groups


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main())
