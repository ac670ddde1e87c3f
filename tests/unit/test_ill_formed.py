"""Ill-formed programs and what is said about them: the place, what is wrong, the way out."""

from collections.abc import Callable
from textwrap import dedent, indent

import pytest

import sparsegen as sg

QKV = 'q: "T Hq D", k: "S Hk D", v: "S Hk D"'


def pattern(body: str, inputs: str = QKV, before: str = "") -> str:
    """Return a file that defines and traces one pattern."""
    head = f"import numpy as np\nimport sparsegen as sg\n{dedent(before).lstrip()}\n"
    lines = indent(dedent(body).strip(), "    ")
    return f"{head}@sg.pattern\ndef p({inputs}):\n{lines}\n\np.program\n"


def attend(argument: str, inputs: str = QKV, before: str = "") -> str:
    return pattern(
        f"i, j = sg.index(q, k)\nh = sg.head(q)\nreturn sg.attend(q, k, v, {argument})",
        inputs,
        before,
    )


def selecting(lines: str, use: str = "sel[i, j]") -> str:
    start = "i, j = sg.index(q, k)\nh = sg.head(q)\ns = sg.score(q, k, where=j <= i)\n"
    return pattern(f"{start}{dedent(lines).strip()}\nreturn sg.attend(q, k, v, where={use})")


ENTRIES = 'kc = sg.compress(k, "mean", width=32, stride=16)\ni, e = sg.index(q, kc)\n'

