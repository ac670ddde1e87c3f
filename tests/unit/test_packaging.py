"""What is on disk is what is shipped, and keeps the house rules."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SOURCES = sorted([*ROOT.glob("sparsegen/**/*.py"), *ROOT.glob("schedules/**/*.py")])
EXAMPLES = sorted(ROOT.glob("examples/**/*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_package_list_is_the_disk() -> None:
    inside = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in ROOT.glob("sparsegen/**/__init__.py")
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(
        inside | {"sparsegen.schedules", "sparsegen.templates"}
    )


def test_every_source_folder_is_a_package() -> None:
    assert [name_of(path) for path in SOURCES if not (path.parent / "__init__.py").exists()] == []


def test_mapped_packages_exist() -> None:
    for package, folder in SETUPTOOLS["package-dir"].items():
        assert (ROOT / folder / "__init__.py").exists(), package


@pytest.mark.parametrize("folder", ["schedules", "templates"])
def test_mapped_packages_are_flat(folder: str) -> None:
    inner = [path for path in (ROOT / folder).iterdir() if path.is_dir()]
    assert [name_of(path) for path in inner if path.name != "__pycache__"] == []


def test_every_template_is_shipped() -> None:
    others = [
        path.name
        for path in (ROOT / "templates").iterdir()
        if path.is_file() and path.suffix != ".j2" and path.name != "__init__.py"
    ]
    assert others == []


def test_no_file_is_over_400_lines() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_example_has_main(example: Path) -> None:
    defined = [
        node.name
        for node in ast.parse(example.read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert "main" in defined


def test_constraints_meet_the_exact_pins() -> None:
    pinned = set((ROOT / "constraints.txt").read_text().splitlines())
    exact = {line for line in PROJECT["project"]["dependencies"] if "==" in line}
    assert exact <= pinned
