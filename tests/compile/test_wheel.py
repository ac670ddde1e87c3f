"""The sdist and the wheel built from it hold every package and template."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    [
        *(path.relative_to(ROOT) for path in ROOT.glob("sparsegen/**/*.py")),
        *(path.relative_to(ROOT) for path in ROOT.glob("sparsegen/tuning/db/*.jsonl")),
        *(path.relative_to(ROOT) for path in ROOT.glob("schedules/*.py")),
        *(path.relative_to(ROOT) for path in ROOT.glob("templates/*")),
        Path("sparsegen/py.typed"),
    ]
)
SHIPPED = [path for path in SHIPPED if path.name != "__pycache__"]

# Run outside the checkout: every package imports and every template can be read.
USE = """
import importlib.resources, pathlib, pkgutil, sys
import sparsegen, sparsegen.arch, sparsegen.errors, sparsegen.schedules, sparsegen.templates
assert sparsegen.__file__.startswith(sys.prefix), sparsegen.__file__
inside = {info.name for info in pkgutil.iter_modules(sparsegen.__path__)}
assert {"schedules", "templates"} <= inside, inside
templates = importlib.resources.files("sparsegen.templates")
assert sorted(p.name for p in templates.iterdir() if p.name.endswith(".j2")) == TEMPLATES
print(sparsegen.arch.host().name)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_wheel_and_sdist_hold_everything(tmp_path: Path) -> None:
    # A copy, so that no build/ folder of an earlier run adds or hides a file.
    tree = tmp_path / "tree"
    tree.mkdir()
    files = [*SHIPPED, *map(Path, ("pyproject.toml", "LICENSE"))]
    files += [Path(name) for name in ("README.md",) if (ROOT / name).exists()]
    for path in files:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes((ROOT / path).read_bytes())
    build = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    sdist = tmp_path / run(sys.executable, "-c", build, cwd=tree).splitlines()[-1]
    with tarfile.open(sdist) as archive:
        members = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert [path for path in SHIPPED if path not in members] == []

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "wheel", *offline, "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = {Path(name) for name in archive.namelist()}
    installed = [
        Path("sparsegen", path) if path.parts[0] != "sparsegen" else path for path in SHIPPED
    ]
    assert [path for path in installed if path not in members] == []

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies of this environment, without its own sparsegen: .pth files do not nest.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    templates = sorted(path.name for path in SHIPPED if path.suffix == ".j2")
    script = tmp_path / "use.py"
    script.write_text(f"TEMPLATES = {templates!r}\n{USE}")
    assert run(python, script, cwd=tmp_path).strip()
