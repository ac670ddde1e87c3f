"""Shared fixtures: snapshots, devices, the hypothesis profile."""

import difflib
import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from sparsegen import arch

SNAPSHOTS = Path(__file__).parent / "snapshots"

# The same examples on every run and machine; --hypothesis-profile=search looks for others.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("search", deadline=None, max_examples=300)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="write the texts under tests/snapshots instead of comparing with them",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = [*item.iter_markers("gpu"), *item.iter_markers("arch")]
        for reason in filter(None, map(why_not, marks)):
            item.add_marker(pytest.mark.skip(reason=reason))


def why_not(mark: pytest.Mark) -> str | None:
    """Say why this machine cannot run a test with that mark, or None."""
    if mark.name == "gpu":
        return None if cuda_capability() else "no CUDA device"
    (name,) = mark.args
    wanted = arch.get(name)
    if wanted.kind == "cpu":
        here = arch.host()
        fits = wanted.features <= here.features and wanted.machine in (None, here.machine)
        return None if fits else f"needs {name}, this is {here.name}"
    needed = int(re.sub(r"\D", "", name))
    found = cuda_capability()
    return (
        None if found >= needed else f"needs {name}, this has {f'sm{found}' if found else 'none'}"
    )


@functools.cache
def cuda_capability() -> int:
    """Return the first device's capability, 90 for 9.0; 0 without a device."""
    import torch  # slow to import, and most runs have no test that asks

    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@pytest.fixture
def snapshot(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a text with the one stored under the test's name: `snapshot(text, "part")`."""
    module = Path(request.node.path).stem.removeprefix("test_")
    test = re.sub(r"[^\w.=-]+", "_", request.node.name.removeprefix("test_")).strip("_")

    def check(text: str, part: str = "") -> None:
        path = SNAPSHOTS / module / (f"{test}.{part}.txt" if part else f"{test}.txt")
        text = text.rstrip("\n") + "\n"
        shown = path.relative_to(SNAPSHOTS.parent)
        if request.config.getoption("--update-snapshots"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        again = "run `make snapshots`, or pytest --update-snapshots, and review the diff"
        if not path.exists():
            pytest.fail(f"no snapshot {shown}: {again}", pytrace=False)
        stored = path.read_text()
        if stored != text:
            diff = difflib.unified_diff(
                stored.splitlines(), text.splitlines(), str(shown), "this run", lineterm=""
            )
            pytest.fail("\n".join([f"{shown} differs: {again}", *diff]), pytrace=False)

    return check
