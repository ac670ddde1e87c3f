"""Build and time attention kernels of GPUs; write results with machine and date.

    python benchmarks/gpu.py build FOLDER     compile them; needs sparsegen and nvcc, no GPU
    python benchmarks/gpu.py time FOLDER OUT  check and time them; needs a GPU, torch and tvm-ffi

Kernels are checked against float64 before anything is timed. Times are medians of a sustained run
in which the L2 cache is overwritten before each call; the ceiling is a matrix product of torch,
timed the same way in the same run. FLOPs count the slots of the lists that hold a key.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

D_QK, D_V = 576, 512
SCALE = D_QK**-0.5
# query heads, slots of a list, dtype
KERNELS = (
    (128, 2048, "bfloat16"),
    (64, 2048, "bfloat16"),
    (37, 200, "bfloat16"),
    (128, 200, "float16"),
)
OUT = {"atol": 8e-4, "rtol": 3.01 / 128}
COSINE = 7e-6
LSE = {"atol": 1e-6, "rtol": 2.01 / 65536}


def name_of(heads: int, topk: int, dtype: str) -> str:
    """Return the name of a kernel's file."""
    return f"listed-h{heads}-k{topk}-{dtype}"


def build(folder: Path) -> None:
    """Compile every kernel for Hopper: attention of DSA over lists that the caller gives."""
    import sparsegen as sg
    from schedules import attend_sm90
    from sparsegen import arch as archs
    from sparsegen.codegen.gpu.build import compile_source
    from sparsegen.codegen.tvm import cuda_source
    from sparsegen.lowering.binding import Binding
    from sparsegen.lowering.partition import partition
    from sparsegen.lowering.tasks import AttendTask

    @sg.pattern
    def listed(q: "T Hq c", kv: "S 1 c", x: "T 1 e", y: "S 1 e", *, topk=2048):  # type: ignore  # noqa: F722
        i, j = sg.index(q, kv)
        sel = sg.select(sg.reduce(sg.score(x, y), "sum", by=(i, j)), topk=topk)
        o = sg.attend(q, kv, kv[..., :D_V], where=(j <= i) & sel[i, j])
        return o, o.lse

    arch = archs.get("sm_90")
    folder.mkdir(parents=True, exist_ok=True)
    for heads, topk, dtype in KERNELS:
        sizes = tuple(sorted({"Hq": heads, "c": D_QK, "e": 64}.items()))
        plan = partition(listed.trace(topk=topk), Binding(dtype=dtype, sizes=sizes))
        task = next(t for t in plan.tasks if isinstance(t, AttendTask))
        reason = attend_sm90.accepts(task, arch)
        assert reason is None, reason
        source = cuda_source(attend_sm90.apply(task, attend_sm90.default(task, arch), arch), arch)
        path = folder / f"{name_of(heads, topk, dtype)}.so"
        compile_source(source, arch, path)
        print(task.name, [b.name for b in task.reads], [b.name for b in task.writes], path)


class Call:
    """The inputs of a kernel, and its outputs, poisoned."""

    def __init__(
        self, folder: Path, heads: int, topk: int, dtype: str, lengths: list[tuple[int, int]],
        *, causal: bool,
    ) -> None:  # fmt: skip
        import tvm_ffi

        module = tvm_ffi.load_module(str(folder / f"{name_of(heads, topk, dtype)}.so"))
        self.function = module["attend_1"]
        self.lengths = lengths
        n_q, n_k = (sum(n[i] for n in lengths) for i in range(2))
        kind = getattr(torch, dtype)
        generator = torch.Generator("cuda").manual_seed(n_q + n_k)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        def ends(i: int) -> torch.Tensor:
            values = [0]
            for n in lengths:
                values.append(values[-1] + n[i])
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        self.q = random(n_q, heads, D_QK).to(kind)
        self.kv = (random(n_k, 1, D_QK) / 10).to(kind)
        self.cu_q, self.cu_k = ends(0), ends(1)
        offsets = [s - t if causal else s for t, s in lengths]
        self.offset = torch.tensor(offsets, dtype=torch.int32, device="cuda")
        least = [torch.rand(t, topk, generator=generator, device="cuda") * s for t, s in lengths]
        self.index = torch.cat(least).to(torch.int32)
        self.out = torch.full((n_q, heads, D_V), float("nan"), dtype=kind, device="cuda")
        self.lse = torch.full((n_q, heads), float("nan"), device="cuda")

    def __call__(self) -> None:
        """Launch the kernel."""
        self.function(
            self.cu_q, self.cu_k, self.offset, self.index, self.q, self.kv, self.out, self.lse
        )

    def check(self, every: int = 1) -> float:
        """Compare with float64, and repeats with each other; return the largest error."""
        results = []
        for _ in range(3):
            self.out.fill_(float("nan"))
            self.lse.fill_(float("nan"))
            self()
            torch.cuda.synchronize()
            results.append((self.out.clone(), self.lse.clone()))
        for other in results[1:]:
            assert torch.equal(results[0][0], other[0]), "repeats differ"
            assert torch.equal(results[0][1], other[1]), "repeats differ"
        wrong = 0.0
        q_start = k_start = 0
        for b, (n_q, n_k) in enumerate(self.lengths):
            for t in range(0, n_q, every):
                row = q_start + t
                x = self.index[row].long()
                i = int(self.offset[b]) + t
                x = x[(x >= 0) & (x < n_k) & (x <= i)]
                keys = self.kv[k_start + x, 0].double()
                scores = self.q[row].double() @ keys.T * SCALE
                lse = scores.logsumexp(-1)
                want = (scores.softmax(-1) if len(x) else scores) @ keys[:, :D_V]
                got = self.out[row].double()
                torch.testing.assert_close(got, want, **OUT)
                torch.testing.assert_close(self.lse[row].double(), lse, **LSE)
                if len(x):
                    distance = 1 - 2 * (got * want).sum() / (got.square() + want.square()).sum()
                    assert distance < COSINE, f"cosine {distance}"
                wrong = max(wrong, float((got - want).abs().max()))
            q_start, k_start = q_start + n_q, k_start + n_k
        return wrong


