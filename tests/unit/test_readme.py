"""The README and the documentation hold: code runs, links resolve, tables are those of the code."""

import re
from pathlib import Path

import pytest

from benchmarks.readme import stale, written
from tests.documents import DOCUMENTS, ROOT, blocks, run


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_code_that_needs_no_kernel_runs(document: Path, tmp_path: Path) -> None:
    run(document, tmp_path, kernels=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    local = [t.partition("#")[0] for t in targets if "://" not in t and not t.startswith("#")]
    assert [t for t in local if not (document.parent / t).exists()] == []


def test_a_wrong_output_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:1: the text below shows\n2\n"):
        run(page, tmp_path, kernels=False)


def test_blocks_know_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python kernel\n1\n```\n\n```python file=a/b.py\nx = 2\n```\n```sh\nls\n```\n"
    )
    first, second = blocks(page)
    assert (first.kernel, first.file, second.file, second.line) == (True, None, "a/b.py", 5)
    run(page, tmp_path, kernels=False)
    assert (tmp_path / "a" / "b.py").read_text() == "x = 2\n"


def test_what_is_generated_is_up_to_date() -> None:
    assert [name_of(path) for path, text in written().items() if path.read_text() != text] == []
    assert stale() == []
