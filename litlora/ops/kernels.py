"""Triton kernels of the fused operations, each with the function that launches it: no autograd here.

They take contiguous CUDA tensors of any 16- or 32-bit float dtype, compute in fp32 and round once on the way out.
Sizes: N tokens, C hidden, F ffn, H heads, D head dim, V vocabulary, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


def _power(n: int) -> int:
    return int(triton.next_power_of_2(n))


# ---------------------------------------------------------------- RMSNorm


@triton.jit
def _rms_norm(x, weight, y, rstd, size, eps, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < size
    raw = tl.load(x + row * size + column, mask=inside, other=0.0)
    value = raw.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    tl.store(rstd + row, scale)
    # rounded before it is scaled, as the reference and transformers do
    w = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(y + row * size + column, (value * scale).to(raw.dtype) * w, mask=inside)


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


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """x (N, C), weight (C,) -> y (N, C) in `dtype` and 1/rms (N,) fp32."""
    rows, size = x.shape
    y, rstd = torch.empty_like(x, dtype=dtype), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = _power(size)
    _rms_norm[(rows,)](x, weight, y, rstd, size, eps, block=block, num_warps=_norm_warps(block))
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """dx (N, C), with `residual` (N, C), the gradient that went past the norm, added to it; into `out` where given."""
    rows, size = x.shape
    dx, block = torch.empty_like(x) if out is None else out, _power(size)
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
        half=half, heads_block=_power(heads), kv_block=_power(k.shape[1]), half_block=_power(half), num_warps=4,
    )  # fmt: skip
    return q_out, k_out


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


@triton.jit
def _low(z, b, row, column, here, across, z_stride, b_row, b_column, rank, r: tl.constexpr):
    """A tile of z bᵀ in fp32; nothing where rank is 0."""
    inner = tl.arange(0, r)
    deep = inner < rank
    left = tl.load(z + row[:, None] * z_stride + inner[None, :], mask=here & deep[None, :], other=0.0)
    right = tl.load(b + column[None, :] * b_row + inner[:, None] * b_column, mask=across & deep[:, None], other=0.0)
    return tl.dot(left, right, input_precision="ieee")


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
    g = _low(z_gate, b_gate, row, column, here, across, z_stride, rank_gate, 1, rank_gate, r) + raw.to(tl.float32)
    u = _low(z_up, b_up, row, column, here, across, z_stride, rank_up, 1, rank_up, r)
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
    g = _low(z_gate, b_gate, row, column, here, across, z_stride, rank_gate, 1, rank_gate, r)
    g += tl.load(gate + place, mask=here & across, other=0.0).to(tl.float32)
    u = _low(z_up, b_up, row, column, here, across, z_stride, rank_up, 1, rank_up, r)
    u += tl.load(up + place, mask=here & across, other=0.0).to(tl.float32)
    d = _low(dz, a, row, column, here, across, dz_stride, 1, size, rank, r)
    d += tl.load(dy + place, mask=here & across, other=0.0).to(tl.float32)
    _store_swiglu(dy, d_gate, y, place, here & across, d, g, u, again)


_FLAT = 2048
LARGEST_RANK = 64  # that the kernels hold in registers
Low = tuple[Tensor, Tensor]  # z (N, R), whose rows may be strided, and b (O, R): z bᵀ is still to be added


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
) -> tuple[Tensor, Tensor]:
    """(d_gate, d_up); d_up takes dy's place. `low_dy`: dz (N, R) and a (R, F), dz a being part of dy. Into `hidden`
    goes what `swiglu` gave."""
    d_gate, (rows, size) = torch.empty_like(gate), gate.shape
    y, again = dy if hidden is None else hidden, hidden is not None
    if low_gate is None and low_up is None and low_dy is None:
        _swiglu_backward[(triton.cdiv(rows * size, _FLAT),)](
            dy, gate, up, d_gate, y, rows * size, again=again, block=_FLAT, num_warps=4
        )
        return d_gate, dy
    lows, ranks, r = _lows(gate, low_gate, low_up)
    dz, a = low_dy or (gate[:, :0], gate)
    rank = dz.shape[1]
    stride, tile, block = max(low.stride(0) for low in (lows[0], lows[2])), 32, 128
    _swiglu_low_backward[(triton.cdiv(rows, tile), triton.cdiv(size, block))](
        dy, gate, up, d_gate, y, *lows, dz, a, rows, size, stride, dz.stride(0), *ranks, rank, again=again,
        tile=tile, block=block, r=max(r, 16, _power(max(1, rank))), num_warps=4,
    )  # fmt: skip
    return d_gate, dy


def _lows(stand_in: Tensor, *lows: Low | None) -> tuple[list[Tensor], list[int], int]:
    """The pairs' tensors in turn, their ranks (0 for None), and the power of two that holds the largest."""
    tensors = [tensor for low in lows for tensor in (low or (stand_in[:, :0].as_strided((1, 0), (0, 0)), stand_in))]
    ranks = [0 if low is None else low[1].shape[1] for low in lows]
    return tensors, ranks, max(16, _power(max(1, *ranks)))


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
    _cross_entropy[(rows,)](logits, labels, losses, size, gradient=gradient, block=min(4096, _power(size)), num_warps=8)
    return losses