def check(folder: Path) -> None:
    """Check odd lengths, padding anywhere, empty rows, and rows of NaN that nobody lists."""
    for heads, topk, dtype in KERNELS:
        for lengths in ([(7, 3001)], [(141, 8191)], [(5, 300), (0, 17), (66, 1), (3, 999)]):
            for causal in (False, True):
                if causal and any(t > s for t, s in lengths):
                    continue
                call = Call(folder, heads, topk, dtype, lengths, causal=causal)
                index = call.index
                index[torch.rand(index.shape, device="cuda") < 0.1] = -1
                index[1, : topk // 2] = 2**31 - 1
                index[2] = -5
                index[3, : topk - 1] = -1
                index[4, topk // 3 :] = -1
                # Key 0 of every sequence is not listed and holds NaN.
                index[index == 0] = -1
                if all(s > 1 for _, s in lengths):
                    call.kv[call.cu_k[:-1].long()] = float("nan")
                error = call.check(1 if sum(t for t, _ in lengths) < 100 else 7)
                print(f"h{heads} k{topk} {dtype} {lengths} causal {causal}: error {error:.2e}")


def sustained(function: Any, flush: torch.Tensor, seconds: float = 0.5) -> float:
    """Return the median time in seconds of a call, in the second half of a run under load."""
    pairs = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            flush.zero_()
            pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            pairs[-1][0].record()
            function()
            pairs[-1][1].record()
        torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairs[len(pairs) // 2 :])
    return times[len(times) // 2] / 1e3


class Timer:
    """Times functions beside the ceiling: torch's product of two 8192 x 8192 matrices."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.factors = [
            torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        ]

    def row(self, function: Any, flops: float) -> dict[str, float]:
        """Return the time of a call of `flops`, its rate and its share of the ceiling."""
        limit = 2 * 8192**3 / sustained(lambda: self.factors[0] @ self.factors[1], self.flush)
        taken = sustained(function, self.flush)
        rate = flops / taken
        return {
            "ms": taken * 1e3, "tflops": rate / 1e12, "ceiling_tflops": limit / 1e12,
            "share": rate / limit,
        }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Print a row of results."""
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """Write results with machine and date."""
    report = {
        "machine": torch.cuda.get_device_name(), "torch": torch.__version__,
        "date": date.today().isoformat(), "workloads": rows,
    }  # fmt: skip
    out.write_text(json.dumps(report, indent=2) + "\n")


def measure(folder: Path, out: Path) -> None:
    """Check, then time every workload beside the ceiling."""
    check(folder)
    timer = Timer()
    rows = []
    for heads in (128, 64):
        for n_k in (8192, 32768, 131072):
            for padded in (0.0, 0.25):
                call = Call(folder, heads, 2048, "bfloat16", [(4096, n_k)], causal=False)
                call.index[:, int(2048 * (1 - padded)) :] = -1
                error = call.check(499)
                flops = 2 * 4096 * heads * 2048 * (1 - padded) * (D_QK + D_V)
                what = {"workload": "W1", "heads": heads, "keys": n_k, "padding": padded}
                rows.append({**what, **timer.row(call, flops), "error": error})
                show(rows[-1])
    write(rows, out)


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
