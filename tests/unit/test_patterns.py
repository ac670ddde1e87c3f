"""Every shipped pattern: its oracle, its shapes, its full budget, its hash."""

import ast
from typing import Any

import numpy as np
import pytest

import sparsegen as sg
from sparsegen import patterns
from sparsegen.patterns import Config
from tests.unit.oracles import ORACLES, Array, causal_mask, first_of, masked

NAMES = patterns.names()
CASES = [
    pytest.param(name, config, id=f"{name}[{config}]")
    for name in NAMES
    for config in patterns.configs(name, test=True)
]


def doubles(program: sg.Program, sizes: Any, seed: int = 0) -> dict[str, Array]:
    made = patterns.random_inputs(program, sizes, seed)
    return {n: x if x.dtype == np.int32 else x.astype(np.float64) for n, x in made.items()}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_reference_is_the_dense_oracle(name: str, config: Config, seed: int) -> None:
    program = patterns.load(name).trace(**config.hyper)
    x = doubles(program, config.sizes, seed)
    got = first_of(sg.reference(program, x))
    want = ORACLES[name](**x, **config.hyper)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12, err_msg=f"{name}[{config}]")


# Hyperparameters that let every key be chosen, and how the pattern is then told apart from causal.
FULL_BUDGET: dict[str, dict[str, Any]] = {
    "dsa": {"topk": 999, "d_v": 4},
    "hisa": {"B": 3, "n": 99, "topk": 999, "d_v": 4},
    "infllm_v2": {"width": 4, "stride": 2, "B": 8, "n": 99, "local": 99},
    "moba": {"B": 3, "n": 99},
    "msa": {"B": 3, "n": 99},
    "nsa": {"l": 4, "d": 2, "L": 8, "n": 99},
    "qsa": {"topk": 999},
    "quest": {"B": 3, "n": 99},
    "seer": {"B": 3, "n": 99},
    "snapkv": {"last": 5, "budget": 999},
    "vertical_slash": {"last": 5, "columns": 999, "slashes": 1, "first": 1, "recent": 1},
    "xattention": {"stride": 2, "B": 6, "mass": 1.0},
}


@pytest.mark.parametrize("lengths", [(31, 31), (6, 48), (1, 37)], ids=str)
@pytest.mark.parametrize("name", FULL_BUDGET)
def test_full_budget_is_dense_causal_attention(name: str, lengths: tuple[int, int]) -> None:
    program = patterns.load(name).trace(**FULL_BUDGET[name])
    sizes = dict(patterns.configs(name, test=True)[0].sizes) | dict(zip("TS", lengths, strict=True))
    if name == "seer" and (sizes["S"] - sizes["T"]) % 3:
        sizes["S"] = sizes["T"]
    x = doubles(program, sizes)
    if "g" in x:
        x["g"][:] = (0.0, 1.0, 0.0)  # only the selected branch
    got = first_of(sg.reference(program, x))
    q, k = x["q"], x.get("k", x.get("kv"))
    want = masked(q, k, x["v"] if "v" in x else k[..., :4], causal_mask(q, k))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_every_dynamic_pattern_has_a_full_budget() -> None:
    dynamic = {n for n in NAMES if any(m.op == "select" for m in patterns.load(n).program.nodes)}
    assert dynamic == FULL_BUDGET.keys() | {"v4_csa"}  # the next test


def test_csa_with_every_entry_is_dense_over_entries_and_window() -> None:
    @sg.pattern
    def dense(
        q: "T H c", kv: "S 1 c", x_prev: "S 1 c", z_prev: "S 1 c", x: "S 1 c", z: "S 1 c",
        ape: "slots c", sink: "H",
    ):  # fmt: skip
        i, j = sg.index(q, kv)
        kc = sg.compress(x, sg.softmax(z, bias=ape, previous=(x_prev, z_prev)), width=4)
        both = [kc.end <= i, (j <= i) & (i - j < 9)]
        return sg.attend(q, [kc, kv], [kc, kv], where=both, sink=sink)

    program = patterns.load("v4_csa").trace(topk=999, W=9)
    x = doubles(program, patterns.configs("v4_csa", test=True)[0].sizes)
    less = {n.name: x[n.name] for n in dense.inputs}
    np.testing.assert_allclose(
        sg.reference(program, x), sg.reference(dense, less), rtol=0, atol=1e-12
    )


