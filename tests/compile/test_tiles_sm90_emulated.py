"""Attention over tiles of keys on an emulated Hopper, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsegen as sg
from schedules import attend_tiles_sm90
from schedules.attend_tiles_sm90 import Knobs
from sparsegen import arch as archs
from sparsegen import patterns
from sparsegen.codegen.gpu import union
from sparsegen.codegen.gpu.tiled_pairs import asked
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.tasks import AttendTask
from sparsegen.patterns import Config
from tests.emulator import compile_task, emulated, unwritten
from tests.gpu.test_patterns_gpu import guarded, verify
from tests.harness import Case, batch, listed, poisoned

ARCH = archs.get("sm_90")
LENGTHS = [(5, 31), (0, 17), (3, 1), (2, 0), (1, 129), (70, 190), (19, 13)]  # queries, keys
SMALL = {"T": 37, "S": 150, "Hq": 6, "Hk": 2, "D": 64, "E": 64}
NSA = Config(
    "nsa", {"T": 70, "S": 70, "Hq": 32, "Hk": 2, "D": 64, "E": 64},
    {"l": 32, "d": 16, "L": 32, "n": 3, "W": 40},
)  # fmt: skip
QUEST = Config("quest", SMALL, {"B": 16, "n": 5})
SEER = Config("seer", {**SMALL, "g": 16}, {"B": 32, "n": 3})
MOBA = Config("moba", SMALL, {"B": 16, "n": 4})
WINDOW = Config("window", {**SMALL, "Hq": 4}, {"window": 40, "first": 2})


def check(case: Case, scale: float = 1.0, target: str = "sm_90") -> None:
    """Compare with the reference, and calls with different numbers in unwritten memory."""
    first: list[torch.Tensor] = []
    for poison in (0xFF, 0x5A):
        with emulated((int(target[3]), 0)), guarded(poison) as untouched:
            kernel = case.compile(target)
            got = listed(kernel(**case.inputs, **case.call))
            untouched()
        first = first or got
        for a, b in zip(first, got, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    used = {s.name for n, s in kernel.schedules.items() if n.startswith("attend")}
    assert used == {"attend_tiles_sm90" if target == "sm_90" else "attend_mma"}
    verify(case, first, scale)


@pytest.mark.parametrize("page", [0, 64, 16, 24])
def test_ranges_of_sequences(page: int) -> None:
    """Chunks have 64 keys, which pages that are shorter share."""
    for name, config in (("causal", Config("odd", SMALL)), ("sliding_window", WINDOW)):
        dtype, layout = (torch.float16, "paged") if page else (torch.bfloat16, "ragged")
        check(batch(name, config, layout, LENGTHS, page=page, dtype=dtype, explicit=False))


@pytest.mark.parametrize("tail", [16, 32])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["causal", "sliding_window"])
def test_last_chunks_of_fewer_keys(name: str, joint: bool, tail: int) -> None:
    """Lengths leave 1 to 64 keys for the last chunk; windows begin anywhere."""
    config = WINDOW if name == "sliding_window" else Config("odd", SMALL)
    lengths = [*LENGTHS, (9, 64), (33, 80), (20, 96)]
    case = batch(name, config, "ragged", lengths, dtype=torch.bfloat16, explicit=False)
    knobs = Knobs(groups=2, keys=64, stages=3, ahead=False, joint=joint, tail=tail)
    chosen = {"attend_1": sg.Schedule("attend_tiles_sm90", **asdict(knobs))}
    check(replace(case, options={**case.options, "schedule": chosen}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_those_who_see_it(value: float) -> None:
    check(poisoned("causal", Config("odd", SMALL), torch.bfloat16, value))


def test_operands_in_parts_that_need_a_copy() -> None:
    """One part of the keys lies in pages, the other is projected from them."""
    sizes = {"T": 70, "S": 70, "H": 2, "n": 64, "r": 64, "c": 64, "v": 64}
    config = Config("odd", sizes, patterns.configs("mla_prefill", test=True)[0].hyper)
    options = {"page": 32, "dtype": torch.bfloat16, "explicit": False}
    check(batch("mla_prefill", config, "paged", LENGTHS, **options))


def test_branches_that_are_merged() -> None:
    """Rows between the entries of two sequences are never written."""
    # Three outputs are summed, each times a gate.
    options = {"page": 16, "dtype": torch.bfloat16, "explicit": False}
    check(batch("nsa", NSA, "paged", LENGTHS, **options), scale=3.0)


@pytest.mark.parametrize(
    ("name", "config", "layout"),
    [
        ("quest", QUEST, "ragged"),
        ("quest", QUEST, "paged"),
        ("seer", SEER, "paged"),
        ("moba", MOBA, "ragged"),
    ],
)
def test_short_blocks_that_share_chunks(name: str, config: Config, layout: str) -> None:
    """Blocks of 16 and 32 keys, in pages of 16; MoBA's own block is a range."""
    options = {"page": 16, "dtype": torch.bfloat16, "explicit": False}
    # The whole own block of the last token, which is less than a chunk.
    check(batch(name, config, layout, [*LENGTHS, (1, 144)], **options))


