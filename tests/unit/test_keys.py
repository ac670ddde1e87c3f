import hypothesis.strategies as st
import pytest
from hypothesis import given

import sparsegen as sg
from sparsegen import PatternError
from sparsegen.analysis.affine import Affine, affine, to_expr
from sparsegen.analysis.keys import Key, key_extent, same, selection_axis
from sparsegen.ir.axes import Entries, Fixed, Named
from sparsegen.ir.expr import Apply, Const, Expr, Head, Pos, apply, show

T, S = Named("T"), Named("S")
QUERY, KEY = Pos("query", T), Pos("key", S)


def evaluate(expr: Expr, i: int, j: int) -> int:
    match expr:
        case Const(value):
            return int(value)
        case Pos(role):
            return i if role == "query" else j
        case Apply(op, args):
            a = [evaluate(x, i, j) for x in args]
            match op:
                case "add":
                    return a[0] + a[1]
                case "sub":
                    return a[0] - a[1]
                case "mul":
                    return a[0] * a[1]
                case "neg":
                    return -a[0]
                case "floordiv":
                    return a[0] // a[1]
                case "mod":
                    return a[0] % a[1]
    raise AssertionError(expr)


def sums(depth: int) -> st.SearchStrategy[Expr]:
    leaves = st.sampled_from([QUERY, KEY]) | st.integers(-20, 20).map(Const)
    if depth == 0:
        return leaves
    below = sums(depth - 1)
    return st.one_of(
        leaves,
        st.builds(lambda op, a, b: apply(op, a, b), st.sampled_from(["add", "sub"]), below, below),
        st.builds(lambda a, n: apply("mul", a, Const(n)), below, st.integers(-6, 6)),
        st.builds(
            lambda op, a, n: apply(op, a, Const(n)),
            st.sampled_from(["floordiv", "mod"]), below, st.integers(1, 12),
        ),
        st.builds(lambda a: apply("neg", a), below),
    )  # fmt: skip


@given(expr=sums(4), i=st.integers(-99, 999), j=st.integers(0, 999))
def test_affine_form_keeps_the_value(expr: Expr, i: int, j: int) -> None:
    total = affine(expr)
    assert total is not None
    assert evaluate(to_expr(total), i, j) == evaluate(expr, i, j)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("j // 4 // 16", "j // 64"),
        ("(j + 64) // 64", "j // 64 + 1"),
        ("(2 * j + 1) // 8", "j // 4"),
        ("j - j // 8 * 8", "j % 8"),
        ("(j // 4 + 1) // 2", "(j + 4) // 8"),
        ("i - j", "-(j - i)"),
    ],
)
def test_equal_sums_are_equal(a: str, b: str) -> None:
    names = {"i": sg.dsl.index.Index(QUERY), "j": sg.dsl.index.Index(KEY)}  # type: ignore[attr-defined]
    assert same(eval(a, names).expr, eval(b, names).expr)


@pytest.mark.parametrize("op", ["min", "max", "mul", "div"])
def test_not_affine(op: str) -> None:
    assert affine(apply(op, QUERY, KEY)) is None
    assert isinstance(affine(apply("min", QUERY, KEY), opaque=True), Affine)


