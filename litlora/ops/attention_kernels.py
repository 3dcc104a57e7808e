"""Triton kernels of causal attention over a packed stream of short sequences, where flash attention's larger tiles are
half empty. What was rotated before the attention is rotated back as its gradient is written.

They take contiguous CUDA tensors of a 16-bit dtype and compute in fp32; nothing is summed by atomics.
Sizes: N tokens, H heads, K key/value heads, D head dim; T tiles of TILE tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from litlora.ops import attention
from litlora.ops.attention import TILE, Inside, Tiles

HEAD_DIMS = (32, 64, 128)
LONGEST = 1024  # of sequences: flash attention is the faster one from there on
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(x, begin, known, heads, head, size: tl.constexpr, tile: tl.constexpr):
    """One head of a tile's tokens (tile, D), zero where there is none."""
    x += (tl.cast(begin, tl.int64) * heads + head) * size
    place = tl.arange(0, tile)[:, None] * (heads * size) + tl.arange(0, size)[None, :]
    return tl.load(x + place, mask=known[:, None], other=0.0)


@triton.jit
def _store_turned_back(y, x, begin, known, heads, head, cos, sin, size: tl.constexpr, tile: tl.constexpr):
    """x (tile, D), the gradient after the rotation, as the one before it."""
    half: tl.constexpr = size // 2
    first, second = tl.split(tl.permute(tl.reshape(x, (tile, 2, half)), (0, 2, 1)))
    row, pair = tl.arange(0, tile)[:, None], tl.arange(0, half)[None, :]
    inside, angle = known[:, None], tl.cast(begin, tl.int64) * half + row * half + pair
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    place = (tl.cast(begin, tl.int64) * heads + head) * size + row * (heads * size) + pair
    tl.store(y + place, first * c + second * s, mask=inside)
    tl.store(y + place + half, second * c - first * s, mask=inside)


@triton.jit
def _seen(row, column, window, windowed: tl.constexpr):
    """Whether a query at `row` sees a key at `column`. Queries after the sequence's end need no mask: their gradients
    were read as zeros."""
    seen = column <= row
    if windowed:
        seen = seen & (row - column < window)
    return seen


@triton.jit
def _lowest(first, start, window, windowed: tl.constexpr, tile: tl.constexpr):
    """Where the keys begin that a tile of queries from `start` on sees: whole tiles that nobody sees are left out."""
    lowest = first
    if windowed:
        lowest = first + tl.maximum(0, start - window + 1 - first) // tile * tile
    return lowest


