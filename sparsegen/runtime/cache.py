"""Keep built libraries on disk, addressed by everything they are made from.

An entry is a folder `<key>` that appears whole, by one rename, or not at all. Whoever builds it
holds the lock of its key, so two processes build a kernel once. An entry whose content does not
match the hashes it was written with is built again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from sparsegen.errors import CacheError
from sparsegen.runtime.standalone.bundle import digest

LIBRARY = "kernel.so"
_ENTRY = "entry.json"
_PATIENCE = 600.0

log = logging.getLogger("sparsegen")


def root() -> Path:
    """Return the folder of the cache: $SPARSEGEN_CACHE_DIR, or one in the user's cache folder."""
    chosen = os.environ.get("SPARSEGEN_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sparsegen"


def get(key: str) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the library of a key and what was noted when it was built; None if there is none.

    Raises:
        CacheError: the entry exists, but may not be read.
    """
    folder = root() / key
    try:
        entry = json.loads((folder / _ENTRY).read_bytes())
        intact = digest(folder / LIBRARY) == entry["sha256"]
        notes: Mapping[str, Any] = entry["notes"]
    except FileNotFoundError:
        if folder.exists():
            log.warning("the cached kernel %s is incomplete and will be built again", folder)
        return None
    except (ValueError, KeyError, TypeError):
        intact = False
    except OSError as error:
        raise _unusable(folder, error) from error
    if not intact:
        log.warning("the cached kernel %s is damaged and will be built again", folder)
        return None
    return folder / LIBRARY, notes


def get_or_build(
    key: str, build: Callable[[Path], Mapping[str, Any]]
) -> tuple[Path, Mapping[str, Any]]:
    """Return the library of a key and its notes, building it if there is none.

    Args:
        key: names the library; equal keys are equal libraries.
        build: writes the library to the path it is given and returns the notes, JSON data.

    Raises:
        CacheError: the cache cannot be read, locked or written.
    """
    found = get(key)
    if found is not None:
        return found
    with _locked(key):
        # Another process may have built it while this one waited.
        found = get(key)
        if found is None:
            _publish(key, build)
            found = get(key)
    if found is None:
        raise CacheError(
            f"the kernel {root() / key} cannot be read back after it was written",
            hint="check the disk, or set SPARSEGEN_CACHE_DIR to another folder",
        )
    return found


@contextmanager
def _locked(key: str) -> Iterator[None]:
    lock = root() / f"{key}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(lock, timeout=_PATIENCE)
        held.acquire()
    except filelock.Timeout as error:
        raise CacheError(
            f"{lock} was held for {_PATIENCE:.0f} s by a process that builds this kernel",
            hint="end that process, or set SPARSEGEN_CACHE_DIR to another folder",
        ) from error
    except OSError as error:
        raise _unusable(lock, error) from error
    try:
        yield
    finally:
        held.release()


def _publish(key: str, build: Callable[[Path], Mapping[str, Any]]) -> None:
    folder = root() / key
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{key[:12]}-", dir=root()))
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        library = made / LIBRARY
        notes = build(library)
        entry = {"sha256": digest(library), "notes": notes}
        (made / _ENTRY).write_text(json.dumps(entry, indent=1, sort_keys=True) + "\n")
        for path in (library, made / _ENTRY, made):
            _sync(path)
        if folder.exists():
            # Damaged: its name must be free, and readers may still be in it.
            folder.rename(made / "damaged")
        made.rename(folder)
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        _sync(root())
    except OSError as error:
        raise _unusable(folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until the disk has a file or a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unusable(path: Path, error: OSError) -> CacheError:
    return CacheError(
        f"the kernel cache cannot be used: {path}: {error.strerror}",
        hint="set SPARSEGEN_CACHE_DIR to a folder that you may write",
    )
