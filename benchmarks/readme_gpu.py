"""Write what was measured on GPUs: a table and a plot for the README, all of it for the docs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import jinja2

OURS = "default"  # the variant that a user gets
# The workloads that the README shows, where they were measured.
SHOWN = (
    "W1 h128 8k", "W1 h128 128k", "W1 h64 8k", "W1 h16 8k",
    "W3 h128 b128 8k", "W3 h16 b128 8k",
    "W6 selected 32k random", "W6 selected 32k clustered", "W6 compressed 32k", "W6 window 32k",
    "W8 8k", "packed 32k",
)  # fmt: skip
LEFT, SPAN, TOP, STEP = 270, 400, 68, 36  # of the plot: bars start, 100%, first bar, next one


def described(row: Mapping[str, Any]) -> str:
    """Return what a workload is."""
    shape = row["shape"]
    queries, keys, heads = row["queries"], row["keys"], f"{shape['heads']} heads"
    match shape["kind"]:
        case "listed":
            more = {"padded": ", a quarter padding", "start": ", from the start"}
            return f"DSA prefill, {heads}, {short(keys)} keys{more.get(row['draw'], '')}"
        case "blocks":
            return f"NSA selected, {short(queries)} tokens, {row['draw']}"
        case "entries":
            entries = ", float32 entries" if shape["pooled"] else ""
            return f"NSA compressed, {short(queries)} tokens{entries}"
        case "window":
            return f"NSA window of {shape['window']}, {short(queries)} tokens"
        case "packed":
            return f"packed documents, {short(queries)} tokens"
        case "causal" if shape["page"]:
            return f"MLA decode, {heads}, {row['batch']} x {short(keys)} keys"
    return f"MLA prefill, {heads}, {short(queries)} tokens"


def short(n: int) -> str:
    """Return a number of tokens in units of 1024."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def ours(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what was found of our kernel: times, or an error."""
    if "error" in row:
        return {"error": row["error"]}
    found: Mapping[str, Any] = row["kernels"].get(OURS, {"error": "not built"})
    return found


