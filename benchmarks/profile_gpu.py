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
# What a report calls it, the metric as Hopper and Ampere have it, and what to multiply it by.
METRICS = (
    ("us", "gpu__time_duration.sum", 1e-3),
    ("tensor cores, %", "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", 1.0),
    ("issue slots, %", "sm__issue_active.avg.pct_of_peak_sustained_elapsed", 1.0),
    (
        "shared memory, %",
        "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed",
        1.0,
    ),
    ("bank conflicts", "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", 1.0),
    ("L1, %", "l1tex__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    ("L2, %", "lts__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    ("L2, GB/s", "lts__t_sectors.sum.per_second", 32e-9),
    ("L2 hits, %", "lts__t_sector_hit_rate.pct", 1.0),
    ("memory, %", "dram__cycles_active.avg.pct_of_peak_sustained_elapsed", 1.0),
    ("memory, GB/s", "dram__bytes.sum.per_second", 1e-9),
    ("blocks", "launch__grid_size", 1.0),
    ("threads of a block", "launch__block_size", 1.0),
    ("registers of a thread", "launch__registers_per_thread", 1.0),
    ("spilled loads", "sass__inst_executed_local_loads", 1.0),
    ("shared bytes of a block", "launch__shared_mem_per_block_dynamic", 1.0),
    ("active warps, %", "sm__warps_active.avg.pct_of_peak_sustained_active", 1.0),
)
STALL = re.compile(r"issue_stalled_(\w+)_per_issue_active\.ratio$")
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
            "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(raw),
            sys.executable, "-m", "benchmarks.gpu", "call", str(args.folder), args.workload,
            "--label", args.label,
        ]  # fmt: skip
        done = subprocess.run(command, check=False)
        lines = raw.read_text().splitlines() if raw.is_file() else []
    if done.returncode or not any(line.startswith('"') for line in lines):
        print("\n".join(lines[-20:]), file=sys.stderr)
        return 1
    kernels = list(read(lines))
    report = {"workload": args.workload, "label": args.label, "kernels": kernels}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for kernel in kernels:
        print(json.dumps(kernel, indent=1))
    return 0


def read(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield what is to be known of each kernel of a table of ncu: names, units, then values."""
    names, _, *rows = csv.reader(line for line in lines if line.startswith('"'))
    for values in rows:
        yield summary(dict(zip(names, values, strict=True)))


def summary(values: Mapping[str, str]) -> dict[str, Any]:
    """Return the metrics of a kernel, and the reasons for which warps waited longest.

    A metric that this GPU does not have is None. A stall counts cycles of a warp per instruction.
    """
    found: dict[str, Any] = {"kernel": values["Kernel Name"]}
    for name, metric, factor in METRICS:
        number = _number(values.get(metric, ""))
        found[name] = None if number is None else round(number * factor, 2)
    stalls = {
        m[1]: _number(text) or 0.0 for name, text in values.items() if (m := STALL.search(name))
    }
    order = sorted(stalls, key=stalls.__getitem__, reverse=True)
    return found | {"stalls": {reason: stalls[reason] for reason in order[:TOP]}}


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


if __name__ == "__main__":
    sys.exit(main())
