"""Keep what was measured: append-only JSON lines that survive a kill and can be merged.

One line per candidate, measured or rejected, with its raw samples, and one line per finished
search with the choice that was made. A line carries everything it is keyed by, so files can be
concatenated. Keys hold hashes, never paths or host names.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from sparsegen.errors import TuningError
from sparsegen.ir import serial
from sparsegen.lowering.tasks import Task
from sparsegen.tuning.space import Candidate, Measured, Outcome, Rejected

SCHEMA = 1
_MORE = ("burst", "anchor_burst", "calls", "anchor_calls")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Say how much work a call is: sequences, and query and key rows of each."""

    batch: int
    query: int
    key: int

    def distance(self, other: Sizes) -> float:
        """Return how many doublings lie between two sizes, summed over the three extents."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return sum(abs(math.log2(a) - math.log2(b)) for a, b in pairs)

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Return the exponents of the nearest powers of two."""
        return (
            round(math.log2(self.batch)),
            round(math.log2(self.query)),
            round(math.log2(self.key)),
        )


@dataclass(frozen=True, kw_only=True)
class Key:
    """Say what a measurement is true of.

    task          `task_hash`: the mathematics and the binding as far as this kernel sees them
    distribution  of the indices the kernel gathers: uniform, local, clustered, trace:<hash>
    arch          name of the architecture, and `threads` it used (a GPU's: multiprocessors)
    device        name of the GPU; empty for a CPU
    toolchain     version of TVM, a hash of the sources that generate the kernel, version of nvcc
    """

    task: str
    sizes: Sizes
    distribution: str
    arch: str
    threads: int
    toolchain: str
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Say for people where a key comes from; nothing is looked up by it."""

    program: str
    program_hash: str
    binding: Mapping[str, Any]
    task: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line: the outcome of a candidate, or the choice that ended a search.

    what    "candidate" or "choice"; the outcome of a choice is the final, interleaved comparison
    serves  name of the architecture whose other GPUs may use the choice where they have none of
            their own; empty: it is for the GPU it was measured on
    """

    what: str
    key: Key
    origin: Origin
    candidate: Candidate
    outcome: Outcome
    time: str = ""
    serves: str = ""

    def to_json(self) -> str:
        """Return the line, without its end."""
        data: dict[str, Any] = {"schema": SCHEMA, "what": self.what, "time": self.time}
        data |= {"key": asdict(self.key), "origin": asdict(self.origin)}
        if self.serves:
            data["serves"] = self.serves
        data |= {"schedule": self.candidate.schedule, "knobs": dict(self.candidate.knobs)}
        match self.outcome:
            case Rejected(stage, why):
                data |= {"rejected": {"stage": stage, "why": why}}
            case Measured(samples=samples, anchor=anchor):
                micros = round(self.outcome.micros, 3)
                data |= {"micros": micros, "samples": _round(samples), "anchor": _round(anchor)}
                for name in _MORE:
                    if found := getattr(self.outcome, name):
                        data[name] = _round(found)
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Read what `to_json` wrote."""
        key = dict(data["key"])
        outcome: Outcome
        if "rejected" in data:
            outcome = Rejected(**data["rejected"])
        else:
            outcome = Measured(
                tuple(data["samples"]),
                tuple(data["anchor"]),
                **{name: _tuple(data[name]) for name in _MORE if name in data},
            )
        return cls(
            what=data["what"],
            key=Key(**(key | {"sizes": Sizes(**key["sizes"])})),
            origin=Origin(**data["origin"]),
            candidate=Candidate.of(data["schedule"], data["knobs"]),
            outcome=outcome,
            time=data["time"],
            serves=data.get("serves", ""),
        )


def _round(samples: tuple[Any, ...]) -> list[Any]:
    return [_round(x) if isinstance(x, tuple) else round(x, 3) for x in samples]


def _tuple(samples: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuple(x) if isinstance(x, list) else x for x in samples)


def task_hash(task: Task) -> str:
    """Return a hash of what a task computes and how its memory looks; its name does not count."""
    table = serial.encode(replace(task, name=""), sites=False)
    text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path) -> list[Record]:
    """Return the records of a file; a last line cut short by a kill is left out.

    Raises:
        TuningError: a line before the last is not JSON, or was written by another schema.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest and _parse(rest) is not None:
        lines.append(rest)
    return [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _record(path: Path, number: int, line: bytes) -> Record:
    data = _parse(line)
    if not isinstance(data, dict):
        raise TuningError(
            f"{path}:{number}: not a record", hint="restore the file, or delete that line"
        )
    if data.get("schema") != SCHEMA:
        raise TuningError(
            f"{path}:{number}: record schema {data.get('schema')!r}, this sparsegen reads {SCHEMA}",
            hint="tune into another file, or use the sparsegen that wrote this one",
        )
    try:
        return Record.from_json(data)
    except (KeyError, TypeError) as error:
        raise TuningError(
            f"{path}:{number}: a field is missing or unknown: {error}",
            hint="restore the file, or delete that line",
        ) from error


class Writer:
    """Append records to a file, each on the disk before the next candidate runs.

    Several processes may append to one file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock()
        try:
            _cut_broken_tail(self._fd)
        finally:
            self._unlock()

    def write(self, record: Record) -> None:
        """Append one record and wait until the disk has it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = replace(record, time=record.time or now).to_json() + "\n"
        self._lock()
        try:
            os.write(self._fd, line.encode())
            os.fsync(self._fd)
        finally:
            self._unlock()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def _unlock(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


def _cut_broken_tail(fd: int) -> None:
    """Make the file end with a whole line, so that the next record starts one."""
    size = os.fstat(fd).st_size
    tail = os.pread(fd, min(size, 1 << 20), max(0, size - (1 << 20)))
    rest = tail.rpartition(b"\n")[2]
    if not rest:
        return
    if _parse(rest) is not None:
        os.write(fd, b"\n")
    else:
        os.ftruncate(fd, size - len(rest))


def merge(files: Iterable[Path]) -> Iterator[Record]:
    """Yield the records of several files, each line once, oldest first."""
    seen: dict[str, Record] = {}
    for path in files:
        for record in read(path):
            seen.setdefault(record.to_json(), record)
    yield from sorted(seen.values(), key=lambda r: r.time)


def choices(records: Iterable[Record]) -> dict[tuple[object, ...], Record]:
    """Return the last choice of each task, size, distribution and processor."""
    return {
        (k.task, k.sizes, k.distribution, k.arch, k.threads, k.device): r
        for r in records
        if r.what == "choice" and (k := r.key)
    }


def seen(records: Iterable[Record], key: Key) -> dict[Candidate, Outcome]:
    """Return the outcome of every candidate recorded under exactly this key, the last one wins."""
    return {r.candidate: r.outcome for r in records if r.what == "candidate" and r.key == key}
