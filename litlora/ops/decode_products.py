"""Triton device functions: x times rows of a weight in 16, 8 or 4 bits, for a few rows of x.

A product comes in two halves: `_asked` asks for the first weights, which do not depend on x; `_product` goes on from
there. It runs on tensor cores, rows padded to 16, or plainly where there is one; it is summed in fp32.
Sizes: R rows (a power of two, 16 at most), I in, O out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from litlora.ops.decode_four_bit import _four_bit, _four_bit_row, _places, _row_places

DENSE, FP8, FOUR_BIT = 0, 1, 2


@triton.jit
def _dense(
    ahead, x, w, first, rows, size, r: tl.constexpr, m: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
    stages: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """(R, tile_o): x times rows of W, fp32."""
    row = tl.minimum(first + tl.arange(0, tile_o), rows - 1).to(tl.int64)
    column, slot = tl.arange(0, tile_i), tl.arange(0, m)
    places = w + row[:, None] * size + column[None]
    here = x + slot[:, None] * size + column[None]
    given = (slot < r)[:, None]
    value = tl.load(here, mask=given & (column[None] < size), other=0.0)
    # from fp8 by way of fp32: straight is slower
    total = tl.dot(value, tl.trans(ahead.to(tl.float32).to(value.dtype)), input_precision="ieee")
    for start in tl.range(tile_i, size, tile_i, num_stages=stages):
        if even:
            tile = tl.load(places + start)
            value = tl.load(here + start, mask=given, other=0.0)
        else:
            tile = tl.load(places + start, mask=start + column[None] < size, other=0.0)
            value = tl.load(here + start, mask=given & (start + column[None] < size), other=0.0)
        total = tl.dot(value, tl.trans(tile.to(tl.float32).to(value.dtype)), total, input_precision="ieee")
    return tl.sum(tl.reshape(total, (m // r, r, tile_o)), 0)


@triton.jit
def _dense_row(
    ahead, second, x, w, first, rows, size, tile_o: tl.constexpr, tile_i: tl.constexpr, stages: tl.constexpr,
    lead: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    """(1, tile_o): x (1, I) times rows of W, fp32, without tensor cores: nothing is padded."""
    row = tl.minimum(first + tl.arange(0, tile_o), rows - 1).to(tl.int64)
    column = tl.arange(0, tile_i)[None]
    places = w + row[:, None] * size + column
    piece: tl.constexpr = 8  # that a thread has, and sums itself
    given = tl.load(x + column, mask=column < size, other=0.0)
    total = _pieces(ahead, given, piece)
    if lead == 2:
        given = tl.load(x + tile_i + column, mask=tile_i + column < size, other=0.0)
        total += _pieces(second, given, piece)
    for start in tl.range(lead * tile_i, size, tile_i, num_stages=stages):
        if even:
            tile = tl.load(places + start)
            value = tl.load(x + start + column)
        else:
            tile = tl.load(places + start, mask=start + column < size, other=0.0)
            value = tl.load(x + start + column, mask=start + column < size, other=0.0)
        total += _pieces(tile, value, piece)
    return tl.sum(total, 1)[None]


@triton.jit
def _pieces(w, x, piece: tl.constexpr):
    """w (O, I) times x (1, I), summed by pieces (O, I / piece)."""
    product = w.to(tl.float32) * x.to(tl.float32)
    return tl.sum(tl.reshape(product, (w.shape[0], w.shape[1] // piece, piece)), 2)


@triton.jit
def _asked(
    w, s, n, first, rows, size,
    form: tl.constexpr, nested: tl.constexpr, r: tl.constexpr, splits: tl.constexpr, tile_o: tl.constexpr,
    tile_i: tl.constexpr, lead: tl.constexpr,
):  # fmt: skip
    """The first weights of a product, which do not depend on its x: words and their scales, or `lead` tiles."""
    if form == 2:
        if r == 1:
            places, word, scaled = _row_places(w, first, rows, size, tile_o, tile_i)
            end = size // 8
        else:
            places, word, end, scaled = _places(w, first, rows, size, splits, tile_o, tile_i)
        ahead = tl.load(places, mask=word < end, other=0)
        at = tl.minimum(scaled, rows * (size // 64) - 1)
        absmax = tl.load(s + at)
        nested_absmax = absmax
        if nested:
            nested_absmax = tl.load(n + at // 256)
    else:
        row = tl.minimum(first + tl.arange(0, tile_o), rows - 1).to(tl.int64)
        column = tl.arange(0, tile_i)[None]
        places = w + row[:, None] * size + column
        ahead = tl.load(places, mask=column < size, other=0.0)
        absmax, nested_absmax = 0, 0
        if lead == 2:
            absmax = tl.load(places + tile_i, mask=tile_i + column < size, other=0.0)
    return ahead, absmax, nested_absmax


@triton.jit
def _product(
    ahead, absmax, nested_absmax, x, w, s, n, code, o, table, first, rows, size,
    form: tl.constexpr, nested: tl.constexpr, asm: tl.constexpr, operands: tl.constexpr, mine: tl.constexpr,
    r: tl.constexpr, m: tl.constexpr, splits: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
    stages: tl.constexpr, lead: tl.constexpr, even: tl.constexpr, steady: tl.constexpr, flat: tl.constexpr,
):  # fmt: skip
    """(R, tile_o): x times rows of W, fp32, from what `_asked` gave on. `even`: tiles fill the columns; `steady`: a
    row has one nested scale."""
    if form == 2:
        if r == 1:
            total = _four_bit_row(
                ahead, absmax, nested_absmax, x, w, s, n, code, o, table, first, rows, size,
                nested, asm, operands, mine, tile_o, tile_i, even, steady,
            )  # fmt: skip
        else:
            total = _four_bit(
                ahead, absmax, nested_absmax, x, w, s, n, code, o, table, first, rows, size,
                nested, asm, operands, r, m, splits, tile_o, tile_i,
            )  # fmt: skip
    elif flat:
        total = _dense_row(ahead, absmax, x, w, first, rows, size, tile_o, tile_i, stages, lead, even)
    else:
        total = _dense(ahead, x, w, first, rows, size, r, m, tile_o, tile_i, stages, even)
    if form == 1:
        column = first + tl.arange(0, tile_o)
        total *= tl.load(s + column, mask=column < rows, other=0.0)[None]
    return total
