from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from random import Random

import pytest

from sparsegen.errors import TuningError
from sparsegen.tuning.race import Choice, Race, noise_of
from sparsegen.tuning.records import Key, Origin, Record, Sizes, read
from sparsegen.tuning.replay import Replay
from sparsegen.tuning.space import Candidate, History, Measured, Outcome, Rejected, Space
from sparsegen.tuning.strategies import STRATEGIES

KEY = Key(
    task="ab12", sizes=Sizes(batch=1, query=64, key=8192), distribution="uniform",
    arch="x86_64_v4", threads=2, toolchain="t1",
)  # fmt: skip
ORIGIN = Origin(program="dsa", program_hash="77", binding={"dtype": "float32"}, task="attend_1")

A, B = (1, 2, 4, 8, 16, 32), (16, 32, 64, 128)


def candidate(a: int, b: int, packed: bool) -> Candidate:
    return Candidate.of("attend_cpu", {"a": a, "b": b, "packed": packed})


BEST = candidate(8, 64, True)


def micros(a: int, b: int, packed: bool) -> float:
    """A bowl around (8, 64, True), 2.7 times as fast as the default (1, 16, False)."""
    steps = abs(A.index(a) - A.index(8)) + abs(B.index(b) - B.index(64)) + (not packed)
    return 1000.0 * 1.18**steps


def recorded(noise: float = 0.01) -> list[Record]:
    rng = Random(1)
    out = []
    for knobs in product(A, B, (False, True)):
        outcome: Outcome = Measured(
            tuple(micros(*knobs) * rng.gauss(1, noise) for _ in range(9)), (1.0,) * 9
        )
        if knobs[0] * knobs[1] > 2048:
            outcome = Rejected("build", "does not fit")
        out.append(
            Record(
                what="candidate", key=KEY, origin=ORIGIN, candidate=candidate(*knobs),
                outcome=outcome,
            )
        )  # fmt: skip
    return out


def race(
    runner: Replay, strategy: str, seconds: float, space: Space | None = None, seed: int = 0
) -> tuple[Choice, Race]:
    known: dict[Candidate, Outcome] = {}
    run = Race(
        space=space or runner.space,
        propose=STRATEGIES[strategy].propose,
        runner=runner,
        history=History(),
        record=known.__setitem__,
        deadline=seconds,
        reserve=0.2 * seconds,
        rng=Random(seed),
        clock=runner.clock,
    )
    choice = run.run()
    assert known == run.history.outcomes
    return choice, run


@pytest.mark.parametrize("strategy", ["exhaustive", "random", "evolutionary"])
def test_every_strategy_finds_the_best_given_time(strategy: str) -> None:
    choice, run = race(Replay(recorded()), strategy, 100)
    assert choice.candidate == BEST
    assert choice.speedup == pytest.approx(1.18**6, rel=0.05)
    assert len(run.history) == 48


def test_evolution_beats_chance_on_a_fifth_of_the_space() -> None:
    wide = [
        Record(what="candidate", key=KEY, origin=ORIGIN, candidate=Candidate.of(
            "attend_cpu", {**dict(r.candidate.knobs), "c": c}),
            outcome=Measured(tuple(s * 1.18 ** abs(c - 3) for s in r.outcome.samples), (1.0,) * 9))
        for r in recorded() if isinstance(r.outcome, Measured) for c in range(5)
    ]  # fmt: skip

    def mean_loss(strategy: str) -> float:
        found = [race(Replay(wide), strategy, 30, seed=n)[1].history for n in range(6)]
        return sum(h.measured[h.fastest(1)[0]].micros for h in found) / 6000.0 - 1

    losses = {name: mean_loss(name) for name in ("evolutionary", "random")}
    assert losses["evolutionary"] < min(0.1, losses["random"]), losses


def test_strategies_propose_only_what_is_new_and_only_once() -> None:
    space = Replay(recorded()).space
    for strategy in STRATEGIES.values():
        history = History()
        while batch := strategy.propose(space, history, 5, Random(len(history))):
            assert len(set(batch)) == len(batch) <= 5
            assert not set(batch) & history.outcomes.keys()
            history.outcomes |= {c: Rejected("build", "") for c in batch}
        assert set(history.outcomes) == set(space.candidates)


def test_the_default_stays_unless_beaten_by_more_than_the_noise() -> None:
    rng = Random(3)
    default, other = candidate(1, 16, False), candidate(2, 16, False)
    for gain, spread, wins in ((0.03, 0.001, True), (0.03, 0.05, False), (0.005, 0.0, False)):
        records = [
            Record(what="candidate", key=KEY, origin=ORIGIN, candidate=c, outcome=Measured(
                tuple(t * rng.gauss(1, spread) for _ in range(40)), (1.0,) * 40))
            for c, t in ((default, 100.0), (other, 100.0 * (1 - gain)))
        ]  # fmt: skip
        choice, _ = race(Replay(records), "exhaustive", 60)
        assert (choice.candidate == other) is wins, choice


