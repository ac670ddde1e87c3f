"""Count the choices that come with sparsegen, without importing what reads them in full."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """What a file holds of one processor."""

    name: str
    about: str
    file: Path


def shipped_files() -> tuple[Path, ...]:
    """Return the files that come with sparsegen."""
    folder = Path(str(files("sparsegen.tuning"))) / "db"
    return tuple(sorted(folder.glob("*.jsonl")))


def processors() -> Iterator[Row]:
    """Yield a row for each file and processor in it: how many choices, and whom they serve."""
    for path in shipped_files():
        counts: Counter[tuple[str, str]] = Counter()
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["what"] != "choice":
                continue
            key = record["key"]
            name = key.get("device") or f"{key['arch']}x{key['threads']}"
            counts[name, record.get("serves", "")] += 1
        for (name, serves), count in sorted(counts.items()):
            others = f"; other {serves} use them where they have none" if serves else ""
            yield Row(name, f"{count} choices{others}.", path)
