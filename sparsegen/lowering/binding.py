"""Bind a program to a deployment: dtypes, layout and the sizes of its letters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

Layout = Literal["sequence", "dense", "ragged", "paged"]
LAYOUTS: tuple[Layout, ...] = ("sequence", "dense", "ragged", "paged")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Binding:
    """What a deployment fixes.

    layout    sequence  inputs exactly as declared: one sequence
              dense     sequence inputs gain a leading batch axis
              ragged    sequences packed along the first axis, cu_seqlens_q and cu_seqlens_k
              paged     queries packed; inputs on the key axis are [pages, page_size, ...], with
                        page_table [batch, max_pages] and seqlens_k [batch]
    dtypes    of each floating-point input by name; `dtype` for the others and for the outputs
    sizes     every letter but the sequence axes; those stay symbolic
    scale     the softmax scale where the pattern states none (None: last query extent ** -0.5)
    """

    dtype: str = "float32"
    layout: Layout = "sequence"
    page_size: int = 0
    sizes: tuple[tuple[str, int], ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    scale: float | None = None

    def dtype_of(self, name: str) -> str:
        """Return the dtype of the input `name`."""
        return dict(self.dtypes).get(name, self.dtype)

    def to_json(self) -> str:
        """Return canonical JSON, part of every cache key."""
        data = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return json.dumps(data, sort_keys=True, separators=(",", ":"))
