"""The benchmarked workloads: a pattern, its sizes, and the torch formulations to stand beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """One line of the benchmark table.

    sizes      every letter of the pattern, sequence lengths too
    flops      useful floating-point operations: visible pairs only
    tolerance  largest difference from a peer that counts as the same result
    """

    name: str
    pattern: str
    sizes: dict[str, int]
    hyper: dict[str, Any]
    shapes: dict[str, Shape]
    flops: float
    peers: Callable[[dict[str, Tensor]], dict[str, peers.Peer]]
    tolerance: float = 2e-4
    scale: dict[str, float] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """Return seeded random inputs, scaled to keep weights near one in norm."""
        generator = torch.Generator().manual_seed(seed)
        return {
            n: (torch.randn(s, generator=generator) * self.scale.get(n, 1.0)).to(dtype)
            for n, s in self.shapes.items()
        }


def dsa(name: str, T: int, S: int, heads: int, topk: int = 2048) -> Workload:
    """DeepSeek-V3.2: 64 x 128 indexer, top-k, then MQA 576/512 over the selected tokens."""
    pairs = sum(min(topk, S - T + t + 1) for t in range(T))
    visible = sum(S - T + t + 1 for t in range(T))
    return Workload(
        name=name,
        pattern="dsa",
        sizes={"T": T, "S": S, "Hq": heads, "c": 576, "Hi": 64, "e": 128},
        hyper={"topk": topk},
        shapes={
            "q": (T, heads, 576),
            "kv": (S, 1, 576),
            "q_idx": (T, 64, 128),
            "k_idx": (S, 1, 128),
            "w": (T, 64),
        },
        flops=2.0 * visible * 64 * 128 + 2.0 * pairs * heads * (576 + 512),
        peers=lambda x: peers.dsa(x, topk=topk, d_v=512),
    )


def nsa(name: str, T: int, heads: int = 64, kv_heads: int = 4, D: int = 128) -> Workload:
    """NSA with the paper's constants: 32/16 compression, 16 blocks of 64, window 512."""
    hyper = {"l": 32, "d": 16, "L": 64, "n": 16, "W": 512}
    entries = sum(max(0, (t - 31) // 16 + 1) for t in range(T))
    selected = sum(min(t + 1, 15 * 64 + t % 64 + 1) for t in range(T))
    window = sum(min(t + 1, 512) for t in range(T))
    # Scores of the compressed branch are needed twice: for its output and for the selection.
    flops = 2.0 * heads * D * (3 * entries + 2 * selected + 2 * window)
    flops += 2 * 2.0 * (T // 16) * 32 * D * D * kv_heads
    return Workload(
        name=name,
        pattern="nsa",
        sizes={"T": T, "S": T, "Hq": heads, "Hk": kv_heads, "D": D, "E": D},
        hyper=hyper,
        shapes={
            "q": (T, heads, D),
            "k": (T, kv_heads, D),
            "v": (T, kv_heads, D),
            "g": (T, heads, 3),
            "phi_k": (32, D, D),
            "phi_v": (32, D, D),
        },
        flops=flops,
        peers=lambda x: peers.nsa(x, **hyper),
        scale={"phi_k": (32 * D) ** -0.5, "phi_v": (32 * D) ** -0.5},
    )


def window(name: str, T: int, W: int, heads: int, kv_heads: int, D: int = 128) -> Workload:
    """Sliding window of W keys, no sinks."""
    pairs = sum(min(t + 1, W) for t in range(T))
    return Workload(
        name=name,
        pattern="window",
        sizes={"T": T, "S": T, "Hq": heads, "Hk": kv_heads, "D": D},
        hyper={"W": W},
        shapes={"q": (T, heads, D), "k": (T, kv_heads, D), "v": (T, kv_heads, D)},
        flops=4.0 * pairs * heads * D,
        peers=lambda x: peers.window(x, W=W),
    )


WORKLOADS = (
    dsa("DSA prefill, 128 heads", T=64, S=8192, heads=128),
    dsa("DSA decode, 16 heads", T=1, S=8192, heads=16),
    nsa("NSA, 64/4 heads of 128", T=2048),
    window("sliding window, 8 heads", T=8192, W=512, heads=8, kv_heads=8),
    window("sliding window, 32/8 heads", T=8192, W=512, heads=32, kv_heads=8),
)
