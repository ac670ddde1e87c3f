"""DeepSeek Sparse Attention from five lines to a bundle that needs no compiler.

    python examples/dsa_story.py [--queries 64] [--keys 8192] [--budget 45] [--out DIR]

Defines the pattern, explains what it becomes and costs, tunes it for this processor, runs it as a
PyTorch op, compares it with the float64 reference and with the best torch formulation found,
exports it, and runs the bundle in a process that can import neither sparsegen nor TVM.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import sparsegen as sg

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import peers


@sg.pattern
def dsa(
    q: sg.Tensor["T Hq c"],
    kv: sg.Tensor["S 1 c"],
    q_idx: sg.Tensor["T Hi e"],
    k_idx: sg.Tensor["S 1 e"],
    w: sg.Tensor["T Hi"],
    *,
    topk: int = 2048,
    d_v: int = 512,
):
    """Attend to the keys a lightning indexer selects (DeepSeek-V3.2, arXiv 2512.02556)."""
    i, j = sg.index(q, kv)
    s = sg.score(q_idx, k_idx, act=sg.relu, weights=w, scale=1, where=j <= i)
    sel = sg.select(sg.reduce(s, "sum", by=(i, j)), topk=topk)
    return sg.attend(q, kv, kv[..., :d_v], where=(j <= i) & sel[i, j])


BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "sparsegen"):
            raise ImportError(f"{name} is not available in this process")
sys.meta_path.insert(0, Refuse())
import importlib.util, torch
spec = importlib.util.spec_from_file_location("loader", sys.argv[1] + "/loader.py")
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)
case = torch.load(sys.argv[2], weights_only=True)
got = loader.load()(**case["inputs"])
assert "tvm" not in sys.modules and "sparsegen" not in sys.modules
print("bitwise equal to the kernel:", torch.equal(got, case["output"]))
sys.exit(not torch.equal(got, case["output"]))
"""


def main() -> None:
    """Tell the story; every number printed is measured here."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--topk", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=45, help="seconds of tuning")
    parser.add_argument("--out", type=Path, default=None, help="folder for the bundle")
    args = parser.parse_args()
    T, S, H = args.queries, args.keys, args.heads
    sizes = {"Hq": H, "c": 576, "Hi": 64, "e": 128}

    title("1. The pattern, as it was traced")
    program = dsa.trace(topk=args.topk)
    print(program, f"\n  hash {program.hash}")

    title("2. What it becomes, and what that costs")
    lengths = {"T": T, "S": S}
    print(sg.explain(dsa, target="cpu", sizes={**sizes, **lengths}, topk=args.topk))

    title(f"3. Tuned for this processor in {args.budget:g} s")
    print(
        sg.tune(dsa, target="cpu", sizes={**sizes, **lengths}, budget=args.budget, topk=args.topk)
    )

    title("4. A PyTorch op")
    kernel = sg.compile(dsa, target="cpu", sizes=sizes, topk=args.topk)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "q": (T, H, 576), "kv": (S, 1, 576), "q_idx": (T, 64, 128), "k_idx": (S, 1, 128),
        "w": (T, 64),
    }  # fmt: skip
    inputs = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    out = kernel(**inputs)
    print(f"output {tuple(out.shape)} {out.dtype}")
    want = torch.from_numpy(sg.reference(program, {n: t.numpy() for n, t in inputs.items()}))
    print(f"largest difference from the float64 reference: {(out - want).abs().max():.2e}")

    title("5. Side by side with torch, same process, same inputs, median")
    ours = median_ms(lambda: kernel(**inputs))
    print(f"{'sparsegen':48s} {ours:9.1f} ms")
    best = float("inf")
    for name, peer in peers.dsa(inputs, topk=args.topk, d_v=512).items():
        difference = (peer() - want).abs().max()
        ms = median_ms(peer)
        best = min(best, ms)
        print(f"{name:48s} {ms:9.1f} ms   {ms / ours:5.2f}x   differs by {difference:.1e}")
    print(f"sparsegen is {best / ours:.2f}x as fast as the best of them")

    title("6. Exported, and run where neither TVM nor sparsegen can be imported")
    folder = args.out or Path(tempfile.mkdtemp(prefix="dsa-bundle-"))
    sg.export(kernel, folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"  {path.relative_to(folder)}  {path.stat().st_size} bytes")
    with tempfile.TemporaryDirectory() as temp:
        case = Path(temp) / "case.pt"
        torch.save({"inputs": inputs, "output": out}, case)
        subprocess.run([sys.executable, "-c", BARE, str(folder), str(case)], check=True)


def title(text: str) -> None:
    """Print a heading."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def median_ms(fn: Callable[[], object], runs: int = 5) -> float:
    """Return the median wall time of a call, after one warm-up."""
    fn()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[runs // 2]


if __name__ == "__main__":
    main()
