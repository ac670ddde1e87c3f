"""Build and time attention over ranges of keys on a GPU: dense prefill, a window, dense decoding.

    python -m benchmarks.gpu_ranges build FOLDER     export bundles; needs nvcc, no GPU
    python -m benchmarks.gpu_ranges time FOLDER OUT  check and time them; needs a GPU

Rows are compared with float64 before anything is timed; the protocol is that of `benchmarks.gpu`.
FLOPs count the pairs that a query sees.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparsegen as sg
from benchmarks.gpu import COSINE, OUT, Timer, show, write

PAGE = 64


@sg.pattern
def latent(q: "T Hq c", kv: "S 1 c", *, d_v=512):  # type: ignore  # noqa: F722
    """Attend in the latent space of MLA; values are the first elements of the keys."""
    i, j = sg.index(q, kv)
    return sg.attend(q, kv, kv[..., :d_v], where=j <= i)


@dataclass(frozen=True)
class Workload:
    """Sequences of `queries` x `keys`; a query sees the last `window` keys up to its own."""

    pattern: Any
    batch: int
    queries: int
    keys: int
    heads: tuple[int, int]
    dims: tuple[int, int]
    window: int
    layout: str = "sequence"

    @property
    def flops(self) -> int:
        """Return the products of all visible pairs."""
        first = self.keys - self.queries
        pairs = sum(min(first + t + 1, self.window) for t in range(self.queries))
        return 2 * self.batch * self.heads[0] * pairs * sum(self.dims)


EVERY = 1 << 30
WORKLOADS = {
    # DeepSeek-V3's prefill, unfolded.
    "W8": Workload("causal", 1, 8192, 8192, (128, 128), (192, 128), EVERY),
    # NSA's sliding branch, 64 query heads and 4 key heads.
    "W6 window": Workload("sliding_window", 1, 32768, 32768, (64, 4), (128, 128), 512),
    # DeepSeek-V3's absorbed decoding.
    "W3": Workload(latent, 128, 1, 8192, (128, 1), (576, 512), EVERY, "paged"),
}


def compiled(w: Workload, target: str) -> Any:
    """Return the kernel of a workload."""
    hyper = {"window": w.window, "first": 0} if w.pattern == "sliding_window" else {}
    sizes = {"Hq": w.heads[0], "Hk": w.heads[1], "D": w.dims[0], "E": w.dims[1]}
    if w.pattern is latent:
        sizes = {"Hq": w.heads[0], "c": w.dims[0]}
    return sg.compile(
        w.pattern, target=target, dtype="bfloat16", layout=w.layout, sizes=sizes,
        page_size=PAGE if w.layout == "paged" else 0, **hyper,
    )  # fmt: skip


def inputs_of(w: Workload) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return random tensors and metadata; keys in pages lie in a random order."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    q = random(w.batch * w.queries, w.heads[0], w.dims[0])
    if w.pattern is latent:
        each = w.keys // PAGE
        table = torch.randperm(w.batch * each, generator=generator, device="cuda")
        steps = torch.arange(w.batch + 1, dtype=torch.int32, device="cuda")
        return [q, random(w.batch * each, PAGE, 1, w.dims[0]) / 10], {
            "cu_seqlens_q": steps * w.queries,
            "seqlens_k": torch.full((w.batch,), w.keys, dtype=torch.int32, device="cuda"),
            "page_table": table.to(torch.int32).view(w.batch, each),
        }
    k, v = (random(w.keys, w.heads[1], d) for d in w.dims)
    v /= 10  # weights are rounded to bfloat16, so an output errs in proportion to its values
    sink = torch.full((w.heads[0],), float("-inf"), device="cuda").bfloat16()
    return [q, k, v, *([sink] if w.pattern == "sliding_window" else [])], {}


def check(w: Workload, kernel: Callable[..., Any], args: list[Any], given: dict[str, Any]) -> float:
    """Compare some rows with float64, and repeats with each other; return the largest error."""
    got = kernel(*args, **given)
    assert torch.equal(got, kernel(*args, **given)), "repeats differ"
    wrong, group = 0.0, w.heads[0] // w.heads[1]
    for row in {0, 1, w.window, 5 * len(got) // 7, len(got) - 1} & set(range(len(got))):
        b, t = divmod(row, w.queries)
        i = w.keys - w.queries + t
        seen = slice(max(0, i + 1 - w.window), i + 1)
        if w.pattern is latent:
            keys = args[1][given["page_table"][b].long()].flatten(0, 1)[seen].double()
            values = keys[..., : w.dims[1]]
        else:
            keys, values = (x[seen].double() for x in args[1:3])
        q = args[0][row].double().unflatten(0, (w.heads[1], group))
        scores = torch.einsum("hgd,khd->hgk", q, keys) * w.dims[0] ** -0.5
        want = torch.einsum("hgk,khe->hge", scores.softmax(-1), values).flatten(0, 1)
        found = got[row].double()
        torch.testing.assert_close(found, want, **OUT)
        distance = 1 - 2 * (found * want).sum() / (found.square() + want.square()).sum()
        assert distance < COSINE, f"cosine {distance}"
        wrong = max(wrong, float((found - want).abs().max()))
    return wrong


def measure(folder: Path, out: Path) -> None:
    """Check, then time every workload beside the ceiling."""
    timer, rows = Timer(), []
    for name, w in WORKLOADS.items():
        kernel = sg.load(folder / name.replace(" ", "-"))
        args, given = inputs_of(w)
        error = check(w, kernel, args, given)
        taken = timer.row(functools.partial(kernel, *args, **given), w.flops)
        rows.append({"workload": name, **taken, "error": error})
        show(rows[-1])
    write(rows, out)


if __name__ == "__main__":
    if sys.argv[1] == "build":
        for name, w in WORKLOADS.items():
            print(sg.export(compiled(w, "sm_90"), Path(sys.argv[2]) / name.replace(" ", "-")))
    else:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
