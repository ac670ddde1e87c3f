"""Name the extents of a value: letters, literal sizes, compressed entries, concatenations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """An axis named by a letter of a declaration; equal letters are equal extents."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Fixed:
    """An axis of a literal size."""

    size: int

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Entries:
    """Windows of `width` positions every `stride` along `parent`.

    Entry e covers parent positions [e * stride, e * stride + width). Only complete windows count,
    unless `partial`, which also keeps the ragged window at the end.
    """

    parent: Named
    width: int
    stride: int
    partial: bool = False

    @property
    def overlaps(self) -> bool:
        """Tell whether two entries share a parent position."""
        return self.width > self.stride

    def count(self, length: int) -> int:
        """Count the entries of a parent of `length` positions."""
        if self.partial:
            return -(-length // self.stride)
        return max(0, (length - self.width) // self.stride + 1)

    def __str__(self) -> str:
        tail = "+" if self.partial else ""
        return f"{self.parent}/{self.stride}w{self.width}{tail}"


@dataclass(frozen=True)
class Concat:
    """The last axis of a concatenation."""

    parts: tuple[Axis, ...]

    def __str__(self) -> str:
        return "(" + "+".join(map(str, self.parts)) + ")"


Axis = Named | Fixed | Entries | Concat


def extent(axis: Axis, sizes: dict[str, int]) -> int:
    """Return the length of `axis` when the letters have these sizes."""
    match axis:
        case Named(name):
            return sizes[name]
        case Fixed(size):
            return size
        case Entries(parent=parent):
            return axis.count(sizes[parent.name])
        case Concat(parts):
            return sum(extent(p, sizes) for p in parts)


def letters(axis: Axis) -> frozenset[str]:
    """Return the letters that `axis` mentions."""
    match axis:
        case Named(name):
            return frozenset({name})
        case Fixed():
            return frozenset()
        case Entries(parent=parent):
            return frozenset({parent.name})
        case Concat(parts):
            return frozenset().union(*(letters(p) for p in parts))
