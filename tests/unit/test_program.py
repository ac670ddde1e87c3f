"""Programs print, compare, hash stably and survive JSON."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sparsegen as sg
from sparsegen import Program, patterns

NAMES = sorted(patterns.names())

SCRIPT = """
import sparsegen as sg
from sparsegen import patterns
for name in sorted(patterns.names()):
    print(name, patterns.load(name).program.hash)
"""


POSTPONED = """
from __future__ import annotations
import sparsegen as sg
Q = sg.Tensor["T Hq D"]
T = "no declaration, so a letter"

@sg.pattern
def full(q: Q, k: sg.Tensor["S Hk D"], v: "S Hk E", bias: "T"):
    return sg.attend(q, k, v)
"""


def test_axes_are_found_behind_postponed_annotations() -> None:
    scope: dict[str, sg.Pattern] = {}
    exec(compile(POSTPONED, "user.py", "exec"), scope)
    axes = [" ".join(map(str, node.axes)) for node in scope["full"].inputs]
    assert axes == ["T Hq D", "S Hk D", "S Hk E", "T"]


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name: str) -> None:
    program = patterns.load(name).program
    again = Program.from_json(program.to_json())
    assert again == program
    assert again.hash == program.hash
    assert again.to_json() == program.to_json()


@pytest.mark.parametrize("name", NAMES)
def test_sites_do_not_change_what_a_program_is(name: str) -> None:
    program = patterns.load(name).program
    assert Program.from_json(program.to_json(sites=True)) == program


def test_hashes_are_equal_across_processes() -> None:
    seen = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        seen.add(done.stdout)
    assert len(seen) == 1
    assert len(seen.pop().splitlines()) == len(NAMES)


def test_hash_follows_the_mathematics() -> None:
    dsa = patterns.load("dsa")
    assert dsa.trace(topk=64).hash == dsa.trace(topk=64).hash
    assert dsa.trace(topk=64).hash != dsa.trace(topk=65).hash


def test_equal_text_at_other_places_is_the_same_program() -> None:
    def make() -> sg.Pattern:
        def window(q: "T H D", k: "S H D", v: "S H D", *, W=4):  # type: ignore
            i, j = sg.index(q, k)
            return sg.attend(q, k, v, where=(j <= i) & (i - j < W))

        return sg.pattern(window)

    a, b = make().program, make().program
    assert a == b
    assert a.hash == b.hash


def test_number_kinds_are_kept_apart() -> None:
    def one(scale: object) -> Program:
        def p(q: "T H D", k: "S H D", v: "S H D", *, c=1):  # type: ignore
            i, j = sg.index(q, k)
            return sg.attend(q, k, v, where=j <= i, mod=lambda s: s * c + (i - j))

        return sg.pattern(p).trace(c=scale)  # type: ignore[arg-type]

    assert one(2).hash != one(2.0).hash


@pytest.mark.parametrize("name", ["dsa", "nsa", "v4_csa"])
def test_program_text(name: str, snapshot: object) -> None:
    snapshot(str(patterns.load(name).program))  # type: ignore[operator]
