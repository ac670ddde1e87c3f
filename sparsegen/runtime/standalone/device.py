"""Make the arrays that describe a batch on a GPU, where the host never waits for their values.

What the CPU refuses after reading the arrays, a GPU clamps: rows beyond the tensors, pages that do
not exist. That offsets in tensors suit compressed queries is the caller's word. In the ragged and
paged layouts one more sequence without keys follows the others and holds the rows that belong to
none, so every output row is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import POSITIONS, Sizes, check_vector
from .errors import Errors
from .gpu import gpu, unfit
from .metadata import Metadata
from .shapes import Extent
from .spec import Spec


@dataclass(frozen=True, slots=True)
class Filling:
    """What is known of the arrays of a batch before their values are.

    models   tensors of their shapes, without memory of that size
    numbers  the last arguments of `sparsegen_metadata`
    extent   upper bounds of what only the values say
    """

    models: tuple[torch.Tensor, ...]
    numbers: tuple[int, ...]
    extent: Extent


def _no_stream(index: int) -> int:
    return 0


# The current stream of a device, by its index, as a number; builds of torch without CUDA have none.
stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _no_stream)


def check_device(spec: Spec, device: torch.device, errors: Errors) -> None:
    """Refuse a GPU that does not run a kernel."""
    reason = unfit(spec.codes, spec.shared, gpu(device))
    if reason is not None:
        raise errors.unsupported(
            f"{spec.name}() was compiled for {', '.join(spec.codes)}, and {reason}",
            hint="compile it for that GPU: target='cuda' takes the current one; of a bundle with "
            "code for it, sg.load(folder, device=...)",
        )


class DeviceMetadata(Metadata):
    """Turn the keywords of a call into the arrays of the tasks, on the device of its inputs.

    Args:
        spec: the kernel's specification.
        fill: `sparsegen_metadata` of the kernel's library.
        errors: what to raise.
    """

    def __init__(self, spec: Spec, fill: Callable[..., int], errors: Errors) -> None:
        super().__init__(spec, fill, errors)
        self._fill = fill

    def filling(self, sizes: Sizes, keywords: Sequence[Any], device: torch.device) -> Filling:
        """Return how to fill the arrays of calls with such keywords, which are checked.

        Args:
            sizes: of the call's inputs.
            keywords: the values of `spec.metadata`, in that order.
            device: where the inputs are.
        """
        spec = self._spec
        values = dict(zip(spec.metadata, keywords, strict=True))
        given = values["q_offset"]
        tensor = isinstance(given, torch.Tensor)
        fixed = spec.layout in ("sequence", "dense")
        batch, columns, more = sizes.batch, 0, 0
        if not fixed:
            more = 1
            cu_q = self._vector("cu_seqlens_q", values["cu_seqlens_q"], "batch + 1")
            cu_k = self._keys_of(values) if spec.layout == "ragged" else None
            batch, table = cu_q.shape[0] - 1, values.get("page_table")
            self._check_batch(batch, cu_k, values.get("seqlens_k"), table)
            columns = 0 if table is None else table.shape[1]
        if tensor:
            self._same_batch("q_offset", self._vector("q_offset", given).shape[0], batch)
        elif fixed:
            given = self.offset(sizes, given)
        elif given is not None:
            self._check_offset(given)
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.device != device:
                raise self._errors.input(
                    f"{spec.name}(): argument {name!r} is on {value.device}, "
                    f"the inputs on {device}",
                    hint="put all tensors on one device",
                )
        shapes: list[tuple[int, ...]] = [(batch + more + 1,), (batch + more + 1,), (batch + more,)]
        paged = spec.layout == "paged"
        if paged:
            shapes.append((batch + more, max(columns, 1)))
        one = torch.empty(1, dtype=torch.int32, device=device)
        known = not tensor and given is not None
        numbers = (
            sizes.rows_q, sizes.rows_k, spec.page, given if known else 0, int(known),
            sizes.queries, sizes.keys,
        )  # fmt: skip
        longest = sizes.keys if fixed else columns * spec.page if paged else sizes.rows_k
        total_k = batch * longest if paged else sizes.rows_k
        last = sizes.queries if fixed else sizes.rows_q
        query = given + last if known else None if tensor else longest
        stops = {"query": query, "key": longest}
        first = given if known and fixed else 0
        extent = Extent(batch + more, sizes.rows_q, total_k, stops, first)
        return Filling(tuple(map(one.expand, shapes)), numbers, extent)

    def fill(self, filling: Filling, keywords: Sequence[Any], arrays: Sequence[Any]) -> None:
        """Fill the arrays of a call, on the current stream of the tensors among the arguments."""
        *given, offset = keywords
        offsets = offset if isinstance(offset, torch.Tensor) else None
        match self._spec.layout:
            case "ragged":
                cu_q, cu_k = given
                sources = (cu_q, cu_q if cu_k is None else cu_k, None, offsets, None)
            case "paged":
                cu_q, lengths, table = given
                sources = (cu_q, None, lengths, offsets, table)
            case _:
                sources = (None, None, None, offsets, None)
        pages = arrays[3] if len(arrays) == 4 else None
        self._fill(*sources, *arrays[:3], pages, *filling.numbers)

    def offset(self, sizes: Sizes, offset: int | None) -> int:
        """Return the position of the first query of equal sequences."""
        offset = sizes.keys - sizes.queries if offset is None else offset
        self._check_offset(offset, sizes.queries)
        if not -POSITIONS <= offset <= POSITIONS - sizes.queries:
            raise self._errors.input(
                f"{self._spec.name}(): q_offset={offset} puts queries at positions "
                "that 32 bits cannot hold",
                hint="count positions from the first key",
            )
        return offset

    def _check_batch(self, batch: int, cu_k: Any, lengths: Any, table: Any) -> None:
        if batch < 0:
            raise self._errors.input(
                f"{self._spec.name}(): argument 'cu_seqlens_q' is empty",
                hint="it has one element more than there are sequences, and starts with 0",
            )
        if cu_k is not None:
            self._same_batch("cu_seqlens_k", cu_k.shape[0] - 1, batch, " + 1")
            return
        self._same_batch("seqlens_k", self._vector("seqlens_k", lengths).shape[0], batch)
        if table is None:
            raise self._errors.input(
                f"{self._spec.name}(): argument 'page_table' is missing",
                hint="the paged layout takes page_table=, int32 [batch, max_pages]",
            )
        check_vector(self._spec, "page_table", table, ("batch", "max_pages"), self._errors)
        self._same_batch("page_table", table.shape[0], batch)
