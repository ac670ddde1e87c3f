"""Resolve the letters of a program to sizes, and refuse what cannot fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sparsegen.errors import BindingError, did_you_mean
from sparsegen.ir.axes import Axis, Entries, Fixed, Named, extent
from sparsegen.ir.expr import Const, Expr, Size, rebuild
from sparsegen.ir.node import Node, Slice
from sparsegen.ir.program import Program
from sparsegen.primitives import Attend, Compress, Merge, Score


def sizes_of(program: Program, given: Mapping[str, int]) -> dict[str, int]:
    """Return the size of every letter but the sequence axes.

    A letter with the name of an integer hyperparameter takes its value.

    Raises:
        BindingError: a letter has no size, a size is not positive, or extents cannot agree.
    """
    sequence = {program.query, program.key}
    sizes = {k: v for k, v in given.items() if k not in sequence}
    for name, value in program.hyper:
        if name not in program.letters - sequence or not isinstance(value, int):
            continue
        if sizes.setdefault(name, value) != value:
            raise BindingError(
                f"the axis {name} has {sizes[name]} elements, "
                f"but the hyperparameter {name}={value}",
                hint="pass tensors of that size, or the hyperparameter that fits them",
            )
    missing = sorted(program.letters - sequence - sizes.keys())
    if missing:
        raise BindingError(
            f"{program.name} needs the sizes of {', '.join(missing)}",
            hint="pass sizes={" + ", ".join(f"{m!r}: ..." for m in missing) + "}",
        )
    unknown = sorted(sizes.keys() - program.letters)
    if unknown:
        raise BindingError(
            f"{program.name} has no axis {', '.join(unknown)}",
            hint=unknown_size(program, unknown[0], program.letters - sequence),
        )
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise BindingError(f"{name}={size!r}: an extent is a positive integer")
    for node in program.nodes:
        _check(node, sizes)
    return sizes


def unknown_size(program: Program, name: str, letters: Iterable[str]) -> str:
    """Return what somebody may have meant who gives a size that no axis has."""
    if name in dict(program.hyper):
        return f"{name} is a hyperparameter: give it beside the sizes, as {name}=..."
    same = [x for x in letters if x.lower() == name.lower()]
    return did_you_mean(same[0] if same else name, letters)


def resolved(expr: Expr, sizes: Mapping[str, int]) -> Expr:
    """Replace every named size by its value, folding constants."""
    return rebuild(expr, lambda e: Const(sizes[e.name]) if isinstance(e, Size) else None)


def _check(node: Node, sizes: dict[str, int]) -> None:
    match node:
        case Slice(x=x, stop=stop):
            have = extent(x.axes[-1], sizes)
            if stop > have:
                raise BindingError(
                    f"the slice ends at {stop}, but the axis has {have}", at=node.site
                )
        case Compress(width=width, weight=weight, bias=bias, previous=previous):
            slots = 2 * width if previous else width
            for what, tensor, want in (("weight", weight, width), ("slot bias", bias, slots)):
                if tensor is not None and extent(tensor.axes[0], sizes) != want:
                    raise BindingError(
                        f"compress(width={width}) needs a {what} of {want} slots, "
                        f"got {extent(tensor.axes[0], sizes)}",
                        at=node.site,
                    )
        case Score(q=q, k=k):
            _check_pair("score()", node, q, k, sizes)
        case Attend(q=q, sources=sources):
            for source in sources:
                _check_pair("attend()", node, q, source.k, sizes)
                if _heads(source.k, sizes) != _heads(sources[0].k, sizes):
                    raise BindingError(
                        "the key sources of attend() have different numbers of heads", at=node.site
                    )
        case Merge(parts=parts, gates=gates) if gates is not None:
            if extent(gates.axes[2], sizes) != len(parts):
                raise BindingError(
                    f"merge() of {len(parts)} parts needs as many gates, "
                    f"got {extent(gates.axes[2], sizes)}",
                    at=node.site,
                )


def _check_pair(what: str, node: Node, q: Node, k: Node, sizes: dict[str, int]) -> None:
    dq, dk = extent(q.axes[-1], sizes), extent(k.axes[-1], sizes)
    if dq != dk:
        raise BindingError(
            f"{what} multiplies queries of {dq} elements with keys of {dk}",
            at=node.site,
            hint=f"[{q.axes[-1]}] and [{k.axes[-1]}] must be equally long",
        )
    hq, hk = _heads(q, sizes), _heads(k, sizes)
    if hq % hk:
        raise BindingError(
            f"{what}: {hq} query heads are no multiple of {hk} key heads", at=node.site
        )


def _heads(node: Node, sizes: dict[str, int]) -> int:
    return extent(node.axes[1], sizes)


def base_letter(axis: Axis) -> str | None:
    """Return the letter of a sequence axis or of the parent of entries; None for a literal."""
    match axis:
        case Named(name) | Entries(parent=Named(name)):
            return name
        case Fixed():
            return None
        case _:
            return None
