"""Write the benchmark table of README.md from the committed results.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks -->\n", "<!-- /benchmarks -->"


def table() -> str:
    """Return the table in Markdown, one per results file."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        report = json.loads(path.read_text())
        m = report["machine"]
        parts.append(
            f"{m['cpu']} ({m['arch']}), {m['threads']} threads, torch {m['torch']}, float32, "
            f"{m['date']}; `make bench`, `{path.relative_to(ROOT)}`.\n"
        )
        parts.append("| workload | ms | GFLOP/s | best torch formulation | ms | ratio | peak MiB |")
        parts.append("|---|---|---|---|---|---|---|")
        for r in report["workloads"]:
            best, peak = r["best_peer"], r["peak_mib"]
            parts.append(
                f"| {r['name']} | {r['ms']['sparsegen']:.1f} | {r['gflops']:.0f} | {best} "
                f"| {r['ms'][best]:.1f} | {r['ratio']:.2f}x | {peak['sparsegen']} / {peak[best]} |"
            )
        parts.append("")
    return "\n".join(parts)


def rendered(text: str) -> str:
    """Return the README with its table replaced."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text()))
