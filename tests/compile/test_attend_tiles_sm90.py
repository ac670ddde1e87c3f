"""Attention over tiles of keys on Hopper: what is taken, and what the compiler makes of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sparsegen as sg
from schedules import attend_tiles_sm90
from sparsegen import arch as archs
from sparsegen import patterns
from sparsegen.codegen.tvm import cuda_source
from sparsegen.errors import CompileError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.space import Rejected
from sparsegen.lowering.tasks import AttendTask
from tests.binaries import assembled, instructions

ARCH = archs.get("sm_90")


def tasks(name: str, config: int = 0, **options: Any) -> list[AttendTask]:
    """Return the attend tasks of a published shape."""
    found = patterns.configs(name)[config]
    program = patterns.load(name).trace(**found.hyper)
    sizes = {k: v for k, v in found.sizes.items() if k not in (program.query, program.key)}
    binding = {"dtype": "bfloat16", "sizes": tuple(sorted(sizes.items())), **options}
    return [t for t in partition(program, Binding(**binding)).tasks if isinstance(t, AttendTask)]


@sg.pattern
def either(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"]):
    """Attend to blocks that are good on the whole, and to those with one good key."""
    i, j = sg.index(q, k)
    h = sg.head(q) // q.group
    p, by = sg.score(q, k, where=j <= i), (h, i, j // 64)
    whole, one = (sg.select(sg.reduce(p, how, by=by), topk=4) for how in ("sum", "max"))
    seen = whole[h, i, j // 64] | one[h, i, j // 64]
    return sg.attend(q, k, v, where=(j <= i) & seen)


@pytest.mark.parametrize(
    "name",
    ["alibi", "causal", "document", "full", "infllm_v2", "mla_prefill", "moba", "msa", "nsa",
     "quest", "seer", "sliding_window", "softcap", "vertical_slash", "xattention"],
)  # fmt: skip
def test_takes_published_shapes(name: str) -> None:
    for task in tasks(name):
        assert attend_tiles_sm90.accepts(task, ARCH) is None
        knobs = attend_tiles_sm90.default(task, ARCH)
        assert next(iter(attend_tiles_sm90.space(task, ARCH))) == knobs


def test_refuses_with_a_reason() -> None:
    def reason(task: AttendTask) -> str:
        return attend_tiles_sm90.accepts(task, ARCH) or ""

    assert "float32" in reason(tasks("causal", dtype="float32")[0])
    assert "at most 256" in reason(tasks("v4_hca")[0])
    sizes = tuple(sorted({"Hq": 4, "Hk": 2, "D": 64}.items()))
    plan = partition(either.trace(), Binding(dtype="bfloat16", sizes=sizes))
    (both,) = (t for t in plan.tasks if isinstance(t, AttendTask))
    assert "several lists" in reason(both)
    assert "4 keys of a listed block" in reason(tasks("qsa")[0])
    assert "pages of [20]" in reason(tasks("causal", layout="paged", page_size=20)[0])
    (task,) = tasks("causal")
    part = replace(task.q.parts[0], size=40)
    assert "parts of 40" in reason(replace(task, q=replace(task.q, parts=(part,))))


def test_says_what_does_not_fit() -> None:
    (task,) = tasks("mla_prefill")
    with pytest.raises(CompileError, match=r"bytes of shared memory, sm_90 has 232448"):
        attend_tiles_sm90.apply(task, attend_tiles_sm90.Knobs(stages=6), ARCH)
    with pytest.raises(CompileError, match="registers of sums, scores and weights"):
        attend_tiles_sm90.apply(tasks("causal")[0], attend_tiles_sm90.Knobs(groups=3), ARCH)
    found = list(attend_tiles_sm90.space(task, ARCH))
    assert sum(not isinstance(k, Rejected) for k in found) >= 3
    assert all(k.reason for k in found if isinstance(k, Rejected))


def test_gathers_blocks_and_pages_into_chunks() -> None:
    """Knobs say how long chunks are; listed blocks and pages how many boxes make one."""
    paged = {"layout": "paged", "page_size": 16}
    for task, keys, block, box in (
        (tasks("quest")[0], 64, 16, 16), (tasks("seer", **paged)[0], 64, 64, 16),
        (tasks("causal", **paged)[0], 64, 64, 16), (tasks("moba")[0], 128, 128, 128),
    ):  # fmt: skip
        knobs = attend_tiles_sm90.default(task, ARCH)
        cut = attend_tiles_sm90._cut(task, knobs, ARCH)
        assert (cut.keys, cut.block, cut.box) == (keys, block, box)
    found = list(attend_tiles_sm90.space(tasks("quest")[0], ARCH))
    assert {k.keys for k in found if not isinstance(k, Rejected)} == {64, 128}


def built(name: str, folder: Path, **options: Any) -> tuple[Path, str]:
    """Return the binary of a published shape, and what ptxas says of it."""
    # Of NSA, the branch of selected blocks.
    found = tasks(name, **options)
    task = next((t for t in found if t.lists), found[0])
    knobs = attend_tiles_sm90.default(task, ARCH)
    return assembled(cuda_source(attend_tiles_sm90.apply(task, knobs, ARCH), ARCH), ARCH, folder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("causal", "mla_prefill", "moba", "nsa", "quest")),
        ("causal", {"layout": "paged", "page_size": 16}),
    ],
    ids=str,
)
def test_nothing_spills_or_shares_registers(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    cubin, said = built(name, tmp_path, **options)
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"] * said.count("Used ")
    assert "C75" not in said, "products are serialised"
    code = instructions(cubin)
    assert "UTMALDG" in code
    # The first register of A operands: queries that stay, and weights.
    products = re.findall(r"HGMMA\S+ R\d+, R(\d+), gdesc\[\w+\](\.tnspB)?", code)
    queries, weights = ({int(r) for r, t in products if bool(t) == kind} for kind in (False, True))
    assert weights
    assert bool(queries) == (name in ("causal", "mla_prefill", "nsa"))
    assert not {q + i for q in queries for i in range(4)} & {
        w + i for w in weights for i in range(4)
    }


def test_a_last_chunk_of_few_keys_has_products_of_its_own(tmp_path: Path) -> None:
    task = tasks("nsa", 2)[-1]  # the window
    knobs = replace(attend_tiles_sm90.default(task, ARCH), tail=16)
    assert knobs in list(attend_tiles_sm90.space(task, ARCH))
    source = cuda_source(attend_tiles_sm90.apply(task, knobs, ARCH), ARCH)
    cubin, said = assembled(source, ARCH, tmp_path)
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"] * said.count("Used ")
    assert "C75" not in said, "products are serialised"
    assert {"HGMMA.64x64x16", "HGMMA.64x16x16"} <= set(
        re.findall(r"HGMMA\.\w+", instructions(cubin))
    )
    for wrong in (replace(knobs, tail=24), replace(knobs, tail=16, ahead=True)):
        with pytest.raises(CompileError, match="keys of a last chunk"):
            attend_tiles_sm90.apply(task, wrong, ARCH)


def test_a_stage_is_given_back_when_its_queries_are_there(tmp_path: Path) -> None:
    """Arrivals at barriers overtake loads: what arrives needs what was loaded."""
    cubin, _ = built("nsa", tmp_path)
    code = instructions(cubin)
    # The kernel that repairs loads matrices too, but arrives at no barrier.
    kernel = next(x for x in code.split("Function : ") if "LDSM" in x and "SYNCS.ARRIVE" in x)
    after = kernel[kernel.rindex("LDSM") :]
    assert "SHFL.IDX" in after[: after.index("SYNCS.ARRIVE")]


@pytest.mark.parametrize("name", ["causal", "document", "nsa"])
def test_the_lane_that_gives_a_chunk_back_has_read_about_it(tmp_path: Path, name: str) -> None:
    """Other lanes have it from that one: only its own reads come before its arrival for sure."""
    cubin, _ = built(name, tmp_path)
    code = instructions(cubin)
    kernel = next(x for x in code.split("Function : ") if "HGMMA" in x and "UTMALDG" in x)
    before = kernel[: kernel.index("WARPGROUP.ARRIVE")]
    loads = re.findall(r"(@!?P\d+)? +LDS[.\d]* R", before[before.rindex("SYNCS.PHASECHK") :])
    assert len(loads) >= 1 + (name == "nsa")
    assert all(loads), "all lanes read"


def test_queries_that_the_assembler_would_lose_do_not_stay() -> None:
    (task,) = tasks("sliding_window")  # values of 64 elements
    assert attend_tiles_sm90.default(task, ARCH).resident == 0
    knobs = attend_tiles_sm90.Knobs(keys=64, resident=1)
    with pytest.raises(CompileError, match="loses resident queries"):
        attend_tiles_sm90.apply(task, knobs, ARCH)
