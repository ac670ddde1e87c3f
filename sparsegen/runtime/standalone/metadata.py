"""Make and check the arrays that describe a batch: prefix sums of lengths, offsets, page tables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .checks import POSITIONS, Sizes, check_vector
from .errors import Errors
from .spec import Spec


@functools.lru_cache(maxsize=256)
def prefix(batch: int, length: int) -> torch.Tensor:
    """Return [0, length, 2 * length, ...], `batch + 1` elements. Never written to."""
    return (torch.arange(batch + 1, device="cpu") * length).to(torch.int32)


@functools.lru_cache(maxsize=256)
def offsets(batch: int, offset: int) -> torch.Tensor:
    """Return `offset`, `batch` times. Never written to."""
    return torch.full((batch,), offset, dtype=torch.int32, device="cpu")


Arrays = tuple[torch.Tensor, ...]
"""cu_q, cu_k, q_off and, where keys are paged, page_table: the first arguments of every task."""


class Metadata:
    """Turn the keywords of a call into the arrays of the tasks, checking every row they name.

    Args:
        spec: the kernel's specification.
        check: `sparsegen_metadata` of the kernel's library.
        errors: what to raise.
    """

    def __init__(self, spec: Spec, check: Callable[..., int], errors: Errors) -> None:
        self._spec = spec
        self._step = spec.step
        self._check = check
        self._errors = errors

    def fixed(self, sizes: Sizes, offset: int | None) -> Arrays:
        """Return the arrays of equal sequences: the sequence and dense layouts."""
        if offset is None:
            offset = sizes.keys - sizes.queries
        self._check_offset(offset, sizes.queries)
        if not -POSITIONS <= offset <= POSITIONS - sizes.queries:
            raise self._errors.input(
                f"{self._spec.name}(): q_offset={offset} puts queries at positions "
                "that 32 bits cannot hold",
                hint="count positions from the first key",
            )
        return (
            prefix(sizes.batch, sizes.queries),
            prefix(sizes.batch, sizes.keys),
            offsets(sizes.batch, offset),
        )

    def given(self, sizes: Sizes, keywords: Sequence[Any]) -> tuple[Arrays, int]:
        """Return the arrays of a call, and how many query rows belong to a sequence.

        Args:
            sizes: of the call's inputs.
            keywords: the values of `spec.metadata`, in that order.
        """
        spec = self._spec
        values = dict(zip(spec.metadata, keywords, strict=True))
        lengths, table = values.get("seqlens_k"), values.get("page_table")
        if spec.layout in ("sequence", "dense"):
            cu_q, cu_k = prefix(sizes.batch, sizes.queries), prefix(sizes.batch, sizes.keys)
        else:
            cu_q = self._vector("cu_seqlens_q", values["cu_seqlens_q"], "batch + 1")
            ragged = spec.layout == "ragged"
            cu_k = self._keys_of(values) if ragged else torch.empty_like(cu_q)
        batch = cu_q.shape[0] - 1
        if batch < 0:
            raise self._errors.input(
                f"{spec.name}(): argument 'cu_seqlens_q' is empty",
                hint="it has one element more than there are sequences, and starts with 0",
            )
        self._same_batch("cu_seqlens_k", cu_k.shape[0] - 1, batch, " + 1")
        if spec.layout == "paged":
            self._same_batch("seqlens_k", self._vector("seqlens_k", lengths).shape[0], batch)
            if table is None:
                raise self._errors.input(
                    f"{spec.name}(): argument 'page_table' is missing",
                    hint="the paged layout takes page_table=, int32 [batch, max_pages]",
                )
            check_vector(spec, "page_table", table, ("batch", "max_pages"), self._errors)
            self._same_batch("page_table", table.shape[0], batch)
        q_off, ready = self._offsets(values["q_offset"], batch)
        arguments = (cu_q, cu_k, q_off, lengths, table, sizes.rows_q, sizes.rows_k, spec.page)
        valid = 0 if batch == 0 else self._check(*arguments, ready)
        if valid < 0:
            raise self._fault(-valid, cu_q, cu_k, lengths, table, sizes)
        if self._step > 1:
            for offset in q_off[cu_q.diff() > 0].tolist():
                self._check_offset(offset)
        if table is None:
            return (cu_q, cu_k, q_off), valid
        # Memory of no elements has no address to pass.
        some = table if table.shape[1] else torch.zeros(batch, 1, dtype=torch.int32, device="cpu")
        return (cu_q, cu_k, q_off, some), valid

    def _keys_of(self, values: dict[str, Any]) -> torch.Tensor:
        # Self-attention over one axis: the keys are the queries.
        if values["cu_seqlens_k"] is None and self._spec.query == self._spec.key:
            return self._vector("cu_seqlens_q", values["cu_seqlens_q"], "batch + 1")
        return self._vector("cu_seqlens_k", values["cu_seqlens_k"], "batch + 1")

    def _vector(self, name: str, value: Any, axis: str = "batch") -> torch.Tensor:
        if value is None:
            raise self._errors.input(
                f"{self._spec.name}(): argument {name!r} is missing",
                hint=f"the {self._spec.layout} layout takes {name}=, int32 [{axis}]",
            )
        check_vector(self._spec, name, value, (axis,), self._errors)
        tensor: torch.Tensor = value
        return tensor

    def _same_batch(self, name: str, found: int, batch: int, more: str = "") -> None:
        if found != batch:
            raise self._errors.input(
                f"{self._spec.name}(): argument {name!r} describes {found} sequences, "
                f"but 'cu_seqlens_q' {batch}",
                hint=f"give it batch{more} rows",
            )

    def _offsets(self, value: Any, batch: int) -> tuple[torch.Tensor, int]:
        """Return the tensor of offsets, and whether it is filled."""
        if value is None:
            return torch.empty(batch, dtype=torch.int32, device="cpu"), 0
        if not hasattr(value, "shape"):
            self._check_offset(value)
            if abs(value) > POSITIONS:
                raise self._errors.input(
                    f"{self._spec.name}(): q_offset={value} does not fit 32 bits",
                    hint="count positions from the first key",
                )
            return offsets(batch, value), 1
        tensor = self._vector("q_offset", value)
        self._same_batch("q_offset", tensor.shape[0], batch)
        return tensor, 1

    def _check_offset(self, value: Any, queries: int = 1) -> None:
        if not isinstance(value, int):
            raise self._errors.input(
                f"{self._spec.name}(): q_offset={value!r} is a {type(value).__name__}",
                hint="pass an integer, or int32 [batch]",
            )
        if self._step > 1 and queries and value % self._step:
            raise self._errors.input(
                f"{self._spec.name}(): queries that start at position {value} do not start a block "
                f"of {self._step} compressed queries",
                hint=f"pass a q_offset that is a multiple of {self._step}",
            )

    def _fault(
        self, code: int, cu_q: Any, cu_k: Any, lengths: Any, table: Any, sizes: Sizes
    ) -> Exception:
        """Return the error for what `sparsegen_metadata` found."""
        name = self._spec.name
        if code <= 6:
            which, cu, rows = (
                ("cu_seqlens_q", cu_q, sizes.rows_q)
                if code <= 3
                else ("cu_seqlens_k", cu_k, sizes.rows_k)
            )
            found = {
                1: f"starts with {int(cu[0])}, not 0",
                2: f"decreases: {cu.tolist()[:16]}",
                0: f"ends at {int(cu[-1])}, but there are {rows} rows",
            }[code % 3]
            return self._errors.input(
                f"{name}(): argument {which!r} {found}",
                hint="it holds where each sequence starts, and where the last one ends: "
                "[0, n_0, n_0 + n_1, ...]",
            )
        if code == 7:
            return self._errors.input(
                f"{name}(): argument 'seqlens_k' has a negative length, {int(lengths.min())}",
                hint="it holds the number of cached tokens of each sequence",
            )
        if code == 8:
            return self._errors.input(
                f"{name}(): argument 'seqlens_k' holds {int(lengths.max())} tokens, but a row of "
                f"'page_table' has {table.shape[1]} pages of {self._spec.page}",
                hint="give the table more columns, or shorten the sequence",
            )
        if code == 9:
            return self._errors.input(
                f"{name}(): argument 'page_table' names a page outside 0 ... {sizes.rows_k - 1} "
                "within the length of its sequence",
                hint="only entries beyond seqlens_k may hold anything",
            )
        return self._errors.input(
            f"{name}(): positions pass {POSITIONS}", hint="lower q_offset, or split the batch"
        )
