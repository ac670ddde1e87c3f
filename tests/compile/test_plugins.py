"""A new pattern, schedule or processor is one file: found, compiled and run; nothing is edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsegen as sg
from sparsegen import arch, patterns
from sparsegen.arch import Arch
from sparsegen.lowering.space import Rejected
from sparsegen.runtime import catalog
from tests.documents import ROOT, blocks
from tests.harness import published

PATTERN = '''\
"""See a window and, of the older keys, the best ones of every other block."""

import sparsegen as sg
from sparsegen.patterns import Config


@sg.pattern
def striped(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk E"], *, W=9, B=4, n=3
):
    """Attend to the last W keys and to the n best even blocks of B keys."""
    i, j = sg.index(q, k)
    h = sg.head(q)
    s = sg.score(q, k, where=(j <= i) & (j // B % 2 == 0))
    sel = sg.select(sg.reduce(s, "max", by=(h, i, j // B)), topk=n)
    return sg.attend(q, k, v, where=(j <= i) & ((i - j < W) | sel[h, i, j // B]))


CONFIGS = (Config("none", {"T": 64, "S": 64, "Hq": 4, "Hk": 2, "D": 16, "E": 16}),)
TEST_CONFIGS = (
    Config("odd", {"T": 53, "S": 53, "Hq": 6, "Hk": 2, "D": 5, "E": 7}),
    Config("decode", {"T": 1, "S": 71, "Hq": 3, "Hk": 1, "D": 17, "E": 3}, {"n": 5}),
)
'''


@pytest.fixture
def add(tmp_path: Path) -> Iterator[Callable[[Any, str, str], None]]:
    """Write a plug-in into a folder of its own and register the folder."""
    added: list[tuple[Any, Path]] = []

    def write(registry: Any, name: str, text: str) -> None:
        folder = tmp_path / str(len(added))
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        registry.register_path(folder)
        added.append((registry, folder))

    yield write
    for registry, folder in added:
        registry.unregister_path(folder)


def shown_schedule() -> str:
    """Return the schedule that the documentation shows."""
    page = ROOT / "docs" / "adding-a-schedule.md"
    (file,) = [b.text for b in blocks(page) if b.file is not None]
    return file


def inputs_of(program: sg.Program, sizes: dict[str, int]) -> tuple[dict[str, Any], Any]:
    """Return tensors, and the reference of them."""
    arrays = patterns.random_inputs(program, sizes)
    return {n: torch.from_numpy(x) for n, x in arrays.items()}, sg.reference(program, arrays)


def test_a_pattern_is_a_file(add: Callable[[Any, str, str], None]) -> None:
    add(patterns, "striped", PATTERN)
    for config in patterns.configs("striped", test=True):
        program = patterns.load("striped").trace(**config.hyper)
        tensors, want = inputs_of(program, dict(config.sizes))
        out = sg.compile("striped", target="cpu", **config.hyper)(**tensors)
        np.testing.assert_allclose(out.numpy(), want, atol=1e-5)


@sg.pattern
def gated(
    q: sg.Tensor["T Hq D"],
    k: sg.Tensor["S Hk D"],
    v: sg.Tensor["S Hk E"],
    g: sg.Tensor["T Hq 2"],
) -> Any:
    """Weigh a window against the whole past."""
    i, j = sg.index(q, k)
    near = sg.attend(q, k, v, where=(j <= i) & (i - j < 4))
    return sg.merge([near, sg.attend(q, k, v, where=j <= i)], gates=g)


SIZES = {"Hq": 4, "Hk": 2, "D": 16, "E": 16}


@pytest.mark.parametrize("target", [a for a in arch.names() if arch.get(a).kind == "cpu"])
@pytest.mark.parametrize("name", ["mla_prefill", "nsa", "v4_csa"])  # use every family
def test_defaults_are_among_the_candidates(name: str, target: str) -> None:
    machine = arch.get(target)
    for config in patterns.configs(name):
        for task in published(name, config).tasks:
            choice = catalog.choose(task, machine)
            candidates = list(choice.module.space(task, machine))
            assert candidates[0] == choice.module.default(task, machine)
            rejected = [c.knobs for c in candidates if isinstance(c, Rejected)]
            assert dataclasses.asdict(candidates[0]) not in rejected


def test_a_schedule_is_a_file(add: Callable[[Any, str, str], None]) -> None:
    add(catalog, "merge_plain", shown_schedule())
    program = gated.program
    tensors, want = inputs_of(program, {"T": 29, "S": 29, **SIZES})
    # Its priority makes it the default.
    kernel = sg.compile(gated, target="cpu", sizes=SIZES)
    assert kernel.schedules["merge_1"] == sg.Schedule("merge_plain", lanes=8)
    np.testing.assert_allclose(kernel(**tensors).numpy(), want, atol=1e-5)
    chosen = sg.Schedule("merge_plain", lanes=4)
    kernel = sg.compile(gated, target="cpu", sizes=SIZES, schedule=chosen)
    assert kernel.schedules["merge_1"] == chosen
    np.testing.assert_allclose(kernel(**tensors).numpy(), want, atol=1e-5)


def test_what_a_schedule_declines_goes_to_the_next(add: Callable[[Any, str, str], None]) -> None:
    add(catalog, "merge_plain", shown_schedule())
    sizes = {**SIZES, "E": 12}
    kernel = sg.compile(gated, target="cpu", sizes=sizes)
    assert kernel.schedules["merge_1"].name == "merge_cpu"
    with pytest.raises(sg.UnsupportedError) as caught:
        sg.compile(gated, target="cpu", sizes=sizes, schedule=sg.Schedule("merge_plain"))
    assert caught.value.reasons == ("12 elements are no multiple of 8",)
    wide = sg.Schedule("merge_plain", lanes=32)
    with pytest.raises(sg.UnsupportedError, match="16 elements are no multiple of 32"):
        sg.compile(gated, target="cpu", sizes=SIZES, schedule=wide)


def test_an_architecture_is_a_file(add: Callable[[Any, str, str], None]) -> None:
    here = arch.host()
    narrow = dataclasses.replace(here, name="narrow", vector_bytes=16, vector_registers=16)
    fields = {f.name: getattr(narrow, f.name) for f in dataclasses.fields(Arch)}
    text = "".join(f"    {name}={value!r},\n" for name, value in fields.items())
    add(
        arch,
        "narrow",
        f'"""This machine with shorter vectors."""\n\nfrom sparsegen.arch import Arch\n\n'
        f"ARCH = Arch(\n{text})\n",
    )
    program = patterns.load("causal").program
    sizes = {"Hq": 4, "Hk": 2, "D": 24, "E": 40}
    tensors, want = inputs_of(program, {"T": 37, "S": 61, **sizes})
    kernel = sg.compile("causal", target="narrow", sizes=sizes)
    assert kernel.arch.vector_bytes == 16
    assert kernel.built.path != sg.compile("causal", target="cpu", sizes=sizes).built.path
    np.testing.assert_allclose(kernel(**tensors).numpy(), want, atol=1e-5)


def test_a_schedule_that_fails_is_named(add: Callable[[Any, str, str], None]) -> None:
    broken = shown_schedule().replace("    lanes = knobs.lanes\n", "    lanes = knobs.width\n")
    add(catalog, "merge_broken", broken)
    with pytest.raises(sg.CompileError, match=r"merge_broken.*failed on merge_1: AttributeError"):
        sg.compile(gated, target="cpu", sizes=SIZES)


def test_a_processor_that_cannot_run_here_is_refused(add: Callable[[Any, str, str], None]) -> None:
    far = dataclasses.replace(arch.get("generic"), name="far", features=frozenset({"warp"}))
    fields = {f.name: getattr(far, f.name) for f in dataclasses.fields(Arch)}
    text = "".join(f"    {name}={value!r},\n" for name, value in fields.items())
    add(arch, "far", f"from sparsegen.arch import Arch\n\nARCH = Arch(\n{text})\n")
    with pytest.raises(sg.BindingError, match="this machine lacks warp"):
        sg.compile("causal", target="far")


def test_unknown_names_offer_the_closest() -> None:
    with pytest.raises(sg.BindingError, match="did you mean 'znver4'"):
        sg.compile("causal", target="znver5")
    with pytest.raises(sg.BindingError, match="did you mean 'merge_cpu'"):
        sg.compile(gated, target="cpu", sizes=SIZES, schedule=sg.Schedule("merge_cp"))
    with pytest.raises(sg.BindingError, match="did you mean 'nsa'"):
        sg.compile("nsaa", target="cpu")