# --- tables in pages -----------------------------------------------------------------------------

Documents = sg.Tensor["S", "int"]


@sg.pattern
def near(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"],
    x: sg.Tensor["T Hk e"], y: sg.Tensor["S Hk e"], doc: Documents, *, L, n,
):  # fmt: skip
    """Attend to chosen blocks of the same document."""
    i, j = sg.index(q, k)
    s = sg.reduce(sg.score(x, y), "max", by=(sg.head(x), i, j // L))
    sel = sg.select(s, topk=n)
    seen = sel[sg.head(q) // q.group, i, j // L] & (doc[i] == doc[j])
    return sg.attend(q, k, v, where=(j <= i) & seen)


@sg.pattern
def first_too(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"],
    doc: Documents,
):  # fmt: skip
    """Attend to the first keys, and to the same document."""
    i, j = sg.index(q, k)
    return sg.attend(q, k, v, where=(j <= i) & ((j < 3) | (doc[i] == doc[j])))


@pytest.mark.parametrize(
    ("pattern", "sizes", "hyper", "page", "knobs"),
    [
        ("document", {}, {}, 64, None),
        ("document", {}, {}, 16, Knobs(groups=2, keys=128, stages=2, ahead=True)),
        (first_too, {}, {}, 24, None),
        (near, {"e": 16}, {"L": 16, "n": 4}, 16, None),
    ],
    ids=["page", "pages", "either", "blocks"],
)
def test_tables_in_pages(
    pattern: Any, sizes: Any, hyper: Any, page: int, knobs: Knobs | None
) -> None:
    config = Config("odd", {**SMALL, **sizes}, hyper)
    options = {"page": page, "dtype": torch.bfloat16, "explicit": False}
    case = batch(pattern, config, "paged", [(5, 31), (2, 0), (70, 190)], **options)
    if knobs is not None:
        chosen = {"attend_1": sg.Schedule("attend_tiles_sm90", **asdict(knobs))}
        case = replace(case, options={**case.options, "schedule": chosen})
    check(case)


def test_pages_are_looked_up_before_there_are_scores() -> None:
    """Also for listed blocks: with the scores in registers there is no room for addresses."""
    sizes = tuple(sorted({"Hq": 6, "Hk": 2, "D": 64, "E": 64, "e": 16}.items()))
    binding = Binding(dtype="bfloat16", sizes=sizes, layout="paged", page_size=16)
    plan = partition(near.trace(L=16, n=4), binding)
    (task,) = (t for t in plan.tasks if isinstance(t, AttendTask))
    assert asked(task) == [0]


# --- lists that the caller gives -----------------------------------------------------------------


@sg.pattern
def blocks(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"],
    x: sg.Tensor["T Hk e"], y: sg.Tensor["S Hk e"], *, L, n,
):  # fmt: skip
    i, j = sg.index(q, k)
    s = sg.reduce(sg.score(x, y), "max", by=(sg.head(x), i, j // L))
    sel = sg.select(s, topk=n)
    o = sg.attend(q, k, v, where=(j <= i) & sel[sg.head(q) // q.group, i, j // L])
    return o, o.lse


# Query heads, key heads, elements, keys and number of blocks, knobs.
KERNELS = [
    (16, 1, 64, 64, 3, Knobs(groups=3, keys=64, stages=3, ahead=False)),
    (2, 2, 64, 32, 4, Knobs(groups=2, keys=32, stages=2, ahead=False)),
    (6, 2, 64, 128, 2, Knobs(groups=2, keys=64, stages=2, queries=2, ahead=True)),
    (4, 1, 64, 16, 5, Knobs(groups=3, keys=64, stages=2, ahead=False)),
    (16, 1, 64, 32, 3, Knobs(groups=2, keys=64, stages=3, ahead=False, joint=True)),
    (2, 2, 64, 16, 6, Knobs(groups=2, keys=128, stages=2, ahead=True)),
    (16, 1, 64, 8, 7, Knobs(groups=3, keys=64, stages=2, ahead=False)),
    # Queries that stay in registers: half of them, and all, in chunks of one box and of several.
    (6, 2, 128, 64, 3, Knobs(groups=3, keys=64, stages=2, resident=1, ahead=False, joint=True)),
    (16, 1, 128, 64, 3, Knobs(groups=2, keys=64, stages=3, queries=2, resident=1, ahead=True)),
    (2, 2, 64, 32, 4, Knobs(groups=1, keys=32, stages=2, resident=1, ahead=False)),
    (4, 1, 128, 16, 5, Knobs(groups=2, keys=64, stages=3, resident=1, ahead=False)),
]


@pytest.fixture(scope="module")
def attend(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return what compiles a kernel, and what says of it how memory is shaped."""
    folder = tmp_path_factory.mktemp("attend")

    @cache
    def compiled(number: int) -> Any:
        heads, key_heads, dim, width, count, knobs = KERNELS[number]
        sizes = tuple(sorted({"Hq": heads, "Hk": key_heads, "D": dim, "e": 64}.items()))
        plan = partition(blocks.trace(L=width, n=count), Binding(dtype="bfloat16", sizes=sizes))
        task = next(t for t in plan.tasks if isinstance(t, AttendTask))
        path = folder / f"{number}.so"
        # A few blocks at hand, so that lists are united in several turns.
        with mock.patch.dict(union._WINDOW, {1: 32}) if width == 8 else nullcontext():
            return compile_task(attend_tiles_sm90, task, knobs, ARCH, path)

    return compiled


@pytest.mark.parametrize("number", range(len(KERNELS)))
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 300)), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    causal=st.booleans(),
    poison=st.booleans(),
    twice=st.sampled_from(["nowhere", "a third", "token 31"]),
    shared=st.booleans(),
)
def test_lists_of_blocks(
    attend: Callable[..., Any], number: int, lengths: list[tuple[int, int]], seed: int,
    causal: bool, poison: bool, twice: str, shared: bool,
) -> None:  # fmt: skip
    """Indices of every invalid kind, some twice; NaN where some rows do not look."""
    heads, key_heads, dim, width, count, _ = KERNELS[number]
    function, memory = attend(number)
    generator = torch.Generator().manual_seed(seed)
    n_q, n_k = (sum(x[i] for x in lengths) for i in range(2))
    q, k, v = (
        torch.randn(n, h, dim, generator=generator).bfloat16()
        for n, h in ((n_q, heads), (n_k, key_heads), (n_k, key_heads))
    )
    if poison and n_k:
        v[n_k // 2] = math.nan
    cu_q, cu_k = (torch.tensor([0, *(x[i] for x in lengths)]).cumsum(0).int() for i in range(2))
    offset = torch.tensor([s - t if causal else s for t, s in lengths]).int()
    # Distinct, for what is listed twice is done again by another kernel. Where tokens share lists,
    # the blocks of a chunk lie apart; the block of the query is then the last one.
    order = torch.rand(n_q, key_heads, 360 // width + 2, generator=generator)
    if shared and n_q:
        order[:] = order[0]
        position = torch.cat(
            [torch.arange(t) + o for (t, _), o in zip(lengths, offset, strict=True)]
        )
        order[torch.arange(n_q), :, position.clamp(0) // width + 1] = -1
    lists = order.argsort(-1)[..., :count].int() - 1
    if twice == "a third":
        lists[::3, :, 0] = lists[::3, :, 1]
    elif twice == "token 31":  # which the sign of a word stands for
        rows = [int(cu_q[b]) + 31 for b, (t, _) in enumerate(lengths) if t > 31]
        lists[rows, :, 0] = lists[rows, :, 1]
    lists[::5] = -(2**31)
    lists[1::7, :, 0] = 2**31 - 1
    out = torch.full((n_q, heads, dim), math.nan).bfloat16()
    lse = torch.full((n_q, heads), math.nan)
    rest = unwritten(memory, n_q, 0, len(lengths), 4096)
    function(cu_q, cu_k, offset, lists, q, k, v, out, lse, *rest)
    group = heads // key_heads
    for b, (t, s) in enumerate(lengths):
        for i in range(t):
            row, position = int(cu_q[b]) + i, int(offset[b]) + i
            for h in range(key_heads):
                times = torch.zeros(s, dtype=torch.float64)
                for x in lists[row, h].tolist():
                    if 0 <= x * width < s:
                        times[x * width : (x + 1) * width] += 1
                seen = (times > 0) & (torch.arange(s) <= position)
                mine = slice(h * group, (h + 1) * group)
                keys, values = (x[int(cu_k[b]) :][:s][seen][:, h].double() for x in (k, v))
                scores = q[row, mine].double() @ keys.T / dim**0.5 + times[seen].log()
                want = (
                    scores.softmax(-1) @ values if seen.any() else torch.zeros(group, dim).double()
                )
                got = out[row, mine].double()
                torch.testing.assert_close(got, want, atol=8e-3, rtol=3.01 / 128, equal_nan=True)
                torch.testing.assert_close(
                    lse[row, mine].double(), scores.logsumexp(-1), atol=1e-5, rtol=2.01 / 65536
                )
