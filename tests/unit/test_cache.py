"""Entries of the cache appear whole, once, and are built again when damaged."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsegen.errors import CacheError
from sparsegen.runtime import cache

KEY = "0123456789abcdef"


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def building(content: bytes) -> Callable[[Path], Mapping[str, Any]]:
    def build(path: Path) -> Mapping[str, Any]:
        path.write_bytes(content)
        return {"content": content.hex()}

    return build


def never(path: Path) -> Mapping[str, Any]:
    raise AssertionError("it is in the cache")


def test_what_is_built_once_is_found() -> None:
    assert cache.get(KEY) is None
    library, notes = cache.get_or_build(KEY, building(b"code"))
    assert library.read_bytes() == b"code"
    assert cache.get_or_build(KEY, never) == (library, notes) == cache.get(KEY)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda entry: (entry / "kernel.so").write_bytes(b"cod"), "damaged"),
        (lambda entry: (entry / "kernel.so").write_bytes(b"evil"), "damaged"),
        (lambda entry: (entry / "kernel.so").unlink(), "incomplete"),
        (lambda entry: (entry / "entry.json").unlink(), "incomplete"),
        (lambda entry: (entry / "entry.json").write_text('{"sha256": "'), "damaged"),
        (lambda entry: (entry / "entry.json").write_text("[]"), "damaged"),
        (lambda entry: (entry / "entry.json").write_bytes(b"\xff\x00"), "damaged"),
    ],
    ids=["truncated", "altered", "no library", "no notes", "cut notes", "odd notes", "no text"],
)
def test_a_damaged_entry_is_built_again(
    root: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], said: str
) -> None:
    cache.get_or_build(KEY, building(b"code"))
    damage(root / KEY)
    with caplog.at_level(logging.WARNING, logger="sparsegen"):
        library, _ = cache.get_or_build(KEY, building(b"code"))
    assert library.read_bytes() == b"code"
    assert said in caplog.text
    assert str(root / KEY) in caplog.text
    assert cache.get_or_build(KEY, never)[0] == library


def test_a_build_that_fails_leaves_nothing(root: Path) -> None:
    def build(path: Path) -> Mapping[str, Any]:
        path.write_bytes(b"half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.get_or_build(KEY, build)
    assert [p.name for p in root.iterdir() if p.suffix != ".lock"] == []
    assert cache.get_or_build(KEY, building(b"code"))[0].read_bytes() == b"code"


def test_a_cache_that_cannot_be_written_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEGEN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="SPARSEGEN_CACHE_DIR"):
        cache.get_or_build(KEY, building(b"code"))


SCRIPT = f"""
import sys, time
from pathlib import Path
from sparsegen.runtime import cache

def build(path):
    print("building", flush=True)
    path.write_bytes(b"co")
    time.sleep(float(sys.argv[1]))
    path.write_bytes(b"code")
    return {{}}

library, _ = cache.get_or_build({KEY!r}, build)
assert library.read_bytes() == b"code"
print("got it", flush=True)
"""


def start(seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_at_once_build_once() -> None:
    processes = [start(0.5) for _ in range(4)]
    printed = "".join(p.communicate(timeout=60)[0] for p in processes)
    assert [p.returncode for p in processes] == [0] * 4
    assert printed.count("building") == 1
    assert printed.count("got it") == 4


def test_a_process_killed_while_building_stops_nobody(root: Path) -> None:
    first = start(60)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = start(0)
    time.sleep(0.3)
    assert cache.get(KEY) is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert second.communicate(timeout=60)[0] == "building\ngot it\n"
    assert cache.get_or_build(KEY, never)[0].read_bytes() == b"code"
