"""Where the time of an optimizer step goes: the GPU's kernels by kind, and the gaps between them."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

OTHER, IDLE = "elementwise/norm/other", "idle"
KINDS = [  # the first that matches; flash kernels are named after cutlass, too
    ("optimizer", r"multi_tensor|[Aa]dam|[Oo]ptimizer"),
    ("attention", r"flash|fmha|attention|sdpa|cudnn"),
    ("dequant", r"[Dd]equant|kQuantize|_quantize|^_transpose"),
    ("adapter", r"^_low_rank|^_dropped"),  # the low-rank products of our own kernels; the others' are among gemm
    ("cross-entropy", r"oftmax|nll_loss|cross_?[Ee]ntropy|cunn_"),
    ("gemm", r"gemm|nvjet|cutlass|gemv|split[Kk]|cublas|xmma"),
    ("copies", r"Memcpy|Memset|copy_kernel|CatArray"),
]
NO_WORK = r"Sync|^cuda[A-Z]|^cu[A-Z]"  # waits and calls of the driver


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel, in µs."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), OTHER)


def busy(kernels: Iterable[Kernel]) -> float:
    """µs in which at least one kernel ran."""
    total, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return total


def summarize(kernels: list[Kernel], wall: float) -> dict[str, object]:
    """Milliseconds by kind, largest first, and idle: what is left of `wall`, the seconds that the same work takes
    without the profiler."""
    by_kind: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        by_kind[kind_of(kernel.name)] += (kernel.end - kernel.start) / 1e3
    ms = dict(sorted(by_kind.items(), key=lambda pair: -pair[1]))
    ms[IDLE] = max(0.0, 1e3 * wall - busy(kernels) / 1e3)
    return {"ms": {kind: round(value, 2) for kind, value in ms.items()}, "wall_ms": 1e3 * wall, "kernels": len(kernels)}


def top(kernels: list[Kernel], count: int = 25) -> str:
    """The kernels that take the most time, a line each: ms, runs, kind, name."""
    runs: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        runs[kernel.name].append((kernel.end - kernel.start) / 1e3)
    rows = sorted(runs.items(), key=lambda pair: -sum(pair[1]))[:count]
    return "".join(f"{sum(ms):9.3f} ms x{len(ms):6d}  {kind_of(name):24s} {name[:150]}\n" for name, ms in rows)


def kernels_of(work: Callable[[], object], device: torch.device) -> tuple[list[Kernel], float]:
    """The GPU's kernels while `work` ran, and its seconds; on the CPU, torch's operators instead."""
    cuda = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    synchronize(device)
    with torch.profiler.profile(activities=[kind], acc_events=True) as profiler:
        started = time.perf_counter()
        work()
        synchronize(device)
        wall = time.perf_counter() - started
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        # an annotation ("Optimizer.step#AdamW.step") spans kernels that are counted themselves
        if event.device_type.name == kind.name and not event.is_user_annotation and not re.search(NO_WORK, event.name)
    ]
    return kernels, wall


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
