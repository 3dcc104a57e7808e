"""What the card sustains: the model's linears and attention timed in a row for seconds, large products, memory.

A training step cannot be faster than its linears and its attention alone: their time at the step's own lengths is the
limit that its tokens/s are compared with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from breakdown import synchronize
from torch import Tensor

from litlora.config import ModelConfig
from litlora.sequences import Packed

SETS = 2  # blocks of different weights used in turn: none stays in the caches
FP8 = torch.float8_e4m3fn
Row = dict[str, object]


def measure(
    config: ModelConfig, cases: Mapping[str, Sequence[int]], device: torch.device, seconds: float
) -> Iterator[Row]:
    """Rows of figures, each from `seconds` of the same work. `cases`: lengths of the sequences of a micro-batch, by
    the name under which training's rows are found again. What fails becomes a row that says so."""
    yield from _each("launch", partial(launches, device))
    yield from _each("memory", partial(bandwidth, device, seconds / 2))
    for fp8 in (False, True):
        yield from _each("square", partial(square, device, fp8, seconds))
    for rows, lengths in cases.items():
        yield from _each("attention", partial(attention, config, lengths, device, seconds / 2), rows=rows)
        for fp8 in (False, True):
            work = partial(linears, config, sum(lengths), device, fp8, seconds)
            yield from _each("linears", work, rows=rows, dtype="fp8" if fp8 else "bf16")


def _each(name: str, work: Callable[[], Row], **labels: object) -> Iterator[Row]:
    try:
        yield {"card": name, **labels, **work()}
    except Exception as error:  # one that cannot run here leaves the others
        yield {"card": name, **labels, "error": f"{type(error).__name__}: {error}"[:200]}


def in_a_row(work: Callable[[], object], device: torch.device, seconds: float, warm: float = 0.3) -> float:
    """Seconds of one `work()`, of so many in a row that they take `seconds`; the first `warm` part is not counted, in
    which the card's clock falls to what it can hold."""
    work()
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    once = time.perf_counter() - started
    for _ in range(math.ceil(warm * seconds / once)):
        work()
    synchronize(device)
    count = math.ceil((1 - warm) * seconds / once)
    started = time.perf_counter()
    for _ in range(count):
        work()
    synchronize(device)
    return (time.perf_counter() - started) / count


def launches(device: torch.device) -> Row:
    """What a small kernel costs the host, which differs between machines."""
    x = torch.zeros(1024, device=device)

    def many() -> None:
        for _ in range(1000):
            x.add_(1)

    return {"us": in_a_row(many, device, 0.05) * 1e3}


def bandwidth(device: torch.device, seconds: float) -> Row:
    """GB/s of a copy, bytes read plus bytes written, and of a sum, which only reads."""
    size = 2**30 if device.type == "cuda" else 2**20
    x, y = torch.ones(size, device=device), torch.empty(size, device=device)  # 4 GiB each
    copied = in_a_row(lambda: y.copy_(x), device, seconds)
    read = in_a_row(lambda: x.sum(), device, seconds)
    return {"copy_gb_s": 8 * size / copied / 1e9, "read_gb_s": 4 * size / read / 1e9}


def square(device: torch.device, fp8: bool, seconds: float) -> Row:
    """8192³: the first ten products after a pause, and in a row for seconds."""
    n = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    if fp8:
        (a8, sa), (b8, sb) = rowwise(a), rowwise(b)
        work = partial(scaled_mm, a8, sa, b8, sb)
    else:
        work = partial(torch.mm, a, b)
    work()
    synchronize(device)
    time.sleep(0.2)
    started = time.perf_counter()
    for _ in range(10):
        work()
    synchronize(device)
    first = (time.perf_counter() - started) / 10
    row: Row = {"dtype": "fp8" if fp8 else "bf16", "size": n, "first_tflops": 2 * n**3 / first / 1e12}
    return row | {"tflops": 2 * n**3 / in_a_row(work, device, seconds) / 1e12}


def rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) in fp8 with a scale a row (M, 1)."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(FP8).max
    return (x / scale).to(FP8), scale


def scaled_mm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """x (M, K) wᵀ, w (N, K): the one layout that Hopper's fp8 product takes."""
    return torch._scaled_mm(x, w.t(), x_scale, w_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


def linears(config: ModelConfig, tokens: int, device: torch.device, fp8: bool, seconds: float) -> Row:
    """Milliseconds of all products of one micro-batch with the frozen weights: forward, and backward to the inputs.
    In fp8 the blocks only (operands ready, both layouts at hand); the head stays bf16."""
    shapes = dict(config.linear_shapes)
    head = shapes.pop("lm_head")
    random = partial(torch.randn, dtype=torch.bfloat16, device=device)
    wide = {size: random(tokens, size) for shape in (head, *shapes.values()) for size in shape}
    forward: list[Callable[[], object]] = []
    backward: list[Callable[[], object]] = []
    narrow = {size: rowwise(x) for size, x in wide.items()} if fp8 else {}
    for out_size, in_size in list(shapes.values()) * SETS:
        weight = random(out_size, in_size)
        if fp8:
            forward.append(partial(scaled_mm, *narrow[in_size], *rowwise(weight)))
            backward.append(partial(scaled_mm, *narrow[out_size], *rowwise(weight.t().contiguous())))
        else:
            forward.append(partial(F.linear, wide[in_size], weight))
            backward.append(partial(torch.mm, wide[out_size], weight))
    head_weight = random(*head)
    repeats = -(-config.num_hidden_layers // SETS)
    weights = repeats * SETS * sum(o * i for o, i in shapes.values()) + head[0] * head[1]

    def all_of(products: list[Callable[[], object]], head_product: Callable[[], object]) -> None:
        for _ in range(repeats):
            for product in products:
                product()
        head_product()

    passes = [
        partial(all_of, forward, partial(F.linear, wide[head[1]], head_weight)),
        partial(all_of, backward, partial(torch.mm, wide[head[0]], head_weight)),
    ]
    in_a_row(lambda: [work() for work in passes], device, seconds / 4)
    ms = [in_a_row(work, device, 3 * seconds / 8) * 1e3 for work in passes]
    flops = 2 * weights * tokens
    row: Row = {"tokens": tokens, "forward_ms": ms[0], "backward_ms": ms[1]}
    return row | {"tflops": 2 * flops / sum(ms) / 1e9, "forward_tflops": flops / ms[0] / 1e9}


def attention(config: ModelConfig, lengths: Sequence[int], device: torch.device, seconds: float) -> Row:
    """Milliseconds of all layers' attention over one micro-batch, forward, and backward."""
    heads, dim = config.num_attention_heads, config.head_dim
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tensors = [
        torch.randn(sum(lengths), h, dim, device=device, dtype=dtype).requires_grad_()
        for h in (heads, config.num_key_value_heads, config.num_key_value_heads)
    ]
    view = Packed.of_lengths(lengths, device).views([None])[0]
    gradient = torch.randn(sum(lengths), heads, dim, device=device, dtype=dtype)
    layers = config.num_hidden_layers * 1e3
    forward = in_a_row(lambda: view.attend(*tensors), device, seconds / 2) * layers
    both = in_a_row(lambda: torch.autograd.grad(view.attend(*tensors), tensors, gradient), device, seconds / 2) * layers
    return {"tokens": sum(lengths), "forward_ms": forward, "backward_ms": both - forward}
