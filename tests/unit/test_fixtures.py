"""The shared fixtures fail when they should and skip in sight."""

from collections.abc import Callable
from pathlib import Path

import pytest

Snapshot = Callable[..., None]


@pytest.fixture
def helpers(request: pytest.FixtureRequest) -> dict[str, object]:
    """Return the names of tests/conftest.py, which cannot be imported."""
    plugins = request.config.pluginmanager.get_plugins()
    return next(vars(plugin) for plugin in plugins if hasattr(plugin, "SNAPSHOTS"))


@pytest.fixture
def stored(
    tmp_path: Path,
    helpers: dict[str, object],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Return the folder where this test's snapshots are sought."""
    monkeypatch.setitem(helpers, "SNAPSHOTS", tmp_path / "snapshots")
    monkeypatch.setattr(request.config.option, "update_snapshots", False)
    folder = tmp_path / "snapshots" / "fixtures"
    folder.mkdir(parents=True)
    return folder


def test_equal_text_passes(stored: Path, snapshot: Snapshot) -> None:
    (stored / "equal_text_passes.txt").write_text("a\n")
    (stored / "equal_text_passes.tir.txt").write_text("b\n")
    snapshot("a")
    snapshot("b\n", "tir")


@pytest.mark.usefixtures("stored")
def test_missing_text_fails_and_says_how(snapshot: Snapshot) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"no snapshot .*make snapshots"):
        snapshot("a")


def test_other_text_fails_with_a_diff(stored: Path, snapshot: Snapshot) -> None:
    (stored / "other_text_fails_with_a_diff.txt").write_text("a\nb\n")
    with pytest.raises(pytest.fail.Exception, match=r"make snapshots(?s:.*)-b\n\+c"):
        snapshot("a\nc")


@pytest.mark.parametrize("shape", ["(2, 3)"])
def test_update_writes_the_file_of_the_test(
    shape: str,
    stored: Path,
    snapshot: Snapshot,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request.config.option, "update_snapshots", True)
    snapshot(shape)
    assert [path.name for path in stored.iterdir()] == [
        "update_writes_the_file_of_the_test_2_3.txt"
    ]


def test_marks_skip_by_capability(
    helpers: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    why_not = helpers["why_not"]
    assert callable(why_not)
    assert why_not(pytest.mark.arch("generic").mark) is None
    monkeypatch.setitem(helpers, "cuda_capability", lambda: 0)
    assert why_not(pytest.mark.gpu.mark) == "no CUDA device"
    monkeypatch.setitem(helpers, "cuda_capability", lambda: 90)
    assert why_not(pytest.mark.gpu.mark) is None


@pytest.mark.gpu
def test_gpu_mark_means_a_device() -> None:
    import torch

    assert torch.cuda.is_available()
