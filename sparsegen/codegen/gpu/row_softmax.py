"""Turn an accumulator of scores, whose rows are heads, into weights of the next product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsegen.codegen.gpu import wgmma
from sparsegen.codegen.gpu.launch import across
from sparsegen.codegen.gpu.mma import ptx
from sparsegen.codegen.tvm import Memory, T, Value, const, load, maximum, store


@dataclass(frozen=True)
class RowSoftmax:
    """The scores of 64 heads and 64 keys, and the sums of two heads of a thread over all keys.

    rate    of exponents of 2
    lane    of the warp
    scores  float32 [32]
    packed  uint32 [16], the weights in 16 bits
    peak, total, shrink  float32 [2]: maxima, sums of weights, and what made sums fit new maxima
    """

    rate: float
    dtype: str
    lane: Value
    scores: Memory
    packed: Memory
    peak: Memory
    total: Memory
    shrink: Memory

    def weigh(
        self, bias: Memory, first: Value | int, least: Memory, shrink_out: Callable[[], None]
    ) -> None:
        """Turn scores into weights of a maximum that is at least `least`; shrink the sums.

        Args:
            bias: what is added to the scores of a key, from element `first` on.
            shrink_out: makes the weighted values fit, too.
        """
        rate, scores = const(self.rate, "float32"), self.scores
        for j in range(8):
            for c in range(2):
                at = first + 8 * j + self.lane % 4 * 2 + c
                hidden = T.bind(load(bias, at))
                for half in range(2):
                    n = 4 * j + 2 * half + c
                    store(scores, load(scores, n) + hidden, n)
        for half in range(2):
            top = load(scores, 2 * half)
            for j in range(8):
                for c in range(2):
                    if j or c:
                        top = T.bind(maximum(top, load(scores, 4 * j + 2 * half + c)))
            top = across(top, maximum, 4)
            top = T.bind(maximum(load(least, half), top * rate))
            ptx("ex2.approx.ftz.f32", self.shrink[half], load(self.peak, half) - top)
            store(self.peak, top, half)
            total = T.bind(load(self.total, half) * load(self.shrink, half))
            store(self.total, total, half)
        shrink_out()
        for half in range(2):
            for j in range(8):
                for c in range(2):
                    n = 4 * j + 2 * half + c
                    ptx("ex2.approx.ftz.f32", scores[n], load(scores, n) * rate - self.peak[half])
                    store(self.total, load(self.total, half) + load(scores, n), half)
        wgmma.pack_tile(self.packed, scores, self.dtype)
