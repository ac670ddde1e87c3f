"""Ranges that integer tables narrow, on emulated GPUs, against float64 and against all pairs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsegen as sg
from schedules import attend_mma, attend_tiles_sm90
from schedules.attend_tiles_sm90 import Knobs
from sparsegen import arch as archs
from sparsegen.codegen.narrowing import narrowed
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.tasks import AttendTask
from sparsegen.patterns import Config
from tests.compile.test_tiles_sm90_emulated import LENGTHS, SMALL, check
from tests.emulator import compile_task, unwritten
from tests.harness import batch

HEADS, DIM = 4, 64


@sg.pattern
def tables(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"],
    doc: sg.Tensor["S", "int"], keep: sg.Tensor["S", "int"], stop: sg.Tensor["S", "int"],
    start: sg.Tensor["T", "int"],
):  # fmt: skip
    """Documents, some keys hidden; columns that end, and rows that start, where tables say."""
    i, j = sg.index(q, k)
    past = (j <= i) & (doc[i] == doc[j]) & (keep[j] > 0)
    return sg.attend(q, k, v, where=past & (i < stop[j]) & (j >= i - start[i]))


# The cuts of tiles: one group narrower than a block of keys, all of them, pairs of blocks.
KERNELS: list[tuple[Any, Any, str]] = [
    (attend_tiles_sm90, Knobs(groups=3, keys=64, stages=2, ahead=False), "sm_90"),
    (attend_tiles_sm90, Knobs(groups=2, keys=128, stages=2, queries=2, ahead=True), "sm_90"),
    (attend_mma, attend_mma.Knobs(4, 2, 1, 1, 64, 1), "sm_80"),
    (attend_mma, attend_mma.Knobs(2, 1, 2, 1, 32, 2), "sm_80"),
]


def task_of(pattern: Any, **options: Any) -> AttendTask:
    sizes = tuple(sorted({"Hq": HEADS, "Hk": 2, "D": DIM}.items()))
    plan = partition(pattern.trace(), Binding(dtype="bfloat16", sizes=sizes, **options))
    return next(t for t in plan.tasks if isinstance(t, AttendTask))


@pytest.fixture(scope="module")
def attend(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return what compiles a kernel, and what says of it how memory is shaped."""
    folder = tmp_path_factory.mktemp("spans")

    @cache
    def compiled(number: int) -> Any:
        schedule, knobs, name = KERNELS[number]
        path = folder / f"{number}.so"
        return compile_task(schedule, task_of(tables), knobs, archs.get(name), path)

    return compiled


