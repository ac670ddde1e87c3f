"""Describe what is measured as plain data, which a machine without sparsegen can read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel is compiled for; lengths stay symbolic.

    kind    listed   a list of keys for each query, the same for all heads
            blocks   a list of blocks of keys for each query and key head
            entries  keys that each stand for `width` tokens every `stride`, seen once complete
            window   the last `window` keys
            causal   all keys up to the query
            packed   those of them that are of the same document
    shared  values are the first elements of the keys
    pooled  of entries: they lie as a compress task leaves them
    page    keys of a page; 0: keys lie in a row
    """

    kind: str
    heads: int
    kv_heads: int
    d_qk: int
    d_v: int
    shared: bool = False
    topk: int = 0
    block: int = 1
    width: int = 0
    stride: int = 0
    pooled: bool = False
    window: int = 0
    page: int = 0
    dtype: str = "bfloat16"

    @property
    def scale(self) -> float:
        """Return the factor of the scores."""
        return float(self.d_qk**-0.5)

    @property
    def group(self) -> int:
        """Return how many query heads share a key head."""
        return self.heads // self.kv_heads

    def entries(self, tokens: int) -> int:
        """Return how many keys stand for a number of tokens."""
        return max(0, (tokens - self.width) // self.stride + 1)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One line of the table: `batch` sequences of `queries` x `keys` for a kernel.

    draw  of lists: causal, padded (causal, a quarter of each list is padding), start (the queries
          are the first ones), random, clustered (neighbours share nine of ten blocks)
    """

    name: str
    kernel: str
    queries: int
    keys: int
    batch: int = 1
    draw: str = ""

    @property
    def group(self) -> str:
        """Return the first word of the name."""
        return self.name.partition(" ")[0]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def chosen(workloads: Iterable[Workload], only: str) -> list[Workload]:
    """Return the workloads that are asked for: by first words or globs, with commas between."""
    words = [word.strip() for word in only.split(",") if word.strip()]
    return [w for w in workloads if not words or any(_named(w.name, word) for word in words)]


def _named(name: str, word: str) -> bool:
    return f"{name} ".startswith(f"{word} ") or fnmatch(name, word)
