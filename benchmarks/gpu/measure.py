"""Check and time the workloads of a folder, each where a crash of it harms no other."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.check import PEER as PEER_ERROR
from benchmarks.gpu.check import Reference, WrongError, check, trials
from benchmarks.gpu.clock import Ceilings, Reel, Times
from benchmarks.gpu.kernels import Call, Folder, Kernel
from benchmarks.gpu.peers import AbsentError, peers
from benchmarks.gpu.problem import Problem
from benchmarks.gpu.workload import Workload

DEVICE = "cuda"
PEER = "peer: "
TIMING = "timing: "


@dataclass(frozen=True)
class Options:
    """How to measure.

    limit    seconds for one workload, or for what is left of it after a crash
    seconds  of a stretch of calls
    rounds   stretches of each function
    peers    whether to time other people's kernels
    """

    limit: float = 120.0
    seconds: float = 0.15
    rounds: int = 3
    peers: bool = True


def measure(folder: Path, out: Path, workloads: Iterable[Workload], options: Options) -> bool:
    """Measure workloads and write what is known after each; return whether all went well.

    A process of its own checks and times. If it dies or takes too long, what it was at is noted,
    and another one goes on without that.
    """
    report: dict[str, Any] = {
        "machine": {}, "date": date.today().isoformat(), "seconds": options.seconds,
        "rounds": options.rounds, "workloads": [],
    }  # fmt: skip
    worker: Worker | None = None
    fine = True
    for workload in workloads:
        failed: dict[str, str] = {}
        while True:
            if worker is None:
                worker = Worker(folder, options)
            row, at, reason = worker.measure(workload, failed)
            if row is not None:
                break
            worker.stop()
            worker = None
            if at is None or at in failed or at.startswith(TIMING):
                row = {**workload.to_json(), "error": f"{reason} at {at or 'the start'}"}
                break
            failed[at] = reason
        if worker is not None:
            report["machine"] = worker.machine
        report["workloads"].append(row)
        fine = fine and "error" not in row and all(
            "error" not in held for held in row["kernels"].values()
        )  # fmt: skip
        write(report, out)
        for line in lines(row):
            print(line, flush=True)
    if worker is not None:
        worker.stop()
    return fine


def write(report: dict[str, Any], out: Path) -> None:
    """Write a report so that a reader finds the old one or the new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f"{out.name}.new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(out)


class Worker:
    """A process that measures one workload after another."""

    def __init__(self, folder: Path, options: Options) -> None:
        # This process has never touched the GPU, so a fork of it may, and imports nothing again.
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.limit = options.limit
        self.process = context.Process(target=_serve, args=(other, folder, options), daemon=True)
        self.process.start()
        other.close()
        self.machine: dict[str, Any] = {}

    def measure(
        self, workload: Workload, failed: dict[str, str]
    ) -> tuple[dict[str, Any] | None, str | None, str]:
        """Return the row of a workload; or None, what was being done, and what went wrong."""
        at: str | None = None
        end = time.monotonic() + self.limit
        try:
            self.pipe.send((workload, failed))
            while self.pipe.poll(max(0.0, end - time.monotonic())):
                kind, value = self.pipe.recv()
                if kind == "row":
                    return value, None, ""
                if kind == "machine":
                    self.machine = value
                elif kind == "error":
                    return None, at, str(value)
                else:
                    at = value
        except (EOFError, OSError):
            self.process.join(10)
            return None, at, f"the process died with code {self.process.exitcode}"
        return None, at, f"{self.limit:.0f} s were not enough"

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(30)


