"""Reduce scores by key: rows of accumulators, one per value of the last key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsegen.codegen.cpu import vec
from sparsegen.codegen.cpu.stream import cell, get, put
from sparsegen.codegen.tvm import Memory, T, Value, cast, const, load, store

How = Literal["sum", "max", "mean", "lse"]
ABSENT = float("-inf")


@dataclass(frozen=True)
class Accumulator:
    """`rows` rows of `length` groups each, reduced by `how`; a group nothing reached is absent.

    value  float32 [rows * length]: the sum or maximum so far; for "lse" the maximum
    mass   float32 [rows * length]: for "lse" the sum of exp(x - maximum); else the same memory
    count  int32 [rows * length]: how many elements were added
    """

    how: How
    rows: int
    length: Value
    value: Memory
    mass: Memory
    count: Memory

    def clear(self) -> None:
        """Forget every element."""
        with T.serial(self.rows * self.length) as n:
            store(self.value, const(0.0, "float32"), n)
            store(self.count, const(0, "int32"), n)
            if self.how == "lse":
                store(self.mass, const(0.0, "float32"), n)

    def add(self, row: Value, group: Value, x: Value) -> None:
        """Add `x` (float32) to a group (int32); groups outside the row are left out."""
        with T.If(T.And(group >= 0, cast(group, "int64") < self.length)), T.Then():
            at = T.bind(cast(row, "int64") * self.length + cast(group, "int64"))
            before = T.bind(load(self.value, at))
            new = T.bind(load(self.count, at))
            match self.how:
                case "sum" | "mean":
                    store(self.value, before + x, at)
                case "max":
                    with T.If(T.Or(new < 1, x > before)), T.Then():
                        store(self.value, x, at)
                case "lse":
                    self._log_add(at, before, new, x)
            store(self.count, new + 1, at)

    def _log_add(self, at: Value, before: Value, new: Value, x: Value) -> None:
        mass = T.bind(load(self.mass, at))
        with T.If(T.Or(new < 1, x > before)):
            with T.Then():
                old = cell("float32", const(0.0, "float32"))
                with T.If(new > 0), T.Then():
                    put(old, mass * vec.exp(before - x))
                store(self.mass, get(old) + const(1.0, "float32"), at)
                store(self.value, x, at)
            with T.Else():
                store(self.mass, mass + vec.exp(x - before), at)

    def finish(self, *, softmax: bool) -> None:
        """Turn sums into results: -inf where absent, then softmax over each row if asked for."""
        with T.serial(self.rows * self.length) as n:
            count = T.bind(load(self.count, n))
            with T.If(count < 1):
                with T.Then():
                    store(self.value, const(ABSENT, "float32"), n)
                if self.how in ("mean", "lse"):
                    with T.Else():
                        x = load(self.value, n)
                        if self.how == "mean":
                            store(self.value, x / cast(count, "float32"), n)
                        else:
                            store(self.value, x + vec.log(load(self.mass, n)), n)
        if softmax:
            with T.serial(const(self.rows, "int64")) as row:
                self._softmax(row * self.length)

    def _softmax(self, first: Value) -> None:
        top = cell("float32", const(ABSENT, "float32"))
        total = cell("float32", const(0.0, "float32"))
        with T.serial(self.length) as n, T.If(load(self.value, first + n) > get(top)), T.Then():
            put(top, load(self.value, first + n))
        with T.serial(self.length) as n, T.If(load(self.count, first + n) > 0), T.Then():
            p = T.bind(vec.exp(load(self.value, first + n) - get(top)))
            store(self.value, p, first + n)
            put(total, get(total) + p)
        with T.serial(self.length) as n, T.If(load(self.count, first + n) > 0), T.Then():
            store(self.value, load(self.value, first + n) / get(total), first + n)
