"""Run a step of the GPU benchmarks; see the package."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import benchmarks.gpu as package


def main() -> int:
    """Run the step that the command line names; return 1 if something of it failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    steps = parser.add_subparsers(dest="step", required=True)
    build = steps.add_parser("build", help="compile the kernels")
    measure = steps.add_parser("time", help="check and time what was built")
    both = steps.add_parser("run", help="compile, check and time")
    call = steps.add_parser("call", help="call one kernel, for a profiler")
    merge = steps.add_parser("merge", help="join reports of one machine; the last one counts")
    listing = steps.add_parser("list", help="list the workloads")
    for step in (build, measure, call):
        step.add_argument("folder", type=Path)
    for step in (measure, both, merge):
        step.add_argument("out", type=Path)
    merge.add_argument("reports", type=Path, nargs="+")
    for step in (build, measure, both, listing):
        step.add_argument(
            "--only", default="", help="workloads: prefixes or globs, with commas between"
        )
    for step in (build, both):
        step.add_argument(
            "--variant", action="append", default=[], metavar="[KERNELS=]LABEL[:SCHEDULE[:K=V,..]]",
            help="a schedule and knobs to compile; may be repeated; default: what a user gets",
        )  # fmt: skip
        step.add_argument("--target", default="sm_90")
        step.add_argument("--jobs", type=int, default=0, help="kernels at once; 0: as processors")
    for step in (measure, both):
        step.add_argument("--limit", type=float, default=120, help="seconds for a workload")
        step.add_argument("--seconds", type=float, default=0.15, help="of a stretch of calls")
        step.add_argument("--rounds", type=int, default=3)
        step.add_argument("--no-peers", action="store_true")
    call.add_argument("workload")
    call.add_argument("--label", default="default")
    call.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    if args.step == "list":
        from benchmarks.gpu.build import matching

        print("\n".join(f"{w.name:28} {w.kernel}" for w in matching(args.only)))
        return 0
    if args.step == "build":
        return 0 if compile_into(args.folder, args) else 1
    if args.step == "time":
        return 0 if time(args.folder, args) else 1
    if args.step == "call":
        return profiled(args)
    if args.step == "merge":
        from benchmarks.gpu import measure as m

        m.write(m.merge(json.loads(path.read_text()) for path in args.reports), args.out)
        return 0
    with tempfile.TemporaryDirectory(prefix="sparsegen-") as name:
        built = compile_into(Path(name), args)
        return 0 if time(Path(name), args) and built else 1


def compile_into(folder: Path, args: Any) -> bool:
    """Compile what the arguments ask for; return whether all went well."""
    from benchmarks.gpu.build import Variant, build, matching, processors

    variants = [Variant.parse(text) for text in args.variant] or [Variant("default")]
    jobs = args.jobs or processors()
    return build(folder, matching(args.only), variants, target=args.target, jobs=jobs)


def time(folder: Path, args: Any) -> bool:
    """Check and time what the arguments ask for; return whether all went well."""
    from benchmarks.gpu.kernels import Folder
    from benchmarks.gpu.measure import Options, measure
    from benchmarks.gpu.workload import chosen

    known = Folder(folder).workloads
    found = chosen(known, args.only)
    if not found:
        names = ", ".join(w.name for w in known)
        raise SystemExit(f"no workload of {folder} is called {args.only!r}; it has {names}")
    options = Options(args.limit, args.seconds, args.rounds, not args.no_peers)
    return measure(folder, args.out, found, options)


def profiled(args: Any) -> int:
    """Call a kernel between the marks that a profiler waits for."""
    import torch

    from benchmarks.gpu.kernels import Call, Folder
    from benchmarks.gpu.problem import Problem

    folder = Folder(args.folder)
    (workload,) = (w for w in folder.workloads if w.name == args.workload)
    problem = Problem.of(folder.shapes[workload.kernel], workload)
    call = Call(folder.load(workload.kernel, args.label), problem)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(args.repeat):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
