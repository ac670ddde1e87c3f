"""The public surface: names, quick imports, and the contract of every catalogue entry."""

import argparse
import inspect
import json
import subprocess
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest

import sparsegen as sg
from sparsegen import arch
from sparsegen.plugins import discover

ROOT = Path(__file__).parents[2]
VERBS = discover("sparsegen.cli", "verb")
SCHEDULES = discover("sparsegen.schedules", "schedule")
STRATEGIES = discover("sparsegen.tuning.strategies", "strategy")
FAMILIES = {"attend", "compress", "merge", "project", "select"}

NAMES = {
    "BindingError", "BundleError", "CacheError", "CompileError", "InputError", "Kernel", "Pattern",
    "PatternError", "Program", "Schedule", "SparsegenError", "Tensor", "TuningError",
    "UnsupportedError", "abs", "attend", "cat", "compile", "compress", "exp", "explain",
    "export",
    "head", "index", "load", "log", "max", "maximum", "mean", "merge", "min", "minimum",
    "partition", "pattern", "project", "reduce", "reference", "relu", "score", "select", "sigmoid",
    "softmax", "sqrt", "sum", "tanh", "tune", "where",
}  # fmt: skip


def test_public_names_are_pinned() -> None:
    assert set(sg.__all__) == NAMES
    assert list(sg.__all__) == sorted(sg.__all__)
    assert set(dir(sg)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_name_exists_and_explains_itself(name: str) -> None:
    value = getattr(sg, name)
    assert not inspect.ismodule(value)
    assert inspect.getdoc(value)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atend'"):
        sg.atend  # noqa: B018


@pytest.mark.parametrize(
    "work",
    ["import sparsegen", "from sparsegen.cli import main; main(['list', '--json'])"],
    ids=["import", "list"],
)
def test_starts_quickly_without_heavy_packages(work: str) -> None:
    script = (
        f"import sys\n{work}\nimport time\n"
        "heavy = {'torch', 'tvm', 'tvm_ffi', 'sympy'} & set(sys.modules)\n"
        "print(f'\\n{time.process_time()} {sorted(heavy)}')\n"
    )
    seconds, heavy = [], ""
    for _ in range(3):  # the best of three: the first one may write byte code
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        took, _, heavy = done.stdout.splitlines()[-1].partition(" ")
        seconds.append(float(took))
    assert heavy == "[]"
    assert min(seconds) < 0.5


LISTED = """
import json
from sparsegen import arch, patterns
from sparsegen.cli import main
from sparsegen.runtime import catalog
main(["list", "--json"])
print("\\0" + json.dumps([list(patterns.names()), list(catalog.files()), list(arch.names())]))
"""


def test_list_is_json_of_the_catalogue() -> None:
    # In a process of its own: other tests register folders of plug-ins in this one.
    done = subprocess.run(
        [sys.executable, "-c", LISTED], capture_output=True, text=True, check=True
    )
    listed, known = (json.loads(part) for part in done.stdout.split("\0"))
    names = {kind: [row["name"] for row in rows] for kind, rows in listed.items()}
    assert [names["patterns"], names["schedules"], names["archs"]] == known
    assert names["strategies"] == list(STRATEGIES)
    assert names["verbs"] == list(VERBS)
    assert all(row["about"].endswith(".") for rows in listed.values() for row in rows)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedule_meets_its_contract(name: str) -> None:
    module = SCHEDULES[name]
    assert module.FAMILY in FAMILIES
    assert isinstance(module.REQUIRES, frozenset)
    assert all(isinstance(feature, str) for feature in module.REQUIRES)
    assert isinstance(module.PRIORITY, int)
    assert is_dataclass(module.Knobs)
    assert module.Knobs.__dataclass_params__.frozen
    for knob in fields(module.Knobs):
        assert knob.default is not MISSING, knob.name
        assert isinstance(knob.default, int | str), knob.name
    assert parameters(module, "accepts") == ["task", "arch"]
    assert parameters(module, "default") == ["task", "arch"]
    assert parameters(module, "space") == ["task", "arch"]
    assert parameters(module, "apply") == ["task", "knobs", "arch"]


@pytest.mark.parametrize("name", list(VERBS))
def test_verb_meets_its_contract(name: str) -> None:
    module = VERBS[name]
    assert module.HELP
    assert not module.HELP.endswith(".")
    module.add_arguments(argparse.ArgumentParser())
    assert parameters(module, "run") == ["args"]


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_strategy_explains_itself(name: str) -> None:
    assert inspect.getdoc(STRATEGIES[name])


@pytest.mark.parametrize("name", arch.names())
def test_arch_is_data(name: str) -> None:
    assert arch.get(name).name == name


def test_every_family_runs_on_a_plain_cpu() -> None:
    anywhere = {m.FAMILY for m in SCHEDULES.values() if {"cpu"} >= m.REQUIRES}
    assert anywhere == FAMILIES


def parameters(module: ModuleType, function: str) -> list[str]:
    return list(inspect.signature(getattr(module, function)).parameters)
