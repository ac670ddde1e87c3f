"""Start a GPU kernel: grids, threads, functions of scores, reductions over warps and blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sparsegen.codegen.cpu.rows import Arguments, declare
from sparsegen.codegen.tvm import (
    I,
    IRBuilder,
    T,
    Value,
    cast,
    const,
    device_code,
    maximum,
)
from sparsegen.lowering.tasks import Buffer, Task

FULL = 0xFFFFFFFF  # every lane of a warp


def _sigmoid(x: Value) -> Value:
    one = const(1.0, "float32")
    return one / (one + T.exp(const(0.0, "float32") - x))


FUNCTIONS: Mapping[str, Callable[[Value], Value]] = MappingProxyType(
    {"exp": T.exp, "log": T.log, "tanh": T.tanh, "sigmoid": _sigmoid, "sqrt": T.sqrt}
)


@contextmanager
def kernel(task: Task, scratch: tuple[Buffer, ...] = ()) -> Iterator[tuple[Any, Arguments]]:
    """Declare the function of a task; yields the builder, which has the module at the end."""
    with device_code(), IRBuilder() as builder, I.ir_module(), T.prim_func():
        yield builder, declare(task, scratch)


_OR = """
__device__ __forceinline__ unsigned sparsegen_or(int* p, unsigned x) {
  return atomicOr((unsigned*)p, x);
}
"""


@dataclass(frozen=True)
class Place:
    """Where a thread is: its block (int64), its number in the block, its warp and lane (int32)."""

    block: Value
    thread: Value

    @property
    def warp(self) -> Value:
        """Return the number of the warp in the block."""
        return self.thread // 32

    @property
    def lane(self) -> Value:
        """Return the number of the thread in its warp."""
        return self.thread % 32


@contextmanager
def device() -> Iterator[None]:
    """Run what is emitted inside on the device, as one of several launches of a function."""
    with T.attr({"tirx.device_entry": True}):
        yield


def launch(blocks: Value, threads: int, *, entered: bool = False) -> Place:
    """Enter the device: everything after this runs in `blocks` (int64, at most 2^31 - 1).

    Args:
        entered: the launch is one of several, inside `device`.
    """
    if not entered:
        T.device_entry()
    # A grid of no blocks is an error of the launch.
    block = T.cta_id([cast(maximum(blocks, const(1, "int64")), "int32")])
    thread = T.thread_id([threads])
    return Place(T.bind(cast(block, "int64")), T.bind(thread))


def sync() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.cuda.cta_sync())


def shuffle_xor(x: Value, mask: int) -> Value:
    """Return the value of the lane whose number differs in `mask`."""
    return T.tvm_warp_shuffle_xor(
        const(FULL, "uint32"), x, const(mask, "int32"), const(32, "int32"), const(32, "int32")
    )


def across(x: Value, combine: Callable[[Value, Value], Value], lanes: int = 32) -> Value:
    """Combine a value over groups of `lanes` neighbouring lanes; all of them get the result."""
    step = 1
    while step < lanes:
        x = T.bind(x)
        # Bound first: a combination that uses it twice must not shuffle twice, in a branch.
        other = T.bind(shuffle_xor(x, step))
        x = T.bind(combine(x, other))
        step *= 2
    return x


def add(a: Value, b: Value) -> Value:
    """Return the sum."""
    return a + b


def atomic_or(pointer: Value, bits: Value) -> Value:
    """Set bits (uint32) of a word, and return the word before."""
    return T.cuda.func_call("sparsegen_or", pointer, bits, source_code=_OR, return_type="uint32")


def bit_of(place: Value) -> Value:
    """Return the word (uint32) with one bit, 0 to 31; TVM takes a signed one to be positive."""
    return T.bind(T.shift_left(const(1, "uint32"), cast(place, "uint32")))


def signed(bits: int) -> int:
    """Return the int32 with these 32 bits."""
    return bits - 2**32 if bits >= 2**31 else bits
