"""Patterns of attention in a latent space, as `gpu_latent` times them."""

from typing import Any

import sparsegen as sg
from sparsegen import Tensor


@sg.pattern
def dense(q: Tensor["T H c"], kv: Tensor["S 1 c"], *, d_v=512):
    """Attend to the past."""
    i, j = sg.index(q, kv)
    o = sg.attend(q, kv, kv[..., :d_v], where=j <= i)
    return o, o.lse


@sg.pattern
def listed(
    q: Tensor["T H c"],
    kv: Tensor["S 1 c"],
    x: Tensor["T 1 e"],
    y: Tensor["S 1 e"],
    *,
    topk=2048,
    d_v=512,
):
    """Attend to keys that another kernel lists."""
    i, j = sg.index(q, kv)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    o = sg.attend(q, kv, kv[..., :d_v], where=(j <= i) & sel[i, j])
    return o, o.lse


@sg.pattern
def joined(
    q: Tensor["T H c"],
    q_r: Tensor["T H r"],
    kv: Tensor["S 1 c"],
    k_r: Tensor["S 1 r"],
    x: Tensor["T 1 e"],
    y: Tensor["S 1 e"],
    sink: Tensor["H"],
    *,
    topk=2048,
    scale=576**-0.5,
):
    """Attend to listed keys of two parts, beside a sink."""
    i, j = sg.index(q, kv)
    sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
    queries, keys = sg.cat(q, q_r), sg.cat(kv, k_r)
    where = (j <= i) & sel[i, j]
    o = sg.attend(queries, keys, kv, where=where, sink=sink, scale=scale)
    return o, o.lse


@sg.pattern
def sunk(
    q: Tensor["T H c"],
    kv: Tensor["S 1 c"],
    sink: Tensor["H"],
    *,
    d_v=512,
    window=128,
    first=4,
):
    """Attend to a window and the first keys, beside a sink."""
    i, j = sg.index(q, kv)
    where = (j <= i) & ((i - j < window) | (j < first))
    o = sg.attend(q, kv, kv[..., :d_v], where=where, sink=sink)
    return o, o.lse


@sg.pattern
def projected(
    q: Tensor["T H n"],
    q_r: Tensor["T H r"],
    kv: Tensor["S 1 c"],
    k_r: Tensor["S 1 r"],
    w: Tensor["H n c"],
    u: Tensor["H c m"],
    *,
    scale=576**-0.5,
):
    """Attend between projections of queries and outputs, which are float32."""
    i, j = sg.index(q, kv)
    queries, keys = sg.cat(sg.project(q, w), q_r), sg.cat(kv, k_r)
    return sg.project(sg.attend(queries, keys, kv, where=j <= i, scale=scale), u)


def program_of(kernel: Any) -> Any:
    """Return the program of a kernel of `gpu_latent`."""
    if kernel.projected:
        return projected.trace()
    if kernel.rope:
        return joined.trace(topk=kernel.topk)
    if kernel.topk:
        return listed.trace(topk=kernel.topk, d_v=kernel.d_v)
    if kernel.sink:
        hyper = {"d_v": kernel.d_v, "window": kernel.window, "first": kernel.first}
        return sunk.trace(**hyper)
    return dense.trace(d_v=kernel.d_v)