def _serve(pipe: Connection, path: Path, options: Options) -> None:
    """Measure what is asked for until the pipe closes, or until the GPU has failed."""
    bench: Bench | None = None
    while True:
        try:
            workload, failed = pipe.recv()
        except EOFError:
            return
        try:
            if bench is None:
                bench = Bench(Folder(path), options, lambda what: pipe.send(("at", what)))
                pipe.send(("machine", machine()))
            row = bench.row(workload, failed)
            settle()
            torch.cuda.empty_cache()
            pipe.send(("row", row))
        except Exception as error:
            traceback.print_exc()
            pipe.send(("error", f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"))
            return


def settle() -> None:
    """Wait for the GPU; an error of a kernel that ran shows here."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Describe the GPU and its software."""
    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        said = []
    return {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count,
        "driver": said[0] if said else "unknown", "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def merge(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Join reports of one machine; of a workload that is in several, the last one counts.

    Raises:
        ValueError: they are of different machines.
    """
    first, *rest = reports
    rows = {row["name"]: row for row in first["workloads"]}
    for report in rest:
        if report["machine"] != first["machine"]:
            raise ValueError(f"{report['machine']} is not {first['machine']}")
        rows |= {row["name"]: row for row in report["workloads"]}
    least = min(report["rounds"] for report in (first, *rest))
    return {**(rest or [first])[-1], "rounds": least, "workloads": list(rows.values())}


@dataclass
class Bench:
    """Measures workloads in this process.

    told  is called with what is done next
    """

    folder: Folder
    options: Options
    told: Callable[[str], None]
    tried: dict[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reel = Reel(self.options.seconds, self.options.rounds)

    def row(self, workload: Workload, failed: dict[str, str]) -> dict[str, Any]:
        """Return what there is to say about a workload.

        Args:
            workload: what to measure.
            failed: what must not be done again, and why.
        """
        variants = self.folder.variants(workload.kernel)
        self.told("the inputs")
        problem = Problem.of(self.folder.shapes[workload.kernel], workload, DEVICE)
        reference = Reference(problem)
        flops, moved = problem.flops, problem.bytes
        kernels: dict[str, dict[str, Any]] = {}
        functions: dict[str, Callable[[], object]] = {}
        for label, entry in variants.items():
            kernels[label] = {k: entry[k] for k in ("schedule", "knobs", "commit") if k in entry}
            try:
                self._refuse(label, failed)
                call = self._checked(workload, label, problem, reference, kernels[label])
                functions[label] = call
            except (WrongError, RuntimeError, TypeError, ValueError) as error:
                self._note(kernels[label], error)
        others: dict[str, dict[str, Any]] = {}
        if self.options.peers:
            for name, function in self._peers(problem, reference, failed, others):
                functions[PEER + name] = function
        times, ceilings = self.reel.race(functions, lambda label: self.told(TIMING + label))
        for label, taken in times.items():
            name = label.removeprefix(PEER)
            held = others[name] if label.startswith(PEER) else kernels[label]
            held |= rates(taken, flops, moved, ceilings)
        return {
            **workload.to_json(), "shape": asdict(problem.shape), "flops": flops, "bytes": moved,
            "kernels": kernels, "peers": others, "ceiling": asdict(ceilings),
        }  # fmt: skip

    def _refuse(self, what: str, failed: dict[str, str]) -> None:
        if what in failed:
            raise RuntimeError(failed[what])
        self.told(what)

    def _checked(
        self, workload: Workload, label: str, problem: Problem, reference: Reference,
        held: dict[str, Any],
    ) -> Call:  # fmt: skip
        """Return the call of a kernel that is right on small problems and on this one."""
        kernel = self.folder.load(workload.kernel, label)
        key = (workload.kernel, label)
        if key not in self.tried:
            try:
                self._try(kernel)
                self.tried[key] = ""
            except WrongError as error:
                self.tried[key] = str(error)
        if self.tried[key]:
            raise WrongError(self.tried[key])
        call = Call(kernel, problem)
        held["error_of_row"] = check(kernel, call, reference)
        return call

    def _try(self, kernel: Kernel) -> None:
        for trial in trials(kernel.shape, DEVICE):
            try:
                check(kernel, Call(kernel, trial), Reference(trial, range(trial.rows)))
            except WrongError as error:
                raise WrongError(f"sequences {trial.lengths}: {error}") from None

    def _peers(
        self, problem: Problem, reference: Reference, failed: dict[str, str],
        others: dict[str, dict[str, Any]],
    ) -> Iterable[tuple[str, Callable[[], object]]]:  # fmt: skip
        for name, prepare in peers(problem):
            held: dict[str, Any] = {}
            try:
                self._refuse(PEER + name, failed)
                function, outputs = prepare()
                held["error_of_row"] = reference.distance(outputs(function()), PEER_ERROR)
            except AbsentError:
                continue
            except Exception as error:
                self._note(held, error)
            others[name] = held
            if "error" not in held:
                yield name, function

    def _note(self, held: dict[str, Any], error: Exception) -> None:
        """Note what is wrong, if the GPU still works."""
        settle()
        said = (str(error).splitlines() or [""])[0][:300]
        wrong = isinstance(error, WrongError)
        held["error"] = f"WRONG: {said}" if wrong else f"{type(error).__name__}: {said}"


def rates(taken: Times, flops: float, moved: float, ceilings: Ceilings) -> dict[str, Any]:
    """Return times, rates and the share of the ceiling that binds."""
    tflops, gbs = flops / taken.ms / 1e9, moved / taken.ms / 1e6
    shares = {"product": tflops / ceilings.tflops, "copy": gbs / ceilings.gbs}
    bound = max(shares, key=shares.__getitem__)
    return {
        **asdict(taken), "tflops": tflops, "gbs": gbs, "bound": bound, "share": shares[bound],
    }  # fmt: skip


def lines(row: dict[str, Any]) -> Iterable[str]:
    """Yield a row of results as text."""
    if "error" in row:
        yield f"{row['name']:28} {row['error']}"
        return
    timed = [held["ms"] for held in row["kernels"].values() if "ms" in held]
    for kind in ("kernels", "peers"):
        for label, held in row[kind].items():
            if "ms" not in held:
                yield f"{row['name']:28} {label:24} {held.get('error', 'not timed')}"
                continue
            rate = (
                f"{held['tflops']:6.0f} TFLOP/s" if held["bound"] == "product"
                else f"{held['gbs']:6.0f} GB/s   "
            )  # fmt: skip
            ratio = f"  {held['ms'] / min(timed):.2f}x" if timed else ""
            yield (
                f"{row['name']:28} {label:24} {held['ms']:8.3f} ms "
                f"({held['p10']:.3f}-{held['p90']:.3f}) {rate} {held['share']:4.0%} of the "
                f"{held['bound']}, error {held['error_of_row']:.1e}{ratio}"
            )
    held = row["ceiling"]
    yield f"{row['name']:28} ceilings: {held['tflops']:.0f} TFLOP/s, {held['gbs']:.0f} GB/s"
