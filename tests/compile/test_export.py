"""Bundles run without TVM and sparsegen, and damaged ones are refused with the reason."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import library as operators

import sparsegen as sg
from sparsegen import patterns
from sparsegen.errors import BundleError, InputError, UnsupportedError
from sparsegen.runtime.standalone.bundle import MANIFEST, seal

BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "sparsegen"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import loader, torch
case = torch.load(sys.argv[2], weights_only=True)
assert torch.equal(loader.load()(**case["inputs"]), case["output"])
assert "tvm" not in sys.modules and "sparsegen" not in sys.modules
"""


@pytest.fixture(scope="module")
def case() -> Any:
    config = patterns.configs("causal", test=True)[0]
    program = patterns.load("causal").trace()
    sizes = {k: v for k, v in config.sizes.items() if k not in "TS"}
    kernel = sg.compile("causal", target="cpu", sizes=sizes)
    inputs = patterns.random_inputs(program, config.sizes)
    return kernel, {n: torch.from_numpy(x) for n, x in inputs.items()}


def test_a_bundle_runs_in_a_bare_process(case: Any, tmp_path: Path) -> None:
    kernel, inputs = case
    out = kernel(**inputs)
    folder = sg.export(kernel, tmp_path / "bundle")
    assert torch.equal(sg.load(folder)(**inputs), out)
    torch.save({"inputs": inputs, "output": out}, tmp_path / "case.pt")
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(folder), str(tmp_path / "case.pt")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def exported(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sg.export(case[0], tmp_path_factory.mktemp("exported") / "bundle")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def edit(folder: Path, sealed: bool = True, **change: Any) -> None:
    """Change the manifest; `sealed` as its author would, who computes its hash again."""
    path = folder / MANIFEST
    manifest = {**json.loads(path.read_text()), **change}
    if sealed:
        manifest["sha256"] = seal(manifest)
    path.write_text(json.dumps(manifest))


def test_damaged_files_are_refused(bundle: Path) -> None:
    library = next(bundle.glob("*.so"))
    data = library.read_bytes()
    library.write_bytes(data[:-1])
    with pytest.raises(BundleError, match="bytes instead of"):
        sg.load(bundle)
    library.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="was changed"):
        sg.load(bundle)
    library.unlink()
    with pytest.raises(BundleError, match="is missing"):
        sg.load(bundle)


def test_damaged_manifests_are_refused(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_text()
    (bundle / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(BundleError, match="is not JSON"):
        sg.load(bundle)
    (bundle / MANIFEST).write_text(text)
    library = json.loads(text)["libraries"][0]
    edit(bundle, sealed=False, libraries=[{**library, "spec": {**library["spec"], "page": 7}}])
    with pytest.raises(BundleError, match=r"content of manifest\.json was changed"):
        sg.load(bundle)
    (bundle / MANIFEST).unlink()
    with pytest.raises(BundleError, match="is no bundle"):
        sg.load(bundle)


def test_foreign_bundles_are_refused(bundle: Path) -> None:
    library = json.loads((bundle / MANIFEST).read_text())["libraries"][0]
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    for change, message in (
        ({"format": 99}, "bundle format 99"),
        ({"libraries": [{**library, "features": ["nope"]}]}, "needs nope"),
        ({"libraries": [{**library, "machine": "riscv64"}]}, "is for riscv64, this is"),
        ({"libraries": [{**library, "file": "../../x.so"}]}, "a file outside its folder"),
        ({"files": [{**files[0], "path": "/etc/passwd"}]}, "a file outside its folder"),
        ({"requires": {"tvm_ffi": "9.9.9"}}, r"needs apache-tvm-ffi 9\.9\.9"),
        ({"files": 3}, "misses or mistypes a field"),
    ):
        good = (bundle / MANIFEST).read_text()
        edit(bundle, **change)
        with pytest.raises(BundleError, match=message):
            sg.load(bundle)
        (bundle / MANIFEST).write_text(good)
    sg.load(bundle)


def test_a_bundle_needs_an_empty_folder(case: Any, bundle: Path) -> None:
    with pytest.raises(BundleError, match="not an empty folder"):
        sg.export(case[0], bundle)


def test_bad_calls_say_what_is_wrong(case: Any) -> None:
    kernel, inputs = case
    with pytest.raises(InputError, match="argument 'v' is missing"):
        kernel(inputs["q"], inputs["k"])
    with pytest.raises(InputError, match=r"expected torch\.float32"):
        kernel(**{**inputs, "q": inputs["q"].double()})
    with pytest.raises(InputError, match="contiguous"):
        kernel(**{**inputs, "q": inputs["q"].transpose(0, 1).contiguous().transpose(0, 1)})
    with pytest.raises(UnsupportedError, match="no backward yet"):
        kernel(**{**inputs, "q": inputs["q"].clone().requires_grad_()})


def test_a_later_call_is_checked_like_the_first(case: Any) -> None:
    kernel, inputs = case
    want = kernel(**inputs)
    for name, x in inputs.items():
        for wrong, says in (
            (x.double(), r"expected torch\.float32"),
            (x.transpose(0, 1).contiguous().transpose(0, 1), "expected contiguous memory"),
            (x.new_empty(x.numel() * 4 + 1).view(torch.uint8)[1 : 1 + x.numel() * 4], "uint8"),
            (x.to("meta"), "is on meta"),
            (x.to_sparse(), "expected a dense tensor"),
        ):
            with pytest.raises(InputError, match=says):
                kernel(**{**inputs, name: wrong})
    assert torch.equal(kernel(**inputs), want)
    kernel.warm_up(**inputs)
    kernel.warm_up()
    assert torch.equal(kernel(**inputs), want)


def test_the_operator_passes_opcheck_and_compiles(case: Any) -> None:
    kernel, inputs = case
    operators.opcheck(kernel.op, tuple(inputs.values()))
    compiled = torch.compile(lambda q, k, v: kernel(q, k, v) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs), kernel(**inputs) * 2)
