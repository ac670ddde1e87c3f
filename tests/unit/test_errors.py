"""The error tree says what, where and how to fix it."""

import functools
import inspect
import pickle
import runpy
from pathlib import Path

import pytest

import sparsegen
from sparsegen import errors
from sparsegen.errors import (
    BindingError,
    PatternError,
    Site,
    SparsegenError,
    UnsupportedError,
    did_you_mean,
)

LEAVES = {
    "PatternError",
    "BindingError",
    "UnsupportedError",
    "InputError",
    "CompileError",
    "TuningError",
    "BundleError",
    "CacheError",
}


def test_tree_is_flat_and_drawn() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__base__ is SparsegenError
    }
    assert found == LEAVES
    assert errors.__doc__ is not None
    assert all(f"── {name} " in errors.__doc__ for name in LEAVES)


def test_message_alone() -> None:
    assert str(PatternError("topk along 'x'")) == "topk along 'x'"


def test_message_with_place_and_fix() -> None:
    error = PatternError("bad axis", at=Site("/far/away.py", 7, "f"), hint="use another")
    assert str(error) == "/far/away.py:7: bad axis\n  fix: use another"
    assert (error.message, error.hint) == ("bad axis", "use another")


def test_place_below_working_directory_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(Site(str(tmp_path / "mine" / "p.py"), 3, "f")) == "mine/p.py:3"


def test_unsupported_lists_reasons_before_the_fix() -> None:
    error = UnsupportedError(
        "head dim 513 exceeds 512",
        hint="split the heads",
        reasons=["attend_cpu: odd head dim", "attend_mma: no device"],
    )
    assert str(error).splitlines() == [
        "head dim 513 exceeds 512",
        "  - attend_cpu: odd head dim",
        "  - attend_mma: no device",
        "  fix: split the heads",
    ]


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_survives_a_worker_process(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("what", at=Site("f.py", 1, "g"), hint="how")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)


def test_reasons_survive_a_worker_process() -> None:
    error = UnsupportedError("what", reasons=["a"])
    assert pickle.loads(pickle.dumps(error)).reasons == ("a",)


def test_caller_is_this_line() -> None:
    site = Site.caller()
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert site == Site(__file__, line, "test_caller_is_this_line")


def run_as(module: str, file: Path) -> Site:
    """Run a file that calls Site.caller() as if it were a module of that name."""
    file.write_text("from sparsegen.errors import Site\nSITE = Site.caller()\n")
    site = runpy.run_path(str(file), run_name=module)["SITE"]
    assert isinstance(site, Site)
    return site


def test_caller_skips_own_code_and_the_standard_library(tmp_path: Path) -> None:
    # runpy's frames lie between the file and this one.
    site = run_as("sparsegen.dsl.trace", tmp_path / "trace.py")
    assert (site.file, site.function) == (__file__, "run_as")


@pytest.mark.parametrize("module", ["sparsegen.patterns.mla", "theirs", "sparsegenx.dsl"])
def test_caller_stops_at_patterns_and_others(module: str, tmp_path: Path) -> None:
    assert run_as(module, tmp_path / "p.py") == Site(str(tmp_path / "p.py"), 2, "<module>")


def test_caller_sees_through_functools() -> None:
    namespace = {"__name__": "sparsegen.dsl.fake", "Site": Site, "functools": functools}
    exec(
        "@functools.singledispatch\ndef f(x): return Site.caller()\ndef g(): return f(1)\n",
        namespace,
    )
    assert namespace["g"]().function == "test_caller_sees_through_functools"  # type: ignore[operator]


def test_did_you_mean() -> None:
    assert did_you_mean("causl", ["window", "causal"]) == "did you mean 'causal'?"
    assert did_you_mean("zzz", ["b", "a"]) == "choose one of: a, b"
    assert did_you_mean("zzz", []) == "there is nothing to choose from"


def test_errors_are_caught_by_the_base() -> None:
    with pytest.raises(SparsegenError):
        raise BindingError("x")
    assert sparsegen.__doc__
