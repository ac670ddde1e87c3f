"""Every shipped pattern, in every layout and dtype, against the float64 reference on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsegen as sg
from sparsegen import Program, patterns
from sparsegen.oracle.batch import join
from sparsegen.patterns import Config

# Inputs are rounded before both sides read them, so what is left is fp32 accumulation and the
# rounding of the output: half a unit in the last place of the dtype.
TOLERANCE = {
    torch.float32: (3e-5, 3e-5),
    torch.float16: (2e-4, 2**-10),
    torch.bfloat16: (2e-4, 2**-7),
}

CASES = [
    pytest.param(n, c, id=f"{n}-{c}")
    for n in patterns.names()
    for c in patterns.configs(n, test=True)
]
LAYOUTS = [
    pytest.param(n, x, id=f"{n}-{x}")
    for n in patterns.names()
    for x in ("dense", "ragged", "paged")
]
NARROW = [
    pytest.param(n, d, id=f"{n}-{d}")
    for n in patterns.names()
    for d in (torch.bfloat16, torch.float16)
]
# Patterns that tie both sequences to one letter, or that place blocks of queries, take no offset.
UNPAGED = {n for n in patterns.names() if (p := patterns.load(n).program).query == p.key}


def inputs_of(program: Program, sizes: dict[str, int], dtype: torch.dtype, seed: int = 0) -> Any:
    made = patterns.random_inputs(program, sizes, seed)
    return {
        n: torch.from_numpy(x) if x.dtype == np.int32 else torch.from_numpy(x).to(dtype)
        for n, x in made.items()
    }


def as_numpy(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {n: (t.float() if t.is_floating_point() else t).numpy() for n, t in inputs.items()}


def letters(program: Program, sizes: dict[str, int]) -> dict[str, int]:
    return {k: v for k, v in sizes.items() if k not in (program.query, program.key)}


def assert_close(got: Any, want: Any, dtype: torch.dtype) -> None:
    got, want = ([x] if not isinstance(x, tuple | list) else list(x) for x in (got, want))
    assert len(got) == len(want)
    atol, rtol = TOLERANCE[dtype]
    for g, w in zip(got, want, strict=True):
        assert tuple(g.shape) == np.shape(w)
        if g.dtype == torch.int32:
            np.testing.assert_array_equal(g.numpy(), w)
        else:
            np.testing.assert_allclose(g.double().numpy(), w, atol=atol, rtol=rtol)


def compiled(name: str, config: Config, **options: Any) -> tuple[Program, Any]:
    program = patterns.load(name).trace(**config.hyper)
    kernel = sg.compile(
        name, sizes=letters(program, dict(config.sizes)), target="cpu", **options, **config.hyper
    )
    return program, kernel


@pytest.mark.parametrize(("name", "config"), CASES)
def test_one_sequence(name: str, config: Config) -> None:
    program, kernel = compiled(name, config)
    inputs = inputs_of(program, dict(config.sizes), torch.float32)
    assert_close(kernel(**inputs), sg.reference(program, as_numpy(inputs)), torch.float32)


@pytest.mark.parametrize(("name", "dtype"), NARROW)
def test_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    config = patterns.configs(name, test=True)[0]
    program, kernel = compiled(name, config, dtype=str(dtype).removeprefix("torch."))
    inputs = inputs_of(program, dict(config.sizes), dtype)
    assert_close(kernel(**inputs), sg.reference(program, as_numpy(inputs)), dtype)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_batches(name: str, layout: str) -> None:
    if layout == "paged" and name in UNPAGED:
        pytest.skip("queries and keys share one axis, which cannot be paged")
    config = patterns.configs(name, test=True)[1]
    program = patterns.load(name).trace(**config.hyper)
    lengths = (
        [(7, 29), (7, 29), (7, 29)] if layout == "dense" else [(5, 31), (0, 0), (1, 17), (9, 9)]
    )
    run_batch(name, config, program, layout, lengths, page=3)


def run_batch(
    name: str,
    config: Config,
    program: Program,
    layout: str,
    lengths: list[tuple[int, int]],
    page: int,
    seed: int = 0,
) -> None:
    if program.query == program.key:
        lengths = [(t, t) for t, _ in lengths]
    single = [
        inputs_of(
            program, {**config.sizes, program.query: t, program.key: s}, torch.float32, seed + b
        )
        for b, (t, s) in enumerate(lengths)
    ]
    shared = {n.name for n in program.inputs if not role_of(program, n)}
    for inputs in single[1:]:
        inputs.update({n: single[0][n] for n in shared})
    # Blocks of queries are placed from the start of the keys, so their offset is a whole block.
    offsets = [block_offset(program, s - t) for t, s in lengths]
    want = [
        sg.reference(program, as_numpy(x), q_offset=o) for x, o in zip(single, offsets, strict=True)
    ]
    options: dict[str, Any] = {"layout": layout}
    call: dict[str, Any] = {"q_offset": torch.tensor(offsets, dtype=torch.int32)}
    if layout == "paged":
        options["page_size"] = page
    stacked = {}
    for node in program.inputs:
        role, parts = role_of(program, node), [x[node.name] for x in single]
        if role is None:
            stacked[node.name] = parts[0]
        elif layout == "dense":
            stacked[node.name] = torch.stack(parts)
        elif layout == "ragged" or role == "query":
            stacked[node.name] = torch.cat(parts)
        else:
            stacked[node.name], call["page_table"] = paged(parts, page, seed)
    if layout != "dense":
        call["cu_seqlens_q"] = starts([t for t, _ in lengths])
    if layout == "ragged":
        call["cu_seqlens_k"] = starts([s for _, s in lengths])
    if layout == "paged":
        call["seqlens_k"] = torch.tensor([s for _, s in lengths], dtype=torch.int32)
    _, kernel = compiled(name, config, **options)
    got = kernel(**stacked, **call)
    several = [x if isinstance(x, tuple | list) else [x] for x in want]
    joined = [
        join("dense" if layout == "dense" else "ragged", output, list(parts))
        for output, parts in zip(program.outputs, zip(*several, strict=True), strict=True)
    ]
    assert_close(got, joined, torch.float32)


def role_of(program: Program, node: Any) -> str | None:
    first = str(node.axes[0])
    return "query" if first == program.query else "key" if first == program.key else None


def block_offset(program: Program, offset: int) -> int:
    from sparsegen.ir.axes import Entries
    from sparsegen.ir.expr import Pos, walk

    strides = {
        e.axis.stride
        for node in program.nodes
        for key in getattr(node, "keys", ())
        for e in walk(key)
        if isinstance(e, Pos) and e.role == "query" and isinstance(e.axis, Entries)
    }
    stride = max(strides, default=1)
    return offset // stride * stride


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def paged(parts: list[torch.Tensor], page: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scatter sequences over shuffled pages; the rest of each page holds NaN or a far id."""
    counts = [-(-len(p) // page) for p in parts]
    order = np.random.default_rng(seed).permutation(sum(counts) + 1)
    first = parts[0]
    poison = float("nan") if first.is_floating_point() else 12345
    pages = torch.full((sum(counts) + 1, page, *first.shape[1:]), poison, dtype=first.dtype)
    table = torch.zeros(len(parts), max(1, *counts), dtype=torch.int32)
    at = 0
    for b, part in enumerate(parts):
        for n in range(counts[b]):
            chunk = part[n * page : (n + 1) * page]
            pages[order[at], : len(chunk)] = chunk
            table[b, n] = int(order[at])
            at += 1
    return pages, table


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(set(patterns.names()) - UNPAGED)),
    layout=st.sampled_from(["dense", "ragged", "paged"]),
    lengths=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 47)), min_size=1, max_size=4),
    page=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_random_batches(
    name: str, layout: str, lengths: list[tuple[int, int]], page: int, seed: int
) -> None:
    config = patterns.configs(name, test=True)[0]
    program = patterns.load(name).trace(**config.hyper)
    if layout == "dense":
        lengths = [lengths[0]] * len(lengths)
    run_batch(name, config, program, layout, lengths, page, seed)
