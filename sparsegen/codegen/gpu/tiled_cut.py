"""Say how attention over tiles of keys is cut on Hopper, and what memory it takes."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.codegen.cpu.attend import shared_heads
from sparsegen.codegen.gpu.attend_cut import dtype_of
from sparsegen.codegen.gpu.convert import converted
from sparsegen.codegen.gpu.membership import map_buffers
from sparsegen.codegen.gpu.pipeline import GROUP
from sparsegen.codegen.gpu.spans import span_buffers
from sparsegen.codegen.gpu.tma import COLUMNS
from sparsegen.codegen.tvm import Value, const
from sparsegen.ir.expr import Const, Expr, Stop, apply, walk
from sparsegen.lowering.tasks import AttendTask, Buffer, Clause, KeyList, KeySource, Rows

ROWS = 64  # of a warp group
# What the feed tells about an item, int32 each: whether there is one, how many chunks it has, its
# first head and token, its number among what can be repaired, the warp groups with an index listed
# twice, and its sequence.
FACTS = (
    "there", "chunks", "head", "first", "entry", "twice",
    "number", "q_start", "k_start", "n_q", "n_k", "q_off",
)  # fmt: skip
ENDS = 4  # words of a hull; those of the warp groups follow the facts
# What a warp group does with a chunk, in two bits each; the number of the clause lies above.
SKIP, MASKED, SURE = 0, 1, 2
SHORT = 1 << 8  # all keys that are seen are among the first of the chunk
CLAUSE_BIT = 16


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut.

    heads, tokens  rows of a warp group: `tokens` by `heads`, at most 64
    groups         warp groups that compute
    keys           keys of a chunk
    block          keys of a chunk that are of one listed block: all, or it has several blocks
    box            keys that the copy engine loads at once: of one block, and of one page
    stages         chunks in shared memory
    queries        items whose queries are in shared memory
    resident       panels of 64 columns of the queries that stay in registers; they arrive as a
                   chunk of their own, the first of an item
    ahead          scores of the next chunk are computed beside the values of this one
    patience       a maximum that grows by less, in powers of two, leaves the sums as they are
    joint          keys and values of a chunk arrive, and are given back, at once
    tail           keys of the last chunk of a range, where no more are left; 0: as of others
    compute, copy  registers of a thread that computes, and of one that feeds
    blocks         persistent blocks
    """

    heads: int
    tokens: int
    groups: int
    keys: int
    block: int
    box: int
    stages: int
    queries: int
    resident: int
    ahead: bool
    patience: int
    joint: bool
    tail: int
    compute: int
    copy: int
    blocks: int

    @property
    def all_tokens(self) -> int:
        """Return the tokens of an item."""
        return self.tokens * self.groups

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return GROUP * (self.groups + 1)

    @property
    def parts(self) -> int:
        """Return the listed blocks of a chunk."""
        return self.keys // self.block

    @property
    def boxes(self) -> int:
        """Return the boxes of a chunk."""
        return self.keys // self.box


def rows_of(task: AttendTask) -> tuple[int, int]:
    """Return the heads and tokens of a warp group: all heads that share keys, and then tokens."""
    heads = shared_heads(task)
    while heads > ROWS:
        heads = max(n for n in range(1, heads) if heads % n == 0)
    return heads, ROWS // heads


def clauses_of(task: AttendTask) -> list[tuple[KeySource, Clause]]:
    """Return the clauses in the order in which they are visited, each with its source."""
    return [(s, c) for s in task.sources for c in s.clauses]


def stage_elements(task: AttendTask, cut: Cut) -> int:
    """Return the elements of a chunk: keys, then values."""
    return cut.keys * (task.q.dim + task.sources[0].v.dim)


def query_elements(task: AttendTask, cut: Cut) -> int:
    """Return the elements of the queries of a warp group that stay in shared memory."""
    return ROWS * (task.q.dim - COLUMNS * cut.resident)


def shared_bytes(task: AttendTask, cut: Cut) -> int:
    """Return the shared memory a block takes, some padding included."""
    return (
        cut.stages * (2 * stage_elements(task, cut) + 128 * cut.parts)
        + cut.queries * cut.groups * 2 * query_elements(task, cut)
        + 2048
    )


def scratch_of(task: AttendTask, cut: Cut) -> tuple[tuple[Buffer, Expr], ...]:
    """Return the memory beside the buffers of the task.

    That is counters, warp groups to repair, united lists, maps, spans, and copies of operands.
    """
    rows = Rows(space="query_block", block=cut.all_tokens)
    groups = task.q.heads // cut.heads
    name = task.name
    found: list[tuple[Buffer, Expr]] = [
        (Buffer(name=f"{name}_state", dtype="int32", shape=(64,)), Const(0)),
        (
            Buffer(name=f"{name}_again", dtype="int32", shape=(groups * cut.groups,), rows=rows),
            Const(0),
        ),
    ]
    if key_list(task) is not None:
        shape = (groups, -1)
        lists = Buffer(name=f"{name}_united", dtype="int32", shape=shape, rows=rows)
        found.append((lists, list_words(task, cut)))
    found += map_buffers(task)
    found += span_buffers(task, cut.tokens, cut.groups)
    dtype = dtype_of(task)
    assert dtype is not None
    copies = converted(task, dtype)[1]
    return (*found, *((buffer, Const(0)) for buffer in copies.values()))


def key_list(task: AttendTask) -> tuple[Clause, KeyList] | None:
    """Return the clause that lists of blocks drive, if there is one."""
    for _, clause in clauses_of(task):
        if clause.keys is not None:
            return clause, clause.keys
    return None


def group_words(cut: Cut) -> int:
    """Return the words with a bit for each token of a warp group; 0 if groups share one word."""
    return 0 if cut.all_tokens <= 32 else -(-cut.tokens // 32)


def member_words(cut: Cut) -> int:
    """Return the words that say which tokens of an item see a block: a bit each."""
    return cut.groups * group_words(cut) or 1


def member_bit(cut: Cut, group: Value, token: Value) -> tuple[Value, Value]:
    """Return the word and the bit of a token of a warp group."""
    if not group_words(cut):
        return const(0, "int32"), group * cut.tokens + token
    return group * group_words(cut) + token // 32, token % 32


def entry_words(cut: Cut) -> int:
    """Return the words of a block in a united list: its number, then who sees it."""
    return -(-(1 + member_words(cut)) // 2) * 2


def list_words(task: AttendTask, cut: Cut) -> Expr:
    """Return the words of the united list of an item: a first entry that counts, then blocks."""
    found = key_list(task)
    assert found is not None
    clause, keys = found
    stop = next(e for end in clause.hull.hi for e in walk(end) if isinstance(e, Stop))
    longest = apply("floordiv", apply("add", stop, Const(keys.granule - 1)), Const(keys.granule))
    width = dict(task.lists)[keys.member].buffer.shape[-1]
    if width != -1:
        longest = apply("min", longest, Const(cut.all_tokens * width))
    return apply("mul", apply("add", longest, Const(1)), Const(entry_words(cut)))
