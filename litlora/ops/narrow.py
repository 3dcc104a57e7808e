"""Triton kernels of the weights' narrow formats: 4 bits made wide, 8-bit floats rounded and turned round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from litlora.ops.low_rank import power

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
        scale = tl.load(absmax + block, mask=known, other=0.0).to(tl.float32)
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
def store_scale(scales, row, top):
    """The scale of a row whose largest magnitude is `top`; what the row is to be multiplied by."""
    top = tl.maximum(top, 1e-12)
    tl.store(scales + row, top / 448.0)
    return 448.0 / top


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
    scale = store_scale(scales, row, top)
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
    scales, block = torch.empty(rows, 1, dtype=torch.float32, device=xs[0].device), power(max(sizes))
    three = [*xs, xs[0], xs[0]][:3]
    factors = [*columns, columns[0], columns[0]][:3] if columns else [scales] * 3
    widths = [*sizes, 0, 0][:3]
    _quantize_rows[(rows,)](
        *three, *factors, y, scales, *widths,
        count=len(xs), scaled=columns is not None, block=block, num_warps=min(4, max(1, block // 1024)),
    )  # fmt: skip
    return y, scales


@triton.jit
def _transpose(x, y, rows, width, stride, tile: tl.constexpr):
    """In words of four bytes: x (rows, width) to y (4 · width, stride), of which rows / 4 are written. A thread turns
    four words of four rows; what is left to turn are words."""
    row = tl.program_id(0) * tile + tl.arange(0, tile)  # each of four
    word = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = (4 * row < rows)[:, None] & (word < width)[None, :]
    x += 4 * row[:, None].to(tl.int64) * width + word[None, :]
    a, b = tl.load(x, mask=inside, other=0), tl.load(x + width, mask=inside, other=0)
    c, d = tl.load(x + 2 * width, mask=inside, other=0), tl.load(x + 3 * width, mask=inside, other=0)
    y += 4 * word[:, None].to(tl.int64) * stride + row[None, :]
    for byte in tl.static_range(4):
        low = (a >> 8 * byte & 255) | (b >> 8 * byte & 255) << 8
        turned = low | (c >> 8 * byte & 255) << 16 | (d >> 8 * byte & 255) << 24
        tl.store(y + byte * stride, tl.trans(turned), mask=tl.trans(inside))


def transpose_bytes(xs: Sequence[Tensor]) -> Tensor:
    """Matrices (O_j, I) of one-byte values, one below the other, as (I, ΣO). All O_j and I are multiples of 4."""
    size, total = xs[0].shape[1], sum(len(x) for x in xs)
    y = torch.empty(size, total // 4, dtype=torch.int32, device=xs[0].device)
    tile, start = 32, 0
    for x in xs:
        grid = (triton.cdiv(len(x), 4 * tile), triton.cdiv(size, 4 * tile))
        _transpose[grid](x.view(torch.int32), y[:, start:], len(x), size // 4, total // 4, tile=tile, num_warps=4)
        start += len(x) // 4
    return y.view(xs[0].dtype)
