"""Build and time attention in a latent space on a GPU: dense decoding, lists, few and many heads.

    python -m benchmarks.gpu_latent build FOLDER     compile kernels; needs nvcc, no GPU
    python -m benchmarks.gpu_latent time FOLDER OUT  check and time them; needs a GPU

Kernels are compared with float64 before anything is timed, on ragged batches with empty sequences,
keys in pages, slots that hold no key, and memory of NaN where nothing may be read. Times are
medians of a sustained run in which the L2 cache is overwritten before each call; the ceiling is a
matrix product of torch, timed the same way in the same run. FLOPs count the pairs that a query
sees. `benchmarks.gpu` compares fewer shapes of these kernels with those of other people.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

OUT = {"atol": 8e-4, "rtol": 3.01 / 128}
COSINE = 7e-6
LSE = {"atol": 1e-6, "rtol": 2.01 / 65536}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    topk    slots of a list; 0: a range of keys
    window  keys that a query sees up to its own, and the first `first` ones; 0: all of them
    rope    columns of a second operand that follow those of the first; 0: one operand has all
    """

    heads: int
    topk: int = 0
    d: int = 576
    d_v: int = 512
    dtype: str = "bfloat16"
    page: int = 0
    window: int = 0
    first: int = 0
    rope: int = 0
    sink: bool = False
    projected: bool = False  # queries and outputs are float32, as beside projections

    @property
    def name(self) -> str:
        """Return the stem of its files."""
        return "-".join(str(x) for x in self.__dict__.values())


W3 = {n: Kernel(n, page=64) for n in (128, 16)}
W1 = {n: Kernel(n, 2048) for n in (128, 64, 32, 16)}
OTHERS = (
    Kernel(128, 200, dtype="float16", page=64, rope=64, sink=True),
    Kernel(9, 200, dtype="float16", page=16, rope=64, sink=True),
    Kernel(24, d=512, window=300, first=5, sink=True),
    Kernel(64, d=256, d_v=256, window=100, first=7, sink=True, page=16),
    Kernel(128, page=64, rope=64, projected=True),
    Kernel(8, page=64, rope=64, projected=True),
)
# Queries and keys of sequences.
RAGGED = ((1, 8191), (2, 300), (0, 17), (1, 1), (66, 65), (3, 64), (2, 1000), (1, 129))


def build(folder: Path) -> None:
    """Compile every kernel for Hopper, and write down what it reads and writes."""
    from benchmarks.latent_patterns import program_of
    from schedules import attend_sm90
    from sparsegen import arch as archs
    from sparsegen.codegen.gpu.build import compile_source
    from sparsegen.codegen.tvm import cuda_source
    from sparsegen.lowering.binding import Binding
    from sparsegen.lowering.partition import partition
    from sparsegen.lowering.tasks import AttendTask

    arch = archs.get("sm_90")
    folder.mkdir(parents=True, exist_ok=True)
    for k in (*W3.values(), *W1.values(), *OTHERS):
        known = {"H": k.heads, "c": k.d - k.rope, "r": k.rope, "e": 64, "n": 64, "m": 64}
        program = program_of(k)
        used = {str(a) for node in program.inputs for a in node.axes}
        sizes = tuple(sorted((n, x) for n, x in known.items() if n in used))
        layout: Any = {"layout": "paged", "page_size": k.page} if k.page else {}
        plan = partition(program, Binding(dtype=k.dtype, sizes=sizes, **layout))
        task = next(t for t in plan.tasks if isinstance(t, AttendTask))
        reason = attend_sm90.accepts(task, arch)
        assert reason is None, reason
        source = cuda_source(attend_sm90.apply(task, attend_sm90.default(task, arch), arch), arch)
        compile_source(source, arch, folder / f"{k.name}.so")
        buffers = {"reads": [b.name for b in task.reads], "writes": [b.name for b in task.writes]}
        (folder / f"{k.name}.json").write_text(json.dumps({"function": task.name, **buffers}))
        print(k.name, buffers)


