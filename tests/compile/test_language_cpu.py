"""What the language has and no shipped pattern uses, against the float64 reference on the CPU."""

from typing import Any

import pytest
import torch

import sparsegen as sg
from sparsegen import api
from sparsegen.patterns import Config
from sparsegen.runtime import catalog
from tests.compile.test_patterns_cpu import check
from tests.harness import batch, one_sequence

Q, K, V = sg.Tensor["T Hq D"], sg.Tensor["S Hk D"], sg.Tensor["S Hk E"]
SIZES = {"T": 19, "S": 43, "Hq": 6, "Hk": 2, "D": 7, "E": 5}


@sg.pattern
def negated(q: Q, k: K, v: V):
    """A hole in the past."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) & ~((i - j > 3) & (i - j < 9)))


@sg.pattern
def strided(q: Q, k: K, v: V, *, W=24):
    """Every third key of a window, and columns that are multiples of eight."""
    i, j = sg.index(q, k)
    near = (i - j < W) & ((i - j) % 3 == 0)
    return sg.attend(q, k, v, where=(j <= i) & (near | (j % 8 == 0)))


@sg.pattern
def chunked(q: Q, k: K, v: V, *, C=8):
    """Chunks of positions, and a prefix of all."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) & ((i // C == j // C) | (j < 3)))


@sg.pattern
def prefix(q: Q, k: K, v: V, *, P=11):
    """Bidirectional in a prefix; the last key is for all."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) | (j < P) | (j == j.stop - 1))


@sg.pattern
def by_head(q: Q, k: K, v: V):
    """A window that grows with the head."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    return sg.attend(q, k, v, where=(j <= i) & (i - j < 4 * (h + 1)))


@sg.pattern
def positions(q: Q, k: K, v: V, pos: sg.Tensor["S", "int"]):
    """A window in positions that a table gives."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(pos[j] <= pos[i]) & (pos[i] - pos[j] < 2))


@sg.pattern
def tokens(q: Q, k: K, v: V, kind: sg.Tensor["S", "int"]):
    """Longformer: a window, and tokens that all see."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(i - j < 6) & (j - i < 6) | (kind[j] == 1) | (kind[i] == 1))


@sg.pattern
def bias_table(q: Q, k: K, v: V, bias: sg.Tensor["Hq n"]):
    """A learned bias for each head and clamped distance."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    return sg.attend(q, k, v, where=j <= i, mod=lambda s: s + bias[h, sg.minimum(i - j, 9)])


@sg.pattern
def capped_alibi(q: Q, k: K, v: V, slope: sg.Tensor["Hq"]):
    """Two modifications of the score and a switch."""
    i, j = sg.index(q, k)
    h = sg.head(q)

    def mod(s: Any) -> Any:
        return sg.where(j % 2 == 0, 3 * sg.tanh(s / 3), s) - sg.abs(slope[h]) * (i - j)

    out = sg.attend(q, k, v, where=j <= i, mod=mod, scale=0.3)
    return out, out.lse


@sg.pattern
def two_sources(
    q: Q, k: K, v: V, k2: sg.Tensor["S Hk D"], v2: sg.Tensor["S Hk E"], sink: sg.Tensor["Hq"]
):
    """Two key sources in one softmax."""
    i, j = sg.index(q, k)
    out = sg.attend(
        q, [k, k2], [v, v2], where=[(j <= i) & (i - j < 5), (j <= i) & (j % 4 == 3)], sink=sink
    )
    return out, out.lse


@sg.pattern
def merged_by_lse(q: Q, k: K, v: V):
    """Near and far keys apart, merged as one softmax; some rows see nothing far."""
    i, j = sg.index(q, k)
    near = sg.attend(q, k, v, where=(j <= i) & (i - j < 9))
    far = sg.attend(q, k, v, where=i - j >= 9)
    out = sg.merge([near, far])
    return out, out.lse


@sg.pattern
def merged_by_gates(q: Q, k: K, v: V, g: sg.Tensor["T Hq 2"]):
    i, j = sg.index(q, k)
    near = sg.attend(q, k, v, where=(j <= i) & (i - j < 9))
    far = sg.attend(q, k, v, where=i - j >= 9)
    return sg.merge([near, far], gates=g)


@sg.pattern
def pools(q: Q, k: K, v: V):
    """A sum of overlapping windows as keys, their greatest values as values."""
    kc = sg.compress(k, sg.sum, width=5, stride=2, partial=True)
    vc = sg.compress(v, sg.max, width=5, stride=2, partial=True)
    i, _ = sg.index(q, kc)
    return sg.attend(q, kc, vc, where=kc.start <= i)


@sg.pattern
def weighted_pool(
    q: Q, k: K, v: V, wk: sg.Tensor["m"], bk: sg.Tensor["m D"], wv: sg.Tensor["m E F"],
    bv: sg.Tensor["m E"], *, m=6,
):  # fmt: skip
    """Learned windows with a bias for each slot: a weight for each slot, and a matrix."""
    kc = sg.compress(k, wk, width=m, stride=3, bias=bk)
    vc = sg.compress(v, wv, width=m, stride=3, bias=bv)
    i, _ = sg.index(q, kc)
    return sg.attend(q, kc, vc, where=kc.end <= i)


@sg.pattern
def deep_pool(q: Q, k: K, v: sg.Tensor["S Hk 80"], w: sg.Tensor["m 80 F"], *, m=8):
    """A product too deep for one block of contracted elements."""
    kc = sg.compress(k, sg.mean, width=m)
    vc = sg.compress(v, w, width=m)
    i, _ = sg.index(q, kc)
    return sg.attend(q, kc, vc, where=kc.end <= i)


@sg.pattern
def softmax_pool(q: Q, k: K, v: V, z: sg.Tensor["S Hk D"], b: sg.Tensor["m D"], *, m=4):
    """Keys pooled by softmax without overlap."""
    kc = sg.compress(k, sg.softmax(z, bias=b), width=m)
    vc = sg.compress(v, sg.mean, width=m)
    i, _ = sg.index(q, kc)
    return sg.attend(q, kc, vc, where=kc.end <= i)


@sg.pattern
def top_p(q: Q, k: K, v: V, *, p=0.7):
    """The fewest keys that hold a share of the probability, of each head."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    sel = sg.select(sg.score(q, k, norm="softmax", where=j <= i), top_p=p)
    return sg.attend(q, k, v, where=(j <= i) & sel[h, i, j]), sel.indices


