"""Compute the shipped patterns densely, with loops and masks: oracles that share no code with us.

Each takes the inputs of one sequence in float64 and the hyperparameters, and returns the output.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Array = np.ndarray
ORACLES: dict[str, Callable[..., Array]] = {}


def oracle(fn: Callable[..., Array]) -> Callable[..., Array]:
    ORACLES[fn.__name__] = fn
    return fn


# --- building blocks ----------------------------------------------------------------------------


def queries(q: Array, k: Array) -> Array:
    """Return the absolute position of each query: the last ones of the sequence."""
    return np.arange(len(q)) + len(k) - len(q)


def logits(q: Array, k: Array, scale: float | None = None) -> Array:
    """Return [heads queries keys]."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return np.einsum("thd,shd->hts", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)


def softmax(s: Array, visible: Array) -> Array:
    """Return probabilities over the visible keys; zeros in rows that see none."""
    p = np.zeros(np.broadcast_shapes(s.shape, visible.shape))
    s, visible = np.broadcast_to(s, p.shape), np.broadcast_to(visible, p.shape)
    for row in np.ndindex(*p.shape[:-1]):
        seen = np.flatnonzero(visible[row])
        if len(seen):
            e = np.exp(s[row][seen] - s[row][seen].max())
            p[row][seen] = e / e.sum()
    return p


