"""Lay arrays of single sequences out in memory as kernels read them, and take results back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsegen.lowering.tasks import Buffer, Rows

Array = npt.NDArray[Any]

_NUMPY = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "bfloat16": np.uint16}


@dataclass(frozen=True)
class Sequences:
    """The sequences of one call; see `lowering/tasks.py` for the symbols.

    queries, keys  rows of each sequence
    offsets        absolute position of each first query
    table          [batch, max_pages] physical pages, when keys are paged by `page`
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    offsets: tuple[int, ...]
    page: int = 0
    table: Array | None = None

    @classmethod
    def of(
        cls,
        queries: Sequence[int],
        keys: Sequence[int],
        *,
        page: int = 0,
        align: int = 1,
        rng: np.random.Generator,
    ) -> Sequences:
        """Place the queries at the end of the keys, at a multiple of `align`; shuffle pages."""
        offsets = tuple((k - q) // align * align for q, k in zip(queries, keys, strict=True))
        table = None
        if page:
            counts = [-(-k // page) for k in keys]
            # Two pages belong to nobody; a kernel that reads them reads poison.
            physical = iter(rng.permutation(sum(counts) + 2).astype(np.int32))
            table = np.zeros((len(keys), max(1, *counts)), np.int32)
            for b, count in enumerate(counts):
                table[b, :count] = [next(physical) for _ in range(count)]
        return cls(tuple(queries), tuple(keys), offsets, page, table)

    def __len__(self) -> int:
        return len(self.queries)

    def metadata(self) -> list[Array]:
        """Return the first arguments of every task: cu_q, cu_k, q_off and perhaps page_table."""
        arrays = [self.starts("query"), self.starts("key"), np.array(self.offsets)]
        if self.table is not None:
            arrays.append(self.table)
        return [x.astype(np.int32) for x in arrays]

    def starts(self, role: str) -> Array:
        """Return the first row of each sequence, and the end."""
        lengths = self.queries if role == "query" else self.keys
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def rows(self, rows: Rows, b: int, count: int) -> Array:
        """Return where the `count` rows of sequence `b` lie."""
        first: int | Array = b
        n = np.arange(count)
        match rows.space:
            case "query":
                first = self.starts("query")[b]
            case "key" if rows.paged:
                assert self.table is not None
                first, n = self.table[b, n // self.page].astype(np.int64) * self.page, n % self.page
            case "key":
                first = self.starts("key")[b]
            case "entry":
                assert rows.entries is not None
                first = self.starts(rows.role)[b] // rows.entries.stride + b
            case "query_block":
                first = self.starts("query")[b] // rows.block + 2 * b
        return np.asarray(first + n)

    def capacity(self, rows: Rows) -> int:
        """Return how many rows a buffer has, those that belong to no sequence too."""
        total = {role: int(self.starts(role)[-1]) for role in ("query", "key")}
        match rows.space:
            case "query":
                return total["query"]
            case "key" if rows.paged:
                assert self.table is not None
                return (sum(-(-k // self.page) for k in self.keys) + 2) * self.page
            case "key":
                return total["key"]
            case "entry":
                assert rows.entries is not None
                return total[rows.role] // rows.entries.stride + len(self)
            case "query_block":
                return total["query"] // rows.block + 2 * len(self)
            case _:
                return len(self)


def pack(buffer: Buffer, values: Sequence[Array], sequences: Sequences, width: int) -> Array:
    """Return the memory of a buffer; rows of no sequence hold NaN, or a key that does no harm.

    Args:
        values: one array for each sequence; for a weight, the same array each time.
        width: the last extent where the buffer leaves it open; lists are padded with -1.
    """
    if buffer.rows.space == "none":
        return encode(values[0], buffer.dtype)
    memory = empty(buffer, sequences, width, key=0).copy()
    flat = memory.reshape(-1, *memory.shape[2:]) if buffer.rows.paged else memory
    for b, value in enumerate(values):
        rows = sequences.rows(buffer.rows, b, len(value))
        if buffer.dtype == "int32" and value.ndim > 1 and value.shape[-1] != flat.shape[-1]:
            missing = flat.shape[-1] - value.shape[-1]
            value = np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, missing)], constant_values=-1)
        flat[rows] = encode(value, buffer.dtype)
    return memory


def empty(buffer: Buffer, sequences: Sequences, width: int, *, key: int = -7) -> Array:
    """Return a poisoned buffer, one element seen everywhere: NaN, or the key `key`."""
    poison = encode(np.array(key if buffer.dtype == "int32" else np.nan), buffer.dtype)
    return np.broadcast_to(poison, shape_of(buffer, sequences, width))


def shape_of(buffer: Buffer, sequences: Sequences, width: int) -> tuple[int, ...]:
    """Return the shape of a buffer in memory; `width` is its extent -1."""
    shape = tuple(width if n == -1 else n for n in buffer.shape)
    if buffer.rows.space == "none":
        return shape
    rows, page = sequences.capacity(buffer.rows), sequences.page
    return (rows // page, page, *shape) if buffer.rows.paged else (rows, *shape)


def encode(values: Array, dtype: str) -> Array:
    """Round to a dtype of the kernels; bfloat16 becomes its bits in uint16."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, dtype=_NUMPY[dtype])
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    if not (bits & 0xFFFF).any():  # nothing to round, as in large arrays that are rounded already
        return (bits >> 16).astype(np.uint16)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, quiet, even).astype(np.uint16)


def decode(memory: Array, dtype: str) -> Array:
    """Return what `encode` stored, as float64 or as integers."""
    if dtype == "int32":
        return memory
    if dtype == "bfloat16":
        return (memory.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return memory.astype(np.float64)


def rounded(values: Array, dtype: str) -> Array:
    """Return the values a kernel sees when it reads them in `dtype`."""
    return decode(encode(values, dtype), dtype)
