"""The documentation's code for a GPU runs there, and prints what it shows."""

from pathlib import Path

import pytest

from tests.documents import DOCUMENTS, ROOT, blocks, run

pytestmark = pytest.mark.gpu

ON_GPU = [d for d in DOCUMENTS if any(b.gpu for b in blocks(d))]


@pytest.mark.parametrize("document", ON_GPU, ids=lambda d: str(d.relative_to(ROOT)))
def test_code_runs_and_prints_what_is_shown(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "cache"))
    run(document, tmp_path, kernels=False, gpu=True)
