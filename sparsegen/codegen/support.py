"""Name what is linked into every CPU library: parallel loops, workspaces, checked metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tvm_ffi import libinfo

from sparsegen.codegen.render import render


@dataclass(frozen=True)
class Support:
    """Everything support.cc.j2 may mention."""

    template: ClassVar[str] = "support.cc.j2"

    pieces_per_thread: int = 16
    """Parallel loops are cut into this many pieces for each thread, which take them in turn."""


def link_options(folder: Path) -> list[str]:
    """Write the source into `folder` and return the compiler's arguments that link it."""
    source = folder / "support.cc"
    source.write_text(render(Support()), encoding="utf-8")
    includes = [f"-I{path}" for path in libinfo.include_paths()]
    # -ldl: before version 2.34 of the GNU C library, dlsym is in a library of its own.
    return ["-std=c++17", "-O2", "-fno-exceptions", "-fno-rtti", *includes, str(source), "-ldl"]
