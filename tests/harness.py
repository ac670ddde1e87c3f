"""Inputs of shipped patterns, one sequence or a batch of them, and what the reference makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import sparsegen as sg
from sparsegen import Pattern, Program, partition, patterns
from sparsegen.ir.axes import Entries
from sparsegen.ir.expr import Pos, walk
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.resolve import sizes_of
from sparsegen.oracle.batch import join
from sparsegen.patterns import Config

# Patterns that tie both sequences to one letter, or that place blocks of queries, take no offset.
UNPAGED = {n for n in patterns.names() if (p := patterns.load(n).program).query == p.key}


@dataclass(frozen=True)
class Case:
    """A call and what it must return.

    options  of `sg.compile`
    inputs   tensors by name
    call     metadata by name
    want     a list of arrays, in float64 or int32
    """

    program: Program
    options: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    call: dict[str, Any]
    want: list[Any]

    def compile(self, target: str) -> Any:
        """Return the kernel."""
        return sg.compile(self.program, target=target, **self.options)

    def to(self, device: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return inputs and metadata on a device."""
        inputs, call = ({n: x.to(device) for n, x in d.items()} for d in (self.inputs, self.call))
        return inputs, call


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


def published(name: str, config: Config, **binding: Any) -> Plan:
    """Partition a pattern for a shape, with all of its sizes."""
    program = patterns.load(name).trace(**config.hyper)
    sizes = sizes_of(program, letters(program, dict(config.sizes)))
    return partition(program, Binding(sizes=tuple(sorted(sizes.items())), **binding))


def listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple | list) else [results]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def traced(pattern: str | Pattern, config: Config) -> Program:
    """Return the program of a pattern, or of the shipped pattern of that name."""
    found = patterns.load(pattern) if isinstance(pattern, str) else pattern
    return found.trace(**config.hyper)


def one_sequence(pattern: str | Pattern, config: Config, dtype: torch.dtype, seed: int = 0) -> Case:
    """Return a call of one sequence of a configuration's sizes."""
    program = traced(pattern, config)
    inputs = inputs_of(program, dict(config.sizes), dtype, seed)
    options = {"dtype": name_of(dtype), "sizes": letters(program, dict(config.sizes))}
    want = listed(sg.reference(program, as_numpy(inputs)))
    return Case(program, options, inputs, {}, want)


def poisoned(
    name: str, config: Config, dtype: torch.dtype, value: float, roles: Sequence[str] = ("key",)
) -> Case:
    """Return a case in which a row of every tensor on these axes is NaN or infinite."""
    case = one_sequence(name, config, dtype)
    for node in case.program.inputs:
        rows = case.inputs[node.name]
        if role_of(case.program, node) in roles and rows.is_floating_point():
            rows[len(rows) * 2 // 3] = value
    with np.errstate(all="ignore"):
        want = listed(sg.reference(case.program, as_numpy(case.inputs)))
    return Case(case.program, case.options, case.inputs, {}, want)


def batch(
    pattern: str | Pattern,
    config: Config,
    layout: str,
    lengths: list[tuple[int, int]],
    *,
    page: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    explicit: bool = True,
) -> Case:
    """Return a call of several sequences of (queries, keys).

    Args:
        explicit: pass the offsets of the queries even where they are the default.
    """
    program = traced(pattern, config)
    if program.query == program.key:
        lengths = [(t, t) for t, _ in lengths]
    single = [
        inputs_of(program, {**config.sizes, program.query: t, program.key: s}, dtype, seed + b)
        for b, (t, s) in enumerate(lengths)
    ]
    shared = {n.name for n in program.inputs if not role_of(program, n)}
    for inputs in single[1:]:
        inputs.update({n: single[0][n] for n in shared})
    # Blocks of queries are placed from the start of the keys, so their offset is a whole block.
    offsets = [block_offset(program, s - t) for t, s in lengths]
    want = [
        listed(sg.reference(program, as_numpy(x), q_offset=o))
        for x, o in zip(single, offsets, strict=True)
    ]
    sizes = letters(program, dict(config.sizes))
    options: dict[str, Any] = {"layout": layout, "dtype": name_of(dtype), "sizes": sizes}
    call: dict[str, Any] = {}
    if explicit or offsets != [s - t for t, s in lengths]:
        call["q_offset"] = torch.tensor(offsets, dtype=torch.int32)
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
    joined = [
        join("dense" if layout == "dense" else "ragged", output, list(parts))
        for output, parts in zip(program.outputs, zip(*want, strict=True), strict=True)
    ]
    return Case(program, options, stacked, call, joined)


def role_of(program: Program, node: Any) -> str | None:
    first = str(node.axes[0])
    return "query" if first == program.query else "key" if first == program.key else None


def block_offset(program: Program, offset: int) -> int:
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
