"""Attention over lists of keys on Hopper: what is taken, and what the compiler makes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import sparsegen as sg
from schedules import attend_sm90
from sparsegen import arch as archs
from sparsegen import patterns
from sparsegen.codegen.tvm import cuda_source
from sparsegen.errors import CompileError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.tasks import AttendTask
from tests.binaries import assembled, instructions
from tests.gathered import common, own
from tests.latent import beside

ARCH = archs.get("sm_90")
# What ptxas says where it gives up products, or registers of groups.
SERIAL = re.compile("C75(08|10|12|20)")


def nightly(*values: Any) -> Any:
    """Return a case that is much like others."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def task(heads: int = 128, topk: int = 2048, c: int = 576, **options: Any) -> AttendTask:
    sizes = tuple(sorted({"Hq": heads, "c": c, "Hi": 64, "e": 128}.items()))
    program = patterns.load("dsa").trace(topk=topk)
    plan = partition(program, Binding(**{"dtype": "bfloat16", "sizes": sizes, **options}))
    return next(t for t in plan.tasks if isinstance(t, AttendTask))


def built(
    one: AttendTask, folder: Path, knobs: attend_sm90.Knobs | None = None
) -> tuple[Path, str]:
    """Return the binary of a task, and what ptxas says of it."""
    module = attend_sm90.apply(one, knobs or attend_sm90.default(one, ARCH), ARCH)
    return assembled(cuda_source(module, ARCH), ARCH, folder)


def takes_without_spills(one: AttendTask, folder: Path) -> None:
    assert attend_sm90.accepts(one, ARCH) is None
    _, said = built(one, folder)
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert not SERIAL.search(said)


@sg.pattern
def dense(q: sg.Tensor["T H c"], k: sg.Tensor["S K c"], *, d_v=512, first=0, last=512):
    i, j = sg.index(q, k)
    return sg.attend(q, k, k[..., first:last], where=j <= i)


@sg.pattern
def per_head(q: sg.Tensor["T H c"], k: sg.Tensor["S 1 c"]):
    i, j = sg.index(q, k)
    return sg.attend(q, k, k[..., :512], where=(j <= i) & (i - j < 64 * (sg.head(q) + 1)))


@sg.pattern
def capped(q: sg.Tensor["T H c"], k: sg.Tensor["S 1 c"]):
    i, j = sg.index(q, k)
    return sg.attend(q, k, k[..., :512], where=j <= i, mod=lambda s: 50 * sg.tanh(s / 50))


def of(
    pattern: Any, sizes: dict[str, int], options: dict[str, Any] | None = None, **hyper: Any
) -> AttendTask:
    """Return the attend task of a pattern."""
    binding = Binding(dtype="bfloat16", sizes=tuple(sorted(sizes.items())), **(options or {}))
    plan = partition(pattern.trace(**hyper), binding)
    return next(t for t in plan.tasks if isinstance(t, AttendTask))


@sg.pattern
def mixed(
    q: sg.Tensor["T H d"], c: sg.Tensor["S 1 c"], x: sg.Tensor["S 1 r"], w: sg.Tensor["1 r r"]
):
    i, j = sg.index(q, c)
    return sg.attend(q, sg.cat(c, sg.project(x, w)), c, where=j <= i)


@pytest.mark.parametrize("heads", [128, 64, 37, 32, 16, 1])
@pytest.mark.parametrize("options", [{}, {"layout": "paged", "page_size": 64}])
def test_takes_any_number_of_heads(heads: int, options: dict[str, Any]) -> None:
    assert attend_sm90.accepts(task(heads, **options), ARCH) is None


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "glm-5"])
def test_takes_absorbed_decoding_between_projections(name: str) -> None:
    config = next(c for c in patterns.configs("mla_decode") if c.name == name)
    sizes = {n: x for n, x in config.sizes.items() if n not in "TS"}
    assert attend_sm90.accepts(of(patterns.load("mla_decode"), sizes), ARCH) is None


@pytest.mark.parametrize(("c", "d_v"), [(512, 512), (256, 256), (576, 128), (320, 256)])
@pytest.mark.parametrize("heads", [40, 8])
def test_takes_other_widths(c: int, d_v: int, heads: int) -> None:
    found = of(dense, {"H": heads, "K": 1, "c": c}, last=d_v)
    assert attend_sm90.accepts(found, ARCH) is None


def test_refuses_with_a_reason() -> None:
    one = {"H": 8, "c": 576}
    sizes = {**one, "K": 1}

    def reason(found: AttendTask) -> str:
        return attend_sm90.accepts(found, ARCH) or ""

    assert "float32" in reason(task(dtype="float32"))
    assert "64 elements" in reason(task(c=520))
    assert "share one key head" in reason(of(dense, {**sizes, "K": 2}))
    assert "no prefix" in reason(of(dense, sizes, first=64, last=576))
    assert "multiples of 128" in reason(of(dense, sizes, last=64))
    short = {"Hq": 64, "Hk": 1, "D": 64, "E": 96, "e": 64}
    assert "multiples of 64" in reason(of(common, short))
    assert "multiples of 64" in reason(of(common, {**short, "Hq": 8}))
    assert "hidden from some heads" in reason(of(per_head, one))
    assert "scores are modified" in reason(of(capped, one))
    assert "shared memory" in reason(of(dense, {**sizes, "H": 128, "c": 640}))
    assert "64 elements" in reason(of(patterns.load("v4_hca"), _letters("v4_hca", c=520)))
    wide = {"Hq": 64, "Hk": 1, "D": 576, "E": 512, "e": 64}
    assert "shared memory" in reason(of(common, wide))
    assert "of blocks or ranges" in reason(of(patterns.load("snapkv"), _letters("snapkv")))
    paged = {"layout": "paged", "page_size": 64}
    assert "different ways" in reason(
        of(mixed, {"H": 8, "d": 192, "c": 128, "r": 64}, options=paged)
    )