def mix(p: Array, v: Array) -> Array:
    return np.einsum("hts,shd->thd", p, np.repeat(v, p.shape[0] // v.shape[1], axis=1))


def masked(q: Array, k: Array, v: Array, visible: Array, scale: float | None = None) -> Array:
    return mix(softmax(logits(q, k, scale), visible), v)


def causal_mask(q: Array, k: Array) -> Array:
    return np.arange(len(k))[None, None, :] <= queries(q, k)[None, :, None]


def with_sink(s: Array, visible: Array, v: Array, sink: Array) -> Array:
    """Attend with one more key of logit sink[h] and value zero."""
    heads, t, _ = s.shape
    extra = np.broadcast_to(sink[:, None, None], (heads, t, 1))
    visible = np.broadcast_to(visible, s.shape)
    p = softmax(np.concatenate([s, extra], -1), np.concatenate([visible, extra == extra], -1))
    return mix(p[..., :-1], v)


def best(scores: dict[int, float], budget: int, forced: Iterable[int] = ()) -> set[int]:
    """Return the forced keys, then those of the largest score, smallest index first."""
    order = sorted(forced) + sorted(
        (j for j in scores if j not in set(forced)), key=lambda j: (-scores[j], j)
    )
    return set(order[:budget])


def windows(x: Array, width: int, stride: int) -> list[Array]:
    return [x[a : a + width] for a in range(0, len(x) - width + 1, stride)]


def pooled(x: Array, width: int, stride: int, how: Callable[[Array], Array]) -> Array:
    out = [how(w) for w in windows(x, width, stride)]
    return np.stack(out) if out else np.zeros((0, *x.shape[1:]))


def ragged_pool(x: Array, width: int, how: Callable[..., Array]) -> Array:
    return np.stack([how(x[a : a + width], axis=0) for a in range(0, len(x), width)])


# --- patterns -----------------------------------------------------------------------------------


@oracle
def full(q: Array, k: Array, v: Array) -> Array:
    return masked(q, k, v, np.ones((1, 1, len(k)), bool))


@oracle
def causal(q: Array, k: Array, v: Array) -> Array:
    return masked(q, k, v, causal_mask(q, k))


@oracle
def sliding_window(
    q: Array, k: Array, v: Array, sink: Array, *, window: int = 4096, first: int = 4
) -> Array:
    i, j = queries(q, k)[:, None], np.arange(len(k))
    seen = [(j <= i) & (i - j < window), (j <= i) & (j < first)]
    return with_sink(logits(q, k), (seen[0] | seen[1])[None], v, sink)


@oracle
def document(q: Array, k: Array, v: Array, doc: Array) -> Array:
    same = np.zeros((len(q), len(k)), bool)
    for t, i in enumerate(queries(q, k)):
        for j in range(len(k)):
            same[t, j] = j <= i and doc[max(i, 0)] == doc[j]
    return masked(q, k, v, same[None])


@oracle
def alibi(q: Array, k: Array, v: Array, slope: Array) -> Array:
    distance = np.arange(len(k))[None, :] - queries(q, k)[:, None]
    s = logits(q, k) + slope[:, None, None] * distance
    return mix(softmax(s, causal_mask(q, k)), v)


@oracle
def softcap(q: Array, k: Array, v: Array, *, cap: float = 50.0, window: int = 4096) -> Array:
    near = queries(q, k)[None, :, None] - np.arange(len(k)) < window
    return mix(softmax(cap * np.tanh(logits(q, k) / cap), causal_mask(q, k) & near), v)


@oracle
def mla_decode(
    q_nope: Array, q_rope: Array, c_kv: Array, k_rope: Array, w_uk: Array, w_uv: Array,
    *, scale: float = 192**-0.5,
) -> Array:  # fmt: skip
    """Unfold the latents into full keys and values instead of absorbing the projections."""
    s, h = len(c_kv), q_nope.shape[1]
    k = np.zeros((s, h, q_nope.shape[2] + q_rope.shape[2]))
    v = np.zeros((s, h, w_uv.shape[2]))
    for n in range(h):
        k[:, n] = np.concatenate([c_kv[:, 0] @ w_uk[n].T, k_rope[:, 0]], axis=-1)
        v[:, n] = c_kv[:, 0] @ w_uv[n]
    q = np.concatenate([q_nope, q_rope], axis=-1)
    return masked(q, k, v, causal_mask(q, k), scale)


@oracle
def mla_prefill(**inputs: Any) -> Array:
    return mla_decode(**inputs)


@oracle
def nsa(
    q: Array, k: Array, v: Array, g: Array, phi_k: Array, phi_v: Array,
    *, l: int = 32, d: int = 16, L: int = 64, n: int = 16, W: int = 512,  # noqa: E741
) -> Array:  # fmt: skip
    kc = pooled(k, l, d, lambda w: np.einsum("whd,wde->he", w, phi_k))
    vc = pooled(v, l, d, lambda w: np.einsum("whd,wde->he", w, phi_v))
    i, j = queries(q, k), np.arange(len(k))
    complete = (np.arange(len(kc)) * d + l - 1)[None, None, :] <= i[None, :, None]
    p = softmax(logits(q, kc), complete)
    group = q.shape[1] // k.shape[1]
    chosen = np.zeros((q.shape[1], len(q), len(k)), bool)
    for grp in range(k.shape[1]):
        for t in range(len(q)):
            mass: dict[int, float] = {}
            for e in np.flatnonzero(complete[0, t]):
                for x in range(e * d, e * d + l):  # each position carries 1 / stride of the entry
                    share = p[grp * group : (grp + 1) * group, t, e].sum() / d
                    mass[x // L] = mass.get(x // L, 0.0) + share
            blocks = -(-len(k) // L)
            near = {b for b in (0, i[t] // L, i[t] // L - 1) if 0 <= b < blocks}
            picked = best(mass, n, near)
            chosen[grp * group : (grp + 1) * group, t] = np.isin(j // L, list(picked))
    slc = masked(q, k, v, causal_mask(q, k) & chosen)
    win = masked(q, k, v, causal_mask(q, k) & (i[None, :, None] - j < W))
    return g[..., :1] * mix(p, vc) + g[..., 1:2] * slc + g[..., 2:] * win


def index_scores(q_idx: Array, k_idx: Array, w: Array) -> Array:
    """Return the lightning indexer's sum over heads of w * relu(q . k), [queries keys]."""
    r = np.maximum(np.einsum("thd,sd->ths", q_idx, k_idx[:, 0]), 0.0)
    return np.einsum("ths,th->ts", r, w)


@oracle
def dsa(
    q: Array, kv: Array, q_idx: Array, k_idx: Array, w: Array, *, topk: int = 2048, d_v: int = 512
) -> Array:
    s = index_scores(q_idx, k_idx, w)
    chosen = np.zeros((1, len(q), len(kv)), bool)
    for t, i in enumerate(queries(q, kv)):
        for j in best({j: s[t, j] for j in range(len(kv)) if j <= i}, topk):
            chosen[0, t, j] = True
    return masked(q, kv, kv[..., :d_v], chosen)


@oracle
def hisa(
    q: Array, kv: Array, q_idx: Array, k_idx: Array, w: Array,
    *, B: int = 128, n: int = 64, topk: int = 2048, d_v: int = 512,
) -> Array:  # fmt: skip
    blocks = ragged_pool(k_idx, B, np.mean)
    coarse, fine = index_scores(q_idx, blocks, w), index_scores(q_idx, k_idx, w)
    chosen = np.zeros((1, len(q), len(kv)), bool)
    for t, i in enumerate(queries(q, kv)):
        done = {b: coarse[t, b] for b in range(len(blocks)) if (b + 1) * B - 1 <= i}
        near = {b for b in (0, i // B) if 0 <= b < len(blocks)}
        allowed = best(done, n, near)
        tokens = {j: fine[t, j] for j in range(len(kv)) if j <= i and j // B in allowed}
        for j in best(tokens, topk):
            chosen[0, t, j] = True
    return masked(q, kv, kv[..., :d_v], chosen)


@oracle
def moba(q: Array, k: Array, v: Array, *, B: int = 512, n: int = 3) -> Array:
    gate = logits(q, pooled(k, B, B, lambda w: w.mean(0)))
    j = np.arange(len(k))
    chosen = np.zeros((q.shape[1], len(q), len(k)), bool)
    for h in range(q.shape[1]):
        for t, i in enumerate(queries(q, k)):
            own = i // B
            past = {b: gate[h, t, b] for b in range(max(own, 0))}
            chosen[h, t] = np.isin(j // B, [*best(past, n - 1), own])
    return masked(q, k, v, causal_mask(q, k) & chosen)


@oracle
def msa(
    q: Array, k: Array, v: Array, q_idx: Array, k_idx: Array, *, B: int = 128, n: int = 16
) -> Array:
    s = logits(q_idx, k_idx)
    group = q.shape[1] // k.shape[1]
    chosen = np.zeros((q.shape[1], len(q), len(k)), bool)
    for h in range(q.shape[1]):
        for t, i in enumerate(queries(q, k)):
            top: dict[int, float] = {}
            for j in range(len(k)):
                if j <= i:
                    top[j // B] = max(top.get(j // B, -np.inf), s[h // group, t, j])
            own = {i // B} if 0 <= i // B < -(-len(k) // B) else set()
            chosen[h, t] = np.isin(np.arange(len(k)) // B, list(best(top, n, own)))
    return masked(q, k, v, causal_mask(q, k) & chosen)


@oracle
def qsa(
    q: Array, k: Array, v: Array, q_idx: Array, k_idx: Array, *, m: int = 4, topk: int = 512
) -> Array:
    s = np.maximum(logits(q_idx, pooled(k_idx, m, m, lambda w: w.mean(0))), 0.0).sum(0)
    j = np.arange(len(k))
    chosen = np.zeros((1, len(q), len(k)), bool)
    for t, i in enumerate(queries(q, k)):
        done = max((i + 1) // m, 0)
        groups = best({e: s[t, e] for e in range(done)}, topk)
        chosen[0, t] = np.isin(j // m, list(groups)) | (j >= done * m)
    return masked(q, k, v, causal_mask(q, k) & chosen)


def csa_entries(x_prev: Array, z_prev: Array, x: Array, z: Array, ape: Array, m: int) -> Array:
    """Pool slots of the window before and of the own window, per channel."""
    out = []
    for e in range(len(x) // m):
        own = slice(e * m, (e + 1) * m)
        values, gates = x[own, 0], z[own, 0] + ape[m:]
        if e:
            before = slice((e - 1) * m, e * m)
            values = np.concatenate([x_prev[before, 0], values])
            gates = np.concatenate([z_prev[before, 0] + ape[:m], gates])
        weights = np.exp(gates) / np.exp(gates).sum(0)
        out.append((weights * values).sum(0))
    return np.array(out).reshape(len(out), 1, x.shape[2])


@oracle
def v4_csa(
    q: Array, kv: Array, x_prev: Array, z_prev: Array, x: Array, z: Array, ape: Array,
    q_idx: Array, w: Array, y_prev: Array, u_prev: Array, y: Array, u: Array, ape_idx: Array,
    sink: Array, *, m: int = 4, topk: int = 512, W: int = 128, scale_idx: float = 128**-0.5,
) -> Array:  # fmt: skip
    kc = csa_entries(x_prev, z_prev, x, z, ape, m)
    s = index_scores(q_idx, csa_entries(y_prev, u_prev, y, u, ape_idx, m), w * scale_idx)
    i = queries(q, kv)
    entries = np.zeros((len(q), len(kc)), bool)
    for t in range(len(q)):
        for e in best({e: s[t, e] for e in range(len(kc)) if e < (i[t] + 1) // m}, topk):
            entries[t, e] = True
    return joint(q, kc, kv, entries, window(i, len(kv), W), sink)


@oracle
def v4_hca(
    q: Array, kv: Array, x: Array, z: Array, ape: Array, sink: Array, *, m: int = 128, W: int = 128
) -> Array:
    def pool(rows: Array) -> Array:
        weights = np.exp(z[rows, 0] + ape)
        return (weights * x[rows, 0]).sum(0) / weights.sum(0)

    out = [pool(np.arange(e * m, (e + 1) * m)) for e in range(len(x) // m)]
    kc = np.array(out).reshape(len(out), 1, x.shape[2])
    i = queries(q, kv)
    done = np.arange(len(kc))[None, :] < ((i + 1) // m)[:, None]
    return joint(q, kc, kv, done, window(i, len(kv), W), sink)


def window(i: Array, keys: int, width: int) -> Array:
    j = np.arange(keys)
    return (j <= i[:, None]) & (i[:, None] - j < width)


def joint(q: Array, kc: Array, kv: Array, seen_c: Array, seen: Array, sink: Array) -> Array:
    """Attend to entries and tokens laid side by side."""
    both = np.concatenate([kc, kv])
    return with_sink(logits(q, both), np.concatenate([seen_c, seen], -1)[None], both, sink)


@oracle
def quest(q: Array, k: Array, v: Array, *, B: int = 16, n: int = 128) -> Array:
    high, low = ragged_pool(k, B, np.max), ragged_pool(k, B, np.min)
    group = q.shape[1] // k.shape[1]
    chosen = np.zeros((q.shape[1], len(q), len(k)), bool)
    for h in range(q.shape[1]):
        for t, i in enumerate(queries(q, k)):
            bound = {
                b: np.maximum(q[t, h] * high[b, h // group], q[t, h] * low[b, h // group]).sum()
                for b in range(len(high))
                if (b + 1) * B - 1 <= i
            }
            own = {i // B} if 0 <= i // B < len(high) else set()
            chosen[h, t] = np.isin(np.arange(len(k)) // B, list(best(bound, n, own)))
    return masked(q, k, v, causal_mask(q, k) & chosen)


@oracle
def xattention(
    q: Array, k: Array, v: Array, *, stride: int = 8, B: int = 128, mass: float = 0.9
) -> Array:
    s, i = logits(q, k), queries(q, k)
    first = i[0] // stride
    rows, tiles, blocks = i[-1] // stride - first + 1, -(-len(k) // stride), -(-len(k) // B)
    chosen = np.zeros((q.shape[1], len(q), len(k)), bool)
    for h in range(q.shape[1]):
        sums = np.full((rows, tiles), -np.inf)
        for t in range(len(q)):
            for j in range(len(k)):
                if j <= i[t] and (i[t] % stride) + (j % stride) == stride - 1:
                    at = i[t] // stride - first, j // stride
                    sums[at] = (0.0 if sums[at] == -np.inf else sums[at]) + s[h, t, j]
        p = softmax(sums, sums > -np.inf)
        for b in sorted({x // B for x in i}):
            share: dict[int, float] = {}
            for r in range(rows):
                for c in range(tiles):
                    if (first + r) // (B // stride) == b and sums[r, c] > -np.inf:
                        block = c // (B // stride)
                        share[block] = share.get(block, 0.0) + p[r, c]
            forced = {x for x in (0, b) if 0 <= x < blocks}
            picked, held = set(forced), sum(share.get(x, 0.0) for x in forced)
            for x in sorted(set(share) - forced, key=lambda x: (-share[x], x)):
                if held >= mass * sum(share.values()):
                    break
                picked.add(x)
                held += share[x]
            for t in np.flatnonzero(i // B == b):
                chosen[h, t] = np.isin(np.arange(len(k)) // B, list(picked))
    return masked(q, k, v, causal_mask(q, k) & chosen)


@oracle
def vertical_slash(
    q: Array, k: Array, v: Array, *, last: int = 64, columns: int = 1000, slashes: int = 6096,
    first: int = 30, recent: int = 100,
) -> Array:  # fmt: skip
    i, j = queries(q, k), np.arange(len(k))
    late = causal_mask(q, k) & (i >= len(k) - last)[None, :, None]
    p = softmax(logits(q, k), late)
    chosen = np.zeros((q.shape[1], len(q), len(k)), bool)
    for h in range(q.shape[1]):
        column: dict[int, float] = {}
        slash: dict[int, float] = {}
        for t in range(len(q)):
            for x in np.flatnonzero(late[0, t]):
                column[x] = column.get(x, 0.0) + p[h, t, x]
                slash[i[t] - x] = slash.get(i[t] - x, 0.0) + p[h, t, x]
        kept = best(column, columns, range(min(first, len(k))))
        # There are as many distances as positions up to the last query.
        lines = best(slash, slashes, range(min(recent, max(i[-1] + 1, 0))))
        for t in range(len(q)):
            chosen[h, t] = np.isin(j, list(kept)) | np.isin(i[t] - j, list(lines))
    return masked(q, k, v, causal_mask(q, k) & chosen)


@oracle
def infllm_v2(
    q: Array, k: Array, v: Array, *, width: int = 32, stride: int = 16, B: int = 64, n: int = 64,
    local: int = 32,
) -> Array:  # fmt: skip
    kc = pooled(k, width, stride, lambda w: w.mean(0))
    i, group = queries(q, k), q.shape[1] // k.shape[1]
    complete = (np.arange(len(kc)) * stride + width - 1)[None, :] <= i[:, None]
    p = softmax(logits(q, kc), complete[None])
    blocks = -(-len(k) // B)
    chosen = np.zeros((q.shape[1], len(q), len(k)), bool)
    for h in range(q.shape[1]):
        own = slice(h // group * group, (h // group + 1) * group)
        for t in range(len(q)):
            top: dict[int, float] = {}
            for e in np.flatnonzero(complete[t]):
                for b in {x // B for x in range(e * stride, e * stride + width)}:
                    top[b] = max(top.get(b, -np.inf), p[own, t, e].sum())
            near = {b for b in range(blocks) if b < 1 or i[t] // B - local < b <= i[t] // B}
            chosen[h, t] = np.isin(np.arange(len(k)) // B, list(best(top, n, near)))
    return masked(q, k, v, causal_mask(q, k) & chosen)


@oracle
def snapkv(q: Array, k: Array, v: Array, *, last: int = 32, budget: int = 1024) -> Array:
    i, group = queries(q, k), q.shape[1] // k.shape[1]
    late = causal_mask(q, k) & (i >= len(k) - last)[None, :, None]
    p = softmax(logits(q, k), late)
    chosen = np.zeros((q.shape[1], 1, len(k)), bool)
    for h in range(q.shape[1]):
        own = slice(h // group * group, (h // group + 1) * group)
        mass = {j: p[own, :, j].sum() for j in range(len(k)) if late[0, :, j].any()}
        forced = [j for j in range(len(k)) if j >= len(k) - last]
        chosen[h, 0, list(best(mass, budget, forced))] = True
    return masked(q, k, v, causal_mask(q, k) & chosen)


@oracle
def seer(
    q: Array, k: Array, v: Array, w_q: Array, w_max: Array, w_min: Array, w_mean: Array,
    *, B: int = 64, n: int = 32,
) -> Array:  # fmt: skip
    i, group = queries(q, k), q.shape[1] // k.shape[1]
    chosen = np.zeros((q.shape[1], len(q), len(k)), bool)
    pools = [(ragged_pool(k, B, f), w) for f, w in ((np.max, w_max), (np.min, w_min))]
    pools.append((ragged_pool(k, B, np.mean), w_mean))
    gates_q = ragged_pool(q, B, np.mean)
    for h in range(q.shape[1]):
        kg = sum(pool[:, h // group] @ w[h // group] for pool, w in pools)
        for a in range(len(gates_q)):
            own = a + i[0] // B
            s = (gates_q[a, h] @ w_q[h]) @ kg.T * (3 * w_q.shape[2]) ** -0.5
            past = {b: s[b] for b in range(len(kg)) if b <= own}
            picked = best(past, n, {b for b in (0, own) if b in past})
            for t in range(a * B, min((a + 1) * B, len(q))):
                chosen[h, t] = np.isin(np.arange(len(k)) // B, list(picked))
    return masked(q, k, v, causal_mask(q, k) & chosen)


def first_of(result: Any) -> Array:
    """Return the output of a pattern that also returns its selection."""
    return result[0] if isinstance(result, tuple) else result