def test_a_resumed_search_measures_nothing_twice() -> None:
    runner = Replay(recorded())
    _, first = race(runner, "exhaustive", 8)
    done = dict(first.history.outcomes)
    prepared: list[Candidate] = []

    class Watch(Replay):
        def prepare(self, candidates: Sequence[Candidate], deadline: float):  # type: ignore[no-untyped-def]
            prepared.extend(candidates)
            return super().prepare(candidates, deadline)

    again = Watch(recorded())
    run = Race(
        space=again.space, propose=STRATEGIES["exhaustive"].propose, runner=again,
        history=History(dict(done)), record=lambda c, o: None, deadline=100, reserve=5,
        rng=Random(0), clock=again.clock,
    )  # fmt: skip
    assert run.run().candidate == BEST
    finalists = set(run.history.fastest(3)) | {again.space.default}
    assert not (set(prepared) & done.keys()) - finalists


def test_no_time_at_all_means_the_default() -> None:
    choice, _ = race(Replay(recorded()), "evolutionary", 0)
    assert choice.candidate == candidate(1, 16, False)
    assert choice.final is None


def test_a_broken_default_is_replaced_by_what_works() -> None:
    records = recorded()
    records[0] = Record(
        what="candidate", key=KEY, origin=ORIGIN, candidate=records[0].candidate,
        outcome=Rejected("check", "wrong"),
    )  # fmt: skip
    choice, _ = race(Replay(records), "evolutionary", 100)
    assert choice.candidate == BEST


def test_nothing_works_is_an_error_with_the_reason() -> None:
    records = [
        Record(what="candidate", key=KEY, origin=ORIGIN, candidate=r.candidate,
               outcome=Rejected("build", "LLVM ERROR: out of registers"))
        for r in recorded()
    ]  # fmt: skip
    with pytest.raises(TuningError, match=r"all 48 candidates were rejected") as caught:
        race(Replay(records), "exhaustive", 100)
    assert "out of registers" in str(caught.value)


def test_a_candidate_that_dies_in_a_round_leaves_alone() -> None:
    class Fragile(Replay):
        def round(self, candidates: Sequence[Candidate]) -> Mapping[Candidate, float | Rejected]:
            times = dict(super().round(candidates))
            return times | {c: Rejected("time", "SIGSEGV") for c in candidates if c == BEST}

    choice, run = race(Fragile(recorded()), "exhaustive", 100)
    assert run.history.outcomes[BEST] == Rejected("time", "SIGSEGV")
    assert micros(**dict(choice.candidate.knobs)) == pytest.approx(1180)  # type: ignore[arg-type]


def test_neighbours_are_one_step_away() -> None:
    space = Replay(recorded()).space
    assert set(space.neighbours(candidate(8, 64, True))) == {
        candidate(4, 64, True), candidate(16, 64, True), candidate(8, 32, True),
        candidate(8, 128, True), candidate(8, 64, False),
    }  # fmt: skip


def test_what_is_tried_first_is_near_or_of_another_schedule() -> None:
    known = Replay(recorded()).space
    others = tuple(Candidate.of(s, {"n": n}) for s in ("s", "t") for n in range(9))
    space = Space((*known.candidates, *others), known.excluded)
    orders = [space.first(n, Random(0)).candidates for n in (1, 4, 12, 40, 1000)]
    for less, more in pairwise(orders):
        assert more[: len(less)] == less
    near = space.neighbours(space.default)
    assert orders[-1][: len(near) + 3] == (space.default, *near, others[0], others[9])
    assert {c.schedule for c in orders[3][len(near) + 3 :]} == {"attend_cpu"}
    assert set(orders[-1]) == set(space.candidates)
    worthwhile = orders[-1][: space.worthwhile]
    assert {c for c in space.candidates if c not in worthwhile} == {*others[1:9], *others[10:]}


def test_neighbours_in_a_space_with_holes_are_the_nearest() -> None:
    make: Callable[[int, int], Candidate] = lambda a, b: Candidate.of("s", {"a": a, "b": b})  # noqa: E731
    space = Space((make(1, 1), make(2, 2), make(3, 3)))
    assert space.neighbours(make(1, 1)) == [make(2, 2)]


def test_the_noise_of_a_ratio_ignores_drift_common_to_both() -> None:
    drift = (1.0, 1.3, 2.0, 1.1, 0.9)
    quiet = Measured(tuple(9.0 * d for d in drift), tuple(10.0 * d for d in drift))
    assert quiet.ratio == pytest.approx(0.9)
    assert noise_of(quiet) == 0.01


def test_static_reasons_are_counted() -> None:
    a = candidate(1, 16, False)
    space = Space((a,), excluded=((a, "too big"), (a, "odd"), (a, "too big")))
    assert list(space.reasons().items()) == [("too big", 2), ("odd", 1)]


# --- a space recorded on a real machine ---------------------------------------------------------

REAL = Path(__file__).parent / "data" / "attend_cpu.jsonl"


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_on_a_recorded_space_no_strategy_ends_far_from_the_best(strategy: str) -> None:
    recorded = [r for r in read(REAL) if r.what == "candidate"]
    times = {r.candidate: r.outcome.micros for r in recorded if isinstance(r.outcome, Measured)}
    share = 1.0 if strategy == "exhaustive" else 0.5
    runner = Replay(recorded, build_seconds=1.0)
    choice, run = race(runner, strategy, 1.6 * share * len(times))
    assert len(run.history) >= 0.4 * share * len(times)
    assert times[choice.candidate] < 1.2 * min(times.values())
