"""Offer kernels under the signatures by which harnesses for other people's kernels call ours.

    sparse_mla_fwd(q [T, h, c], kv [S, 1, c], indices [T, n], scale) -> [T, h, 512], lse [T, h]
    mla_decode(q [b, s, h, c], kv [pages, 64, 1, c], page_table, lengths, scale) -> [b, s, h, 512]
    nsa_select_fwd(q [T, h, d], k [S, g, d], v [S, g, e], blocks [T, g, n], scale) -> [T, h, e]

Padding is -1; query rows are the last positions, except that of `sparse_mla_fwd`, which sees all it
lists. Kernels come from the folder $SPARSEGEN_BENCH_KERNELS, which `python -m benchmarks.gpu build`
wrote, in the variant $SPARSEGEN_BENCH_LABEL ("default" if unset). What is not there is compiled, if
sparsegen can be imported, for this process.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.kernels import Folder, Kernel
from benchmarks.gpu.workload import Shape

D_V = 512  # of the latent space, the first elements of its keys
BLOCK = 64


def sparse_mla_fwd(q: Tensor, kv: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to a list of keys for each query, shared by all heads."""
    shape = Shape(
        kind="listed", heads=q.shape[1], kv_heads=1, d_qk=q.shape[2], d_v=D_V, shared=True,
        topk=indices.shape[1], dtype=_name(q),
    )  # fmt: skip
    # No query stands before a key.
    metadata = _sequences(1, len(q), len(kv), len(kv), q.device)
    return _call(shape, scale, metadata, {"q": q, "k": kv, "list": indices})


def mla_decode(q: Tensor, kv: Tensor, page_table: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attend to the keys of each sequence, which lie in pages."""
    batch, steps, heads, dim = q.shape
    shape = Shape(
        kind="causal", heads=heads, kv_heads=1, d_qk=dim, d_v=D_V, shared=True,
        page=kv.shape[1], dtype=_name(q),
    )  # fmt: skip
    metadata = (*_decoding.of(lengths, steps), page_table)
    out, _ = _call(shape, scale, metadata, {"q": q.flatten(0, 1), "k": kv})
    return out.view(batch, steps, heads, D_V)


def nsa_select_fwd(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, scale: float) -> Tensor:
    """Attend to a list of blocks of 64 keys for each query and key head."""
    shape = Shape(
        kind="blocks", heads=q.shape[1], kv_heads=k.shape[1], d_qk=q.shape[2], d_v=v.shape[2],
        topk=blocks.shape[2], block=BLOCK, dtype=_name(q),
    )  # fmt: skip
    metadata = _sequences(1, len(q), len(k), len(k) - len(q), q.device)
    return _call(shape, scale, metadata, {"q": q, "k": k, "v": v, "list": blocks})[0]


def _call(
    shape: Shape, scale: float, metadata: tuple[Tensor, ...], given: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    if abs(scale - shape.scale) > 1e-6 * shape.scale:
        raise ValueError(f"scale {scale}: the kernels are compiled for {shape.scale}")
    kernel, q = kernel_of(shape), given["q"]
    out = q.new_empty(len(q), shape.heads, shape.d_v)
    lse = q.new_empty(len(q), shape.heads, dtype=torch.float32)
    keys = given["k"].shape[0] * max(1, shape.page)
    longest = metadata[-1].shape[1] * shape.page if shape.page else keys
    # Where queries end is on the device; it is not beyond this.
    extent = kernel.extent(len(metadata[2]), len(q), keys, longest + len(q), longest)
    scratch = kernel.scratch(extent, str(q.device))
    kernel.function(*metadata, *kernel.bind({**given, "o": out, "lse": lse}, scratch))
    return out, lse


@functools.cache
def kernel_of(shape: Shape) -> Kernel:
    """Return the kernel of a shape: from the folder, or newly compiled.

    Raises:
        RuntimeError: neither is possible.
    """
    label = os.environ.get("SPARSEGEN_BENCH_LABEL", "default")
    given = os.environ.get("SPARSEGEN_BENCH_KERNELS")
    if given is not None:
        folder = Folder(Path(given))
        name = folder.kernel_of(shape)
        if name is not None and "error" not in folder.variants(name).get(label, {"error": ""}):
            return folder.load(name, label)
    try:
        from benchmarks.gpu.build import Variant, build_shapes
    except ImportError as error:
        raise RuntimeError(
            f"{shape} is not in the folder of $SPARSEGEN_BENCH_KERNELS ({given}) as {label!r}, "
            f"and sparsegen, which could compile it, cannot be imported: {error}"
        ) from error
    made = Path(_scratch().name)
    name = f"kernel-{len(list(made.glob('*.so')))}"
    build_shapes(made, {name: shape}, [Variant("default")])
    return Folder(made).load(name, "default")


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sparsegen-")


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


@functools.cache
def _sequences(
    batch: int, queries: int, keys: int, offset: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the metadata of equal sequences."""
    steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
    offsets = torch.full((batch,), offset, dtype=torch.int32, device=device)
    return steps * queries, steps * keys, offsets


class _Decoding:
    """The metadata of a decoding step, made once for the lengths that are passed again.

    Harnesses give kernels the same lengths in every call, as peers reuse their scheduling of them.
    """

    def __init__(self) -> None:
        self.key: tuple[Tensor, int, int] | None = None
        self.made: tuple[Tensor, ...] = ()

    def of(self, lengths: Tensor, steps: int) -> tuple[Tensor, ...]:
        """Return cumulated queries and keys, and where queries start."""
        # The tensor is held, so that no other one can take its place; writes raise its version.
        key = (lengths, lengths._version, steps)
        if self.key is None or self.key[0] is not lengths or self.key[1:] != key[1:]:
            cu_q, _, _ = _sequences(len(lengths), steps, 0, 0, lengths.device)
            cu_k = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
            torch.cumsum(lengths, 0, out=cu_k[1:])
            self.key, self.made = key, (cu_q, cu_k, (lengths - steps).int())
        return self.made


_decoding = _Decoding()
