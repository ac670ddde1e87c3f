"""The best torch formulations found of each benchmarked pattern, several per pattern.

Every peer takes the pattern's inputs as torch tensors of one sequence and returns its output. None
may keep what a caller would have to recompute per call (masks that depend on the selection, copies
of gathered keys); masks that depend on lengths alone are built once, outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[[], Tensor]


def dsa(inputs: dict[str, Tensor], *, topk: int, d_v: int) -> dict[str, Peer]:
    """Indexer scores and top-k per chunk of queries, then gathered attention in three ways."""
    q, kv, q_idx, k_idx, w = (inputs[n] for n in ("q", "kv", "q_idx", "k_idx", "w"))
    T, S = q.shape[0], kv.shape[0]
    keys, index_keys = kv[:, 0], k_idx[:, 0]
    scale = q.shape[-1] ** -0.5
    i = torch.arange(T)[:, None] + (S - T)
    hidden = torch.arange(S)[None] > i
    neg = torch.finfo(q.dtype).min

    def lists(chunk: int) -> Tensor:
        found = []
        for a in range(0, T, chunk):
            qi = q_idx[a : a + chunk]
            logits = torch.matmul(qi.reshape(-1, qi.shape[-1]), index_keys.T)
            logits = logits.view(*qi.shape[:2], S).relu_()
            s = torch.bmm(w[a : a + chunk, None], logits)[:, 0].float()
            s.masked_fill_(hidden[a : a + chunk], float("-inf"))
            found.append(s.topk(min(topk, S), dim=-1, sorted=False).indices)
        return torch.cat(found)

    def gathered(chunk: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        idx = lists(8)
        out = torch.empty(T, q.shape[1], d_v, dtype=q.dtype)
        for a in range(0, T, chunk):
            part = idx[a : a + chunk]
            g = keys.index_select(0, part.reshape(-1)).view(*part.shape, -1)
            mask = torch.where(part > i[a : a + chunk], neg, 0.0).to(q.dtype)[:, None]
            out[a : a + chunk] = attend(q[a : a + chunk], g, mask)
        return out

    def bmm(qc: Tensor, g: Tensor, mask: Tensor) -> Tensor:
        p = torch.softmax(torch.baddbmm(mask, qc * scale, g.transpose(1, 2)), -1)
        return torch.bmm(p, g[..., :d_v])

    def sdpa(qc: Tensor, g: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            qc[:, None], g[:, None], g[:, None, :, :d_v], attn_mask=mask[:, None], scale=scale
        )[:, 0]

    def masked() -> Tensor:
        mask = torch.full((T, S), neg, dtype=q.dtype)
        mask.scatter_(1, lists(8), 0.0).masked_fill_(hidden, neg)
        p = torch.matmul(q * scale, keys.T) + mask[:, None]
        return torch.matmul(torch.softmax(p, -1), keys[:, :d_v])

    peers: dict[str, Peer] = {"masked dense": masked}
    for c in (1, 4, 16):
        peers[f"index_select + bmm, {c} queries a chunk"] = lambda c=c: gathered(c, bmm)
        peers[f"index_select + SDPA, {c} queries a chunk"] = lambda c=c: gathered(c, sdpa)
    return peers


def window(inputs: dict[str, Tensor], *, W: int, flex: bool = True) -> dict[str, Peer]:
    """Banded attention: SDPA under a mask, SDPA over overlapping chunks, FlexAttention."""
    q, k, v = (inputs[n].transpose(0, 1)[None].contiguous() for n in ("q", "k", "v"))
    T = q.shape[2]
    gqa = q.shape[1] != k.shape[1]
    i = torch.arange(T)
    band = (i[None] <= i[:, None]) & (i[:, None] - i[None] < W)

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band, enable_gqa=gqa)[0]

    def chunked(c: int) -> Tensor:
        out = torch.empty_like(q)
        for a in range(0, T, c):
            lo, hi = max(0, a - W + 1), min(T, a + c)
            out[:, :, a:hi] = F.scaled_dot_product_attention(
                q[:, :, a:hi], k[:, :, lo:hi], v[:, :, lo:hi], attn_mask=band[a:hi, lo:hi],
                enable_gqa=gqa,
            )  # fmt: skip
        return out[0]

    peers: dict[str, Peer] = {"SDPA with mask": masked}
    for c in (128, 256, 512):
        peers[f"SDPA over chunks of {c}"] = lambda c=c: chunked(c)
    if flex:
        peers["FlexAttention (compiled)"] = _flex(q, k, v, W, gqa)
    return {n: _transposed(p) for n, p in peers.items()}


def _flex(q: Tensor, k: Tensor, v: Tensor, W: int, gqa: bool) -> Peer:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = q.shape[2]

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (i - j < W)

    mask = create_block_mask(visible, None, None, T, T, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)[0]


def _transposed(peer: Peer) -> Peer:
    return lambda: peer().transpose(0, 1)


def nsa(
    inputs: dict[str, Tensor],
    *,
    l: int,  # noqa: E741
    d: int,
    L: int,
    n: int,
    W: int,
) -> dict[str, Peer]:
    """Three branches: compressed and selected under masks or gathered, window in chunks."""
    q, k, v, g, phi_k, phi_v = (inputs[x] for x in ("q", "k", "v", "g", "phi_k", "phi_v"))
    T, Hq, D = q.shape
    Hk = k.shape[1]
    R = Hq // Hk
    E = max(0, (T - l) // d + 1)
    B = -(-T // L)
    i = torch.arange(T)
    seen = (torch.arange(E)[None] * d + l - 1) <= i[:, None]
    overlap = torch.zeros(E, B)
    for e in range(E):
        for b in range(e * d // L, min(B - 1, (e * d + l - 1) // L) + 1):
            overlap[e, b] = (min(e * d + l, (b + 1) * L) - max(e * d, b * L)) / d
    forced = torch.zeros(T, B, dtype=torch.bool)
    forced[:, 0] = True
    forced[i, i // L] = True
    forced[i, (i // L - 1).clamp(min=0)] = True
    causal = i[None] <= i[:, None]
    qh = q.transpose(0, 1).contiguous()

    def compressed(x: Tensor, phi: Tensor) -> Tensor:
        windows = x.unfold(0, l, d).permute(1, 0, 3, 2).reshape(Hk, E, l * D)
        return windows @ phi.reshape(l * D, -1)

    def select(kc: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.matmul(qh.view(Hk, R * T, D), kc.transpose(1, 2)).view(Hk, R, T, E) * D**-0.5
        p = torch.softmax(s.masked_fill(~seen, float("-inf")), -1).nan_to_num(0.0)
        block = torch.matmul(p.sum(1), overlap)
        block = block.masked_fill(torch.matmul(seen.float(), (overlap > 0).float()) == 0, -1.0)
        block = block.masked_fill(forced, float("inf"))
        return p, block.topk(min(n, B), dim=-1).indices

    def attended(p: Tensor, vc: Tensor) -> Tensor:
        return torch.matmul(p.view(Hk, R * T, E), vc).view(Hq, T, -1)

    def selected_mask(idx: Tensor) -> Tensor:
        blocks = torch.zeros(Hk, T, B, dtype=torch.bool).scatter_(2, idx, True)
        mask = blocks.repeat_interleave(L, 2)[..., :T] & causal
        return F.scaled_dot_product_attention(
            qh.view(Hk, R, T, D), k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None],
            attn_mask=mask[:, None], enable_gqa=True,
        ).reshape(Hq, T, -1)  # fmt: skip

    def selected_gather(idx: Tensor, chunk: int) -> Tensor:
        out = torch.empty(Hk, T, R, v.shape[-1], dtype=q.dtype)
        offsets = torch.arange(L)
        for h in range(Hk):
            for a in range(0, T, chunk):
                cols = (idx[h, a : a + chunk, :, None] * L + offsets).flatten(1)
                dead = cols > i[a : a + chunk, None]
                flat = cols.clamp(max=T - 1).reshape(-1)
                kg = k[:, h].index_select(0, flat).view(*cols.shape, D)
                vg = v[:, h].index_select(0, flat).view(*cols.shape, -1)
                qc = q[a : a + chunk, h * R : (h + 1) * R]
                mask = torch.where(dead, float("-inf"), 0.0)[:, None]
                out[h, a : a + chunk] = F.scaled_dot_product_attention(
                    qc[:, None], kg[:, None], vg[:, None], attn_mask=mask[:, None]
                )[:, 0]
        return out.permute(0, 2, 1, 3).reshape(Hq, T, -1)

    def windowed(c: int = 256) -> Tensor:
        kh, vh = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        out = torch.empty(1, Hq, T, v.shape[-1], dtype=q.dtype)
        for a in range(0, T, c):
            lo, hi = max(0, a - W + 1), min(T, a + c)
            band = causal[a:hi, lo:hi] & (i[a:hi, None] - i[None, lo:hi] < W)
            out[:, :, a:hi] = F.scaled_dot_product_attention(
                qh[None, :, a:hi], kh[:, :, lo:hi], vh[:, :, lo:hi], attn_mask=band, enable_gqa=True
            )
        return out[0]

    def whole(selected: Callable[[Tensor], Tensor]) -> Tensor:
        kc, vc = compressed(k, phi_k), compressed(v, phi_v)
        p, idx = select(kc)
        parts = torch.stack([attended(p, vc), selected(idx), windowed()], -1)
        return torch.einsum("htdp,thp->thd", parts, g)

    peers: dict[str, Peer] = {"selected branch under a mask": lambda: whole(selected_mask)}
    for c in (4, 16):
        peers[f"selected branch gathered, {c} queries a chunk"] = lambda c=c: whole(
            lambda idx: selected_gather(idx, c)
        )
    return peers
