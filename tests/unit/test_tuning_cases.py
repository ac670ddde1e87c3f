from pathlib import Path

import numpy as np
import pytest
import torch

from sparsegen import patterns
from sparsegen.errors import TuningError
from sparsegen.lowering.binding import Binding
from sparsegen.lowering.partition import partition
from sparsegen.lowering.plan import Plan
from sparsegen.lowering.tasks import Buffer, Rows
from sparsegen.tuning import cases, lists, memory
from sparsegen.tuning.cases import Case, Expected
from sparsegen.tuning.packing import Sequences, decode, encode, pack
from sparsegen.tuning.records import Sizes, task_hash
from sparsegen.tuning.subject import Span, Subject


def plan_of(name: str, layout: str = "ragged", dtype: str = "float32") -> Plan:
    config = patterns.configs(name, test=True)[0]
    program = patterns.load(name).trace(**config.hyper)
    sizes = {k: v for k, v in config.sizes.items() if k not in (program.query, program.key)}
    page = 8 if layout == "paged" else 0
    binding = Binding(
        dtype=dtype, layout=layout, page_size=page, sizes=tuple(sorted(sizes.items()))
    )
    return partition(program, binding)


# --- lists --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", lists.KINDS)
def test_drawn_lists_are_what_a_selection_is(kind: str) -> None:
    rng = np.random.default_rng(0)
    high = np.arange(1, 501)
    low = np.maximum(high - 300, 0)
    drawn = lists.draw(kind, low, high, np.full(500, 100), (2, 3), 128, rng)
    assert drawn.shape == (500, 2, 3, 128)
    assert drawn.dtype == np.int32
    used = drawn >= 0
    assert (used.sum(-1) == np.minimum(high - low, 100)[:, None, None]).all()
    assert (np.diff(used.astype(int), axis=-1) <= 0).all(), "padding is on the right"
    gaps = np.diff(drawn, axis=-1)
    assert (gaps[used[..., 1:]] > 0).all(), "ascending and without repeats"
    assert (np.where(used, drawn, low[:, None, None, None]) >= low[:, None, None, None]).all()
    assert (drawn < high[:, None, None, None]).all()


def test_distributions_differ_in_where_they_read() -> None:
    high = np.full(256, 8192)
    low = np.zeros(256, np.int64)
    drawn = {
        kind: lists.draw(kind, low, high, np.full(256, 512), (), 512, np.random.default_rng(0))
        for kind in lists.KINDS
    }
    runs = {kind: (np.diff(x, axis=-1) == 1).mean() for kind, x in drawn.items()}
    assert runs["uniform"] < 0.2 < 0.9 < runs["clustered"]
    assert (drawn["local"][:, -256:] == np.arange(8192 - 256, 8192)).all()
    rows = drawn["clustered"]
    assert (rows[0] == rows[63]).all()
    assert (rows[0] != rows[64]).any()


def test_a_trace_stands_for_the_last_rows(tmp_path: Path) -> None:
    trace = np.array([[5, 1, -1], [2, 7, 9], [3, 4, 99]], np.int32)
    np.save(tmp_path / "t.npy", trace)
    name = f"trace:{tmp_path / 't.npy'}"
    assert lists.label(name).startswith("trace:")
    high = np.array([10, 10, 10, 10])
    drawn = lists.draw(name, high * 0, high, high, (), 4, np.random.default_rng(0))
    assert drawn.tolist() == [[3, 4, -1, -1], [1, 5, -1, -1], [2, 7, 9, -1], [3, 4, -1, -1]]
    with pytest.raises(TuningError, match="the lists"):
        lists.draw(name, high * 0, high, high, (2,), 4, np.random.default_rng(0))
    with pytest.raises(TuningError, match="no trace"):
        lists.label("trace:/nowhere.npy")


@pytest.mark.parametrize(("dtype", "more"), [("float32", 1.0), ("bfloat16", 2.5)])
def test_operands_in_float32_may_become_16_bits(dtype: str, more: float) -> None:
    plan = plan_of("mla_prefill", dtype=dtype)
    tasks = {t.family: t for t in plan.tasks}
    found = {
        family: cases.small(Subject(plan, task), 0).expected[0].tolerance
        for family, task in tasks.items()
    }
    assert found["attend"] == pytest.approx(more * found["project"])


# --- packing ------------------------------------------------------------------------------------


def test_bfloat16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.standard_normal(10000) * 10.0 ** rng.integers(-30, 30, 10000),
                        [0.0, -0.0, np.inf, -np.inf, np.nan, 3.3895314e38]])  # fmt: skip
    ours = encode(x, "bfloat16").view(np.int16)
    theirs = torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16).view(torch.int16).numpy()
    nan = np.isnan(x)
    assert (ours[~nan] == theirs[~nan]).all()
    assert np.isnan(decode(encode(x, "bfloat16"), "bfloat16")[nan]).all()