class Call:
    """The inputs of a kernel, and its outputs, poisoned; `lengths` are queries and keys."""

    def __init__(
        self, folder: Path, k: Kernel, lengths: tuple[tuple[int, int], ...], *, causal: bool = True
    ) -> None:
        import tvm_ffi

        found = json.loads((folder / f"{k.name}.json").read_text())
        self.k, self.lengths = k, lengths
        self.function = tvm_ffi.load_module(str(folder / f"{k.name}.so"))[found["function"]]
        n_q, n_k = (sum(n[i] for n in lengths) for i in range(2))
        kind = getattr(torch, k.dtype)
        generator = torch.Generator("cuda").manual_seed(n_q + n_k)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device="cuda")

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        self.q = random(n_q, k.heads, k.d).to(kind)
        self.kv = (random(n_k, k.d) / 10).to(kind)
        self.sink = random(k.heads).to(kind)
        ends = [[sum(n[i] for n in lengths[:b]) for b in range(len(lengths) + 1)] for i in (0, 1)]
        self.offsets = [s - t if causal else s for t, s in lengths]
        self.starts = ends
        self.meta = [ints(ends[0]), ints(ends[1]), ints(self.offsets)]
        rows = self._paged(generator) if k.page else self.kv[:, None]
        self.index = None
        if k.topk:
            slots = [
                torch.rand(t, k.topk, generator=generator, device="cuda") * s for t, s in lengths
            ]
            self.index = torch.cat(slots).to(torch.int32)
        wide = torch.float32 if k.projected else kind
        self.out = torch.empty(n_q, k.heads, k.d_v, dtype=wide, device="cuda")
        self.lse = torch.empty(n_q, k.heads, device="cuda")
        self.rows, self.reads, self.writes = rows, found["reads"], found["writes"]
        self.refresh()

    def _paged(self, generator: torch.Generator) -> torch.Tensor:
        """Scatter the keys over pages in a random order; the rest of them is NaN."""
        page = self.k.page
        counts = [-(-s // page) for _, s in self.lengths]
        order = torch.randperm(sum(counts), generator=generator, device="cuda")
        table = torch.full((len(counts), max(counts)), 2**30, dtype=torch.int32, device="cuda")
        pages = torch.full(
            (sum(counts), page, 1, self.k.d), float("nan"), dtype=self.kv.dtype, device="cuda"
        )
        at = 0
        for b, n in enumerate(counts):
            here = order[at : at + n]
            table[b, :n] = here
            start, s = self.starts[1][b], self.lengths[b][1]
            flat = torch.full((n * page, self.k.d), float("nan"), dtype=pages.dtype, device="cuda")
            flat[:s] = self.kv[start : start + s]
            pages[here] = flat.view(n, page, 1, self.k.d)
            at += n
        self.meta.append(table)
        return pages

    def refresh(self) -> None:
        """Choose the arguments again, after a change of the inputs."""
        k, cut = self.k, self.k.d - self.k.rope
        made = {"sink": self.sink, "q": self.q, "kv": self.rows}
        if k.rope:
            made["q"], made["q_r"] = (x.contiguous() for x in self.q.tensor_split([cut], -1))
            made["kv"], made["k_r"] = (x.contiguous() for x in self.rows.tensor_split([cut], -1))
        if k.projected:
            made["q"] = made["q"].float()
        args = list(self.meta)
        for name in self.reads:
            if name.startswith("select"):
                args.append(self.index)
            else:
                args.append(made["q" if name.startswith("project") else name])
        ends = {"o": self.out, "lse": self.lse}
        self.args = [*args, *(ends[name.rpartition("_")[2]] for name in self.writes)]

    def __call__(self) -> None:
        """Launch the kernel."""
        self.function(*self.args)

    def seen(self, b: int, t: int) -> torch.Tensor:
        """Return the keys that a query sees, as often as it does."""
        k, i, n = self.k, self.offsets[b] + t, self.lengths[b][1]
        if self.index is not None:
            x = self.index[self.starts[0][b] + t].long()
            return x[(x >= 0) & (x < n) & (x <= i)]
        j = torch.arange(max(0, min(n, i + 1)), device="cuda")
        return j[(i - j < k.window) | (j < k.first)] if k.window else j

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
            assert torch.equal(results[0][1].nan_to_num(7), other[1].nan_to_num(7)), (
                "repeats differ"
            )
        wrong = 0.0
        rows = [(b, t) for b, (n, _) in enumerate(self.lengths) for t in range(n)]
        for b, t in rows[::every]:
            row, x = self.starts[0][b] + t, self.seen(b, t)
            keys = self.kv[self.starts[1][b] + x].double()
            scores = self.q[row].double() @ keys.T * self.k.d**-0.5
            lse = scores.logsumexp(-1)
            want = (scores.softmax(-1) if len(x) else scores) @ keys[:, : self.k.d_v]
            if self.k.sink:
                want *= torch.sigmoid(lse - self.sink.double())[:, None]
            got = self.out[row].double()
            torch.testing.assert_close(got, want, **OUT)
            if "lse" in str(self.writes):
                torch.testing.assert_close(self.lse[row].double(), lse, **LSE)
            if len(x):
                distance = 1 - 2 * (got * want).sum() / (got.square() + want.square()).sum()
                assert distance < COSINE, f"cosine {distance}"
            wrong = max(wrong, float((got - want).abs().max()))
        return wrong


def check(folder: Path) -> None:
    """Check every kernel on a ragged batch."""
    for k in (*OTHERS, *W3.values(), *W1.values()):
        for causal in (True, False):
            lengths = tuple((t, s) for t, s in RAGGED if not causal or t <= s)
            call = Call(folder, k, lengths, causal=causal)
            if call.index is not None:
                index, topk = call.index, k.topk
                index[torch.rand(index.shape, device="cuda") < 0.1] = -1
                index[0, : topk // 2] = 2**31 - 1
                index[1] = -5
                index[2, : topk - 1] = -1
                index[3, topk // 3 :] = -1
                # Key 0 of every sequence is not listed and holds NaN.
                index[index == 0] = -1
                starts = torch.tensor(call.starts[1][:-1], device="cuda")
                call.kv[starts] = float("nan")
                if k.page:
                    call.rows[call.meta[3][:, 0].long(), 0] = float("nan")
                    call.refresh()
            error = call.check()
            print(f"{k.name} causal {causal}: error {error:.2e}", flush=True)


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
    timer, rows = Timer(), []

    def row(what: dict[str, Any], call: Call, pairs: int, every: int) -> None:
        k = call.k
        error = call.check(every)
        taken = timer.row(call, 2 * k.heads * pairs * (k.d + k.d_v))
        read = pairs * k.d * 2
        rows.append({**what, "heads": k.heads, **taken, "error": error})
        rows[-1]["gathered_tbs"] = read / taken["ms"] / 1e9
        show(rows[-1])

    for k in W3.values():
        for batch, keys in ((128, 8192), (128, 4096)):
            call = Call(folder, k, ((1, keys),) * batch)
            row({"workload": "W3", "batch": batch, "keys": keys}, call, batch * keys, 17)
            del call
    for k in W1.values():
        for keys in (8192, 32768, 131072):
            call = Call(folder, k, ((4096, keys),), causal=False)
            row({"workload": "W1", "batch": 1, "keys": keys}, call, 4096 * k.topk, 499)
            del call
    write(rows, out)


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]))
    else:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
