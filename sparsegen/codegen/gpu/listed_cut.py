"""Say what attention over lists of keys has in a chunk and in a tile: columns, and heads."""

from __future__ import annotations

from dataclasses import dataclass

from sparsegen.codegen.cpu.attend import shared_heads
from sparsegen.codegen.gpu.tiles import inside
from sparsegen.codegen.tvm import T, Value, const
from sparsegen.lowering.tasks import AttendTask


@dataclass(frozen=True)
class Cut:
    """How a kernel is cut.

    blocks          persistent blocks
    compute, copy   registers of a thread of the computing groups, and of the gathering one
    boxes           64 neighbouring keys are copied as boxes
    cluster         two blocks take tiles of one token, and copy boxes for each other
    """

    blocks: int
    compute: int
    copy: int
    boxes: bool
    cluster: bool


@dataclass(frozen=True)
class Columns:
    """Tiles of 64 columns of a chunk: keys, then values where these are no prefix of the keys.

    keys, values  how many
    first         the number of the first one of the values
    """

    keys: int
    values: int
    first: int

    @staticmethod
    def of(task: AttendTask) -> Columns:
        """Return the columns of a task."""
        keys, values = task.q.dim // 64, task.sources[0].v.dim // 64
        prefix = all(inside(s.v, s.k) == 0 for s in task.sources)
        return Columns(keys, values, 0 if prefix else keys)

    @property
    def apart(self) -> bool:
        """Tell whether values are copied beside the keys."""
        return self.first > 0

    @property
    def all(self) -> int:
        """Return how many tiles are copied."""
        return self.keys + (self.values if self.apart else 0)

    @property
    def split(self) -> tuple[range, range]:
        """Return the tiles of the values that are the left ones, and the right ones."""
        left = -(-self.values // 2)
        return range(left), range(left, self.values)

    def halves(self) -> tuple[list[range], list[range]]:
        """Return neighbouring tiles that are copied together: with the left values, the right."""
        left = len(self.split[0])
        if not self.apart:
            return [range(left)], [range(left, self.keys)]
        keys, values = -(-self.keys // 2), self.first + left
        return (
            [range(keys), range(self.first, values)],
            [range(keys, self.keys), range(values, self.all)],
        )


@dataclass(frozen=True)
class Heads:
    """How tiles of heads divide those of a token.

    all     query heads
    shared  neighbouring ones that read the same keys
    rows    heads of a tile
    group   query heads of a key head
    """

    all: int
    shared: int
    rows: int
    group: int

    @staticmethod
    def of(task: AttendTask, rows: int) -> Heads:
        """Return the division into tiles of `rows` heads."""
        return Heads(task.q.heads, shared_heads(task), rows, task.group)

    @property
    def count(self) -> int:
        """Return the tiles of a token."""
        return self.all // self.shared * -(-self.shared // self.rows)

    def bounds(self, tile: Value) -> tuple[Value, Value]:
        """Return the first head of a tile, and the end of those that read the same keys (int32)."""
        if self.shared == self.all:
            return T.bind(tile % self.count * self.rows), const(self.all, "int32")
        part, each = T.bind(tile % self.count), -(-self.shared // self.rows)
        first = T.bind(part // each * self.shared)
        return T.bind(first + part % each * self.rows), T.bind(first + self.shared)
