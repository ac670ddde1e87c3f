"""Make the arrays that describe a batch on a GPU, where the host never waits for their values.

What the CPU refuses after reading the arrays, a GPU clamps: rows beyond the tensors, pages that do
not exist. That offsets in tensors suit compressed queries is the caller's word. In the ragged and
paged layouts one more sequence without keys follows the others and holds the rows that belong to
none, so every output row is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .checks import POSITIONS, Sizes, check_vector
from .errors import Errors
from .metadata import Arrays, Metadata
from .shapes import Extent
from .spec import Spec


@functools.lru_cache(maxsize=256)
def equal_sequences(
    batch: int, queries: int, keys: int, offset: int, device: torch.device
) -> Arrays:
    """Return the arrays of `batch` equal sequences. Never written to."""
    steps = torch.arange(batch + 1, device="cpu")
    arrays = (
        (steps * queries).to(device=device, dtype=torch.int32),
        (steps * keys).to(device=device, dtype=torch.int32),
        torch.full((batch,), offset, dtype=torch.int32, device=device),
    )
    # Later calls may be on other streams.
    torch.cuda.current_stream(device).synchronize()
    return arrays


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

    def equal(self, sizes: Sizes, offset: int | None, device: torch.device) -> Arrays:
        """Return the arrays of equal sequences: the sequence and dense layouts."""
        if torch.cuda.is_current_stream_capturing():
            raise self._errors.input(
                f"{self._spec.name}(): the first call of these shapes is being captured",
                hint="call it once before the capture, as torch.cuda.graph() asks for",
            )
        offset = self.offset(sizes, offset)
        return equal_sequences(sizes.batch, sizes.queries, sizes.keys, offset, device)

    def filled(
        self, sizes: Sizes, keywords: Sequence[Any], device: torch.device
    ) -> tuple[Arrays, Extent]:
        """Return the arrays of a call, and upper bounds of what the host does not know.

        Args:
            sizes: of the call's inputs.
            keywords: the values of `spec.metadata`, in that order.
        """
        spec = self._spec
        values = dict(zip(spec.metadata, keywords, strict=True))
        lengths, table, given = (
            values.get("seqlens_k"),
            values.get("page_table"),
            values["q_offset"],
        )
        fixed = spec.layout in ("sequence", "dense")
        cu_k: torch.Tensor | None
        if fixed:
            cu_q, cu_k, _ = equal_sequences(sizes.batch, sizes.queries, sizes.keys, 0, device)
        else:
            cu_q = self._vector("cu_seqlens_q", values["cu_seqlens_q"], "batch + 1")
            cu_k = self._keys_of(values) if spec.layout == "ragged" else None
        batch = cu_q.shape[0] - 1
        self._check_batch(batch, cu_k, lengths, table)
        columns = 0 if table is None else table.shape[1]
        tensor = isinstance(given, torch.Tensor)
        if tensor:
            self._same_batch("q_offset", self._vector("q_offset", given).shape[0], batch)
        for name in spec.metadata:
            value = values[name]
            if isinstance(value, torch.Tensor) and value.device != device:
                raise self._errors.input(
                    f"{spec.name}(): argument {name!r} is on {value.device}, "
                    f"the inputs on {device}",
                    hint="put all tensors on one device",
                )
        if given is not None and not tensor:
            self._check_offset(given)
        more = 0 if fixed else 1
        empty = functools.partial(torch.empty, dtype=torch.int32, device=device)
        arrays = (empty(batch + more + 1), empty(batch + more + 1), empty(batch + more))
        pages = empty((batch + more, max(columns, 1))) if spec.layout == "paged" else None
        self._fill(
            cu_q, cu_k, lengths, given if tensor else None, table, *arrays, pages,
            sizes.rows_q, sizes.rows_k, spec.page, 0 if given is None or tensor else given,
            1 if given is not None and not tensor else 0,
        )  # fmt: skip
        longest = columns * spec.page if pages is not None else sizes.rows_k
        total_k = batch * longest if pages is not None else sizes.rows_k
        if fixed:
            longest = sizes.keys
        query = longest if given is None else None if tensor else given + sizes.rows_q
        stops = {"query": query, "key": longest}
        extent = Extent(batch + more, sizes.rows_q, total_k, stops)
        return (arrays if pages is None else (*arrays, pages)), extent

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