@triton.jit(do_not_specialize=["rows"])
def _attention_forward(
    q, k, v, out, logsums, starts, firsts, ends, rows, heads, kv_heads, scale, window,
    windowed: tl.constexpr, size: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head over the keys that they see."""
    number, head = tl.program_id(0), tl.program_id(1)
    start, first, end = tl.load(starts + number), tl.load(firsts + number), tl.load(ends + number)
    if start >= end:
        return
    kv_head = head // (heads // kv_heads)
    row = start + tl.arange(0, tile)
    valid = row < end
    query = _rows(q, start, valid, heads, head, size, tile)
    best, total = tl.full((tile,), -1e38, tl.float32), tl.zeros((tile,), tl.float32)
    mean = tl.zeros((tile, size), tl.float32)
    for begin in range(_lowest(first, start, window, windowed, tile), start + tile, tile):
        column = begin + tl.arange(0, tile)
        key = _rows(k, begin, column < end, kv_heads, kv_head, size, tile)
        value = _rows(v, begin, column < end, kv_heads, kv_head, size, tile)
        score = tl.dot(query, tl.trans(key)) * (scale * _LOG2E)
        seen = _seen(row[:, None], column[None, :], window, windowed)
        score = tl.where(seen, score, -1e38)
        higher = tl.maximum(best, tl.max(score, 1))
        weight, fade = tl.where(seen, tl.exp2(score - higher[:, None]), 0.0), tl.exp2(best - higher)
        total = total * fade + tl.sum(weight, 1)
        mean = tl.dot(weight.to(value.dtype), value, mean * fade[:, None])
        best = higher
    place = tl.arange(0, tile)[:, None] * (heads * size) + tl.arange(0, size)[None, :]
    out += (tl.cast(start, tl.int64) * heads + head) * size
    tl.store(out + place, mean / total[:, None], mask=valid[:, None])
    tl.store(logsums + tl.cast(head, tl.int64) * rows + row, (best + tl.log2(total)) / _LOG2E, mask=valid)


@triton.jit(do_not_specialize=["rows"])
def _attention_backward_q(
    q, k, v, cos, sin, out, d_out, logsums, deltas, dq, starts, firsts, ends, rows, heads, kv_heads, scale, window,
    windowed: tl.constexpr, size: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """dq of a tile and head, and each query's delta: the inner product of its output and that one's gradient."""
    number, head = tl.program_id(0), tl.program_id(1)
    start, first, end = tl.load(starts + number), tl.load(firsts + number), tl.load(ends + number)
    if start >= end:
        return
    kv_head = head // (heads // kv_heads)
    row = start + tl.arange(0, tile)
    valid = row < end
    query = _rows(q, start, valid, heads, head, size, tile)
    gradient = _rows(d_out, start, valid, heads, head, size, tile)
    output = _rows(out, start, valid, heads, head, size, tile)
    delta = tl.sum(gradient.to(tl.float32) * output.to(tl.float32), 1)
    line = tl.cast(head, tl.int64) * rows
    tl.store(deltas + line + row, delta, mask=valid)
    logsum = tl.load(logsums + line + row, mask=valid, other=0.0) * _LOG2E
    total = tl.zeros((tile, size), tl.float32)
    for begin in range(_lowest(first, start, window, windowed, tile), start + tile, tile):
        column = begin + tl.arange(0, tile)
        key = _rows(k, begin, column < end, kv_heads, kv_head, size, tile)
        value = _rows(v, begin, column < end, kv_heads, kv_head, size, tile)
        score = tl.dot(query, tl.trans(key)) * (scale * _LOG2E)
        seen = _seen(row[:, None], column[None, :], window, windowed)
        weight = tl.where(seen, tl.exp2(score - logsum[:, None]), 0.0)
        d_score = weight * (tl.dot(gradient, tl.trans(value)) - delta[:, None])
        total = tl.dot(d_score.to(key.dtype), key, total)
    _store_turned_back(dq, total * scale, start, valid, heads, head, cos, sin, size, tile)


@triton.jit(do_not_specialize=["rows"])
def _attention_backward_kv(
    q, k, v, cos, sin, d_out, logsums, deltas, dk, dv, starts, ends, rows, heads, kv_heads, scale, window,
    windowed: tl.constexpr, size: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile and key/value head, summed over the heads that read it."""
    number, kv_head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(starts + number), tl.load(ends + number)
    if start >= end:
        return
    group = heads // kv_heads
    column = start + tl.arange(0, tile)
    known = column < end
    key = _rows(k, start, known, kv_heads, kv_head, size, tile)
    value = _rows(v, start, known, kv_heads, kv_head, size, tile)
    d_key = tl.zeros((tile, size), tl.float32)
    d_value = tl.zeros((tile, size), tl.float32)
    last = end
    if windowed:
        last = tl.minimum(end, start + tile + window - 1)
    for head in range(kv_head * group, (kv_head + 1) * group):
        line = tl.cast(head, tl.int64) * rows
        for begin in range(start, last, tile):
            row = begin + tl.arange(0, tile)
            valid = row < end
            query = _rows(q, begin, valid, heads, head, size, tile)
            gradient = _rows(d_out, begin, valid, heads, head, size, tile)
            logsum = tl.load(logsums + line + row, mask=valid, other=0.0) * _LOG2E
            delta = tl.load(deltas + line + row, mask=valid, other=0.0)
            # keys by queries, so that what is made of them is the left side of the products that follow
            score = tl.dot(key, tl.trans(query)) * (scale * _LOG2E)
            seen = _seen(row[None, :], column[:, None], window, windowed)
            weight = tl.where(seen, tl.exp2(score - logsum[None, :]), 0.0)
            d_value = tl.dot(weight.to(value.dtype), gradient, d_value)
            d_score = weight * (tl.dot(value, tl.trans(gradient)) - delta[None, :])
            d_key = tl.dot(d_score.to(key.dtype), query, d_key)
    place = tl.arange(0, tile)[:, None] * (kv_heads * size) + tl.arange(0, size)[None, :]
    tl.store(dv + (tl.cast(start, tl.int64) * kv_heads + kv_head) * size + place, d_value, mask=known[:, None])
    _store_turned_back(dk, d_key * scale, start, known, kv_heads, kv_head, cos, sin, size, tile)


def takes(q: Tensor, inside: Inside) -> bool:
    """Whether `forward` and `backward` take such q (N, H, D), and are faster than flash attention."""
    fits = q.shape[-1] in HEAD_DIMS and inside.bounds.longest <= LONGEST
    return fits and attention.can_varlen(q)


def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, window: int | None) -> tuple[Tensor, Tensor]:
    """What `attention.varlen` gives."""
    rows, heads, size = q.shape
    out, logsums = torch.empty_like(q), torch.empty(heads, rows, dtype=torch.float32, device=q.device)
    _attention_forward[(len(tiles.starts), heads)](
        q, k, v, out, logsums, tiles.starts, tiles.firsts, tiles.ends, rows, heads, k.shape[1], size**-0.5, window or 0,
        windowed=window is not None, size=size, tile=TILE, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out, logsums


def backward(saved: Sequence[Tensor], d_out: Tensor, tiles: Tiles, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q (N, H, D) and k (N, K, D) as they were before their rotation, and of v (N, K, D).

    Args:
        saved: q and k rotated, v; cos and sin (N, 1, D/2) of the rotation; the output (N, H, D), and the natural
            logarithm (H, N) fp32 of each query's sum of exponentials.
        d_out: the output's gradient.
    """
    q, k, v, cos, sin, out, logsums = saved
    rows, heads, size = q.shape
    kv_heads, count = k.shape[1], len(tiles.starts)
    dq, dk, dv, deltas = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(logsums)
    last = rows, heads, kv_heads, size**-0.5, window or 0
    form = {"windowed": window is not None, "size": size, "tile": TILE, "num_warps": 4}
    _attention_backward_q[(count, heads)](
        q, k, v, cos, sin, out, d_out, logsums, deltas, dq, tiles.starts, tiles.firsts, tiles.ends, *last, **form,
        num_stages=2,
    )  # fmt: skip
    _attention_backward_kv[(count, kv_heads)](
        q, k, v, cos, sin, d_out, logsums, deltas, dk, dv, tiles.starts, tiles.ends, *last, **form,
        num_stages=1,
    )  # fmt: skip
    return dq, dk, dv
