"""Write the tables of README.md and docs/speed.md, and plots: from committed results and the code.

python -m benchmarks.readme
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import readme_gpu
from benchmarks.ceiling import SIDE
from sparsegen import arch, patterns
from sparsegen.errors import SparsegenError
from sparsegen.lowering.binding import LAYOUTS, Binding, Layout
from sparsegen.lowering.partition import partition
from sparsegen.runtime import catalog
from sparsegen.runtime.describe import describe

ROOT = Path(__file__).parents[1]
OURS = "sparsegen"
GPUS = ("sm_80", "sm_90")


def benchmarks() -> Iterator[str]:
    """Yield a table for each file of results."""
    results = ROOT / "benchmarks" / "results"
    for path in sorted(results.glob("cpu-*.json")):
        report = json.loads(path.read_text())
        m = report["machine"]
        yield f"{made(path, m)}: {m['threads']} threads, float32."
        yield ""
        yield (
            "| workload | queries x keys | ms | GFLOP/s | share of peak | best torch formulation "
            "| ms | speed-up | peak MiB, ours / theirs |"
        )
        yield "|---|---|--:|--:|--:|---|--:|--:|--:|"
        fma, product = (
            max(run[kind] for run in report["ceiling"].values())
            for kind in ("fma_gflops", "torch_matmul_gflops")
        )
        for r in report["workloads"]:
            best, peak, sizes = r["best_peer"], r["peak_mib"], r["sizes"]
            yield (
                f"| {r['name']} | {sizes['T']} x {sizes['S']} | {r['ms'][OURS]:.1f} "
                f"| {r['gflops']:.0f} | {r['gflops'] / fma:.0%} | {best} | {r['ms'][best]:.1f} "
                f"| {r['ratio']:.2f} | {peak[OURS]} / {peak[best]} |"
            )
        yield ""
        yield (
            f"The peak is {fma:.0f} GFLOP/s, multiply-adds in registers alone, measured in the "
            f"same run; torch's own matrix product of {SIDE} x {SIDE} reaches {product:.0f}. "
            "Twice the speed of torch was the aim for each of these:"
        )
        for r in report["workloads"]:
            needed = 2 * r["gflops"] / r["ratio"]
            if r["ratio"] < 2:
                yield (
                    f"{r['name']} misses it at {r['ratio']:.2f}, and would need "
                    f"{needed:.0f} GFLOP/s, {needed / fma:.0%} of the peak;"
                )
        yield "what is not named here has it."
    for path, report in on_gpus().items():
        yield ""
        yield from readme_gpu.section(report, path, ROOT)
    for path in sorted(results.glob("overhead-*.json")):
        report = json.loads(path.read_text())
        yield ""
        yield f"{cost_of(report)}: {made(path, report['machine'])}."


def cost_of(report: dict[str, Any]) -> str:
    """Return what a call costs, of a file of results of `benchmarks.overhead`."""
    cost = {name: value["median"] for name, value in report["microseconds"].items()}
    if "gpu" not in report["machine"]:
        return f"A call costs {cost['overhead']:.1f} us beside its kernel"
    return (
        f"On an {report['machine']['gpu']} a call costs {cost['overhead']:.1f} us beside the "
        f"launch of its kernel, the memory for its output included, and takes the host "
        f"{cost['call']:.1f} us in all ({cost['ragged']:.1f} with ragged, {cost['paged']:.1f} with "
        f"paged sequences; `torch.add(out=)` takes {cost['torch.add']:.1f} us)"
    )


def made(path: Path, machine: dict[str, str]) -> str:
    """Return where and when a file of results was measured, with a link to it."""
    m = machine
    return (
        f"{m['cpu']} ({m['arch']}), torch {m['torch']}, {m['date']}, commit {m['commit']}, "
        f"[{path.name}]({path.relative_to(ROOT)})"
    )


def support() -> Iterator[str]:
    """Yield where every task of a pattern has a schedule: by layout on any CPU, by GPU, and whose.

    A GPU runs a pattern if it does so in all layouts, for every published shape.
    """
    yield f"| pattern | | {' | '.join(LAYOUTS)} | {' | '.join(GPUS)} | attention on {GPUS[-1]} |"
    yield "|---|---|" + ":-:|" * (len(LAYOUTS) + len(GPUS)) + "---|"
    for name in patterns.names():
        file = patterns.path(name)
        about = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        small = patterns.configs(name, test=True)[0]
        found = [lowered(name, small, layout, "generic") is not None for layout in LAYOUTS]
        attends: set[str] = set()
        for gpu in GPUS:
            each = [lowered(name, c, x, gpu) for c in patterns.configs(name) for x in LAYOUTS]
            each.append(lowered(name, small, LAYOUTS[0], gpu))
            found.append(all(stems is not None for stems in each))
            attends = {stem for stems in each[:-1] for stem in stems or ()}
        marks = " | ".join("yes" if yes else "no" for yes in found)
        by = ", ".join(sorted(attends))
        yield f"| [{name}]({file.relative_to(ROOT)}) | {about.rstrip('.')} | {marks} | {by} |"


def lowered(name: str, config: patterns.Config, layout: Layout, target: str) -> set[str] | None:
    """Return the schedules of a pattern's attend tasks, or None if it is not lowered in a layout.

    Inputs are float32 on a CPU and bfloat16 on a GPU.
    """
    processor = arch.get(target)
    dtype = "float32" if processor.kind == "cpu" else "bfloat16"
    program = patterns.load(name).trace(**config.hyper)
    axes = (program.query, program.key)
    sizes = tuple((letter, n) for letter, n in config.sizes.items() if letter not in axes)
    page = 16 if layout == "paged" else 0
    try:
        binding = Binding(dtype=dtype, layout=layout, page_size=page, sizes=sizes)
        plan = partition(program, binding)
        choices = catalog.choose_all(plan.tasks, processor)
        describe(plan, name, processor)
    except SparsegenError:
        return None
    chosen = zip(plan.tasks, choices, strict=True)
    return {choice.stem for task, choice in chosen if task.family == "attend"}


def rendered(text: str) -> str:
    """Return the README with its tables replaced."""
    for name, lines in (("benchmarks", benchmarks()), ("support", support())):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(begin)
        text = head + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    return text


def on_gpus() -> dict[Path, dict[str, Any]]:
    """Return the reports of `benchmarks.gpu`."""
    found = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))
    return {path: json.loads(path.read_text()) for path in found}


def written() -> dict[Path, str]:
    """Return all that is generated, by file."""
    readme = ROOT / "README.md"
    reports = on_gpus()
    speed = "\n".join(readme_gpu.page(reports, ROOT)) + "\n"
    plots = {ROOT / "docs" / f"{path.stem}.svg": readme_gpu.plot(r) for path, r in reports.items()}
    return {readme: rendered(readme.read_text()), ROOT / "docs" / "speed.md": speed, **plots}


def stale() -> list[Path]:
    """Return the plots of reports that are gone."""
    return [p for p in (ROOT / "docs").glob("gpu-*.svg") if p not in written()]


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text)
    for path in stale():
        path.unlink()