def best(row: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """Return the fastest peer."""
    timed = {name: held for name, held in row.get("peers", {}).items() if "ms" in held}
    name = min(timed, key=lambda n: timed[n]["ms"], default=None)
    return None if name is None else (name, timed[name])


def shown(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rows for the README: those named above, else all."""
    rows = [row for row in report["workloads"] if "shape" in row and "ms" in ours(row)]
    return [row for row in rows if row["name"] in SHOWN] or rows


def machine(report: Mapping[str, Any]) -> str:
    """Return where and when a report was made, and from which commits."""
    m = report["machine"]
    kernels = [ours(row) for row in report["workloads"]]
    commits = sorted({k["commit"] for k in kernels if k.get("commit")})
    return (
        f"{m['gpu']}, driver {m.get('driver', 'unknown')}, torch {m['torch']}, {report['date']}, "
        f"commit {', '.join(commits)}"
    )


def table(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield rows beside their fastest peer."""
    yield "| workload | ms (p10-p90) | rate | of the ceiling | best peer | ms | speed-up |"
    yield "|---|--:|--:|--:|---|--:|--:|"
    for row in rows:
        mine, peer = ours(row), best(row)
        cells = [described(row), *_cells(mine)]
        if peer is None:
            cells += ["none was there", "", ""]
        else:
            name, held = peer
            cells += [name, f"{held['ms']:.2f}", f"{held['ms'] / mine['ms']:.2f}"]
        yield f"| {' | '.join(cells)} |"


def _cells(held: Mapping[str, Any]) -> list[str]:
    product = held["bound"] == "product"
    rate = f"{held['tflops']:.0f} TFLOP/s" if product else f"{held['gbs']:.0f} GB/s"
    return [f"{held['ms']:.2f} ({held['p10']:.2f}-{held['p90']:.2f})", rate, f"{held['share']:.0%}"]


def section(report: Mapping[str, Any], path: Path, root: Path) -> Iterator[str]:
    """Yield the part of the README about a report."""
    link, plot = path.relative_to(root), f"docs/{path.stem}.svg"
    yield (
        f"{machine(report)}, [{path.name}]({link}): attention alone in bfloat16, selections and "
        "compressed keys given. The ceiling is torch's product of two 8192 x 8192 matrices or a "
        "copy within the memory of the device, whichever binds, in the same run. "
        "[All workloads, and how it is measured](docs/speed.md)."
    )
    yield ""
    yield f"![Shares of the ceiling on {report['machine']['gpu']}]({plot})"
    yield ""
    yield from table(shown(report))


def page(reports: Mapping[Path, Mapping[str, Any]], root: Path) -> Iterator[str]:
    """Yield the page of the documentation about all reports."""
    yield "# Speed on GPUs"
    yield ""
    yield "Written by `python -m benchmarks.readme` from the committed results."
    yield ""
    yield (
        "A kernel is the attend task of a pattern, alone: selections and compressed keys are "
        "given. Before it is timed, it is compared with float64 on small problems of odd shapes "
        "and on rows of the workload itself, and its repeats with each other, bit by bit. Kernels, "
        "peers and ceilings take turns in one process, each for a stretch of its own whose first "
        "third is left out; the L2 cache is overwritten before every call. Times are medians, with "
        "the tenths below and above. FLOPs count the pairs that a query sees, bytes count every "
        "tensor once. The ceilings are torch's product of two 8192 x 8192 bfloat16 matrices, and a "
        "copy within the memory of the device; the one that binds is named."
    )
    yield ""
    yield (
        "DSA: 4096 queries, top-k 2048, keys of 576 elements whose first 512 are the values, all "
        "queries at the end unless said. MLA decode: the same keys, in pages of 64. NSA: 64 query "
        "and 4 key heads of 128, 16 blocks of 64 (random: every token draws anew; clustered: "
        "neighbours share about nine of ten), windows of 32 every 16, the last 512. MLA prefill: "
        "192/128, causal. Packed documents: 32 query and 8 key heads of 128, causal, about a "
        "thousand tokens each; the block mask of FlexAttention is made beforehand, and not timed."
    )
    yield ""
    yield (
        "Rows are the latest with peers in the same process; GPUs of one name differ by some "
        "percent, as the ceilings show. Further runs:"
    )
    yield ""
    for path in sorted((root / "benchmarks" / "results" / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        yield f"- [{path.name}](../{path.relative_to(root)}): {machine(run)}"
    yield ""
    yield "```sh"
    yield "python -m benchmarks.gpu run benchmarks/results/gpu-NAME.json"
    yield "python -m benchmarks.readme"
    yield "```"
    for path, report in reports.items():
        yield ""
        yield f"## {report['machine']['gpu']}"
        yield ""
        yield (
            f"{machine(report)}; "
            f"at least {report['rounds']} rounds of {report['seconds']} s for each: "
            f"[{path.name}](../{path.relative_to(root)})"
        )
        yield ""
        yield from _everything(report)


def _everything(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| workload | kernel | ms (p10-p90) | rate | of the ceiling | that is |"
    yield "|---|---|--:|--:|--:|---|"
    for row in report["workloads"]:
        if "shape" not in row:
            yield f"| {row['name']} | | {row['error']} | | | |"
            continue
        mine = ours(row)
        entries = [(f"sparsegen, {mine.get('schedule', '')}", mine), *row["peers"].items()]
        for name, held in entries:
            if "ms" not in held:
                cells = [_short(held["error"]), "", "", ""]
            else:
                peak = row["ceiling"]["tflops" if held["bound"] == "product" else "gbs"]
                unit = "TFLOP/s" if held["bound"] == "product" else "GB/s"
                cells = [*_cells(held), f"{peak:.0f} {unit}"]
            yield f"| {described(row)} | {name} | {' | '.join(cells)} |"


def _short(error: str) -> str:
    return error.replace("|", "/").replace("<", "(").replace(">", ")")[:80]


@dataclass(frozen=True)
class Bar:
    """A bar of the plot: its first of two has the label of the workload."""

    y: int
    width: float
    colour: str
    text: str
    label: str = ""


@dataclass(frozen=True)
class Line:
    """A line of the scale."""

    x: float
    label: str


@dataclass(frozen=True)
class Plot:
    """Everything speed.svg.j2 may mention."""

    title: str
    width: int
    height: int
    left: int
    lines: tuple[Line, ...]
    bars: tuple[Bar, ...]


def plot(report: Mapping[str, Any]) -> str:
    """Return a drawing of the shares of the ceiling as SVG."""
    rows = shown(report)
    bars = []
    for n, row in enumerate(rows):
        y, peer = TOP + n * STEP, best(row)
        bars.append(_bar(y, ours(row), "#2f6feb", "", described(row)))
        if peer is not None:
            bars.append(_bar(y + 14, peer[1], "#9aa4af", f", {peer[0]}", ""))
    lines = tuple(Line(LEFT + SPAN * x / 4, f"{25 * x}%") for x in range(5))
    context = Plot(
        title=f"Share of the ceiling, {report['machine']['gpu']}, {report['date']}",
        width=LEFT + SPAN + 190, height=TOP + len(rows) * STEP + 30, left=LEFT, lines=lines,
        bars=tuple(bars),
    )  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("speed.svg.j2").render(vars(context))


def _bar(y: int, held: Mapping[str, Any], colour: str, more: str, label: str) -> Bar:
    width = round(SPAN * min(held["share"], 1.1), 1)
    return Bar(y, width, colour, escape(f"{held['ms']:.2f} ms{more}"), escape(label))