@sg.pattern
def threshold(q: Q, k: K, v: V):
    """Blocks whose greatest score passes a bar, and the own one."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    best = sg.reduce(sg.score(q, k, where=j <= i), "max", by=(h, i, j // 4))
    sel = sg.select(best, threshold=0.9, force=j // 4 == i // 4)
    return sg.attend(q, k, v, where=(j <= i) & sel[h, i, j // 4])


@sg.pattern
def lse_of_pairs(q: Q, k: K, v: V, *, B=5, n=2):
    """Blocks by the log-sum-exp of their scores, added up by groups of heads."""
    i, j = sg.index(q, k)
    grp = sg.head(q) // q.group
    s = sg.reduce(sg.score(q, k, where=j <= i), "lse", by=(grp, i, j // B))
    sel = sg.select(s, topk=n)
    return sg.attend(q, k, v, where=(j <= i) & sel[grp, i, j // B]), sel.indices


@sg.pattern
def mean_of_heads(q: Q, k: K, v: V):
    """Keys by the mean of all heads' scores; the budget grows with the position."""
    i, j = sg.index(q, k)
    s = sg.reduce(sg.score(q, k, mod=lambda s: s - 0.1 * (i - j), where=j <= i), "mean", by=(i, j))
    sel = sg.select(s, topk=2 + i // 5)
    return sg.attend(q, k, v, where=(j <= i) & sel[i, j]), sel.indices


@sg.pattern
def without(q: Q, k: K, v: V):
    """All but the keys that fit best."""
    i, j = sg.index(q, k)
    sel = sg.select(sg.reduce(sg.score(q, k, where=j <= i), "max", by=(i, j)), topk=3)
    return sg.attend(q, k, v, where=(j <= i) & ~sel[i, j])


@sg.pattern
def both(q: Q, k: K, v: V):
    """Keys that two selections agree on, and those of either in a window."""
    i, j = sg.index(q, k)
    s = sg.score(q, k, where=j <= i)
    a = sg.select(sg.reduce(s, "max", by=(i, j)), topk=9)
    b = sg.select(sg.reduce(s, "mean", by=(i, j // 3)), topk=5)
    seen = (a[i, j] & b[i, j // 3]) | ((a[i, j] | b[i, j // 3]) & (i - j < 6))
    return sg.attend(q, k, v, where=(j <= i) & seen)


@sg.pattern
def activations(q: Q, k: K, v: V, w: sg.Tensor["T Hq"]):
    """An indexer that is no sum of relus."""
    i, j = sg.index(q, k)
    s = sg.score(q, k, act=lambda s: sg.sigmoid(s) * sg.sqrt(sg.abs(s)), weights=w, where=j <= i)
    sel = sg.select(sg.reduce(s, "sum", by=(i, j)), topk=4)
    return sg.attend(q, k, v, where=(j <= i) & sel[i, j])


PATTERNS = [
    negated, strided, chunked, prefix, by_head, positions, tokens, bias_table, capped_alibi,
    two_sources, merged_by_lse, merged_by_gates, pools, weighted_pool, deep_pool, softmax_pool,
    top_p, threshold, lse_of_pairs, mean_of_heads, without, both, activations,
]  # fmt: skip


def config_of(pattern: Any) -> Config:
    letters = {str(a) for node in pattern.program.inputs for a in node.axes}
    extents = {**SIZES, "n": 10, "F": 9}
    known = {x for x, value in pattern.program.hyper if isinstance(value, int)}
    return Config("odd", {x: n for x, n in extents.items() if x in letters - known})


def lines_of(pattern: Any) -> int:
    """Return how long the code of the one task of a pattern is."""
    request = api.request_of(pattern)
    (task,) = request.plan({"Hq": 6, "Hk": 2, "D": 7, "E": 5}).tasks
    (choice,) = catalog.choose_all([task], request.arch, None)
    return len(choice.module.apply(task, choice.knobs, request.arch).script().splitlines())


def test_ranges_of_keys_share_their_code() -> None:
    """Three ranges of keys take little more code, and so time to compile, than one."""
    assert lines_of(prefix) < 1.3 * lines_of(by_head)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_one_sequence(pattern: Any) -> None:
    check(one_sequence(pattern, config_of(pattern), torch.float32))


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
def test_pages(pattern: Any) -> None:
    lengths = [(5, 31), (0, 0), (1, 17), (9, 9)]
    check(batch(pattern, config_of(pattern), "paged", lengths, page=4, dtype=torch.bfloat16))
