"""Say what is installed, what this machine is, and how to get what is missing."""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

HELP = "check the installation and say how to get what is missing"

_PINNED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
_PACKAGES = ("sparsegen", "torch", "numpy", "sympy", "jinja2", "rich", "filelock", *_PINNED)


@dataclass(frozen=True)
class Finding:
    """One checked thing: what was found, and how to repair it if it is not `ok`."""

    what: str
    found: str
    ok: bool = True
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sparsegen doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print every finding; the exit code is 1 when something is missing."""
    findings = [f for check in _CHECKS for f in check()]
    if args.json:
        json.dump([dataclasses.asdict(f) for f in findings], sys.stdout, indent=2)
        print()
    else:
        width = max(len(f.what) for f in findings)
        for f in findings:
            print(f"{'ok ' if f.ok else 'BAD'} {f.what:<{width}}  {f.found}")
            if not f.ok:
                print(f"    fix: {f.fix}")
    return 0 if all(f.ok for f in findings) else 1


def _python() -> list[Finding]:
    fits = sys.version_info >= (3, 11)
    return [
        Finding("python", platform.python_version(), fits, "sparsegen needs Python 3.11 or newer")
    ]


def _packages() -> list[Finding]:
    findings = []
    for name in _PACKAGES:
        wanted = _PINNED.get(name)
        install = f'run `pip install "{name}=={wanted}"`' if wanted else f"run `pip install {name}`"
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(Finding(name, "not installed", False, install))
            continue
        findings.append(Finding(name, found, wanted in (None, found), install))
    return findings


def _plugins() -> list[Finding]:
    from sparsegen.errors import BindingError
    from sparsegen.plugins import discover

    try:
        stems = list(discover("sparsegen.schedules", "schedule"))
    except BindingError as error:
        return [Finding("schedules", error.message, False, error.hint or "")]
    return [Finding("schedules", ", ".join(stems), bool(stems), "run `pip install -e .` again")]


def _target() -> list[Finding]:
    from sparsegen import arch

    host = arch.host()
    vectors = f"{8 * host.vector_bytes}-bit vectors"
    return [Finding("target", f"{host.name}, {host.cores} cores, {vectors}, {platform.machine()}")]


def _compiler() -> list[Finding]:
    name = next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    fix = "install g++ or clang++; running what is compiled already needs neither"
    return [Finding("C++ compiler", name or "not found", name is not None, fix)]


def _cache() -> list[Finding]:
    from sparsegen.runtime.cache import root
    from sparsegen.tuning.database import user_file

    folder = root()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    usable = os.access(nearest, os.W_OK)
    entries = sum(1 for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else 0
    records = user_file()
    lines = len(records.read_bytes().splitlines()) if records.is_file() else 0
    fix = "set SPARSEGEN_CACHE_DIR to a folder you may write"
    return [
        Finding("cache", f"{folder}, {entries} entries", usable, fix),
        Finding("tuning records", f"{records}, {lines} lines"),
    ]


def _settings() -> list[Finding]:
    known = ("SPARSEGEN_CACHE_DIR", "SPARSEGEN_NO_JIT", "SPARSEGEN_TRACEBACK", "TVM_NUM_THREADS")
    given = [f"{name}={os.environ[name]}" for name in known if name in os.environ]
    return [Finding("environment", ", ".join(given) or "nothing set")]


_CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _packages,
    _plugins,
    _target,
    _compiler,
    _cache,
    _settings,
)