class Call:
    """A call of `tables`: q, k, v and int32 tables, of sequences of (queries, keys, offset)."""

    def __init__(self, sequences: list[tuple[int, int, int]], seed: int, **given: Any) -> None:
        rng = np.random.default_rng(seed)
        self.sequences = sequences
        n_q, n_k = (sum(s[n] for s in sequences) for n in (0, 1))
        self.q = torch.from_numpy(rng.standard_normal((n_q, HEADS, DIM))).bfloat16()
        self.k, self.v = (
            torch.from_numpy(rng.standard_normal((n_k, 2, DIM))).bfloat16() for _ in range(2)
        )
        doc = rng.integers(0, 4, n_k)
        made = {
            "doc": doc if seed % 2 else np.sort(doc), "keep": rng.integers(0, 3, n_k),
            "stop": rng.integers(0, 400, n_k), "start": rng.integers(0, 300, n_q),
        }  # fmt: skip
        self.tables = {n: torch.from_numpy(x.astype(np.int32)) for n, x in (made | given).items()}

    def want(self) -> torch.Tensor:
        program, found, q0, k0 = tables.trace(), [], 0, 0
        for n_q, n_k, offset in self.sequences:
            queries, keys = slice(q0, q0 + n_q), slice(k0, k0 + n_k)
            inputs = {"q": self.q[queries], "k": self.k[keys], "v": self.v[keys]}
            inputs |= {n: x[queries if n == "start" else keys] for n, x in self.tables.items()}
            arrays = {n: x.double().numpy() if n in "qkv" else x.numpy() for n, x in inputs.items()}
            found.append(torch.from_numpy(np.asarray(
                sg.reference(program, arrays, q_offset=offset)
            )))  # fmt: skip
            q0, k0 = q0 + n_q, k0 + n_k
        return torch.cat(found)

    def run(self, attend: Callable[..., Any], number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs and the bounds that were found."""
        function, memory = attend(number)
        ends = [torch.tensor(np.cumsum([0, *(s[n] for s in self.sequences)])).int() for n in (0, 1)]
        offsets = torch.tensor([s[2] for s in self.sequences]).int()
        queries, keys, count = len(self.q), len(self.k), len(self.sequences)
        scratch = unwritten(memory, queries, keys, count, 0)
        out = torch.full_like(self.q, float("nan"))
        task = task_of(tables)
        named = {"q": self.q, "k": self.k, "v": self.v, **self.tables}
        inputs = [named[b.name] for b in task.reads]
        function(*ends, offsets, *inputs, out, *scratch)
        hulls = next(x for b, x in zip(memory, scratch, strict=True) if b.name.endswith("hulls"))
        return out, hulls


@pytest.mark.parametrize("number", range(len(KERNELS)))
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 90), st.integers(0, 300), st.integers(-20, 320)),
        min_size=1, max_size=3,
    ),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_ranges_that_tables_narrow(
    attend: Callable[..., Any], number: int, lengths: list[tuple[int, int, int]], seed: int
) -> None:
    if not sum(n for n, _, _ in lengths) or not sum(n for _, n, _ in lengths):
        return
    call = Call(lengths, seed)
    got, want = call.run(attend, number)[0].double(), call.want()
    assert torch.allclose(got, want, atol=2e-2, rtol=2e-2)


def test_what_is_walked_and_what_needs_no_mask(attend: Callable[..., Any]) -> None:
    """Three documents of 130, 100 and 100 tokens, tiles of two groups of 32 tokens."""
    given = {
        "doc": np.repeat([2, 5, 7], [130, 100, 100]), "keep": np.full(330, 1),
        "stop": np.full(330, 999), "start": np.full(330, 999),
    }  # fmt: skip
    call = Call([(330, 330, 0)], 0, **given)
    got, hulls = call.run(attend, 1)
    assert torch.allclose(got.double(), call.want(), atol=2e-2, rtol=2e-2)
    groups = hulls.reshape(-1, 4).tolist()
    assert groups[0] == [0, 32, 0, -1]  # queries 0 to 31: no 64 keys that all of them see
    assert groups[3] == [0, 128, 0, 64]  # 96 to 127, of document 2: all see the first 64 keys
    assert groups[4] == [0, 160, 0, -1]  # 128 to 159, of documents 2 and 5
    assert groups[5] == [128, 192, 0, -1]  # of document 5, which begins at 130
    assert groups[7] == [128, 256, 0, -1]  # of documents 5 and 7
    assert groups[9] == [192, 320, 0, -1]  # of document 7, which begins at 230
    assert groups[10] == [192, 330, 256, 320]  # and 10 tokens at its end
    assert groups[11] == [0, 0, 0, -1]  # no tokens
    # Keys that end, or are hidden, are known by their tables too.
    given["keep"][:128], given["stop"][256:320] = 0, 300
    got, hulls = Call([(330, 330, 0)], 0, **given).run(attend, 1)
    groups = hulls.reshape(-1, 4).tolist()
    assert groups[3] == [0, 0, 0, -1]
    assert groups[4] == [128, 160, 0, -1]
    assert groups[10] == [192, 330, 0, -1]


@pytest.mark.parametrize("page", [0, 24])
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_documents(page: int, target: str) -> None:
    layout = "paged" if page else "ragged"
    lengths = [*LENGTHS, (150, 190), (129, 129)]
    options = {"page": page, "dtype": torch.bfloat16, "explicit": False}
    check(batch("document", Config("odd", SMALL), layout, lengths, **options), target=target)


@sg.pattern
def prefix(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"],
    known: sg.Tensor["T", "int"],
):  # fmt: skip
    """See the past, and what is known from the start: no table is read at keys."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) | (j < 9 * known[i]))


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_rows_that_see_a_prefix(target: str) -> None:
    sizes = {n: x for n, x in SMALL.items() if n != "E"}
    options = {"dtype": torch.bfloat16, "explicit": False}
    lengths = [*LENGTHS, (150, 190), (129, 129)]
    check(batch(prefix, Config("odd", sizes), "ragged", lengths, **options), target=target)


def test_what_tables_cannot_narrow() -> None:
    """Real numbers, heads and entries at other places are not known before."""

    @sg.pattern
    def real(
        q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"], x: sg.Tensor["S"]
    ):
        _, j = sg.index(q, k)
        return sg.attend(q, k, v, where=x[j] > 0)

    @sg.pattern
    def elsewhere(
        q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"],
        x: sg.Tensor["S", "int"],
    ):  # fmt: skip
        _, j = sg.index(q, k)
        return sg.attend(q, k, v, where=x[j // 2] > 0)

    assert not narrowed(task_of(real))
    assert not narrowed(task_of(elsewhere))
    assert len(narrowed(task_of(tables))) == 1
