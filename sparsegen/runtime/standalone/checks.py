"""Check the tensors of a call against the specification, and say what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import Errors
from .spec import Spec, TensorSpec

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int32": torch.int32,
}

# A kernel's arrays of positions are int32.
POSITIONS = 2**31 - 1


@dataclass(frozen=True)
class Sizes:
    """How much a call computes.

    batch            sequences; 0 where only the metadata says
    queries, keys    of one sequence, in the sequence and dense layouts
    rows_q, rows_k   rows of packed queries and keys; pages, where keys are paged
    """

    batch: Any
    queries: Any
    keys: Any
    rows_q: Any
    rows_k: Any


def leading(spec: Spec, tensor: TensorSpec) -> tuple[str, ...]:
    """Return the names of the axes before `tensor.shape`."""
    if tensor.space == "none":
        return ()
    if tensor.paged:
        return ("pages", "page")
    letter = spec.query if tensor.space == "query" else spec.key
    return ("batch", letter) if spec.layout == "dense" else (letter,)


def sizes_of(spec: Spec, shapes: Sequence[Sequence[Any]]) -> Sizes:
    """Return the sizes of a call from the shapes of its inputs, real or symbolic."""
    found: dict[str, Any] = {}
    for tensor, shape in zip(spec.inputs, shapes, strict=True):
        for name, extent in zip(leading(spec, tensor), shape, strict=False):
            found.setdefault(name, extent)
    queries = found[spec.query]
    if spec.layout in ("sequence", "dense"):
        batch, keys = found.get("batch", 1), found[spec.key]
        return Sizes(batch, queries, keys, batch * queries, batch * keys)
    return Sizes(0, 0, 0, queries, found["pages" if spec.layout == "paged" else spec.key])


def check_inputs(spec: Spec, args: Sequence[Any], errors: Errors) -> Sizes:
    """Return the sizes of a call, or raise the error that says which argument does not fit."""
    seen: dict[str, tuple[int, str]] = {}
    for tensor, value in zip(spec.inputs, args, strict=True):
        _check_kind(spec, tensor.name, tensor.dtype, value, errors)
        _check_shape(spec, tensor, value, seen, errors)
        check_memory(spec, tensor.name, value, errors)
        if value.device != args[0].device:
            raise errors.input(
                f"{spec.name}(): argument {tensor.name!r} is on {value.device}, "
                f"but {spec.inputs[0].name!r} on {args[0].device}",
                hint="put all inputs on one device",
            )
    sizes = sizes_of(spec, [value.shape for value in args])
    if max(sizes.rows_q, sizes.rows_k) > POSITIONS:
        raise errors.input(
            f"{spec.name}(): {max(sizes.rows_q, sizes.rows_k)} rows, "
            f"but positions are counted up to {POSITIONS}",
            hint="split the batch",
        )
    return sizes


def _check_kind(spec: Spec, name: str, dtype: str, value: Any, errors: Errors) -> None:
    where = f"{spec.name}(): argument {name!r}"
    if not isinstance(value, torch.Tensor):
        kind = type(value)
        module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        what = module + kind.__name__
        hint = f"torch.as_tensor({name}) makes one"
        raise errors.input(f"{where} is a {what}, expected a torch.Tensor", hint=hint)
    if value.layout != torch.strided:
        raise errors.input(
            f"{where} is {value.layout}, expected a dense tensor", hint=".to_dense()"
        )
    if value.device.type != spec.device:
        place = "the CPU" if spec.device == "cpu" else "a GPU"
        raise errors.input(
            f"{where} is on {value.device}, but this kernel runs on {place}",
            hint=f"pass {name}.{spec.device}()",
        )
    if value.dtype != DTYPES[dtype]:
        raise errors.input(
            f"{where} is {value.dtype}, expected {DTYPES[dtype]}",
            hint=f"pass {name}.to({DTYPES[dtype]})"
            + ("" if dtype == "int32" else ", or compile with a dtype that fits"),
        )


def _check_shape(
    spec: Spec, tensor: TensorSpec, value: Any, seen: dict[str, tuple[int, str]], errors: Errors
) -> None:
    front = leading(spec, tensor)
    names = (*front, *tensor.axes)
    fixed: tuple[int | None, ...] = (
        *(spec.page if name == "page" else None for name in front),
        *tensor.shape,
    )
    shape = tuple(value.shape)
    expected = ", ".join(
        name if size is None else name if name == str(size) else f"{name}={size}"
        for name, size in zip(names, fixed, strict=True)
    )
    where = (
        f"{spec.name}(): argument {tensor.name!r} has shape {list(shape)}, expected [{expected}]"
    )
    if len(shape) != len(names):
        hint = f"give it {len(names)} axes"
        if spec.layout == "dense" and len(shape) == len(names) - 1 and front:
            hint = f"pass {tensor.name}[None] for a batch of one sequence"
        elif spec.layout == "sequence" and len(shape) == len(names) + 1:
            hint = 'compile with layout="dense" for a leading batch axis'
        raise errors.input(f"{where}: {len(shape)} axes instead of {len(names)}", hint=hint)
    for name, size, extent in zip(names, fixed, shape, strict=True):
        if size is not None:
            if extent != size:
                raise errors.input(
                    f"{where}: {name} is {extent}, not {size}",
                    hint="this kernel is specialised to its sizes: pass a tensor that fits, "
                    "or compile one for this size",
                )
            continue
        other, whose = seen.setdefault(name, (extent, tensor.name))
        if other != extent:
            raise errors.input(
                f"{where}: {name} is {extent}, but {other} in {whose!r}",
                hint=f"equal letters are equal extents: {tensor.name!r} and {whose!r} "
                f"share the axis {name}",
            )


def check_memory(spec: Spec, name: str, value: Any, errors: Errors) -> None:
    """Refuse strides and addresses that the kernel cannot read."""
    where = f"{spec.name}(): argument {name!r}"
    if not value.is_contiguous():
        raise errors.input(
            f"{where} has strides {list(value.stride())} for shape {list(value.shape)}, "
            "expected contiguous memory",
            hint=f"pass {name}.contiguous()",
        )
    if value.data_ptr() % (step := alignment(spec, value.dtype)):
        own = step == value.element_size()
        raise errors.input(
            f"{where} starts at an address that is no multiple of "
            f"{'its element size' if own else 'what a GPU loads at once'}, {step} bytes",
            hint=f"pass {name}.clone()",
        )


def alignment(spec: Spec, dtype: torch.dtype) -> int:
    """Return the bytes that the address of a tensor must be a multiple of."""
    # A GPU loads numbers in vectors, and integers one by one.
    return 16 if spec.device == "cuda" and dtype != torch.int32 else dtype.itemsize


def check_vector(spec: Spec, name: str, value: Any, axes: Sequence[str], errors: Errors) -> None:
    """Refuse metadata that is not an int32 tensor with these axes."""
    _check_kind(spec, name, "int32", value, errors)
    if value.dim() != len(axes):
        raise errors.input(
            f"{spec.name}(): argument {name!r} has shape {list(value.shape)}, "
            f"expected [{', '.join(axes)}]",
            hint=f"give it {len(axes)} axes",
        )
    check_memory(spec, name, value, errors)
