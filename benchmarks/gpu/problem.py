"""Make the tensors of a kernel's call, and say which keys every query sees."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.gpu.draws import block_lists, documents, token_lists
from benchmarks.gpu.workload import Shape, Workload


class Problem:
    """Sequences of (queries, keys) for a shape, with random tensors.

    Keys count tokens, of compressed keys that lie as a compress task leaves them too. Position
    `offsets[b]` is that of the first query of sequence b; by default queries are the last ones.
    """

    def __init__(
        self,
        shape: Shape,
        lengths: Sequence[tuple[int, int]],
        *,
        offsets: Sequence[int] | None = None,
        draw: str = "",
        device: str = "cuda",
        seed: int = 0,
    ) -> None:
        self.shape, self.lengths, self.device = shape, list(lengths), device
        self.offsets = list(offsets) if offsets is not None else [s - t for t, s in lengths]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.rows = sum(t for t, _ in lengths)
        kind = getattr(torch, shape.dtype)
        self.q = self._random(self.rows, shape.heads, shape.d_qk).to(kind)
        self.ends = [list(accumulate(n, initial=0)) for n in zip(*lengths, strict=True)]
        self.cu_q, self.cu_k = (
            torch.tensor(n, dtype=torch.int32, device=device) for n in self.ends
        )
        self.table: Tensor | None = None
        self.places = self._place()
        rows = self.capacity
        self.k = self._random(rows, shape.kv_heads, shape.d_qk).to(kind)
        self.v = (
            self.k[..., : shape.d_v]
            if shape.shared
            else self._random(rows, shape.kv_heads, shape.d_v).to(kind)
        )
        self.list = self._lists(draw)
        self.doc: Tensor | None = None
        if shape.kind == "packed":
            each = [documents(s, self.generator) for _, s in self.lengths]
            self.doc = torch.cat(each)

    @staticmethod
    def of(shape: Shape, workload: Workload, device: str = "cuda") -> Problem:
        """Return the problem of a workload."""
        lengths = [(workload.queries, workload.keys)] * workload.batch
        given = shape.kind == "entries" and not shape.pooled
        offsets = [0] * workload.batch if workload.draw == "start" or given else None
        return Problem(shape, lengths, offsets=offsets, draw=workload.draw, device=device)

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device)

    def _place(self) -> list[Tensor]:
        """Return the rows of the keys of each sequence, and note how many rows there are."""
        shape, device = self.shape, self.device
        ends = self.ends[1]
        if shape.page:
            pages = [-(-s // shape.page) for _, s in self.lengths]
            self.capacity = (sum(pages) + 1) * shape.page
            order = torch.randperm(sum(pages) + 1, generator=self.generator, device=device)
            self.table = torch.zeros(len(pages), max(1, *pages), dtype=torch.int32, device=device)
            places, at = [], 0
            for b, (count, (_, s)) in enumerate(zip(pages, self.lengths, strict=True)):
                self.table[b, :count] = order[at : at + count].int()
                rows = order[at : at + count, None] * shape.page
                rows = rows + torch.arange(shape.page, device=device)
                places.append(rows.flatten()[:s])
                at += count
            return places
        if shape.kind == "entries" and shape.pooled:
            self.capacity = ends[-1] // shape.stride + len(self.lengths)
            counts = [shape.entries(s) for _, s in self.lengths]
            starts = [e // shape.stride + b for b, e in enumerate(ends[:-1])]
        else:
            self.capacity = max(ends[-1], 1)
            counts, starts = [s for _, s in self.lengths], ends[:-1]
        return [
            torch.arange(first, first + n, device=device)
            for first, n in zip(starts, counts, strict=True)
        ]

    def _lists(self, draw: str) -> Tensor | None:
        shape, generator = self.shape, self.generator
        if shape.kind == "listed":
            return torch.cat(
                [token_lists(t, s, shape.topk, draw, generator) for t, s in self.lengths]
            )
        if shape.kind == "blocks":
            heads, topk, block = shape.kv_heads, shape.topk, shape.block
            return torch.cat(
                [block_lists(t, s, heads, topk, block, draw, generator) for t, s in self.lengths]
            )
        return None

    def seen(self, row: int, head: int) -> Tensor:
        """Return the rows of the keys that a row of queries sees with a key head."""
        shape = self.shape
        b = bisect_right(self.ends[0], row) - 1
        place = self.places[b]
        i = self.offsets[b] + row - self.ends[0][b]
        last = max(0, min(i + 1, len(place)))
        match shape.kind:
            case "listed":
                assert self.list is not None
                x = self.list[row].long()
                return place[x[(x >= 0) & (x < last)]]
            case "blocks":
                assert self.list is not None
                x = self.list[row, head].long()
                x = x[x >= 0, None] * shape.block + torch.arange(shape.block, device=x.device)
                x = x.flatten()
                return place[x[x < last]]
            case "entries":
                complete = (i + 1 - shape.width) // shape.stride + 1
                return place[: max(0, complete)]
            case "window":
                return place[max(0, i + 1 - shape.window) : last]
            case "packed" if len(place):
                assert self.doc is not None
                # A table ends where the sequence does: queries behind it see its last document.
                doc = self.doc[place]
                return place[:last][doc[:last] == doc[min(max(i, 0), len(place) - 1)]]
        return place[:last]

    @property
    def selects(self) -> int:
        """Return how many key heads see other keys than their neighbours."""
        return self.shape.kv_heads if self.shape.kind == "blocks" else 1

    def pairs(self) -> float:
        """Return how many (query, key) pairs there are, over the query heads."""
        shape, total = self.shape, 0.0
        for b, (t, _) in enumerate(self.lengths):
            place, first = self.places[b], self.offsets[b]
            i = torch.arange(t, device=self.device) + first
            last = (i + 1).clamp(0, len(place))
            rows = slice(*self.ends[0][b : b + 2])
            match shape.kind:
                case "listed":
                    assert self.list is not None
                    x = self.list[rows]
                    count = ((x >= 0) & (x < last[:, None])).sum() * shape.heads
                case "blocks":
                    assert self.list is not None
                    x = self.list[rows].long()
                    n = (last[:, None, None] - x * shape.block).clamp(0, shape.block)
                    count = (n * (x >= 0)).sum() * shape.group
                case "entries":
                    complete = (i + 1 - shape.width).div(shape.stride, rounding_mode="floor") + 1
                    count = complete.clamp(0, len(place)).sum() * shape.heads
                case "window":
                    count = (last - (i + 1 - shape.window).clamp_min(0)).clamp_min(0).sum()
                    count = count * shape.heads
                case "packed" if len(place):
                    assert self.doc is not None
                    doc = self.doc[place]
                    first = torch.searchsorted(doc, doc[i.clamp(0, len(place) - 1)])
                    count = (last - first).clamp_min(0).sum() * shape.heads
                case _:
                    count = last.sum() * shape.heads
            total += float(count)
        return total

    @property
    def flops(self) -> float:
        """Return the products of all pairs."""
        return 2.0 * (self.shape.d_qk + self.shape.d_v) * self.pairs()

    @property
    def bytes(self) -> float:
        """Return the size of what is read and written, each element once."""
        shape = self.shape
        keys = sum(map(len, self.places)) * shape.kv_heads
        dims = shape.d_qk + (0 if shape.shared else shape.d_v)
        out = self.rows * shape.heads * (shape.d_v * self.q.element_size() + 4)
        lists = sum(x.numel() * 4 for x in (self.list, self.doc) if x is not None)
        inputs = self.q.numel() * self.q.element_size() + keys * dims * self.k.element_size()
        return float(inputs + lists + out)

    def hide(self) -> None:
        """Put NaN into every row of keys and values that no query sees."""
        for head in range(self.selects):
            seen = torch.zeros(len(self.k), dtype=torch.bool, device=self.device)
            for row in range(self.rows):
                seen[self.seen(row, head)] = True
            heads = slice(None) if self.selects == 1 else slice(head, head + 1)
            for held in (self.k, self.v):
                held[:, heads].masked_fill_(~seen[:, None, None], float("nan"))