def test_hca_by_merge_is_one_softmax() -> None:
    @sg.pattern
    def joint(q: "T H c", kv: "S 1 c", x: "S 1 c", z: "S 1 c", ape: "m c", *, m=4, W=5):
        i, j = sg.index(q, kv)
        kc = sg.compress(x, sg.softmax(z, bias=ape), width=m)
        near = (j <= i) & (i - j < W)
        a = sg.attend(q, [kc, kv], [kc, kv], where=[kc.end <= i, near])
        return a, a.lse

    @sg.pattern
    def merged(q: "T H c", kv: "S 1 c", x: "S 1 c", z: "S 1 c", ape: "m c", *, m=4, W=5):
        i, j = sg.index(q, kv)
        kc = sg.compress(x, sg.softmax(z, bias=ape), width=m)
        near = sg.attend(q, kv, kv, where=(j <= i) & (i - j < W))
        a = sg.merge([sg.attend(q, kc, kc, where=kc.end <= i), near])
        return a, a.lse

    for config in patterns.configs("v4_hca", test=True):
        hyper = dict(config.hyper)
        x = doubles(joint.trace(**hyper), config.sizes)
        one, two = (sg.reference(p.trace(**hyper), x) for p in (joint, merged))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_quest_bound_is_an_upper_bound() -> None:
    """With one page chosen by its bound, no key of another page scores above the best bound."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 1, 8)), rng.standard_normal((40, 1, 8))
    pages = k.reshape(10, 4, 8)
    signs = np.concatenate([np.maximum(q, 0), -np.maximum(-q, 0)], -1)
    bound = np.concatenate([pages.max(1), pages.min(1)], -1) @ signs[0, 0]
    assert (bound >= (k[:, 0] @ q[0, 0]).reshape(10, 4).max(1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_pattern_file_keeps_the_house_rules(name: str) -> None:
    pattern = patterns.load(name)
    path = patterns.path(name)
    functions = {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    body = functions[name].body[1:]
    lines = body[-1].end_lineno - body[0].lineno + 1  # type: ignore[operator]
    assert lines <= 12
    assert ast.get_docstring(functions[name])
    assert len(patterns.configs(name, test=True)) >= 5
    assert patterns.configs(name)
    assert pattern.__doc__


@pytest.mark.parametrize("test", [False, True], ids=["published", "test"])
@pytest.mark.parametrize("name", NAMES)
def test_configs_name_every_letter_once(name: str, test: bool) -> None:
    found = patterns.configs(name, test=test)
    assert len({c.name for c in found}) == len(found)
    for config in found:
        program = patterns.load(name).trace(**config.hyper)
        hyper = {n for n, v in program.hyper if isinstance(v, int)}
        hyper -= {program.query, program.key}
        assert set(config.sizes) == program.letters - hyper, str(config)


@pytest.mark.parametrize("name", NAMES)
def test_program_survives_json(name: str) -> None:
    program = patterns.load(name).program
    again = sg.Program.from_json(program.to_json())
    assert again == program
    assert again.hash == program.hash
    assert sg.pattern(patterns.load(name).fn).program.hash == program.hash


@pytest.mark.parametrize("name", NAMES)
def test_printed_program(name: str, snapshot: Any) -> None:
    snapshot(str(patterns.load(name).program))


def test_hashes_tell_patterns_and_hyperparameters_apart() -> None:
    seen = [patterns.load(n).program.hash for n in NAMES]
    assert len(set(seen)) == len(NAMES)
    dsa = patterns.load("dsa")
    assert dsa.trace(topk=6).hash != dsa.trace(topk=7).hash == dsa.trace(topk=7).hash


def test_unknown_pattern_offers_the_closest() -> None:
    with pytest.raises(sg.BindingError, match="unknown pattern 'mobba'") as caught:
        patterns.load("mobba")
    assert caught.value.hint == "did you mean 'moba'?"


def test_a_folder_of_patterns_can_be_added(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "import sparsegen as sg\n"
        "@sg.pattern\n"
        "def mine(q: 'T H D', k: 'S H D', v: 'S H D'):\n"
        "    return sg.attend(q, k, v)\n"
    )
    (tmp_path / "wrong.py").write_text("import sparsegen as sg\n")
    patterns.register_path(tmp_path)
    try:
        assert patterns.load("mine").name == "mine"
        assert "mine" in patterns.names()
        with pytest.raises(sg.BindingError, match="defines no pattern 'wrong'"):
            patterns.load("wrong")
    finally:
        patterns.unregister_path(tmp_path)
