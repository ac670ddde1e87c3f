"""Bring operands into the shape that kernels copy: 16 bits, nothing left to apply, compact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sparsegen.codegen.cpu.rows import Arguments, Sequence, find_sequence
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.cpu.vec import load_f32
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.gpu.launch import FUNCTIONS, device, launch
from sparsegen.codegen.gpu.tma import COLUMNS
from sparsegen.codegen.tvm import T, Value, cast, const, load, select, store
from sparsegen.lowering.tasks import AttendTask, Buffer, KeySource, Operand, Part, Rows

_THREADS, _EACH = 256, 4
_BLOCKS = 8  # of a multiprocessor


def loadable(part: Part, dtype: str) -> bool:
    """Tell whether the copy engine can load a part from where it lies."""
    sizes = (part.size, part.start, part.buffer.shape[-1])
    return part.fn is None and part.buffer.dtype == dtype and not any(n % COLUMNS for n in sizes)


def refused(operand: Operand, dtype: str) -> str | None:
    """Return None, or why an operand can neither be loaded nor be copied first."""
    for part in operand.parts:
        if part.size % COLUMNS:
            return f"elements come in parts of {part.size}: no multiples of {COLUMNS}"
        if part.buffer.rows.paged and not loadable(part, dtype):
            return "keys in pages need a conversion"
    return None


def converted(
    task: AttendTask, dtype: str, fits: Callable[[Part, str], bool] = loadable,
    operands: str = "qkv",
) -> tuple[AttendTask, dict[Part, Buffer]]:  # fmt: skip
    """Return the task over copies of what cannot be loaded, and the copies.

    Args:
        fits: tells whether a part can be loaded from where it lies.
        operands: those that are looked at; others stay as they are.
    """
    copies: dict[Part, Buffer] = {}

    def operand(x: Operand, name: str) -> Operand:
        return replace(x, parts=tuple(map(part, x.parts))) if name in operands else x

    def part(p: Part) -> Part:
        if fits(p, dtype):
            return p
        if p not in copies:
            name = f"{task.name}_copy_{len(copies)}"
            shape = (*p.buffer.shape[:-1], p.size)
            copies[p] = Buffer(name=name, dtype=dtype, shape=shape, rows=p.buffer.rows)
        return Part(buffer=copies[p], start=0, size=p.size)

    def source(s: KeySource) -> KeySource:
        return replace(s, k=operand(s.k, "k"), v=operand(s.v, "v"))

    loaded = replace(task, q=operand(task.q, "q"), sources=tuple(map(source, task.sources)))
    return loaded, copies


def convert(arguments: Arguments, copies: dict[Part, Buffer], cores: int) -> None:
    """Emit a launch for each copy that fills it, on `cores` multiprocessors."""
    for part, buffer in copies.items():
        with device():
            _fill(arguments, part, buffer, cores * _BLOCKS)


def _fill(arguments: Arguments, part: Part, buffer: Buffer, blocks: int) -> None:
    place = launch(const(blocks, "int64"), _THREADS, entered=True)
    source, target = arguments[part.buffer], arguments[buffer]
    heads, dim = buffer.shape[-2:]
    rows = T.bind(source.rows * heads)
    pieces = T.bind(rows * (dim // _EACH))
    at = cell("int64", place.block * _THREADS + cast(place.thread, "int64"))
    with T.While(get(at) < pieces):
        row = T.bind(get(at) // (dim // _EACH))
        column = T.bind((get(at) - row * (dim // _EACH)) * _EACH)
        first = T.bind(row * part.buffer.shape[-1] + (column + part.start))
        there = _there(arguments, part.buffer.rows, T.bind(row // heads))
        for n in range(_EACH):
            x = _applied(part, load_f32(source.flat, part.buffer.dtype, first + n))
            if there is not None:
                x = select(there, x, const(0.0, "float32"))
            store(target.flat, cast(x, buffer.dtype), row * dim + (column + n))
        put(at, get(at) + blocks * _THREADS)


def _there(arguments: Arguments, rows: Rows, row: Value) -> Value | None:
    """Tell whether a row (int64) belongs to a sequence; None if all do.

    Rows between the entries of two sequences hold anything, and boxes reach into them.
    """
    if rows.space != "entry":
        return None
    number = find_sequence(arguments, lambda b: _first(arguments, rows, b), row)
    local = row - _first(arguments, rows, number)
    return T.bind(local < cast(Sequence.at(arguments, number).count(rows), "int64"))


def _first(arguments: Arguments, rows: Rows, number: Value) -> Value:
    """Return the row of the first entry of a sequence."""
    assert rows.entries is not None
    ends = arguments.cu_k if rows.role == "key" else arguments.cu_q
    return cast(load(ends, number), "int64") // rows.entries.stride + number


def _applied(part: Part, x: Value) -> Value:
    if part.fn is None:
        return x
    return emit(part.fn, Env(symbols={"x": T.bind(x)}, functions=FUNCTIONS))
