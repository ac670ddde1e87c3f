"""Call other people's kernels on a problem, where they can be imported.

As of FlashMLA 9241ae3, fla-core 0.6.0 (with einops and packaging), and the Triton kernels of
XunhaoLai/native-sparse-attention-triton 9bea856 (with einops).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.problem import Problem

# Launches a kernel and returns something; what follows makes outputs [rows, heads, d_v] of it.
Peer = tuple[Callable[[], Any], Callable[[Any], Tensor]]
# Whether a batch, a head, a query and a key meet.
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class AbsentError(Exception):
    """A peer is not installed, or does not know a problem."""


def peers(problem: Problem) -> Iterator[tuple[str, Callable[[], Peer]]]:
    """Yield the peers of a problem: a name, and what prepares it, which may find it absent."""
    shape = problem.shape
    match shape.kind:
        case "listed":
            if shape.heads in (64, 128):
                yield "FlashMLA", lambda: _flash_mla_sparse(problem)
            yield "torch, gather + bmm", lambda: _gather(problem)
        case "causal" if shape.page:
            yield "FlashMLA", lambda: _flash_mla_decode(problem)
            yield "torch, bmm of contiguous keys", lambda: _bmm(problem)
        case "causal":
            yield "torch SDPA, cuDNN", lambda: _sdpa(problem, SDPBackend.CUDNN_ATTENTION)
            yield "torch SDPA, flash", lambda: _sdpa(problem, SDPBackend.FLASH_ATTENTION)
        case "blocks":
            yield "native-sparse-attention", lambda: _nsa_selected(problem)
            yield "fla", lambda: _fla_selected(problem)
        case "entries":
            yield "native-sparse-attention", lambda: _nsa_compressed(problem)
        case "window":
            yield "FlexAttention", lambda: _flex(problem, _in_window(problem))
        case "packed":
            yield "FlexAttention", lambda: _flex(problem, _same_document(problem))


def _installed(package: str) -> None:
    """Raise unless a package is there; if its import then fails, that is an error to report."""
    if find_spec(package) is None:
        raise AbsentError(f"{package} is not installed")


def _same(x: Tensor) -> Tensor:
    return x


def _flash_mla_sparse(p: Problem) -> Peer:
    _installed("flash_mla")
    from flash_mla import flash_mla_sparse_fwd  # type: ignore[import-not-found]

    assert p.list is not None
    index, scale, d_v = p.list.view(p.rows, 1, -1), p.shape.scale, p.shape.d_v
    # Lists that end in padding may say how long they are.
    length = (p.list >= 0).sum(1).int()
    more = (None, length) if bool((length < p.shape.topk).any()) else ()
    return lambda: flash_mla_sparse_fwd(p.q, p.k, index, scale, d_v, *more), lambda x: x[0]


def _flash_mla_decode(p: Problem) -> Peer:
    _installed("flash_mla")
    import flash_mla

    lengths = p.cu_k.diff().int()
    q, pages = p.q[:, None], p.k.unflatten(0, (-1, p.shape.page))
    scheduled, _ = flash_mla.get_mla_metadata()
    arguments = (p.table, lengths, p.shape.d_v, scheduled, None, p.shape.scale, False)
    return lambda: flash_mla.flash_mla_with_kvcache(q, pages, *arguments), lambda x: x[0][:, 0]


def _gather(p: Problem) -> Peer:
    """Gather the keys of some queries, multiply, softmax, multiply; no padding anywhere."""
    assert p.list is not None
    if bool((p.list < 0).any()):
        raise AbsentError("it knows no padding")
    index, d_v = p.list.long(), p.shape.d_v
    out = p.q.new_empty(p.rows, p.shape.heads, d_v)

    def run() -> Tensor:
        for a in range(0, p.rows, 256):
            keys = p.k[index[a : a + 256], 0]
            scores = torch.bmm(p.q[a : a + 256], keys.transpose(1, 2)).float() * p.shape.scale
            torch.bmm(scores.softmax(-1).to(p.q.dtype), keys[..., :d_v], out=out[a : a + 256])
        return out

    return run, _same


def _bmm(p: Problem) -> Peer:
    """Multiply, softmax, multiply, over keys that were brought in a row beforehand."""
    keys = torch.stack([p.k[place, 0] for place in p.places])
    d_v = p.shape.d_v

    def run() -> Tensor:
        scores = torch.bmm(p.q, keys.transpose(1, 2)).float() * p.shape.scale
        return torch.bmm(scores.softmax(-1).to(p.q.dtype), keys[..., :d_v])

    return run, _same


def _sdpa(p: Problem, backend: SDPBackend) -> Peer:
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (p.q, p.k, p.v))
    if backend == SDPBackend.FLASH_ATTENTION:
        v = F.pad(v, (0, p.shape.d_qk - p.shape.d_v))

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=p.shape.scale)

    return run, lambda x: x[0, ..., : p.shape.d_v].transpose(0, 1)


def _nsa_selected(p: Problem) -> Peer:
    _installed("native_sparse_attention")
    from native_sparse_attention.ops.triton.topk_sparse_attention import (  # type: ignore[import-not-found]
        TopkSparseAttention,
    )

    assert p.list is not None
    index = p.list.transpose(0, 1).contiguous()
    # Its public function has the host wait for the longest length in every call.
    arguments = (index, p.shape.block, p.cu_q, p.cu_k, p.rows, len(p.k), p.shape.scale)
    return lambda: TopkSparseAttention.apply(p.q, p.k, p.v, *arguments), _same


def _nsa_compressed(p: Problem) -> Peer:
    _installed("native_sparse_attention")
    from native_sparse_attention.ops.triton.compressed_attention import (  # type: ignore[import-not-found]
        CompressedAttention,
    )

    shape, (place,) = p.shape, p.places
    k, v, cu_k = p.k[place], p.v[place], p.cu_k.new_tensor([0, len(place)])
    arguments = (shape.width, shape.stride, p.cu_q, cu_k, p.rows, len(place), shape.scale)
    return lambda: CompressedAttention.apply(p.q, k, v, *arguments), lambda x: x[0]


def _fla_selected(p: Problem) -> Peer:
    _installed("fla")
    from fla.ops.nsa.parallel import parallel_nsa_fwd  # type: ignore[import-not-found]

    assert p.list is not None
    q, k, v, index = (x[None].contiguous() for x in (p.q, p.k, p.v, p.list))
    settings = {
        "block_counts": p.shape.topk, "block_size": p.shape.block, "scale": p.shape.scale,
    }  # fmt: skip
    return (
        lambda: parallel_nsa_fwd(q=q, k=k, v=v, block_indices=index, **settings),
        lambda x: x[0][0],
    )


def _in_window(p: Problem) -> Visible:
    last = p.shape.window

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < last)

    return visible


def _same_document(p: Problem) -> Visible:
    doc = p.doc
    assert doc is not None

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (doc[i] == doc[j])

    return visible


def _flex(p: Problem, visible: Visible) -> Peer:
    """Call FlexAttention; the blocks that it visits were found beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (p.q, p.k, p.v))
    n = p.rows
    mask = create_block_mask(visible, None, None, n, n, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return (
        lambda: compiled(q, k, v, block_mask=mask, scale=p.shape.scale, enable_gqa=True),
        lambda x: x[0].transpose(0, 1),
    )
