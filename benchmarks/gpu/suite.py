"""List the kernels and workloads: patterns, with the sizes of published models where one fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sparsegen as sg
from benchmarks.gpu.workload import Shape, Workload
from sparsegen import patterns
from sparsegen.ir.program import Program
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.plan import Plan

# Axis declarations are no types.
# mypy: ignore-errors
# ruff: noqa: F722, F821, UP037

PAGE = 64


@sg.pattern
def listed(q: "T Hq c", kv: "S 1 c", x: "T 1 c", y: "S 1 c", *, topk=2048, d_v=512):
    """Attend to a list of keys: DSA after its indexer."""
    i, j = sg.index(q, kv)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    o = sg.attend(q, kv, kv[..., :d_v], where=(j <= i) & sel[i, j])
    return o, o.lse


@sg.pattern
def latent(q: "T Hq c", kv: "S 1 c", *, d_v=512):
    """Attend in the latent space of MLA."""
    i, j = sg.index(q, kv)
    o = sg.attend(q, kv, kv[..., :d_v], where=j <= i)
    return o, o.lse


@sg.pattern
def blocks(q: "T Hq D", k: "S Hk D", v: "S Hk E", *, topk=16, block=64):
    """Attend to a list of blocks for each group of heads: the selected branch of NSA."""
    i, j = sg.index(q, k)
    grp = sg.head(q) // q.group
    sel = sg.select(sg.reduce(sg.score(q, k), "sum", by=(grp, i, j // block)), topk=topk)
    o = sg.attend(q, k, v, where=(j <= i) & sel[grp, i, j // block])
    return o, o.lse


@sg.pattern
def pooled(q: "T Hq D", k: "S Hk D", v: "S Hk E", *, width=32, stride=16):
    """Attend to compressed keys: the compressed branch of NSA as it is lowered."""
    i, _ = sg.index(q, k)
    kc, vc = (sg.compress(x, "mean", width=width, stride=stride) for x in (k, v))
    o = sg.attend(q, kc, vc, where=kc.end <= i)
    return o, o.lse


@sg.pattern
def entries(q: "T Hq D", k: "S Hk D", v: "S Hk E", *, width=32, stride=16):
    """Attend to keys that the caller has compressed."""
    i, j = sg.index(q, k)
    o = sg.attend(q, k, v, where=stride * j + width - 1 <= i)
    return o, o.lse


@sg.pattern
def window(q: "T Hq D", k: "S Hk D", v: "S Hk E", *, W=512):
    """Attend to the last W keys: the sliding branch of NSA."""
    i, j = sg.index(q, k)
    o = sg.attend(q, k, v, where=(j <= i) & (i - j < W))
    return o, o.lse


@sg.pattern
def causal(q: "T Hq D", k: "S Hk D", v: "S Hk E"):
    """Attend to the past: the prefill of MLA, unfolded."""
    i, j = sg.index(q, k)
    o = sg.attend(q, k, v, where=j <= i)
    return o, o.lse


@sg.pattern
def packed(q: "T Hq D", k: "S Hk D", v: "S Hk E", doc: sg.Tensor["S", "int"]):
    """Attend to the past of the same document."""
    i, j = sg.index(q, k)
    o = sg.attend(q, k, v, where=(j <= i) & (doc[i] == doc[j]))
    return o, o.lse


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile: the program whose attend task it is, and how it is bound."""

    shape: Shape
    program: Program

    @property
    def plan(self) -> Plan:
        """Return the plan of the program."""
        shape = self.shape
        sizes = {
            "Hq": shape.heads, "Hk": shape.kv_heads,
            "c": shape.d_qk, "D": shape.d_qk, "E": shape.d_v,
        }  # fmt: skip
        letters = {str(axis) for node in self.program.inputs for axis in node.axes}
        binding = Binding(
            dtype=shape.dtype,
            layout="paged" if shape.page else "sequence",
            page_size=shape.page,
            sizes=tuple(sorted((k, n) for k, n in sizes.items() if k in letters)),
        )
        return partition(self.program, binding)


def of(shape: Shape) -> Kernel:
    """Return the kernel of a shape."""
    windows = {"width": shape.width, "stride": shape.stride}
    match shape.kind:
        case "listed":
            return Kernel(shape, listed.trace(topk=shape.topk, d_v=shape.d_v))
        case "blocks":
            return Kernel(shape, blocks.trace(topk=shape.topk, block=shape.block))
        case "entries":
            return Kernel(shape, (pooled if shape.pooled else entries).trace(**windows))
        case "window":
            return Kernel(shape, window.trace(W=shape.window))
        case "packed":
            return Kernel(shape, packed.trace())
        case "causal" if shape.shared:
            return Kernel(shape, latent.trace(d_v=shape.d_v))
        case "causal":
            return Kernel(shape, causal.trace())
    raise ValueError(f"there is no kind {shape.kind!r}")


