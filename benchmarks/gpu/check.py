"""Compare kernels with float64 on rows of a problem, and repeats with each other bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.kernels import Call, Kernel
from benchmarks.gpu.problem import Problem
from benchmarks.gpu.workload import Shape

# The norm of a row's error over the norm of the row: outputs and weights are rounded to 8 bits.
NORM = 4e-3
# Of an element: a unit of its own rounding, and twelve deviations of that of the weights.
ELEMENT, OF_ROW = 2.0**-7, 0.02
PEER = 1e-2  # the norm of a peer's error: some round scores as well
LSE_ABSOLUTE, LSE_RELATIVE = 1e-4, 2.0**-15


class WrongError(AssertionError):
    """A result differs from the reference, or from its own repeat."""


class Reference:
    """Rows of a problem in float64."""

    def __init__(self, problem: Problem, rows: Iterable[int] | None = None) -> None:
        self.problem = problem
        self.rows = sampled(problem) if rows is None else list(rows)
        made = [self._row(row) for row in self.rows]
        self.o = torch.stack([o for o, _ in made])
        self.lse = torch.stack([lse for _, lse in made])

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        problem, shape = self.problem, self.problem.shape
        outs, sums = [], []
        seen = problem.seen(row, 0)
        for head in range(shape.kv_heads):
            if head and problem.selects > 1:
                seen = problem.seen(row, head)
            q = problem.q[row, head * shape.group : (head + 1) * shape.group].double()
            scores = q @ problem.k[seen, head].double().T * shape.scale
            sums.append(scores.logsumexp(-1))
            weights = scores.softmax(-1) if len(seen) else scores
            outs.append(weights @ problem.v[seen, head].double())
        return torch.cat(outs), torch.cat(sums)

    def distance(self, o: Tensor, most: float = NORM) -> float:
        """Return the largest error of a row, relative to its norm.

        Args:
            o: the outputs of all rows of the problem.
            most: the largest to allow.

        Raises:
            WrongError: it is larger, or an output is not finite.
        """
        got = o[self.rows].double()
        if not got.isfinite().all():
            raise WrongError("an output is not finite")
        off = (got - self.o).square().sum(-1)
        norm = float((off / self.o.square().sum(-1).clamp_min(1e-30)).sqrt().max())
        if norm > most:
            raise WrongError(f"the error of a row is {norm:.2e} of its norm")
        return norm

    def error(self, o: Tensor, lse: Tensor | None = None) -> float:
        """Return the largest error of a row, relative to its norm.

        Args:
            o, lse: the results of all rows of the problem.

        Raises:
            WrongError: it is too large, an element is too far off, or a sum is.
        """
        norm = self.distance(o)
        off = (o[self.rows].double() - self.o).abs()
        rms = self.o.square().mean(-1, keepdim=True).sqrt()
        excess = off - ELEMENT * self.o.abs() - OF_ROW * rms
        if float(excess.max()) > 0:
            n = int(excess.flatten(1).max(1).values.argmax())
            raise WrongError(
                f"row {self.rows[n]}: an element differs by {float(off[n].max()):.2e}, "
                f"{float((off[n] / rms[n].clamp_min(1e-30)).max()):.2e} of its row"
            )
        if lse is not None:
            self._compare_lse(lse)
        return norm

    def _compare_lse(self, lse: Tensor) -> None:
        found = lse[self.rows].double()
        same = found == self.lse  # -inf of rows that see nothing
        off = torch.where(same, 0.0, (found - self.lse).abs())
        allowed = LSE_ABSOLUTE + LSE_RELATIVE * self.lse.abs().nan_to_num(posinf=0.0)
        # A NaN fails this too.
        if not bool((off <= allowed).all()):
            raise WrongError(f"lse differs by {float(off.nan_to_num(torch.inf).max()):.2e}")


def sampled(problem: Problem) -> list[int]:
    """Return rows at the edges of sequences and tiles, and odd ones between."""
    dice = random.Random(0)
    rows: set[int] = set()
    count = len(problem.lengths)
    for b in sorted({0, 1, count // 3, count - 1} & set(range(count))):
        n, start = problem.lengths[b][0], problem.ends[0][b]
        near = {0, 1, 31, 63, 64, n // 2 + 7, n - 2, n - 1}
        near |= {dice.randrange(n) for _ in range(3)} if n else set()
        rows |= {start + t for t in near if 0 <= t < n}
    return sorted(rows)


def check(kernel: Kernel, call: Call, reference: Reference, repeats: int = 3) -> float:
    """Run a kernel over poisoned outputs; return the largest error.

    Raises:
        WrongError: a result differs from the reference, or two repeats from each other.
    """
    held: list[tuple[Tensor, Tensor]] = []
    for _ in range(repeats):
        call.poison()
        call()
        if call.o.is_cuda:
            torch.cuda.synchronize()
        if held:
            for name, one, two in zip(("o", "lse"), held[0], (call.o, call.lse), strict=True):
                # Bits, not values: two NaN are equal here.
                if not torch.equal(_bits(one), _bits(two)):
                    raise WrongError(f"repeats of {name} differ")
        else:
            held.append((call.o.clone(), call.lse.clone()))
    return reference.error(call.o, call.lse if kernel.dtype("lse") is not None else None)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def trials(shape: Shape, device: str) -> Iterator[Problem]:
    """Yield small problems: odd lengths, several sequences, rows that see nothing, hidden NaN."""
    several = [(5, 300), (1, 17), (66, 70), (3, 999)]
    if shape.page:
        # Decoding, and a step of several tokens; pages are full or not.
        yield _trial(shape, [(1, 1), (1, 64), (1, 65), (1, 300), (1, 4097), (1, 2000)], device)
        yield _trial(shape, [(3, 130), (1, 64), (2, 999)], device, back=1)
        return
    if shape.kind == "entries" and not shape.pooled:
        # Keys are entries here, and positions count tokens.
        for lengths in ([(141, 8)], [(700, 42)], [(77, 3), (1, 1), (300, 17)]):
            yield _trial(shape, lengths, device, offsets=[0] * len(lengths))
        return
    for lengths in ([(7, 3001)], [(141, 141)], several):
        yield _trial(shape, lengths, device)
    yield _trial(shape, several, device, back=3)
    yield _trial(shape, [(9, 5), (70, 40)], device)


def _trial(
    shape: Shape, lengths: list[tuple[int, int]], device: str, *,
    back: int = 0, offsets: list[int] | None = None,
) -> Problem:  # fmt: skip
    """Return a problem whose queries stand `back` positions before the last keys."""
    offsets = [s - t - back for t, s in lengths] if offsets is None else offsets
    draw = "clustered" if shape.kind == "blocks" else "causal"
    problem = Problem(shape, lengths, offsets=offsets, draw=draw, device=device)
    if shape.kind == "listed":
        _spoil(problem)
    elif shape.kind == "blocks":
        assert problem.list is not None
        problem.list[problem.rows // 2] = -1
    problem.hide()
    return problem


def _spoil(problem: Problem) -> None:
    """Put padding and indices that do not exist anywhere into lists, and take key 0 out."""
    index, topk = problem.list, problem.shape.topk
    assert index is not None
    dice = torch.rand(index.shape, generator=problem.generator, device=index.device)
    index[dice < 0.1] = -1
    for row, (first, last, value) in enumerate(
        ((0, topk // 2, 2**31 - 1), (0, topk, -5), (0, topk - 1, -1), (topk // 3, topk, -1))
    ):
        if row + 1 < len(index):
            index[row + 1, first:last] = value
    index[index == 0] = -1
