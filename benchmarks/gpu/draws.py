"""Draw selections with the statistics that matter: how far keys lie apart, what queries share."""

from __future__ import annotations

import torch

CHUNK = 1024  # rows whose scores are drawn at once
NOISE = 0.02  # of 1: neighbours share about nine of ten blocks at 32768 tokens


def token_lists(
    queries: int, keys: int, topk: int, draw: str, generator: torch.Generator
) -> torch.Tensor:
    """Return lists of distinct keys in random order, [queries, topk] int32, padded with -1.

    A query sees the keys up to itself; queries are the last positions, the first ones for "start".
    With "padded", the last quarter of every list is padding.
    """
    device = generator.device
    first = 0 if draw == "start" else keys - queries
    column = torch.arange(keys, device=device)
    out = torch.full((queries, topk), -1, dtype=torch.int32, device=device)
    for a in range(0, queries, CHUNK):
        position = torch.arange(a, min(a + CHUNK, queries), device=device) + first
        score = torch.rand(len(position), keys, generator=generator, device=device)
        score.masked_fill_(column[None] > position[:, None], -1.0)
        value, index = score.topk(min(topk, keys), dim=1)
        out[a : a + CHUNK, : index.shape[1]] = torch.where(value < 0, -1, index).int()
    if draw == "padded":
        out[:, topk - topk // 4 :] = -1
    return out


def documents(keys: int, generator: torch.Generator) -> torch.Tensor:
    """Return the document of each key, [keys] int32, ascending: of about a thousand keys each."""
    count = keys // 1024 + 2
    # Their ends lie anywhere, so that some are short.
    ends = torch.randint(keys + 1, (count - 1,), generator=generator, device=generator.device)
    position = torch.arange(keys, device=generator.device)
    return torch.searchsorted(ends.sort().values, position, right=True).int()


def block_lists(
    queries: int, keys: int, heads: int, topk: int, block: int, draw: str,
    generator: torch.Generator,
) -> torch.Tensor:  # fmt: skip
    """Return lists of blocks, [queries, heads, topk] int32, ascending, padded with -1.

    The first block, the one of the query and the one before are always there. With "clustered", the
    scores of the others follow a base that the queries of a block share, with a little noise.
    """
    device = generator.device
    count = -(-keys // block)
    current = (torch.arange(queries, device=device) + keys - queries) // block
    column = torch.arange(count, device=device)
    out = torch.full((queries, heads, topk), -1, dtype=torch.int32, device=device)
    for h in range(heads):
        score = torch.rand(queries, count, generator=generator, device=device)
        if draw == "clustered":
            base = torch.rand(count, count, generator=generator, device=device)
            score = base[current] + NOISE * score
        score[:, 0] = 3
        for forced in (current, current - 1):
            score.scatter_(1, forced.clamp_min(0)[:, None], 3.0)
        score.masked_fill_(column[None] > current[:, None], -1)
        value, index = score.topk(min(topk, count), dim=1)
        index = torch.where(value < 0, count, index).sort(1)[0]
        out[:, h, : index.shape[1]] = torch.where(index == count, -1, index).int()
    return out
