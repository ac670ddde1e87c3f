"""Draw selections the way models do, because what a gather costs depends on where it reads.

uniform    keys spread over everything a row may see
local      half of them the most recent keys, the rest spread
clustered  runs of 32 neighbouring keys, the same for 64 neighbouring rows
trace:F    lists recorded from a model: an .npy file [rows, ..., width], -1 where unused
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsegen.errors import TuningError, did_you_mean

Array = npt.NDArray[Any]

KINDS = ("uniform", "local", "clustered")
_RUN = 32
_SHARED_ROWS = 64


def label(distribution: str) -> str:
    """Return the name of a distribution as records keep it: a trace by a hash of its content.

    Raises:
        TuningError: there is no such distribution or file.
    """
    kind, _, file = distribution.partition(":")
    if kind == "trace":
        path = Path(file)
        if not path.is_file():
            raise TuningError(f"no trace {file!r}", hint="pass trace:FILE.npy")
        return f"trace:{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    if kind not in KINDS:
        raise TuningError(
            f"unknown index distribution {distribution!r}",
            hint=did_you_mean(kind, [*KINDS, "trace:FILE"]),
        )
    return kind


def draw(
    distribution: str,
    low: Array,
    high: Array,
    count: Array,
    groups: tuple[int, ...],
    width: int,
    rng: np.random.Generator,
) -> Array:
    """Return lists int32 [rows, *groups, width]: ascending, without repeats, padded with -1.

    Args:
        low, high: [rows] the keys a row may select lie in [low, high).
        count: [rows] how many it selects; no more than there are.
    """
    kind, _, file = distribution.partition(":")
    if kind == "trace":
        return _traced(Path(file), high, groups, width)
    eligible = np.maximum(high - low, 0)
    count = np.minimum(np.minimum(count, eligible), width)
    many = int(np.prod(groups)) if groups else 1
    lists = np.full((len(low), many, width), -1, np.int32)
    for g in range(many):
        lists[:, g] = _rows(kind, low, eligible, count, width, rng)
    return lists.reshape(len(low), *groups, width)


def _rows(
    kind: str, low: Array, eligible: Array, count: Array, width: int, rng: np.random.Generator
) -> Array:
    slot = np.arange(width)[None]
    low, eligible, count = low[:, None], eligible[:, None], count[:, None]
    if kind == "local":
        recent = count // 2
        far = _spread(slot, count - recent, eligible - recent, rng)
        keys = np.where(slot < count - recent, far, eligible - count + slot)
    elif kind == "clustered":
        # Whole runs are spread over the whole runs there are; what is left over comes last.
        runs, places = count // _RUN, (eligible - count % _RUN) // _RUN
        block = np.arange(len(low)) // _SHARED_ROWS
        offsets = rng.random((block[-1] + 1 if len(low) else 1, width))[block]
        start = _spread(slot // _RUN, runs, places, rng, offsets[:, np.arange(width) // _RUN])
        tail = eligible - count + slot
        keys = np.where(slot < runs * _RUN, start * _RUN + slot % _RUN, tail)
    else:
        keys = _spread(slot, count, eligible, rng)
    return np.where(slot < count, low + keys, -1).astype(np.int32)


def _spread(
    slot: Array,
    count: Array,
    eligible: Array,
    rng: np.random.Generator,
    offsets: Array | None = None,
) -> Array:
    """Draw one key from each of `count` equal strata of the eligible ones: distinct, ascending."""
    if offsets is None:
        offsets = rng.random((len(count), slot.shape[1]))
    first = slot * eligible // np.maximum(count, 1)
    after = (slot + 1) * eligible // np.maximum(count, 1)
    return np.asarray(first + (offsets * (after - first)).astype(np.int64))


def _traced(path: Path, high: Array, groups: tuple[int, ...], width: int) -> Array:
    trace = np.load(path)
    if trace.ndim != 2 + len(groups) or trace.shape[1:-1] not in (groups, (1,) * len(groups)):
        raise TuningError(
            f"the trace {path} has shape {trace.shape}, the lists [rows, "
            f"{', '.join(map(str, (*groups, width)))}]",
            hint="record the indices this pattern selects, as a kernel returns them",
        )
    # Rows of the trace stand for the last rows of the call: both see the most keys there.
    rows = np.arange(len(high)) - len(high) + len(trace)
    lists = np.broadcast_to(trace[rows % len(trace)], (len(high), *groups, trace.shape[-1])).astype(
        np.int64
    )
    lists = np.where(lists < high.reshape(-1, *(1,) * (lists.ndim - 1)), lists, -1)
    ordered = np.sort(np.where(lists < 0, np.iinfo(np.int32).max, lists), axis=-1)[..., :width]
    ordered[ordered == np.iinfo(np.int32).max] = -1
    missing = width - ordered.shape[-1]
    padded = np.pad(ordered, [(0, 0)] * (ordered.ndim - 1) + [(0, missing)], constant_values=-1)
    return padded.astype(np.int32)
