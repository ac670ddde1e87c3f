"""Tune every shape that the patterns come with on this GPU, within a time budget; resumes.

    python -m benchmarks.tune_gpu FOLDER --minutes 6

writes to FOLDER
    <gpu>.raw.jsonl  every candidate with its single calls; a later run goes on where this one was
    <gpu>.jsonl      the choices, to be shipped as sparsegen/tuning/db/<gpu>.jsonl
    quarantine/      candidates that failed, each with what repeats the failure

Candidates are built on all cores ahead of the GPU, checked against float64 before anything is
timed, and timed by the GPU's clock in rounds beside the default, the L2 cache overwritten before
each call. A choice may serve other GPUs of the architecture, and says so.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from sparsegen import patterns
from sparsegen.api import arch_of
from sparsegen.tuning import records
from sparsegen.tuning.machine import machine_of
from sparsegen.tuning.result import TaskResult
from sparsegen.tuning.sweep import CANDIDATES, Entry, database, entries, sweep

FIRST = ("dsa", "nsa", "mla_prefill", "mla_decode", "causal", "sliding_window", "moba", "msa")


def main(argv: list[str] | None = None) -> int:
    """Tune, and print what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--patterns", default=",".join(FIRST), help="in order; 'all' for every one")
    parser.add_argument("--distributions", default="clustered,uniform,local", help="in order")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--candidates", type=int, default=CANDIDATES, help="of each kernel")
    args = parser.parse_args(argv)
    rest = [name for name in patterns.names() if name not in FIRST]
    names = [*FIRST, *rest] if args.patterns == "all" else args.patterns.split(",")

    start = time.monotonic()
    machine = machine_of(arch_of("cuda"))
    stem = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")
    args.folder.mkdir(parents=True, exist_ok=True)
    raw, into = args.folder / f"{stem}.raw.jsonl", args.folder / f"{stem}.jsonl"
    found = entries(names, args.dtype, args.distributions.split(","))
    print(f"{machine.device}: {len(found)} entries, {machine.builders} builders", flush=True)

    def tell(entry: Entry, results: tuple[TaskResult, ...] | str) -> None:
        lines = [results] if isinstance(results, str) else list(map(str, results))
        print(f"[{time.monotonic() - start:5.0f} s] {entry}", *lines, sep="\n  ", flush=True)
        write(raw, into)

    reached = sweep(
        found, machine, raw, 60 * args.minutes - (time.monotonic() - start), tell,
        limit=args.candidates, serves=machine.arch.name,
    )  # fmt: skip
    print(f"{reached} of {len(found)} entries in {time.monotonic() - start:.0f} s")
    print(f"{write(raw, into)} choices in {into}")
    return 0


def write(raw: Path, into: Path) -> int:
    """Write the choices of a file of records, and return how many there are."""
    chosen = database(records.read(raw))
    part = into.with_suffix(".part")
    part.write_text("".join(r.to_json() + "\n" for r in chosen))
    part.replace(into)
    return len(chosen)


if __name__ == "__main__":
    sys.exit(main())