def _sizes(pattern: str, config: str) -> dict[str, Any]:
    """Return sizes and hyperparameters of a published model."""
    found = next(c for c in patterns.configs(pattern) if c.name == config)
    program = patterns.load(pattern).trace(**found.hyper)
    return {**dict(program.hyper), **found.sizes}


_DSA = _sizes("dsa", "deepseek-v3.2")
# The heads of fla's port with the constants of the paper, which peers measure.
_NSA = _sizes("nsa", "fla") | dict(patterns.load("nsa").trace().hyper)
_MLA = _sizes("mla_prefill", "deepseek-v3")
_PACKED = _sizes("document", "llama-3-8b-packed")
_V3, _LITE = (_sizes("mla_decode", name) for name in ("deepseek-v3", "deepseek-v2-lite"))

_GROUPED = {
    "heads": _NSA["Hq"], "kv_heads": _NSA["Hk"], "d_qk": _NSA["D"], "d_v": _NSA["E"],
}  # fmt: skip


def _dsa(heads: int) -> Shape:
    return Shape(
        kind="listed", heads=heads, kv_heads=1, d_qk=_DSA["c"], d_v=_DSA["d_v"], shared=True,
        topk=_DSA["topk"],
    )  # fmt: skip


def _decode(sizes: dict[str, Any]) -> Shape:
    return Shape(
        kind="causal", heads=sizes["H"], kv_heads=1, d_qk=sizes["c"] + sizes["r"],
        d_v=sizes["c"], shared=True, page=PAGE,
    )  # fmt: skip


def _compressed(*, pooled: bool) -> Shape:
    return Shape(kind="entries", width=_NSA["l"], stride=_NSA["d"], pooled=pooled, **_GROUPED)


SHAPES = {
    # 64 heads are GLM-5's; 16 are what eight GPUs share of DeepSeek's 128.
    "listed-h128": _dsa(_DSA["Hq"]),
    "listed-h64": _dsa(_sizes("dsa", "glm-5")["Hq"]),
    "listed-h16": _dsa(_DSA["Hq"] // 8),
    "decode-h128": _decode(_V3),
    "decode-h16": _decode(_LITE),
    "blocks": Shape(kind="blocks", topk=_NSA["n"], block=_NSA["L"], **_GROUPED),
    "entries": _compressed(pooled=False),
    "pooled": _compressed(pooled=True),
    "window": Shape(kind="window", window=_NSA["W"], **_GROUPED),
    "packed": Shape(
        kind="packed", heads=_PACKED["Hq"], kv_heads=_PACKED["Hk"], d_qk=_PACKED["D"],
        d_v=_PACKED["E"],
    ),
    "prefill": Shape(
        kind="causal", heads=_MLA["H"], kv_heads=_MLA["H"], d_qk=_MLA["n"] + _MLA["r"],
        d_v=_MLA["v"],
    ),
}  # fmt: skip


def _prefill(heads: int) -> list[Workload]:
    """Return W1: sparse prefill of 4096 queries."""
    cases = [(n, draw) for n in (8, 32, 128) for draw in ("causal", "padded")] + [(8, "start")]
    return [
        Workload(
            name=f"W1 h{heads} {n}k" + ("" if draw == "causal" else f" {draw}"),
            kernel=f"listed-h{heads}", queries=_DSA["T"], keys=n * 1024, draw=draw,
        )
        for n, draw in cases
    ]  # fmt: skip


def _branches(n: int) -> list[Workload]:
    """Return W6: the branches of NSA over a sequence of n x 1024 tokens."""
    tokens = n * 1024
    all_of = {"queries": tokens, "keys": tokens}
    given = SHAPES["entries"].entries(tokens)
    return [
        Workload(name=f"W6 selected {n}k random", kernel="blocks", draw="random", **all_of),
        Workload(name=f"W6 selected {n}k clustered", kernel="blocks", draw="clustered", **all_of),
        Workload(name=f"W6 compressed {n}k", kernel="entries", queries=tokens, keys=given),
        Workload(name=f"W6 compressed {n}k pooled", kernel="pooled", **all_of),
        Workload(name=f"W6 window {n}k", kernel="window", **all_of),
    ]


WORKLOADS = (
    *(w for heads in (128, 64, 16) for w in _prefill(heads)),
    *(
        Workload(
            name=f"W3 h{h} b{b} {n}k", kernel=f"decode-h{h}", queries=1, keys=n * 1024, batch=b
        )
        for h, b, n in ((128, 128, 4), (128, 128, 8), (128, 32, 32), (16, 128, 8))
    ),
    *(w for n in (8, 32, 64) for w in _branches(n)),
    Workload(name="W8 8k", kernel="prefill", queries=8192, keys=8192),
    *(
        Workload(name=f"packed {n}k", kernel="packed", queries=n * 1024, keys=n * 1024)
        for n in (8, 32)
    ),
)