@sg.pattern
def nsa(
    q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"], phi: sg.Tensor["slots"],
):  # fmt: skip
    i, j = sg.index(q, k)
    h = sg.head(q)
    kc = sg.compress(k, phi, width=32, stride=16)
    p = sg.score(q, kc, norm="softmax", where=kc.end <= i)
    blk = kc.blocks(64)
    imp = sg.reduce(p, "sum", by=(h // q.group, i, blk))
    force = (blk < 1) | (blk == i // 64) | (blk == i // 64 - 1)
    sel = sg.select(imp, topk=16, force=force)
    return sg.attend(q, k, v, where=(j <= i) & sel[h // q.group, i, j // 64])


def selections(pattern: sg.Pattern) -> list:
    return [n for n in pattern.program.nodes if n.op == "select"]


def test_force_is_said_in_keys() -> None:
    (select,) = selections(nsa)
    assert show(select.force) == (
        "(((key2 < 1) | (key2 == (key1 // 64))) | (key2 == ((key1 // 64) - 1)))"
    )
    assert selection_axis(select) == Key("key", S, 64)


def over(body, *, compressed: int | None = None) -> sg.Pattern:  # type: ignore[no-untyped-def]
    """Trace a pattern that selects and attends as `body(i, j, h, q, scores, entry)` says."""

    @sg.pattern
    def made(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"]):  # type: ignore[no-untyped-def]
        i, j = sg.index(q, k)
        h = sg.head(q)
        keys = k
        entry = j
        if compressed is not None:
            keys = sg.compress(k, sg.mean, width=compressed)
            entry = sg.index(q, keys)[1]
        scores = sg.score(q, keys)
        return sg.attend(q, k, v, where=(j <= i) & body(i, j, h, q, scores, entry))

    return made


def test_entries_are_read_by_their_positions() -> None:
    made = over(
        lambda i, j, h, q, s, e: sg.select(s, topk=2, force=j // 64 == i // 64)[h, i, j // 64],
        compressed=64,
    )
    (select,) = selections(made)
    assert show(select.force) == "(key2 == (key1 // 64))"
    assert selection_axis(select) == Key("key", S, 64)


def test_coarser_floors_become_quotients() -> None:
    made = over(
        lambda i, j, h, q, s, e: sg.select(
            sg.reduce(s, "max", by=(h, i // 16, j // 4)), topk=2, force=j // 16 == i // 32
        )[h, i // 16, j // 4]
    )
    (select,) = selections(made)
    assert show(select.force) == "((key2 // 4) == (key1 // 2))"


def test_reduction_of_a_reduction() -> None:
    made = over(
        lambda i, j, h, q, s, e: sg.select(
            sg.reduce(sg.reduce(s, "max", by=(h, i, j // 8)), "sum", by=(h // 2, i, j // 32)),
            topk=2,
        )[h // 2, i, j // 32]
    )
    (select,) = selections(made)
    assert selection_axis(select) == Key("key", S, 32)


def test_slashes_and_columns() -> None:
    made = over(
        lambda i, j, h, q, s, e: (
            sg.select(sg.reduce(s, "sum", by=(h, i - j)), topk=4)[h, i - j]
            | sg.select(sg.reduce(s, "sum", by=(h, j)), topk=4)[h, j]
        )
    )
    axes = {selection_axis(s) for s in selections(made)}
    assert axes == {Key("slash", S), Key("key", S)}


def test_lists_of_another_head_axis() -> None:
    @sg.pattern
    def msa(  # type: ignore[no-untyped-def]
        q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"],
        q_idx: sg.Tensor["T Hk e"], k_idx: sg.Tensor["S 1 e"],
    ):  # fmt: skip
        i, j = sg.index(q, k)
        g = sg.head(q_idx)
        s = sg.reduce(sg.score(q_idx, k_idx, where=j <= i), "max", by=(g, i, j // 128))
        sel = sg.select(s, topk=16)
        return sg.attend(q, k, v, where=(j <= i) & sel[sg.head(q) // q.group, i, j // 128])

    assert selections(msa)


BAD = {
    "too few keys": (lambda i, j, h, q, s, e: sg.select(s, topk=2)[i, j], "read with 2 keys"),
    "other head": (
        lambda i, j, h, q, s, e: sg.select(s, topk=2)[h // 2, i, j],
        "read with (h // 2) in place of h",
    ),
    "other query": (lambda i, j, h, q, s, e: sg.select(s, topk=2)[h, i // 2, j], "(i // 2)"),
    "other granule": (
        lambda i, j, h, q, s, e: sg.select(sg.reduce(s, "max", by=(i, j // 64)), topk=2)[
            i, j // 32
        ],
        "read with (j // 32) in place of (j // 64)",
    ),
    "raw key of blocks": (
        lambda i, j, h, q, s, e: sg.select(sg.reduce(s, "max", by=(i, j // 64)), topk=2)[i, j],
        "read with j in place of (j // 64)",
    ),
    "not affine": (lambda i, j, h, q, s, e: sg.reduce(s, "sum", by=(i, j * j)), "is not affine"),
    "two axes in one key": (
        lambda i, j, h, q, s, e: sg.reduce(s, "sum", by=(i + j, j)),
        "does not enumerate one axis",
    ),
    "key of the inner space": (
        lambda i, j, h, q, s, e: sg.reduce(sg.reduce(s, "sum", by=(i, j // 8)), "sum", by=(i, j)),
        "is no function of the keys reduced",
    ),
    "uneven blocks": (
        lambda i, j, h, q, s, e: sg.reduce(
            sg.reduce(s, "sum", by=(i, j // 8)), "sum", by=(i, j // 12)
        ),
        "is no function of the keys reduced",
    ),
    "heads chosen": (
        lambda i, j, h, q, s, e: sg.select(sg.reduce(s, "sum", by=(i, h)), topk=2),
        "which is no key position",
    ),
    "two key positions": (
        lambda i, j, h, q, s, e: sg.select(sg.reduce(s, "sum", by=(i, j // 64, j)), topk=2),
        "heads and at most one query position",
    ),
    "force over raw keys": (
        lambda i, j, h, q, s, e: sg.select(
            sg.reduce(s, "max", by=(i, j // 64)), topk=2, force=j < 4
        ),
        "mentions j",
    ),
    "budget over the chosen key": (
        lambda i, j, h, q, s, e: sg.select(sg.reduce(s, "max", by=(i, j)), topk=j + 1),
        "mentions j",
    ),
    "negative shift": (
        lambda i, j, h, q, s, e: sg.reduce(s, "sum", by=(i, (j - 3) // 4)),
        "shifted by -3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_keys_and_the_line(name: str) -> None:
    body, message = BAD[name]
    with pytest.raises(PatternError) as caught:
        _ = over(body).program
    assert message in str(caught.value)
    assert "test_keys.py:" in str(caught.value)


def test_overlapping_entries_cannot_be_selected() -> None:
    @sg.pattern
    def overlapping(q: sg.Tensor["T Hq D"], k: sg.Tensor["S Hk D"], v: sg.Tensor["S Hk D"]):  # type: ignore[no-untyped-def]
        i, j = sg.index(q, k)
        kc = sg.compress(k, sg.mean, width=32, stride=16)
        sel = sg.select(sg.score(q, kc), topk=4)
        return sg.attend(q, k, v, where=sel[sg.head(q), i, j // 16])

    with pytest.raises(PatternError) as caught:
        _ = overlapping.program
    assert "select() on overlapping entries (width=32, stride=16, built at" in str(caught.value)
    assert "to disjoint blocks first" in str(caught.value)


def test_extents_of_head_keys() -> None:
    head = Head(Named("H"))
    assert key_extent(head, {"H": 6}) == 6
    assert key_extent(apply("floordiv", head, Const(4)), {"H": 6}) == 2
    assert key_extent(Const(0), {}) == 1
    assert key_extent(Head(Fixed(3)), {}) == 3


def test_entries_of_equal_blocks_are_the_same_key() -> None:
    entry = Pos("key", Entries(S, 64, 64))
    assert same(entry, apply("floordiv", KEY, Const(64)))
    assert same(apply("floordiv", entry, Const(2)), apply("floordiv", KEY, Const(128)))
    assert not same(Pos("key", Entries(S, 64, 32)), apply("floordiv", KEY, Const(32)))