def test_paged_keys_lie_where_the_table_says() -> None:
    rng = np.random.default_rng(0)
    sequences = Sequences.of((2, 3), (10, 5), page=4, rng=rng)
    buffer = Buffer(
        name="k", dtype="float32", shape=(1,), rows=Rows(space="key", paged=True, page=4)
    )
    values = [np.arange(10.0)[:, None], 100 + np.arange(5.0)[:, None]]
    packed = pack(buffer, values, sequences, 0)
    assert sequences.table is not None
    for b, value in enumerate(values):
        for j, x in enumerate(value[:, 0]):
            assert packed[sequences.table[b, j // 4], j % 4, 0] == x
    assert np.isnan(packed).sum() == packed.size - 15, "what belongs to nobody is poison"


# --- cases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["ragged", "paged"])
@pytest.mark.parametrize("name", ["dsa", "nsa", "seer", "v4_csa", "vertical_slash", "mla_prefill"])
def test_every_task_has_cases(name: str, layout: str, tmp_path: Path) -> None:
    plan = plan_of(name, layout, "bfloat16")
    for task in plan.tasks:
        subject = Subject(plan, task)
        timed = cases.timed(subject, Sizes(batch=2, query=11, key=157), "clustered")
        for case in (cases.small(subject, 0), cases.small(subject, 1), timed):
            assert len(case.inputs) == 3 + task.paged + len(task.reads)
            assert len(case.outputs) == len(task.writes)
            for expected in case.expected:
                out = case.outputs[expected.output]
                assert len(set(expected.rows)) == len(expected.rows) == len(expected.values)
                assert expected.rows.max(initial=0) < len(out)
                assert out.shape[1:] == expected.values.shape[1:]
            back = Case.load(case.save(tmp_path / "case.npz"))
            assert back.name == case.name
            assert [e.tolerance for e in back.expected] == [e.tolerance for e in case.expected]


@pytest.mark.parametrize("name", ["dsa", "nsa", "seer", "quest", "snapkv"])
def test_a_sample_of_rows_says_what_all_rows_say(name: str) -> None:
    plan = plan_of(name)
    for task in plan.tasks:
        subject = Subject(plan, task)
        sizes = Sizes(batch=1, query=24, key=157)
        timed = cases.timed(subject, sizes, "uniform")
        if not timed.expected:
            continue
        made = _unpacked(subject, timed)
        offset = (157 - 24) // subject.align() * subject.align()
        whole = subject.part(made, Span(0, 0, 24, offset, 157))
        for expected in timed.expected:
            full = subject.value(whole, task.writes[expected.output])
            np.testing.assert_allclose(full[expected.rows], expected.values, rtol=1e-9, atol=1e-12)


def _unpacked(subject: Subject, case: Case) -> dict[str, np.ndarray]:
    """Return the inputs of a case of one packed sequence as its oracle takes them."""
    rng = np.random.default_rng(0)
    sequences = Sequences.of((24,), (157,), align=subject.align(), rng=rng)
    made = dict(subject.large(sequences, 0)[0])
    for buffer, packed in zip(subject.task.reads, case.inputs[3:], strict=True):
        if not subject.is_input(buffer):
            rows = sequences.rows(buffer.rows, 0, subject.count(buffer, 0, sequences))
            made[buffer.name] = decode(packed, buffer.dtype)[rows]
    return made


def test_the_hash_of_a_task_is_about_what_it_computes() -> None:
    (a, b), (c, d) = plan_of("dsa").tasks, plan_of("dsa", dtype="bfloat16").tasks
    again = plan_of("dsa").tasks
    assert [task_hash(t) for t in again] == [task_hash(a), task_hash(b)]
    assert len({task_hash(t) for t in (a, b, c, d)}) == 4


# --- comparing ----------------------------------------------------------------------------------


def test_a_difference_is_reported_where_it_is_largest() -> None:
    want = np.array([[1.0, -2.0], [0.5, -np.inf]])
    expected = Expected(0, np.array([4, 9]), want, 1e-3)
    assert memory.compare(want + 1e-5, expected) is None
    wrong = want.copy()
    wrong[1, 0] = 0.9
    assert "wrong at [9, 0]: got 0.9, want 0.5" in (memory.compare(wrong, expected) or "")
    for bad in (np.nan, 7.0):
        wrong = want.copy()
        wrong[1, 1] = bad
        assert "at [9, 1]" in (memory.compare(wrong, expected) or "")


def test_an_error_is_relative_to_its_row_where_that_is_large() -> None:
    want = np.full((50, 16), 0.01)
    want[7] = np.linspace(-1.0, 1.0, 16)
    want[7, 3] = 0.0
    expected = Expected(0, np.arange(50), want, 0.02)
    for row, error, fails in ((7, 0.008, False), (7, 0.02, True), (8, 0.002, True)):
        got = want.copy()
        got[row, 3] += error
        assert (memory.compare(got, expected) is not None) is fails, (row, error)


def test_lists_must_be_equal_where_scores_are_exact() -> None:
    want = np.array([[1, 4, -1], [2, 3, 8]])
    near = np.array([[1, 4, -1], [2, 5, 8]])
    rows = np.array([0, 1])
    assert memory.compare(want, Expected(0, rows, want, 0.0)) is None
    assert "1 of 2 lists, first at [1, 1]: got 5, want 3" in (
        memory.compare(near, Expected(0, rows, want, 0.0)) or ""
    )
    assert memory.compare(near, Expected(0, rows, want, 0.5)) is None
    unsorted = np.array([[1, 4, -1], [3, 2, 8]])
    assert memory.compare(unsorted, Expected(0, rows, want, 0.5)) is not None
