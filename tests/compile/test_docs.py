"""The documentation's code runs with real kernels, and prints what it shows."""

from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, ROOT, blocks, run

WITH_KERNELS = [d for d in DOCUMENTS if any(b.kernel for b in blocks(d))]


@pytest.mark.parametrize("document", WITH_KERNELS, ids=lambda d: str(d.relative_to(ROOT)))
def test_code_runs_and_prints_what_is_shown(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "cache"))
    run(document, tmp_path, kernels=True)
