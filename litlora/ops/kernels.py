"""Triton kernels of the fused operations, each with the function that launches it: no autograd here.

They take contiguous CUDA tensors of any 16- or 32-bit float dtype, compute in fp32 and round once on the way out.
Sizes: N tokens, C hidden, F ffn, H heads, D head dim, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from litlora.ops.low_rank import Low, low_tile, power
from litlora.ops.narrow import store_scale

# ---------------------------------------------------------------- RMSNorm


@triton.jit
def _rms_norm(x, weight, y, rstd, narrow, scales, size, eps, rounds: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < size
    raw = tl.load(x + row * size + column, mask=inside, other=0.0)
    value = raw.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    tl.store(rstd + row, scale)
    # rounded before it is scaled, as the reference and transformers do
    w = tl.load(weight + column, mask=inside, other=0.0)
    normal = ((value * scale).to(raw.dtype) * w).to(y.dtype.element_ty)
    tl.store(y + row * size + column, normal, mask=inside)
    if rounds:
        wide = normal.to(tl.float32)
        wide *= store_scale(scales, row, tl.max(tl.abs(wide), 0))
        tl.store(narrow + row * size + column, wide.to(tl.float8e4nv), mask=inside)


@triton.jit
def _rms_norm_backward(dy, x, weight, rstd, residual, dx, size, add: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside, place = column < size, row * size + column
    scale = tl.load(rstd + row)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32) * w
    normal = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
    g = (g - normal * (tl.sum(g * normal, 0) / size)) * scale
    if add:
        g += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + place, g, mask=inside)


def _norm_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None, *, rounds: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """x (N, C), weight (C,) -> y (N, C) in `dtype`, 1/rms (N,) fp32 and, if it `rounds`, what `quantize_rows` makes of
    y."""
    rows, size = x.shape
    y, rstd = torch.empty_like(x, dtype=dtype), torch.empty(rows, dtype=torch.float32, device=x.device)
    rounded = (torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty_like(rstd)[:, None]) if rounds else None
    block = power(size)
    _rms_norm[(rows,)](
        x, weight, y, rstd, *(rounded or (y, rstd)), size, eps, rounds=rounds, block=block, num_warps=_norm_warps(block)
    )
    return y, rstd, rounded


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """dx (N, C), with `residual` (N, C), the gradient that went past the norm, added to it; into `out` where given."""
    rows, size = x.shape
    dx, block = torch.empty_like(x) if out is None else out, power(size)
    add = residual is not None
    _rms_norm_backward[(rows,)](
        dy, x, weight, rstd, residual if add else dy, dx, size, add=add, block=block, num_warps=_norm_warps(block)
    )
    return dx


# ---------------------------------------------------------------- rotary embedding


@triton.jit
def _rotate(x, y, cos, sin, row, heads, half: tl.constexpr, heads_block: tl.constexpr, half_block: tl.constexpr, sign):
    head = tl.arange(0, heads_block)[:, None]
    pair = tl.arange(0, half_block)[None, :]
    inside = (head < heads) & (pair < half)
    place = row * heads * 2 * half + head * 2 * half + pair
    c = tl.load(cos + row * half + pair, mask=pair < half, other=0.0).to(tl.float32)
    s = tl.load(sin + row * half + pair, mask=pair < half, other=0.0).to(tl.float32) * sign
    first = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, first * c - second * s, mask=inside)
    tl.store(y + place + half, second * c + first * s, mask=inside)


@triton.jit
def _rope(
    q, k, q_out, k_out, cos, sin, sign, heads, kv_heads,
    half: tl.constexpr, heads_block: tl.constexpr, kv_block: tl.constexpr, half_block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _rotate(q, q_out, cos, sin, row, heads, half, heads_block, half_block, sign)
    _rotate(k, k_out, cos, sin, row, kv_heads, half, kv_block, half_block, sign)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backward: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates q (N, H, D) and k (N, K, D) by cos, sin (N, 1, D/2); back again with `backward`."""
    rows, heads, size = q.shape
    q_out, k_out, half = torch.empty_like(q), torch.empty_like(k), size // 2
    _rope[(rows,)](
        q, k, q_out, k_out, cos, sin, -1.0 if backward else 1.0, heads, k.shape[1],
        half=half, heads_block=power(heads), kv_block=power(k.shape[1]), half_block=power(half), num_warps=4,
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def _low_head(
    x, z, b, y, cos, sin, row, here, head, heads, stride, z_stride, rank,
    turns: tl.constexpr, half: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one head: x + z bᵀ and, if it `turns`, its rotation. Not rounded in between, where x, which
    is rounded, would swallow a small z bᵀ."""
    pair = tl.arange(0, half)
    across = pair[None, :] < half
    first = low_tile(z, b, row, head * 2 * half + pair, here, across, z_stride, rank, 1, rank, r)
    second = low_tile(z, b, row, head * 2 * half + half + pair, here, across, z_stride, rank, 1, rank, r)
    place = x + row[:, None].to(tl.int64) * stride + head * 2 * half + pair[None, :]
    first += tl.load(place, mask=here, other=0.0).to(tl.float32)
    second += tl.load(place + half, mask=here, other=0.0).to(tl.float32)
    if turns:
        angle = row[:, None] * half + pair[None, :]
        c = tl.load(cos + angle, mask=here, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=here, other=0.0).to(tl.float32)
        first, second = first * c - second * s, second * c + first * s
    place = y + (row[:, None].to(tl.int64) * heads + head) * 2 * half + pair[None, :]
    tl.store(place, first, mask=here)
    tl.store(place + half, second, mask=here)


@triton.jit(do_not_specialize=["rows"])
def _low_rope(
    q, k, v, q_out, k_out, v_out, z_q, b_q, z_k, b_k, z_v, b_v, cos, sin, rows, heads, kv_heads,
    q_stride, k_stride, v_stride, z_stride, rank_q, rank_k, rank_v,
    tile: tl.constexpr, half: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    row = tl.program_id(1) * tile + tl.arange(0, tile)
    here = (row < rows)[:, None]
    if head < heads:
        _low_head(q, z_q, b_q, q_out, cos, sin, row, here, head, heads, q_stride, z_stride, rank_q, True, half, r)
    elif head < heads + kv_heads:
        other = head - heads
        _low_head(k, z_k, b_k, k_out, cos, sin, row, here, other, kv_heads, k_stride, z_stride, rank_k, True, half, r)
    else:
        other = head - heads - kv_heads
        _low_head(v, z_v, b_v, v_out, cos, sin, row, here, other, kv_heads, v_stride, z_stride, rank_v, False, half, r)


def low_rope(
    xs: Sequence[Tensor], lows: Sequence[Low | None], cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, H, D), k and v (N, K, D) of xs (N, H · D) and twice (N, K · D), whose rows may be strided: each with its
    z bᵀ on top, then q and k rotated by cos, sin (N, 1, D/2), D a power of two from 32. All in q's dtype."""
    rows, half, like = len(xs[0]), cos.shape[-1], xs[0]
    q, k, v = (torch.empty(rows, x.shape[1] // (2 * half), 2 * half, dtype=like.dtype, device=x.device) for x in xs)
    heads, kv_heads = q.shape[1], k.shape[1]
    factors, ranks, r = _lows(xs[0], *lows)
    z_stride, tile = max(z.stride(0) for z in factors[::2]), 64
    _low_rope[(heads + 2 * kv_heads, triton.cdiv(rows, tile))](
        *xs, q, k, v, *factors, cos, sin, rows, heads, kv_heads, *(x.stride(0) for x in xs), z_stride, *ranks,
        tile=tile, half=half, r=r, num_warps=4,
    )  # fmt: skip
    return q, k, v


# ---------------------------------------------------------------- SwiGLU


@triton.jit
def _swiglu(gate, up, y, size, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < size
    raw = tl.load(gate + place, mask=inside, other=0.0)
    g = raw.to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, (g * tl.sigmoid(g)).to(raw.dtype).to(tl.float32) * u, mask=inside)


@triton.jit
def _store_swiglu(dy, d_gate, y, place, inside, d, g, u, again: tl.constexpr):
    gated = tl.sigmoid(g)
    tl.store(d_gate + place, d * u * gated * (1 + g * (1 - gated)), mask=inside)
    tl.store(dy + place, d * g * gated, mask=inside)
    if again:
        tl.store(y + place, (g * gated).to(y.dtype.element_ty).to(tl.float32) * u, mask=inside)


@triton.jit
def _swiglu_backward(dy, gate, up, d_gate, y, size, again: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < size
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    _store_swiglu(dy, d_gate, y, place, inside, d, g, u, again)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_low(
    gate, up, y, z_gate, b_gate, z_up, b_up, rows, size, z_stride, rank_gate, rank_up,
    tile: tl.constexpr, block: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * block + tl.arange(0, block)
    here, across = (row < rows)[:, None], (column < size)[None, :]
    place = row[:, None].to(tl.int64) * size + column[None, :]
    raw = tl.load(gate + place, mask=here & across, other=0.0)
    g = low_tile(z_gate, b_gate, row, column, here, across, z_stride, rank_gate, 1, rank_gate, r) + raw.to(tl.float32)
    u = low_tile(z_up, b_up, row, column, here, across, z_stride, rank_up, 1, rank_up, r)
    u += tl.load(up + place, mask=here & across, other=0.0).to(tl.float32)
    tl.store(y + place, (g * tl.sigmoid(g)).to(raw.dtype).to(tl.float32) * u, mask=here & across)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_low_backward(
    dy, gate, up, d_gate, y, z_gate, b_gate, z_up, b_up, dz, a, rows, size, z_stride, dz_stride,
    rank_gate, rank_up, rank, again: tl.constexpr, tile: tl.constexpr, block: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * block + tl.arange(0, block)
    here, across = (row < rows)[:, None], (column < size)[None, :]
    place = row[:, None].to(tl.int64) * size + column[None, :]
    g = low_tile(z_gate, b_gate, row, column, here, across, z_stride, rank_gate, 1, rank_gate, r)
    g += tl.load(gate + place, mask=here & across, other=0.0).to(tl.float32)
    u = low_tile(z_up, b_up, row, column, here, across, z_stride, rank_up, 1, rank_up, r)
    u += tl.load(up + place, mask=here & across, other=0.0).to(tl.float32)
    d = low_tile(dz, a, row, column, here, across, dz_stride, 1, size, rank, r)
    d += tl.load(dy + place, mask=here & across, other=0.0).to(tl.float32)
    _store_swiglu(dy, d_gate, y, place, here & across, d, g, u, again)


_FLAT = 2048


def swiglu(gate: Tensor, up: Tensor, low_gate: Low | None = None, low_up: Low | None = None) -> Tensor:
    """silu(gate) · up, (N, F), each with its z bᵀ."""
    y, (rows, size) = torch.empty_like(gate), gate.shape
    if low_gate is None and low_up is None:
        _swiglu[(triton.cdiv(rows * size, _FLAT),)](gate, up, y, rows * size, block=_FLAT, num_warps=4)
        return y
    lows, ranks, r = _lows(gate, low_gate, low_up)
    stride, tile, block = max(low.stride(0) for low in (lows[0], lows[2])), 32, 128
    _swiglu_low[(triton.cdiv(rows, tile), triton.cdiv(size, block))](
        gate, up, y, *lows, rows, size, stride, *ranks, tile=tile, block=block, r=r, num_warps=4
    )
    return y


def swiglu_backward(
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    low_gate: Low | None = None,
    low_up: Low | None = None,
    low_dy: Low | None = None,
    hidden: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """(d_gate, d_up); d_up takes dy's place, and `in_place` d_gate that of gate. `low_dy`: dz (N, R) and a (R, F), dz a
    being part of dy. Into `hidden` goes what `swiglu` gave."""
    d_gate, (rows, size) = gate if in_place else torch.empty_like(gate), gate.shape
    y, again = dy if hidden is None else hidden, hidden is not None
    if low_gate is None and low_up is None and low_dy is None:
        _swiglu_backward[(triton.cdiv(rows * size, _FLAT),)](
            dy, gate, up, d_gate, y, rows * size, again=again, block=_FLAT, num_warps=4
        )
        return d_gate, dy
    lows, ranks, r = _lows(gate, low_gate, low_up)
    dz, a = low_dy or (gate[:, :0], gate)
    rank = dz.shape[1]
    stride, tile, block = max(low.stride(0) for low in (lows[0], lows[2])), 16, 128
    _swiglu_low_backward[(triton.cdiv(rows, tile), triton.cdiv(size, block))](
        dy, gate, up, d_gate, y, *lows, dz, a, rows, size, stride, dz.stride(0), *ranks, rank, again=again,
        tile=tile, block=block, r=max(r, 16, power(max(1, rank))), num_warps=4,
    )  # fmt: skip
    return d_gate, dy


def _lows(stand_in: Tensor, *lows: Low | None) -> tuple[list[Tensor], list[int], int]:
    """The pairs' tensors in turn, their ranks (0 for None), and the power of two that holds the largest."""
    tensors = [tensor for low in lows for tensor in (low or (stand_in[:, :0].as_strided((1, 0), (0, 0)), stand_in))]
    ranks = [0 if low is None else low[1].shape[1] for low in lows]
    return tensors, ranks, max(16, power(max(1, *ranks)))


# ---------------------------------------------------------------- cross-entropy


@triton.jit
def _cross_entropy(logits, labels, losses, size, gradient: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    label = tl.load(labels + row)
    # in one reading, the running maximum of each lane and the sum of exponentials relative to it; no infinity, so that
    # a lane without a logit is 0 and not no number
    best = tl.full((block,), -1e38, tl.float32)
    total = tl.zeros((block,), tl.float32)
    for start in range(0, size, block):
        column = start + tl.arange(0, block)
        value = tl.load(logits + column, mask=column < size, other=-1e38).to(tl.float32)
        higher = tl.maximum(best, value)
        total = total * tl.exp(best - higher) + tl.where(column < size, tl.exp(value - higher), 0.0)
        best = higher
    top = tl.max(best, 0)
    logsum = top + tl.log(tl.sum(total * tl.exp(best - top), 0))
    known = label >= 0
    tl.store(losses + row, tl.where(known, logsum - tl.load(logits + tl.maximum(label, 0)).to(tl.float32), 0.0))
    if gradient:
        for start in range(0, size, block):
            column = start + tl.arange(0, block)
            value = tl.load(logits + column, mask=column < size, other=-1e38).to(tl.float32)
            part = tl.where(known, tl.exp(value - logsum) - (column == label), 0.0)
            tl.store(logits + column, part, mask=column < size)


def cross_entropy(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """Losses (N,) fp32 of logits (N, V) and labels (N,), 0 where the label is negative; with `gradient` the logits are
    overwritten by theirs."""
    rows, size = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](logits, labels, losses, size, gradient=gradient, block=min(4096, power(size)), num_warps=8)
    return losses