PROGRAMS = {
    # Python's own control flow
    "if": pattern("i, j = sg.index(q, k)\nif j <= i:\n    pass\nreturn sg.attend(q, k, v)"),
    "and": attend("where=j <= i and i - j < 4"),
    "chained": attend("where=0 <= i - j < 4"),
    "not": attend("where=not j <= i"),
    "while-value": pattern("while q:\n    pass\nreturn sg.attend(q, k, v)"),
    "float-of-index": attend("where=float(i) > 2.0"),
    "math-exp": attend("mod=lambda s: math.exp(s)", before="import math"),
    "loop-over-index": pattern("i, j = sg.index(q, k)\nfor x in i:\n    pass"),
    "python-table": attend("where=[1, 2, 3][j] > 1"),
    # operators
    "precedence": attend("where=j <= i & i - j < 4"),
    "bitwise-on-numbers": attend("where=(i & 1) == 0"),
    "not-of-number": attend("where=~j"),
    "predicate-plus": attend("mod=lambda s: s + (j <= i)"),
    "predicate-as-number": attend("where=(j <= i) + 1 > 1"),
    "number-as-predicate": attend("where=i - j"),
    "divide-by-zero": attend("where=i // 0 == j"),
    "modulo-negative": attend("where=i % -4 == 0"),
    "string-in-expression": attend('where=j <= "i"'),
    "value-in-expression": attend("where=j <= q"),
    "stop-of-expression": attend("where=j < (i + 1).stop"),
    "where-of-number": attend("mod=lambda s: sg.where(s, s, 0.0)"),
    # captured tensors
    "captured-global": attend("where=mask[i, j]", before="mask = np.ones((4, 4))"),
    "captured-operand": pattern("return sg.attend(q, np.zeros((4, 2, 8)), v)"),
    "captured-in-expression": attend("where=j <= np.zeros(3)"),
    # values
    "add-values": pattern("return sg.attend(q, k + k, v)"),
    "compare-values": pattern("return sg.attend(q, k, v, where=q < k)"),
    "scale-by-value": pattern("return sg.attend(q * k, k, v)"),
    "unknown-attribute": pattern("return sg.attend(q, k.T, v)"),
    "end-of-plain": pattern("i, j = sg.index(q, k)\nreturn sg.attend(q, k, v, where=k.end <= i)"),
    "group-before-index": pattern("g = sg.head(q) // q.group\nreturn sg.attend(q, k, v)"),
    "table-rank": attend("where=t[i, j] > 0", QKV + ', t: "S"'),
    "table-of-floats": attend("where=t[j * 0.5] > 0", QKV + ', t: "S"'),
    "table-of-computed": pattern(
        "i, j = sg.index(q, k)\nr = sg.project(q, w)\nreturn sg.attend(q, k, v, where=r[i] > 0)",
        QKV + ', w: "D E"',
    ),
    "slice-first-axis": pattern("return sg.attend(q, k[2:], v)"),
    "slice-with-step": pattern("return sg.attend(q, k[..., ::2], v)"),
    "slice-negative": pattern("return sg.attend(q, k, v[..., :-1])"),
    "slice-open": pattern("return sg.attend(q, k, v[..., 2:])"),
    "slice-out-of-range": pattern("return sg.attend(q, k, k[..., :9])", 'q: "T H 8", k: "S H 8"'),
    "slice-empty": pattern("return sg.attend(q, k, v[..., 3:3])"),
    "blocks-of-nothing": pattern(ENTRIES + "b = kc.blocks(0)"),
    "lse-as-query": pattern("a = sg.attend(q, k, v)\nreturn sg.attend(a.lse, k, v)"),
    "lse-of-gated": pattern(
        "a = sg.attend(q, k, v)\nreturn sg.merge([a, a], gates=g).lse", QKV + ', g: "T Hq 2"'
    ),
    "head-of-table": pattern("h = sg.head(t)\nreturn sg.attend(q, k, v)", QKV + ', t: "S"'),
    "number-as-value": pattern("return sg.attend(q, k, 3)"),
    # signatures
    "no-annotation": pattern("return sg.attend(q, k, v)", 'q: "T H D", k, v: "S H D"'),
    "bad-axes": pattern("return sg.attend(q, k, v)", 'q: "T, H, D", k: "S H D", v: "S H D"'),
    "bad-kind": pattern("return sg.attend(q, k, v)", QKV + ', d: sg.Tensor["S", "long"]'),
    "zero-axis": pattern("return sg.attend(q, k, v)", 'q: "T 0 D", k: "S H D", v: "S H D"'),
    "star-args": pattern("return sg.attend(*x)", "*x"),
    "no-inputs": pattern("return None", "*, n=3"),
    "list-hyper": pattern("return sg.attend(q, k, v)", QKV + ", *, n=[1]"),
    "unused-input": pattern("return sg.attend(q, k, v)", QKV + ', w: "D"'),
    "returns-value": pattern("i, j = sg.index(q, k)\nreturn q"),
    "returns-score": pattern("return sg.score(q, k)"),
    "returns-nothing": pattern("sg.attend(q, k, v)"),
    "attends-nothing": pattern("return sg.project(q, w)", 'q: "T H D", w: "D E"'),
    "missing-hyper": pattern("return sg.attend(q, k, v)", QKV + ", *, n"),
    "call-outside": pattern("return sg.attend(q, k, v)") + "p(1, 2, 3)\n",
    "verb-outside": "import sparsegen as sg\n\nsg.head(None)\n",
    "unknown-hyper": pattern("return sg.attend(q, k, v)", QKV + ", *, width=3")
    + "p.trace(with_=4)\n",
    "not-a-function": "import sparsegen as sg\n\nsg.pattern(3)\n",
    # index, project, cat
    "two-key-axes": pattern(
        "a = sg.attend(q, k, k)\nreturn sg.attend(q, x, x)", 'q: "T H D", k: "S H D", x: "U H D"'
    ),
    "literal-sequence": pattern("return sg.attend(q, k, k)", 'q: "T H D", k: "8 H D"'),
    "project-by-computed": pattern("return sg.attend(sg.project(q, k), k, v)"),
    "project-by-result": pattern("return sg.attend(sg.project(q, sg.cat(k, v)), k, v)"),
    "project-table": pattern(
        "return sg.attend(sg.project(t, w), k, v)", QKV + ', t: "T", w: "D E"'
    ),
    "project-rank": pattern("return sg.attend(sg.project(q, w), k, v)", QKV + ', w: "D"'),
    "project-axis": pattern("return sg.attend(sg.project(q, w), k, v)", QKV + ', w: "Hq E F"'),
    "project-heads": pattern("return sg.attend(sg.project(q, w), k, v)", QKV + ', w: "Hx D D2"'),
    "cat-of-one": pattern("return sg.attend(sg.cat(q), k, v)"),
    "cat-of-tables": pattern("return sg.attend(sg.cat(t, t), k, v)", QKV + ', t: "T"'),
    "cat-lengths": pattern("return sg.attend(sg.cat(q, k), k, v)"),
    # compress
    "compress-twice": pattern(ENTRIES + 'return sg.attend(q, sg.compress(kc, "mean", width=2), v)'),
    "compress-table": pattern('sg.compress(t, "mean", width=2)', QKV + ', t: "S"'),
    "compress-width": pattern('sg.compress(k, "mean", width=0)'),
    "compress-gaps": pattern('sg.compress(k, "mean", width=2, stride=3)'),
    "compress-how": pattern('sg.compress(k, "median", width=2)'),
    "compress-partial-linear": pattern(
        "sg.compress(k, w, width=2, partial=True)", QKV + ', w: "2"'
    ),
    "compress-weight-axes": pattern("sg.compress(k, w, width=2)", QKV + ', w: "2 E"'),
    "compress-weight-dim": pattern("sg.compress(k, w, width=2)", QKV + ', w: "2 E F"'),
    "compress-bias-of-mean": pattern('sg.compress(k, "mean", width=2, bias=b)', QKV + ', b: "2 D"'),
    "compress-bias-axes": pattern("sg.compress(k, w, width=2, bias=b)", QKV + ', w: "2", b: "2 E"'),
    "compress-bias-twice": pattern(
        "sg.compress(k, sg.softmax(v), width=2, bias=b)", QKV + ', b: "2 D"'
    ),
    "compress-gate-axes": pattern("sg.compress(k, sg.softmax(q), width=2)"),
    "compress-previous-stride": pattern(
        "sg.compress(k, sg.softmax(v, previous=(k, v)), width=4, stride=2)"
    ),
    # score, attend, merge
    "score-rank": pattern("sg.score(q, t)", QKV + ', t: "S"'),
    "score-letters": pattern("sg.score(q, x)", QKV + ', x: "S Hk E"'),
    "score-heads": pattern("sg.score(q, x)", 'q: "T 6 D", x: "S 4 D"'),
    "score-weights": pattern("sg.score(q, k, weights=w)", QKV + ', w: "Hq"'),
    "score-norm": pattern('sg.score(q, k, norm="l2")'),
    "scale-is-a-value": pattern("return sg.attend(q, k, v, scale=k)"),
    "mod-is-no-function": pattern("return sg.attend(q, k, v, mod=3)"),
    "mod-returns-predicate": pattern("return sg.attend(q, k, v, mod=lambda s: s > 0)"),
    "foreign-key-position": pattern(ENTRIES + "return sg.attend(q, k, v, where=e <= i)"),
    "foreign-query-position": pattern(
        "i, j = sg.index(k, q)\nreturn sg.attend(q, k, v, where=j <= i)"
    ),
    "token-position-of-compressed-query": pattern(
        """
        i, j = sg.index(q, k)
        qc = sg.compress(q, "mean", width=4)
        kc = sg.compress(k, "mean", width=4)
        sel = sg.select(sg.score(qc, kc, where=kc.end <= i), topk=2)
        """
        "\n        return sg.attend(q, k, v, where=sel[sg.head(q), i // 4, j // 4])"
    ),
    "foreign-head": pattern(
        "h = sg.head(x)\nreturn sg.attend(q, k, v, where=h > 0)", QKV + ', x: "T Hx D"'
    ),
    "table-as-key": pattern("return sg.attend(q, k, d)", QKV + ', d: sg.Tensor["S", "int"]'),
    "attend-nothing": pattern("return sg.attend(q, [], [])"),
    "attend-counts": pattern("return sg.attend(q, [k, k], [v], where=[True, True])"),
    "attend-values": pattern("return sg.attend(q, k, x)", 'q: "T H D", k: "S H D", x: "S G D"'),
    "attend-value-dims": pattern("return sg.attend(q, [k, k], [v, x])", QKV + ', x: "S Hk E"'),
    "attend-sink": pattern("return sg.attend(q, k, v, sink=s)", QKV + ', s: "Hk"'),
    "merge-of-one": pattern("return sg.merge([sg.attend(q, k, v)])"),
    "merge-of-values": pattern("a = sg.attend(q, k, v)\nreturn sg.merge([a, q])"),
    "merge-of-sinks": pattern(
        "a = sg.attend(q, k, v, sink=s)\nreturn sg.merge([a, sg.attend(q, k, v)])",
        QKV + ', s: "Hq"',
    ),
    "merge-of-merge": pattern(
        "a = sg.attend(q, k, v)\nreturn sg.merge([sg.merge([a, a]), a])",
    ),
    "merge-axes": pattern(
        "return sg.merge([sg.attend(q, k, v), sg.attend(q, k, x)])", QKV + ', x: "S Hk E"'
    ),
    "merge-gates": pattern(
        "a = sg.attend(q, k, v)\nreturn sg.merge([a, a], gates=g)", QKV + ', g: "T Hq 3"'
    ),
    # reduce and select
    "reduce-of-value": pattern('sg.reduce(q, "sum", by=(1,))'),
    "reduce-how": selecting('r = sg.reduce(s, "prod", by=(i, j))'),
    "reduce-norm": selecting('r = sg.reduce(s, "sum", by=(i, j), norm="max")'),
    "reduce-no-keys": selecting('r = sg.reduce(s, "sum", by=())'),
    "reduce-key-product": selecting('r = sg.reduce(s, "sum", by=(i, i * j))'),
    "reduce-key-modulo": selecting('r = sg.reduce(s, "sum", by=(i, j % 4))'),
    "reduce-key-sum": selecting('r = sg.reduce(s, "sum", by=(i, i + j))'),
    "reduce-key-shift": selecting('r = sg.reduce(s, "sum", by=(i, (j - 2) // 4))'),
    "reduce-key-lost": selecting(
        'r = sg.reduce(s, "sum", by=(i, j // 4))\nr = sg.reduce(r, "max", by=(i, j // 6))'
    ),
    "select-of-value": pattern("sg.select(q, topk=3)"),
    "select-no-budget": selecting("sel = sg.select(s)"),
    "select-zero": selecting("sel = sg.select(s, topk=0)"),
    "select-fraction": selecting("sel = sg.select(s, topk=2.5)"),
    "select-half": selecting("sel = sg.select(s, topk=i / 2)"),
    "select-mass-of-two": selecting("sel = sg.select(s, top_p=1.5)"),
    "select-two-rules": selecting("sel = sg.select(s, top_p=0.5, threshold=0.1)"),
    "select-overlapping": pattern(
        ENTRIES + "p = sg.score(q, kc, where=kc.end <= i)\nsel = sg.select(p, topk=4)"
    ),
    "select-a-head": selecting('sel = sg.select(sg.reduce(s, "sum", by=(i, h)), topk=4)'),
    "select-two-queries": selecting(
        'sel = sg.select(sg.reduce(s, "sum", by=(i, i // 2, j)), topk=4)'
    ),
    "select-by-key": selecting('sel = sg.select(sg.reduce(s, "sum", by=(j // 4, j)), topk=4)'),
    "force-other-key": selecting(
        'sel = sg.select(sg.reduce(s, "sum", by=(i, j // 4)), topk=4, force=j < 3)'
    ),
    "force-is-a-number": selecting("sel = sg.select(s, topk=4, force=j)"),
    "topk-of-last-key": selecting("sel = sg.select(s, topk=j // 2)"),
    "constant-of-64-bits": attend("where=i - j < 2**40"),
    "member-count": selecting("sel = sg.select(s, topk=4)"),
    "member-other-key": selecting("sel = sg.select(s, topk=4)", "sel[h, i, j // 2]"),
    "member-other-query": selecting("sel = sg.select(s, topk=4)", "sel[h, i // 2, j]"),
    "member-of-entries": pattern(
        ENTRIES
        + 'kb = kc.blocks(64)\nr = sg.reduce(sg.score(q, kc), "sum", by=(i, kb))\n'
        + "sel = sg.select(r, topk=4)\nreturn sg.attend(q, kc, kc, where=sel[i, kb])"
    ),
    "member-of-value": selecting("sel = sg.select(s, topk=4)", "sel[h, i, q]"),
    "indices-as-value": selecting("sel = sg.select(s, topk=4)\nx = sg.attend(sel.indices, k, v)"),
}


def complaint(source: str) -> sg.SparsegenError:
    with pytest.raises(sg.SparsegenError) as caught:
        exec(compile(source, "user.py", "exec"), {"__name__": "user"})
    return caught.value


@pytest.mark.parametrize("name", PROGRAMS)
def test_complaint(name: str, snapshot: Callable[..., None]) -> None:
    source = PROGRAMS[name]
    error = complaint(source)
    numbered = "\n".join(f"{n:2} {x}".rstrip() for n, x in enumerate(source.splitlines(), 1))
    snapshot(f"{numbered}\n\n{type(error).__name__}: {error}")


@pytest.mark.parametrize("name", PROGRAMS)
def test_complaint_names_the_place_and_the_way_out(name: str) -> None:
    error = complaint(PROGRAMS[name])
    assert error.at is not None
    assert error.at.file == "user.py"
    assert 1 <= error.at.line <= PROGRAMS[name].count("\n")
    assert error.hint
    assert not error.message.endswith(".")
