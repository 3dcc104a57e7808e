"""How a weight is best read: every tile that may be, by format and shape, in captured graphs of launches one after the
other, over weights that the caches do not hold."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
FORMATS = ("bf16", "fp8", "nf4dq")
SHAPES = {  # of Llama-2-7B: rows of each weight, columns, what becomes of the product
    "qkv": ((4096, 4096, 4096), 4096, "store"),
    "o": ((4096,), 4096, "add"),
    "gate_up": ((11008, 11008), 4096, "gated"),
    "down": ((4096,), 11008, "add"),
    "head": ((32000,), 4096, "store"),
}
TINY = {"qkv": ((64, 32, 32), 128, "store"), "down": ((64,), 128, "add")}
CANDIDATES: dict[str, list[tuple[Any, ...]]] = {  # rows, columns, warps, stages, splits, bytes ahead, flat: see `Tile`
    "bf16": [(8, 1024, 4, 4, 1, 0, True), (8, 1024, 4, 3, 1, 0, True), (8, 1024, 4, 5, 1, 0, True),
             (16, 512, 4, 4, 1, 0, True), (16, 256, 2, 4), (32, 128, 4, 6), (32, 256, 4, 3)],
    "fp8": [(8, 1024, 4, 4, 1, 0, True), (8, 1024, 4, 6, 1, 0, True), (16, 512, 4, 4, 1, 0, True), (16, 256, 2, 4),
            (32, 256, 4, 4)],
    "nf4dq": [(32, 512, 4), (16, 1024, 8), (16, 512, 4), (32, 512, 8), (32, 1024, 8)],
}  # fmt: skip
PROCESSES = 12  # that compile at a time
BUFFER = 400e6  # bytes of weights in turn, so that none is still in the cache


def run(formats: list[str], add: Callable[[Row], None], tiny: bool) -> None:
    """Compiles in processes of its own, each a share of the candidates; then times them one by one."""
    cases = [case for name in formats for case in cases_of(name, tiny)]
    for share in range(PROCESSES if not tiny else 1):
        if os.fork() == 0:
            try:
                for case in cases[share::PROCESSES]:
                    measure(*case, tiny=tiny, repeats=0)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
    for _ in range(PROCESSES if not tiny else 1):
        os.wait()
    for name, shape, candidate in cases:
        row: Row = {"tune": name, "shape": shape, "tile": "x".join(str(int(part)) for part in candidate)}
        try:
            add(row | measure(name, shape, candidate, tiny=tiny, repeats=3))
        except Exception as error:
            add(row | {"error": f"{type(error).__name__}: {str(error)[:200]}"})


def cases_of(name: str, tiny: bool) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    for shape in TINY if tiny else SHAPES:
        for candidate in CANDIDATES[name][: 2 if tiny else None]:
            if shape != "head" or name == "bf16":
                yield name, shape, candidate


def measure(name: str, shape: str, candidate: tuple[Any, ...], *, tiny: bool, repeats: int) -> Row:
    """µs and GB/s of one launch; `repeats` 0: only launched once."""
    from litlora.decode_graph import has_pdl
    from litlora.few_rows import group_of
    from litlora.frozen import make_quantizer
    from litlora.ops import decode_kernels as kernels
    from litlora.ops import decode_linear as linears
    from litlora.precision import pick_device

    device = pick_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    quantizer = make_quantizer({"bf16": None, "fp8": "fp8", "nf4dq": "bnb.nf4-dq"}[name], dtype, device)
    rows, size, mode = (TINY if tiny else SHAPES)[shape]
    linears.tile_of = lambda *_: linears.Tile(*candidate)
    modes = {"store": kernels.STORE, "add": kernels.ADD, "gated": kernels.GATED}
    launches: list[Callable[[], None]] = []
    read, held = 0, 0.0
    while not launches or (repeats and not tiny and held < BUFFER):
        frozen = [quantizer.freeze(torch.randn(count, size, device=device, dtype=dtype) * 0.02, None) for count in rows]
        weights, factors = group_of(frozen, dtype)
        linear = linears.Linear(weights, factors, modes[mode], 1, dtype, pdl=has_pdl(device))
        read = sum(p.numel() * p.element_size() for module in frozen for p in module.parameters())
        held += read
        launches.append(launcher(linear, size, rows, mode, dtype, device))
    launches[0]()
    if not repeats or device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), 4 * len(launches)
    with torch.cuda.graph(graph):
        for number in range(count):
            launches[number % len(launches)]()
    graph.replay()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / count)
    del graph, launches
    torch.cuda.empty_cache()
    return {"us": 1e6 * best, "gb_s": read / best / 1e9, "mb": read / 1e6}


def launcher(
    linear: Any, size: int, rows: tuple[int, ...], mode: str, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    x, sums = empty(1, size), empty(4096, kind=torch.float32)
    if mode == "add":
        y, residual = empty(1, rows[0]), (empty(1, rows[0]), empty(rows[0]), sums)
        return lambda: linear.launch(x, y, residual=residual)
    y = empty(1, rows[0] if mode == "gated" else sum(rows))
    return lambda: linear.launch(x, y, norm=(sums, 128, 1e-5))