def _letters(name: str, **others: int) -> dict[str, int]:
    sizes = patterns.configs(name)[0].sizes
    return {**{n: x for n, x in sizes.items() if n not in "TS"}, **others}


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("v4_csa", 8), ("v4_csa", 64), ("v4_hca", 16), ("v4_hca", 128),
        *(nightly("v4_csa", h) for h in (16, 128)), *(nightly("v4_hca", h) for h in (8, 64)),
    ],
)  # fmt: skip
def test_takes_entries_beside_a_window(name: str, heads: int, tmp_path: Path) -> None:
    found = of(patterns.load(name), _letters(name, H=heads))
    assert attend_sm90.accepts(found, ARCH) is None
    _, said = built(found, tmp_path)
    assert said.count("0 bytes spill stores, 0 bytes spill loads") == 2
    assert not SERIAL.search(said)


@pytest.mark.parametrize(
    ("heads", "key_heads", "d", "e", "page"),
    [
        (24, 2, 256, 256, 16),
        nightly(24, 2, 256, 256, 0),
        nightly(8, 8, 192, 128, 16),
        nightly(16, 2, 64, 64, 0),
        nightly(32, 1, 128, 128, 16),
        (128, 2, 192, 128, 0),
        (80, 1, 256, 256, 16),
    ],
)
def test_takes_values_apart_from_keys(
    heads: int, key_heads: int, d: int, e: int, page: int, tmp_path: Path
) -> None:
    sizes = {"Hq": heads, "Hk": key_heads, "D": d, "E": e, "Hi": 4, "e": 128}
    options = {"layout": "paged", "page_size": page} if page else {}
    found = of(patterns.load("qsa"), sizes, options=options)
    takes_without_spills(found, tmp_path)


@pytest.mark.parametrize(
    ("heads", "key_heads", "d", "e", "page"),
    [
        nightly(128, 1, 64, 64, 16),
        nightly(140, 2, 128, 64, 0),
        (99, 3, 192, 64, 16),
        nightly(80, 2, 192, 192, 0),
        nightly(70, 1, 64, 320, 16),
        (66, 2, 64, 448, 0),
    ],
)
def test_takes_values_of_an_odd_number_of_tiles(
    heads: int, key_heads: int, d: int, e: int, page: int, tmp_path: Path
) -> None:
    sizes = {"Hq": heads, "Hk": key_heads, "D": d, "E": e, "e": 64}
    options = {"layout": "paged", "page_size": page} if page else {}
    found = of(own, sizes, options=options)
    takes_without_spills(found, tmp_path)


@pytest.mark.parametrize(
    ("heads", "c", "d_v"),
    [
        (40, 64, 64),
        (130, 192, 64),
        nightly(64, 576, 64),
        nightly(70, 192, 192),
        (65, 384, 320),
        nightly(40, 448, 448),
    ],
)  # fmt: skip
def test_takes_an_odd_number_of_tiles_of_keys(heads: int, c: int, d_v: int, tmp_path: Path) -> None:
    found = of(beside, {"H": heads, "c": c, "e": 64}, d_v=d_v)
    takes_without_spills(found, tmp_path)


def test_registers_of_the_groups_fit_a_block() -> None:
    with pytest.raises(CompileError, match="registers of the three groups"):
        attend_sm90.apply(task(), attend_sm90.Knobs(216, 96), ARCH)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 37, "topk": 200, "dtype": "float16"},
        {"layout": "paged", "page_size": 64},
        {"heads": 32, "layout": "paged", "page_size": 64},
        {"heads": 16},
        {"heads": 1, "dtype": "float16"},
    ],
    ids=["bfloat16", "float16", "paged", "32 heads", "16 heads", "1 head"],
)
def test_nothing_spills(options: dict[str, Any], tmp_path: Path) -> None:
    _, said = built(task(**options), tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert not SERIAL.search(said)
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None
    assert int(registers[1]) <= 168


def test_multiplies_on_tensor_cores(tmp_path: Path) -> None:
    code = instructions(built(task(), tmp_path)[0])
    assert code.count("HGMMA") >= 100
    assert "LDGSTS" in code


def test_blocks_of_a_cluster_copy_boxes_for_each_other(tmp_path: Path) -> None:
    paged = of(dense, {"H": 128, "K": 1, "c": 576}, {"layout": "paged", "page_size": 64})
    cubin, said = built(paged, tmp_path, attend_sm90.Knobs(boxes=True, cluster=True))
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert not SERIAL.search(said)
    assert "UTMALDG.2D.MULTICAST" in instructions(cubin)


@pytest.mark.parametrize(("heads", "boxes"), [(64, True), (130, True), (128, False)])
def test_clusters_have_boxes_and_tiles_in_pairs(heads: int, boxes: bool) -> None:
    knobs = attend_sm90.Knobs(boxes=boxes, cluster=True)
    with pytest.raises(CompileError, match="clusters"):
        attend_sm90.apply(of(dense, {"H": heads, "K": 1, "c": 576}), knobs, ARCH)
