"""Describe units of work: each task becomes one kernel, and says all that a schedule may know.

Sequences. Every layout reaches a kernel as `batch` sequences described by three int32 arrays:
`cu_q[batch + 1]`, `cu_k[batch + 1]` (first query and key row of each sequence) and `q_off[batch]`
(absolute position of its first query row, in key coordinates). Dense and single-sequence layouts
are ragged ones whose arrays the runtime makes. In the paged layout, inputs on the key axis are
[pages, page, ...] and `page_table[batch, max_pages]` (int32) maps logical pages; `cu_k` still holds
cumulated lengths, so intermediates stay packed.

Symbols a kernel sees for sequence b: n_q = cu_q[b+1] - cu_q[b], n_k = cu_k[b+1] - cu_k[b], absolute
query position i = q_off[b] + t for local row t, Stop("query") = q_off[b] + n_q, Stop("key") = n_k
for a token axis, or the number of entries for a compressed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsegen.analysis.domain import Clause as Clause
from sparsegen.analysis.domain import Interval as Interval
from sparsegen.analysis.domain import KeyList as KeyList
from sparsegen.errors import Site
from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import Expr

Space = Literal["query", "key", "entry", "query_block", "batch", "none"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How the first axis of a buffer is addressed, for sequence b:

    query        row = cu_q[b] + t                       t local query row, i = q_off[b] + t
    key          row = cu_k[b] + j, or, if `paged`, row = page_table[b, j // page] * page + j % page
                 (the buffer is [pages, page, ...]; treat it as [pages * page, ...])
    entry        row = cu[b] // stride + b + e           cu = cu_k (role "key") or cu_q ("query")
    query_block  row = cu_q[b] // block + 2 * b + (i // block - q_off[b] // block)
    batch        row = b                                 (selections whose keys do not mention i)
    none         a weight: no sequence axis
    """

    space: Space
    paged: bool = False
    page: int = 0
    entries: Entries | None = None
    role: Literal["query", "key"] = "key"
    block: int = 1


NO_ROWS = Rows(space="none")


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A tensor in memory: C-contiguous, `rows` addressing its first axis, then `shape`.

    For `rows.space` "none", `shape` is the whole shape. `dtype` is one of float32, bfloat16,
    float16, int32. A `shape` entry of -1 is symbolic, known only at call time (the width of an
    unbounded selection list).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: Rows = NO_ROWS


@dataclass(frozen=True, kw_only=True)
class Part:
    """Elements [start, start + size) of a buffer's last axis, `fn` (over Symbol("x")) applied."""

    buffer: Buffer
    start: int
    size: int
    fn: Expr | None = None


@dataclass(frozen=True, kw_only=True)
class Operand:
    """Parts side by side along the last axis; a part whose buffer has one head serves all heads."""

    parts: tuple[Part, ...]
    heads: int
    rows: Rows

    @property
    def dim(self) -> int:
        """Return the length of the last axis."""
        return sum(p.size for p in self.parts)


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Where a selection is stored: indices [rows, *groups, width] and the keys that address it.

    `keys` are the key expressions of the selection (without the last): a Head-based key addresses
    a group axis of extent `groups[n]`, a query-based key is the row (see Rows), so at most one key
    is query-based. `last` names the selected axis.
    """

    buffer: Buffer
    keys: tuple[Expr, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class KeySource:
    """Keys and values that take part in one softmax."""

    k: Operand
    v: Operand
    where: Expr
    clauses: tuple[Clause, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every task knows: its name (unique in the plan), the binding and the user's line."""

    name: str
    family: str
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    tables: tuple[tuple[str, Buffer], ...] = ()  # Table.tensor.name -> buffer, for expressions
    lists: tuple[tuple[Expr, Lists], ...] = ()  # Member -> storage of its selection
    paged: bool = False
    site: Site | None = None


@dataclass(frozen=True, kw_only=True)
class AttendTask(Task):
    """Attend(q, sources): writes `o` [rows, heads, d_v] and, if wanted, `lse` [rows, heads]."""

    q: Operand
    sources: tuple[KeySource, ...]
    scale: float
    mod: Expr | None
    sink: Buffer | None
    o: Buffer
    lse: Buffer | None

    @property
    def group(self) -> int:
        """Return the number of query heads that share a key head."""
        return self.q.heads // self.sources[0].k.heads


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One reduction of a select task: `how` over equal `keys`, then an optional softmax."""

    how: Literal["sum", "max", "mean", "lse"]
    keys: tuple[Expr, ...]
    norm: bool


@dataclass(frozen=True, kw_only=True)
class SelectTask(Task):
    """Score, reduce by key, select: writes `out` int32 [rows, *groups, width].

    `stages` may be empty: then the score's own keys (h, i, j) are selected over. `last` is the
    number of keys of the selected axis, over Stop and Size. `width` -1 means that capacity.
    """

    q: Operand
    k: Operand
    scale: float
    mod: Expr | None
    act: Expr | None
    weights: Buffer | None
    where: Expr
    clauses: tuple[Clause, ...]
    norm: bool
    stages: tuple[Stage, ...]
    keys: tuple[Expr, ...]
    groups: tuple[int, ...]
    last: Expr
    topk: Expr | None
    top_p: float | None
    threshold: float | None
    force: Expr | None
    out: Buffer

    @property
    def group(self) -> int:
        """Return the number of query heads that share a key head."""
        return self.q.heads // self.k.heads


@dataclass(frozen=True, kw_only=True)
class CompressTask(Task):
    """Compress(x): writes `out` [entries, heads, dim]; the fields are those of the verb."""

    x: Operand
    how: str
    entries: Entries
    role: Literal["query", "key"]
    weight: Buffer | None
    gate: Operand | None
    bias: Buffer | None
    previous: tuple[Operand, Operand] | None
    out: Buffer

    @property
    def multiplies(self) -> bool:
        """Tell whether windows are multiplied by a matrix, which is not pooling by channel."""
        return self.weight is not None and len(self.weight.shape) == 3


@dataclass(frozen=True, kw_only=True)
class ProjectTask(Task):
    """Project(x, w): writes `out` [rows, heads, dim]; `transposed` as in the verb."""

    x: Operand
    w: Buffer
    transposed: bool
    out: Buffer


@dataclass(frozen=True, kw_only=True)
class MergeTask(Task):
    """Merge(parts): `lses` empty and `gates` set for a gated sum; otherwise by lse."""

    parts: tuple[Buffer, ...]
    lses: tuple[Buffer, ...]
    gates: Buffer | None
    o: Buffer
    lse: Buffer | None
