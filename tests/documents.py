"""Run the code of the documentation: Python blocks in order, each compared with what it shows.

A fence ``` ```python ``` is run; with the word `kernel` behind it, it needs a compiler, with `gpu`
it needs a CUDA device as well, and with `file=NAME` it is written to that file instead. The fence
``` ```text ``` right below a block holds its output, where `...` stands for anything.
"""

import contextlib
import doctest
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sparsegen import arch, patterns
from sparsegen.runtime import catalog

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(.*?)\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
_LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind the fence, its text, its line and the output below it."""

    words: tuple[str, ...]
    text: str
    line: int
    output: str | None = None

    @property
    def kernel(self) -> bool:
        """Tell whether it needs a compiler."""
        return "kernel" in self.words

    @property
    def gpu(self) -> bool:
        """Tell whether it needs a CUDA device."""
        return "gpu" in self.words

    @property
    def file(self) -> str | None:
        """Return the file it is written to."""
        return next((w.removeprefix("file=") for w in self.words if w.startswith("file=")), None)


def blocks(document: Path) -> Iterator[Block]:
    """Yield the Python blocks of a document."""
    text = document.read_text()
    fences = list(_FENCE.finditer(text))
    for fence, after in zip_longest(fences, fences[1:]):
        words = tuple(fence[1].split())
        if words[:1] != ("python",):
            continue
        output = None
        if (
            after is not None
            and after[1] == "text"
            and not text[fence.end() : after.start()].strip()
        ):
            output = after[2]
        yield Block(words[1:], fence[2], text.count("\n", 0, fence.start()) + 1, output)


def run(document: Path, folder: Path, *, kernels: bool, gpu: bool = False) -> None:
    """Run the blocks of a document in `folder`.

    Without `kernels`, those that need one are left out, and without `gpu`, those that need a GPU.

    Errors of a pattern speak of `example.py` and count lines from the start of the block.
    """
    scope: dict[str, Any] = {"__name__": "example"}
    with contextlib.chdir(folder), kept_plugins():
        for block in blocks(document):
            if block.file is not None:
                Path(block.file).parent.mkdir(parents=True, exist_ok=True)
                Path(block.file).write_text(block.text)
            elif (kernels or not block.kernel) and (gpu or not block.gpu):
                _run(block, scope, f"{document.name}:{block.line}")


@contextlib.contextmanager
def kept_plugins() -> Iterator[None]:
    """Forget the folders of plug-ins that were registered meanwhile."""
    registries = (patterns._PLUGINS, arch._PLUGINS, catalog._PLUGINS)
    before = [list(registry._extra) for registry in registries]
    try:
        yield
    finally:
        for registry, folders in zip(registries, before, strict=True):
            registry._extra[:] = folders


def _run(block: Block, scope: dict[str, Any], where: str) -> None:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, str(Path.cwd() / "example.py"), "exec"), scope)
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
    if block.output is None:
        return
    got = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
    if not doctest.OutputChecker().check_output(block.output, got + "\n", _LOOSE):
        raise AssertionError(f"{where}: the text below shows\n{block.output}\nbut it prints\n{got}")