# ---------------------------------------------------------------- low rank


@triton.jit(do_not_specialize=["rows"])
def _low_rank_add(
    z, b, base, also, y, rows, size, rank, z_stride, b_row, b_column,
    second: tl.constexpr, tile: tl.constexpr, block: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * block + tl.arange(0, block)
    here, across = (row < rows)[:, None], (column < size)[None, :]
    value = _low(z, b, row, column, here, across, z_stride, b_row, b_column, rank, r)
    place = row[:, None].to(tl.int64) * size + column[None, :]
    value += tl.load(base + place, mask=here & across, other=0.0).to(tl.float32)
    if second:
        value += tl.load(also + place, mask=here & across, other=0.0).to(tl.float32)
    tl.store(y + place, value, mask=here & across)


def low_rank_add(z: Tensor, b: Tensor, base: Tensor, out: Tensor | None = None, also: Tensor | None = None) -> Tensor:
    """base (N, O) + also (N, O) + z (N, R) bᵀ, b (O, R), into `out`, which may be one of the two, or a new tensor.
    z and b may be strided."""
    (rows, size), rank = base.shape, b.shape[1]
    y = torch.empty_like(base) if out is None else out
    tile, block = 64, 128
    _low_rank_add[(triton.cdiv(rows, tile), triton.cdiv(size, block))](
        z, b, base, base if also is None else also, y, rows, size, rank, z.stride(0), b.stride(0), b.stride(1),
        second=also is not None, tile=tile, block=block, r=max(16, _power(rank)), num_warps=4,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows"])
def _low_rank_gradients(
    dy, z, b, dz, db, rows, size, rank, z_stride, share,
    tile: tl.constexpr, block: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    start, inner = tl.program_id(1) * share, tl.arange(0, r)
    here, deep = (row < rows)[:, None], (inner < rank)[None, :]
    low = tl.load(z + row[:, None] * z_stride + inner[None, :], mask=here & deep, other=0.0)
    total = tl.zeros((tile, r), tl.float32)
    db += tl.program_id(0).to(tl.int64) * size * rank
    for first in range(start, min(start + share, size), block):
        column = first + tl.arange(0, block)
        across = (column < size)[:, None]
        value = tl.load(
            dy + row[:, None].to(tl.int64) * size + column[None, :], mask=here & (column < size)[None, :], other=0.0
        )
        right = tl.load(b + column[:, None] * rank + inner[None, :], mask=across & deep, other=0.0)
        total = tl.dot(value, right, total, input_precision="ieee")
        part = tl.dot(tl.trans(value), low, input_precision="ieee")
        tl.store(db + column[:, None] * rank + inner[None, :], part, mask=across & deep)
    place = (tl.program_id(1) * rows + row[:, None]) * rank + inner[None, :]
    tl.store(dz + place, total, mask=here & deep)


@triton.jit
def _sum_of_parts(parts, y, first, size, rank, stride, count, factor, block: tl.constexpr):
    place = first * block + tl.arange(0, block)
    inside = place < size
    total = tl.zeros((block,), tl.float32)
    parts += place
    for _ in range(count):
        total += tl.load(parts, mask=inside, other=0.0)
        parts += size
    tl.store(y + (place // rank).to(tl.int64) * stride + place % rank, total * factor, mask=inside)


@triton.jit(do_not_specialize=["dz_size", "dz_programs", "dz_count", "db_count"])
def _sum_gradients(
    dz_parts, db_parts, dz, db, dz_size, db_size, rank, dz_stride, dz_programs, dz_count, db_count, scale,
    block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < dz_programs:
        _sum_of_parts(dz_parts, dz, program, dz_size, rank, dz_stride, dz_count, 1.0, block)
    else:
        _sum_of_parts(db_parts, db, program - dz_programs, db_size, rank, rank, db_count, scale, block)


def low_rank_gradients(dy: Tensor, z: Tensor, b: Tensor, dz: Tensor, scale: float) -> Tensor:
    """dy (N, O), z (N, R) whose rows may be strided, b (O, R) -> scale · dyᵀ z (O, R) fp32; dy b goes into dz (N, R),
    which may be strided. Both from one reading of dy, summed in pieces, always in the same order."""
    (rows, size), rank = dy.shape, b.shape[1]
    wide = dy.dtype != torch.float32
    tile, block, r = 256 if wide else 64, 64, max(16, _power(rank))
    tiles = triton.cdiv(rows, tile)
    share = triton.cdiv(triton.cdiv(size, triton.cdiv(GRADIENT_PROGRAMS, tiles)), block) * block
    splits = triton.cdiv(size, share)
    dz_parts = torch.empty(splits, rows, rank, dtype=torch.float32, device=dy.device)
    db_parts = torch.empty(tiles, size, rank, dtype=torch.float32, device=dy.device)
    _low_rank_gradients[(tiles, splits)](
        dy, z, b, dz_parts, db_parts, rows, size, rank, z.stride(0), share,
        tile=tile, block=block, r=r, num_warps=8, num_stages=3,
    )  # fmt: skip
    db, many = torch.empty(size, rank, dtype=torch.float32, device=dy.device), 512
    dz_programs = triton.cdiv(rows * rank, many)
    _sum_gradients[(dz_programs + triton.cdiv(size * rank, many),)](
        dz_parts, db_parts, dz, db, rows * rank, size * rank, rank, dz.stride(0), dz_programs, splits, tiles, scale,
        block=many, num_warps=4,
    )  # fmt: skip
    return db


GRADIENT_PROGRAMS = 264  # two for each multiprocessor of an H100


# ---------------------------------------------------------------- dropout before the low rank

SEEDS = 2**30  # that `_kept` takes, with room for the keys below 2**31


@triton.jit
def _kept(seed, key, place, first, size, threshold):
    """Whether an element stays for the adapter `key`: a hash of its place, the key and the seed (murmur3's mixer), not
    below the threshold; the same in forward and backward, so that no mask is stored. `place` is counted from the
    stream's row `first`, so that a tile of tokens has the masks that it has in the whole."""
    h = (place + tl.cast(first, tl.int64) * size).to(tl.uint32) * 0x9E3779B1
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) ^ (seed + key * 7919).to(tl.uint32)
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    h = h ^ (h >> 16)
    return (h & 0xFFFFFF) >= threshold


@triton.jit(do_not_specialize=["key", "first", "rows"])
def _dropped_down(
    x, a, z, seeds, key, first, rows, size, rank, z_stride, threshold, keep_scale,
    tile: tl.constexpr, block: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    which, seed = tl.program_id(1), tl.load(seeds).to(tl.int32)
    inner = tl.arange(0, r)
    total = tl.zeros((tile, r), tl.float32)
    for start in range(0, size, block):
        column = start + tl.arange(0, block)
        place = row[:, None].to(tl.int64) * size + column[None, :]
        value = tl.load(x + place, mask=(row < rows)[:, None] & (column < size)[None, :], other=0.0)
        value = tl.where(_kept(seed, key + which, place, first, size, threshold), value, 0.0).to(value.dtype)
        right = tl.load(a + which * rank * size + inner[None, :] * size + column[:, None], mask=(inner < rank)[None, :] & (column < size)[:, None], other=0.0)  # fmt: skip  # noqa: E501
        total = tl.dot(value, right, total, input_precision="ieee")
    place = z + row[:, None] * z_stride + which * rank + inner[None, :]
    tl.store(place, total * keep_scale, mask=(row < rows)[:, None] & (inner < rank)[None, :])


@triton.jit(do_not_specialize=["key", "first", "rows"])
def _dropped_up(
    dz, a, dx, seeds, key, first, rows, size, rank, count, z_stride, threshold, keep_scale,
    tile: tl.constexpr, block: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inner = tl.arange(0, r)
    place = row[:, None].to(tl.int64) * size + column[None, :]
    total = tl.zeros((tile, block), tl.float32)
    seed = tl.load(seeds).to(tl.int32)
    for which in range(count):
        left = tl.load(dz + row[:, None] * z_stride + which * rank + inner[None, :], mask=(row < rows)[:, None] & (inner < rank)[None, :], other=0.0)  # fmt: skip  # noqa: E501
        right = tl.load(a + which * rank * size + inner[:, None] * size + column[None, :], mask=(inner < rank)[:, None] & (column < size)[None, :], other=0.0)  # fmt: skip  # noqa: E501
        value = tl.dot(left, right, input_precision="ieee")
        total += tl.where(_kept(seed, key + which, place, first, size, threshold), value * keep_scale, 0.0)
    tl.store(dx + place, total, mask=(row < rows)[:, None] & (column < size)[None, :])


@triton.jit(do_not_specialize=["key", "first", "rows", "chunk"])
def _dropped_a(
    dz, x, parts, seeds, key, first, rows, size, rank, z_stride, chunk, threshold, keep_scale, count,
    tile: tl.constexpr, block: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * block + tl.arange(0, block)
    split, which, seed = tl.program_id(1), tl.program_id(2), tl.load(seeds).to(tl.int32)
    inner = tl.arange(0, r)
    total = tl.zeros((r, block), tl.float32)
    for start in range(split * chunk, min(rows, (split + 1) * chunk), tile):
        row = start + tl.arange(0, tile)
        place = row[:, None].to(tl.int64) * size + column[None, :]
        value = tl.load(x + place, mask=(row < rows)[:, None] & (column < size)[None, :], other=0.0)
        value = tl.where(_kept(seed, key + which, place, first, size, threshold), value, 0.0).to(value.dtype)
        left = tl.load(dz + row[None, :] * z_stride + which * rank + inner[:, None], mask=(row < rows)[None, :] & (inner < rank)[:, None], other=0.0)  # fmt: skip  # noqa: E501
        total = tl.dot(left, value, total, input_precision="ieee")
    place = parts + ((split * count + which) * rank + inner[:, None]) * size + column[None, :]
    tl.store(place, total * keep_scale, mask=(inner < rank)[:, None] & (column < size)[None, :])


@triton.jit(do_not_specialize=["key", "first", "which"])
def _dropped(x, y, seeds, key, first, which, size, threshold, keep_scale, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    place = row * size + column
    seed = tl.load(seeds).to(tl.int32)
    value = tl.load(x + place, mask=column < size, other=0.0).to(tl.float32)
    tl.store(
        y + place,
        tl.where(_kept(seed, key + which, place, first, size, threshold), value * keep_scale, 0.0),
        mask=column < size,
    )


def _threshold(p: float) -> int:
    return round(p * 2**24)


def dropped(x: Tensor, seed: Tensor, key: int, first: int, which: int, p: float) -> Tensor:
    """dropout(x) of adapter `which`, (N, I): for ranks that the kernels above do not hold."""
    y, size = torch.empty_like(x), x.shape[1]
    _dropped[(len(x), triton.cdiv(size, 1024))](
        x, y, seed, key, first, which, size, _threshold(p), 1 / (1 - p), block=1024
    )
    return y


def dropped_down(x: Tensor, a: Tensor, seed: Tensor, key: int, first: int, p: float) -> Tensor:
    """z (N, J·R): for each of J adapters dropout_j(x) aᵀ_j. x (N, I), the stream's rows from `first` on, a (J, R, I),
    seed (1,) int64 on the device and key, the first adapter's number: the same in each of the three."""
    (rows, size), (count, rank, _) = x.shape, a.shape
    z = torch.empty(rows, count * rank, dtype=x.dtype, device=x.device)
    tile, block = 32, 128
    _dropped_down[(triton.cdiv(rows, tile), count)](
        x, a, z, seed, key, first, rows, size, rank, count * rank, _threshold(p), 1 / (1 - p),
        tile=tile, block=block, r=max(16, _power(rank)), num_warps=4, num_stages=4,
    )  # fmt: skip
    return z


def dropped_up(dz: Tensor, a: Tensor, seed: Tensor, key: int, first: int, p: float) -> Tensor:
    """dx (N, I): the sum over J of the mask of j times dz_j a_j. dz (N, J·R)."""
    rows, (count, rank, size) = len(dz), a.shape
    dx = torch.empty(rows, size, dtype=dz.dtype, device=dz.device)
    tile, block = 64, 128
    _dropped_up[(triton.cdiv(rows, tile), triton.cdiv(size, block))](
        dz, a, dx, seed, key, first, rows, size, rank, count, count * rank, _threshold(p), 1 / (1 - p),
        tile=tile, block=block, r=max(16, _power(rank)), num_warps=4,
    )  # fmt: skip
    return dx


def dropped_a(dz: Tensor, x: Tensor, seed: Tensor, key: int, first: int, p: float, count: int) -> Tensor:
    """dA (J, R, I) fp32: dz_jᵀ dropout_j(x), summed in pieces of tokens, always in the same order."""
    rows, size = x.shape
    rank = dz.shape[1] // count
    tile, block = 32, 128
    splits = max(1, min(16, rows // 512))
    chunk = triton.cdiv(triton.cdiv(rows, splits), tile) * tile
    parts = torch.empty(splits, count, rank, size, dtype=torch.float32, device=x.device)
    _dropped_a[(triton.cdiv(size, block), splits, count)](
        dz, x, parts, seed, key, first, rows, size, rank, count * rank, chunk, _threshold(p), 1 / (1 - p), count,
        tile=tile, block=block, r=max(16, _power(rank)), num_warps=4,
    )  # fmt: skip
    return parts.sum(0)


# ---------------------------------------------------------------- 4 bits


@triton.jit
def _dequantize(
    packed, absmax, code, nested_absmax, nested_code, offset, y, size, nested: tl.constexpr, blocks: tl.constexpr
):
    """`blocks` blocks of 64 weights a program; a byte holds two, the first in its high half."""
    block = tl.program_id(0).to(tl.int64) * blocks + tl.arange(0, blocks)
    known = block * 64 < size
    if nested:
        index = tl.load(absmax + block, mask=known, other=0).to(tl.int32)
        scale = tl.load(nested_code + index) * tl.load(nested_absmax + block // 256, mask=known, other=0.0)
        scale += tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=known, other=0.0)
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    pair = tl.load(packed + byte, mask=byte * 2 < size, other=0).to(tl.int32)
    high = tl.load(code + (pair >> 4)) * scale[:, None]
    low = tl.load(code + (pair & 15)) * scale[:, None]
    value = tl.interleave(high, low)
    place = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(y + place, value, mask=place < size)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight (O, I) of bitsandbytes' NF4 or FP4 in blocks of 64; `nested`: absmax and code of the absmax in blocks
    of 256, and its offset."""
    y = torch.empty(shape, dtype=dtype, device=packed.device)
    size, blocks = y.numel(), 32
    inner = nested or (absmax, code, code)
    _dequantize[(triton.cdiv(size, 64 * blocks),)](
        packed, absmax, code, *inner, y, size, nested=nested is not None, blocks=blocks, num_warps=4
    )
    return y


# ---------------------------------------------------------------- 8 bits


@triton.jit
def _scaled_part(x, columns, row, size, scaled: tl.constexpr, block: tl.constexpr):
    column = tl.arange(0, block)
    inside = column < size
    value = tl.load(x + row * size + column, mask=inside, other=0.0).to(tl.float32)
    if scaled:
        value *= tl.load(columns + column, mask=inside, other=0.0)
    return value


@triton.jit
def _quantize_rows(
    x0, x1, x2, columns0, columns1, columns2, y, scales, size0, size1, size2,
    count: tl.constexpr, scaled: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    first = _scaled_part(x0, columns0, row, size0, scaled, block)
    top = tl.max(tl.abs(first), 0)
    width = size0
    if count > 1:
        second = _scaled_part(x1, columns1, row, size1, scaled, block)
        top = tl.maximum(top, tl.max(tl.abs(second), 0))
        width += size1
    if count > 2:
        third = _scaled_part(x2, columns2, row, size2, scaled, block)
        top = tl.maximum(top, tl.max(tl.abs(third), 0))
        width += size2
    top = tl.maximum(top, 1e-12)
    tl.store(scales + row, top / 448.0)
    scale = 448.0 / top
    y += row * width
    tl.store(y + column, (first * scale).to(tl.float8e4nv), mask=column < size0)
    if count > 1:
        tl.store(y + size0 + column, (second * scale).to(tl.float8e4nv), mask=column < size1)
    if count > 2:
        tl.store(y + size0 + size1 + column, (third * scale).to(tl.float8e4nv), mask=column < size2)


def quantize_rows(xs: Sequence[Tensor], columns: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Up to three x (N, I_j), each column first times its `columns` (I_j,) fp32, side by side in fp8 (N, ΣI), and the
    scale of each row (N, 1) fp32."""
    rows, sizes = len(xs[0]), [x.shape[1] for x in xs]
    y = torch.empty(rows, sum(sizes), dtype=torch.float8_e4m3fn, device=xs[0].device)
    scales, block = torch.empty(rows, 1, dtype=torch.float32, device=xs[0].device), _power(max(sizes))
    three = [*xs, xs[0], xs[0]][:3]
    factors = [*columns, columns[0], columns[0]][:3] if columns else [scales] * 3
    widths = [*sizes, 0, 0][:3]
    _quantize_rows[(rows,)](
        *three, *factors, y, scales, *widths,
        count=len(xs), scaled=columns is not None, block=block, num_warps=min(16, max(1, block // 1024)),
    )  # fmt: skip
    return y, scales


@triton.jit
def _transpose(x, y, rows, size, stride, tile: tl.constexpr):
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    value = tl.load(x + row[:, None].to(tl.int64) * size + column[None, :], mask=inside)
    tl.store(y + column[:, None].to(tl.int64) * stride + row[None, :], tl.trans(value), mask=tl.trans(inside))


def transpose_bytes(xs: Sequence[Tensor]) -> Tensor:
    """Matrices (O_j, I) of one-byte values, one below the other, as (I, ΣO)."""
    size, total = xs[0].shape[1], sum(len(x) for x in xs)
    y = torch.empty(size, total, dtype=torch.uint8, device=xs[0].device)
    tile, start = 128, 0
    for x in xs:
        grid = (triton.cdiv(len(x), tile), triton.cdiv(size, tile))
        _transpose[grid](x.view(torch.uint8), y[:, start:], len(x), size, total, tile=tile, num_warps=8)
        start += len(x)
    return y.view(xs[0].dtype)
