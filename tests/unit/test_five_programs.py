"""The five programs the language was designed around, exactly as first printed."""

import numpy as np
import pytest

import sparsegen as sg
from sparsegen import mean, patterns, relu
from tests.unit.oracles import ORACLES


# fmt: off
@sg.pattern
def sink_window(q: "T Hq D", k: "S Hk D", v: "S Hk D", sink: "Hq", *, W=4096, S=4):
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) & ((i - j < W) | (j < S)), sink=sink)

@sg.pattern
def mla_decode(q_nope: "T H n", q_rope: "T H r", c_kv: "S 1 c", k_rope: "S 1 r", w_uk: "H n c", w_uv: "H c v", *, scale=192 ** -0.5):  # noqa: E501
    i, j   = sg.index(q_nope, c_kv)
    latent = sg.project(q_nope, w_uk)                       # absorbed: q·(W c) = (Wᵀq)·c
    o = sg.attend(sg.cat(latent, q_rope), sg.cat(c_kv, k_rope), c_kv, where=j <= i, scale=scale)
    return sg.project(o, w_uv)

@sg.pattern
def dsa(q: "T Hq c", kv: "S 1 c", q_idx: "T Hi e", k_idx: "S 1 e", w: "T Hi", *, topk=2048, d_v=512):  # noqa: E501
    i, j = sg.index(q, kv)
    s   = sg.score(q_idx, k_idx, act=relu, weights=w, scale=1, where=j <= i)
    sel = sg.select(sg.reduce(s, "sum", by=(i, j)), topk=topk)              # one list for all heads
    return sg.attend(q, kv, kv[..., :d_v], where=(j <= i) & sel[i, j])

@sg.pattern
def moba(q: "T Hq D", k: "S Hk D", v: "S Hk D", *, B=512, n=3):
    i, j = sg.index(q, k);  h = sg.head(q)  # noqa: E702
    kb  = sg.compress(k, mean, width=B)
    sel = sg.select(sg.score(q, kb, where=kb.end < i // B * B), topk=n - 1)     # past blocks
    return sg.attend(q, k, v, where=(j <= i) & (sel[h, i, j // B] | (j // B == i // B)))

@sg.pattern
def nsa(q: "T Hq D", k: "S Hk D", v: "S Hk D", g: "T Hq 3", phi_k: "l D D", phi_v: "l D D", *, l=32, d=16, L=64, n=16, W=512):  # noqa: E501, E741
    i, j = sg.index(q, k);  h = sg.head(q);  grp = h // q.group  # noqa: E702
    kc  = sg.compress(k, phi_k, width=l, stride=d);  vc = sg.compress(v, phi_v, width=l, stride=d)  # noqa: E702
    cmp = sg.attend(q, kc, vc, where=kc.end <= i)
    p   = sg.score(q, kc, norm="softmax", where=kc.end <= i)      # shares cmp's lse
    blk = kc.blocks(L)                                            # entry -> selection-block key
    imp = sg.reduce(p, "sum", by=(grp, i, blk))
    sel = sg.select(imp, topk=n, force=(blk < 1) | (blk == i // L) | (blk == i // L - 1))
    slc = sg.attend(q, k, v, where=(j <= i) & sel[grp, i, j // L])
    win = sg.attend(q, k, v, where=(j <= i) & (i - j < W))
    return sg.merge([cmp, slc, win], gates=g)
# fmt: on


SINK = {"Hq": 6, "Hk": 2, "D": 5}
MLA = {"H": 3, "n": 7, "r": 3, "c": 11, "v": 5}
DSA = {"Hq": 5, "c": 9, "Hi": 3, "e": 7}
CASES = {
    "sink_window": (sink_window, SINK, {"W": 7, "S": 3}, {"window": 7, "first": 3}),
    "mla_decode": (mla_decode, MLA, {}, {}),
    "dsa": (dsa, DSA, {"topk": 6, "d_v": 4}, {"topk": 6, "d_v": 4}),
    "moba": (moba, SINK, {"B": 5, "n": 3}, {"B": 5, "n": 3}),
    "nsa": (nsa, SINK, *[{"l": 4, "d": 2, "L": 8, "n": 4, "W": 5}] * 2),
}


@pytest.mark.parametrize("lengths", [(23, 23), (7, 41), (1, 67), (13, 9)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_oracle(name: str, lengths: tuple[int, int]) -> None:
    pattern, sizes, hyper, theirs = CASES[name]
    program = pattern.trace(**hyper)
    made = patterns.random_inputs(program, {**sizes, "T": lengths[0], "S": lengths[1]}, seed=3)
    x = {n: a.astype(np.float64) for n, a in made.items()}
    want = ORACLES["sliding_window" if name == "sink_window" else name](**x, **theirs)
    np.testing.assert_allclose(sg.reference(program, x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_survives_json(name: str) -> None:
    program = CASES[name][0].program
    again = sg.Program.from_json(program.to_json())
    assert again == program
    assert again.hash == program.hash
