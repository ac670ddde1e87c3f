"""Read operands: parts side by side, heads that share a part, pages, functions applied at load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsegen.codegen.cpu.rows import Arguments
from sparsegen.codegen.cpu.vec import load_f32
from sparsegen.codegen.exprs import Env, emit
from sparsegen.codegen.tvm import T, Value
from sparsegen.lowering.tasks import Operand, Part


@dataclass(frozen=True)
class Field:
    """A part of an operand; `first` is the operand's element that it begins with."""

    arguments: Arguments
    part: Part
    first: int

    def read(self, row: Value, head: Value, element: Value) -> Value:
        """Return one element as float32.

        Args:
            row: of the buffer (of [pages * page] rows where it is paged), int64.
            head: of the operand, int64.
            element: of the operand, in this part, int64.
        """
        argument, buffer = self.arguments[self.part.buffer], self.part.buffer
        heads, dim = buffer.shape
        inner = element + (self.part.start - self.first)
        if heads > 1:
            inner = head * dim + inner
        value = load_f32(argument.flat, buffer.dtype, row * (heads * dim) + inner)
        if self.part.fn is None:
            return value
        return emit(self.part.fn, Env(symbols={"x": T.bind(value)}))


def fields(arguments: Arguments, operand: Operand) -> Iterator[Field]:
    """Yield the parts of an operand in order."""
    first = 0
    for part in operand.parts:
        yield Field(arguments, part, first)
        first += part.size
