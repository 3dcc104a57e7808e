"""The next token of each row in one Triton kernel: greedy, or temperature and top-k, as `sampling` defines them.

A program has a row and goes over it in chunks, which the cache next to it holds: once for the best score, a few times
for the k-th best, once for the sums of probabilities and once more over the one chunk where the draw falls. Sums are
whole numbers, so that no order of adding changes a token.
Sizes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 32  # scores at a time, and warps that hold them
ONE = tl.constexpr(2.0**42)  # the best score's weight: that of 2**20 such scores fits into 62 bits
SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13}  # low bits that are 0 once the dtype is fp32


@triton.jit
def _mixed(x):
    """splitmix64's finalizer, as in `sampling`."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, stream, step):
    """`sampling.uniform` times 2**64: what it has no bits for is 0."""
    mixed = _mixed(stream.to(tl.uint64) * 0x9E3779B97F4A7C15 + seed.to(tl.uint64))
    return _mixed(mixed + step.to(tl.uint64) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFF000


@triton.jit
def _key(value, spare: tl.constexpr):
    """fp32 -> int64 in the same order, neighbours of the narrower dtype side by side."""
    bits = value.to(tl.int32, bitcast=True) >> spare
    return (bits ^ ((bits >> 31) & (0x7FFFFFFF >> spare))).to(tl.int64)


@triton.jit
def _value(key, spare: tl.constexpr):
    bits = key.to(tl.int32)
    return ((bits ^ ((bits >> 31) & (0x7FFFFFFF >> spare))) << spare).to(tl.float32, bitcast=True)


@triton.jit
def _scores(logits, start, size: tl.constexpr, block: tl.constexpr):
    """(block,) fp32 from `start` on, -inf behind the row's end."""
    column = start + tl.arange(0, block)
    return tl.load(logits + column, mask=column < size, other=-float("inf")).to(tl.float32)


@triton.jit
def _kth_best(logits, best, top, k, size: tl.constexpr, groups: tl.constexpr, spare: tl.constexpr, block: tl.constexpr):
    """The k-th largest score, from the largest of each lane, `best` (block,), and of all, `top`."""
    low = _key(tl.full((), -float("inf"), tl.float32), spare)
    if groups <= block:  # k groups or more, each with a score that is not below the least of their best ones
        low = _key(tl.min(tl.max(tl.reshape(best, (groups, block // groups)), 1), 0), spare)
    high = _key(top, spare)
    while low < high:  # the largest key that k scores or more reach, or the first that just k reach
        middle = (low + high + 1) >> 1
        bound = _value(middle, spare)
        reach = tl.zeros((block,), tl.int32)
        for start in tl.range(0, size, block, loop_unroll_factor=4):
            reach += (_scores(logits, start, size, block) >= bound).to(tl.int32)
        count = tl.sum(reach, 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count > k, high, tl.where(count == k, middle, middle - 1))
    bound = _value(low, spare)
    least = tl.full((block,), float("inf"), tl.float32)
    for start in tl.range(0, size, block, loop_unroll_factor=4):
        value = _scores(logits, start, size, block)
        least = tl.minimum(least, tl.where(value >= bound, value, float("inf")))
    return tl.min(least, 0)


@triton.jit
def _weights(logits, start, top, inverse, lowest, size: tl.constexpr, block: tl.constexpr):
    """(block,) int64: the softmax's numerators."""
    scaled = (_scores(logits, start, size, block) - top) * inverse
    return (tl.where(scaled >= lowest, tl.exp(scaled), 0.0) * ONE).to(tl.int64)


@triton.jit
def _draw(
    logits, uniform, top, inverse, lowest, size: tl.constexpr, chunks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The first id at which the running sum of weights is above uniform / 2**64 of their total."""
    number = tl.arange(0, chunks)
    sums = tl.zeros((chunks,), tl.int64)
    for start in tl.range(0, size, block, loop_unroll_factor=2):
        weights = _weights(logits, start, top, inverse, lowest, size, block)
        sums = tl.where(number == start // block, tl.sum(weights, 0), sums)
    target = tl.umulhi(uniform, tl.sum(sums, 0).to(tl.uint64)).to(tl.int64)
    ends = tl.cumsum(sums, 0)
    before = tl.sum(tl.where(ends <= target, sums, 0), 0)
    start = tl.sum((ends <= target).to(tl.int32), 0) * block
    inside = tl.cumsum(_weights(logits, start, top, inverse, lowest, size, block), 0)
    return start + tl.sum((inside + before <= target).to(tl.int32), 0)


@triton.jit(do_not_specialize=["k", "seed"])
def _choose(
    logits, stride, streams, steps, tokens, inverse, k, seed: tl.int64,
    size: tl.constexpr, sampled: tl.constexpr, groups: tl.constexpr, spare: tl.constexpr, chunks: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    best = tl.full((block,), -float("inf"), tl.float32)
    column = tl.zeros((block,), tl.int32)
    for start in tl.range(0, size, block, loop_unroll_factor=4):
        value = _scores(logits, start, size, block)
        better = (value > best) | (value != value)  # no number is better than nan: it stays
        best = tl.where(better, value, best)
        column = tl.where(better, start + tl.arange(0, block), column)
    nans = tl.sum((best != best).to(tl.int32), 0)
    top = tl.max(best, 0)
    if (nans > 0) | (tl.abs(top) == float("inf")):
        tl.store(tokens + row, -1)
        return
    if sampled:
        lowest = tl.full((), -float("inf"), tl.float32)
        if groups > 0:  # compared once they are scaled: what rounding makes equal to the k-th stays
            lowest = (_kth_best(logits, best, top, k, size, groups, spare, block) - top) * inverse
        uniform = _uniform(seed, tl.load(streams + row), tl.load(steps + row))
        token = _draw(logits, uniform, top, inverse, lowest, size, chunks, block)
    else:
        token = tl.min(tl.where(best == top, column, size), 0)
    tl.store(tokens + row, token.to(tl.int64))


def choose(
    logits: Tensor, streams: Tensor, steps: Tensor, tokens: Tensor, *, temperature: float, top_k: int | None,
    mixed_seed: int,
) -> None:  # fmt: skip
    """logits (B, V), whose rows may be strided; streams and steps (B,) int64 -> tokens (B,) int64, -1 for a row whose
    best logit is not a number or infinite. V up to 2**20; `mixed_seed`: int64."""
    rows, size = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    block = min(BLOCK, int(triton.next_power_of_2(size)))
    inverse = min(max(1 / temperature, 1e-38), 3e38) if temperature else 0.0  # an fp32 that is neither 0 nor infinite
    k = top_k if top_k and top_k < size else 0
    _choose[(rows,)](
        logits, logits.stride(0), streams.contiguous(), steps.contiguous(), tokens, inverse, k, mixed_seed,
        size=size, sampled=temperature > 0, groups=int(triton.next_power_of_2(k)) if k else 0,
        spare=SPARE_BITS.get(logits.dtype, 0), chunks=int(triton.next_power_of_2(triton.cdiv(size, block))),
        block=block, num_warps=max(1, min(WARPS, block // 256)),
    )  # fmt: skip
