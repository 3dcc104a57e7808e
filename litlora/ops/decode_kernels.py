"""Triton kernels of a decode step: the linears of a few rows at the speed at which their weights can be read, with what
lies between two linears (norm, residual stream, SwiGLU, adapters) in the same kernels.

What reads its weights once is bound by that, so a kernel may begin before the one in front of it has ended, and asks
for its first weights before it waits for it (`pdl`: programmatic dependent launch).

A norm takes no kernel: who writes the residual stream x also writes x · weight and the sums of x² by block; who reads
them multiplies its result by 1/rms.
Sizes: R rows (a power of two, 16 at most), I in, O out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from litlora.ops.decode_products import _asked, _product

MOST_ROWS = 16
STORE, ADD, GATED = 0, 1, 2  # what becomes of a product: stored; added to the residual stream; SwiGLU of two
AT_END, AT_ONCE, HALFWAY = 0, 1, 2  # when a kernel lets the next one begin; halfway: after its first product
RANKS = 16  # of adapters at a time


@triton.jit
def _fetch_ahead(w, row_bytes, piece, first, rows, tile_o: tl.constexpr, pieces: tl.constexpr):
    """A program's rows into the L2 cache, each in `pieces`, while the kernel before this one leaves the memory idle."""
    lane = tl.arange(0, tile_o * pieces)
    row = tl.minimum(first + lane // pieces, rows - 1).to(tl.int64)
    place = w.to(tl.int64) + row * row_bytes + tl.minimum(lane % pieces * piece, row_bytes - piece)
    asm: tl.constexpr = "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l,r", [place, piece], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _order(place, size, layout: tl.constexpr):
    """Where element `place` of a row of `size` lies."""
    # no early `return`: what is behind one in a branch taken at compile time would be compiled, too
    if layout == 1:
        place = place - place % 8 + tl.where(place % 2 == 1, place % 8 // 2, 4 + place % 8 // 2)
    elif layout == 2:
        place = place % 8 * (size // 8) + place // 8
    return place


@triton.jit
def _inverse_rms(sums, blocks, size, eps, r: tl.constexpr, blocks_block: tl.constexpr):
    """(R, 1) of the rows whose squares are summed by block in `sums` (R, blocks)."""
    row, block = tl.arange(0, r), tl.arange(0, blocks_block)
    parts = tl.load(sums + row[:, None] * blocks + block[None], mask=(block < blocks)[None], other=0.0)
    return tl.rsqrt(tl.sum(parts, 1) / size + eps)[:, None]


@triton.jit
def _up(
    z, b, first, rows, rank, offset, ranks, factor,
    r: tl.constexpr, tile_o: tl.constexpr, parts: tl.constexpr, most: tl.constexpr, step: tl.constexpr, like,
):  # fmt: skip
    """(R, tile_o): factor · z Bᵀ, z (parts, R, ranks) summed over its parts, the adapter's own from `offset` on."""
    row = tl.minimum(first + tl.arange(0, tile_o), rows - 1).to(tl.int64)
    slot, part, inner = tl.arange(0, r), tl.arange(0, parts), tl.arange(0, step)
    total = tl.zeros((r, tile_o), tl.float32)
    for start in tl.static_range(0, most, step):
        known = start + inner < rank
        place = (part[:, None, None] * r + slot[None, :, None]) * ranks + offset + start + inner[None, None]
        low = tl.sum(tl.load(z + place, mask=known[None, None], other=0.0), 0)
        up = tl.load(b + row[:, None] * rank + start + inner[None], mask=known[None], other=0.0)
        low, up = low.to(like.dtype.element_ty), up.to(like.dtype.element_ty)  # as the products of the adapter alone
        total += tl.sum(low[:, None].to(tl.float32) * up[None].to(tl.float32), 2)
    return total * factor


@triton.jit(do_not_specialize=["blocks", "rank0", "rank1", "rank2", "rows0", "rows1", "rows2"])
def _linear(
    x, sums, blocks, eps, w0, w1, w2, s0, s1, s2, n0, n1, n2, o0, o1, o2, code, table, bias,
    z, b0, b1, b2, rank0, rank1, rank2, f0, f1, f2, y, residual, norm_weight, new_sums, size, rows0, rows1, rows2,
    row_bytes, piece,
    mode: tl.constexpr, form: tl.constexpr, nested: tl.constexpr, asm: tl.constexpr, operands: tl.constexpr,
    mine: tl.constexpr, norm: tl.constexpr, biased: tl.constexpr, most: tl.constexpr, parts: tl.constexpr,
    step: tl.constexpr, r: tl.constexpr, m: tl.constexpr, splits: tl.constexpr, tile_o: tl.constexpr,
    tile_i: tl.constexpr, stages: tl.constexpr, lead: tl.constexpr, even: tl.constexpr, steady: tl.constexpr,
    blocks_block: tl.constexpr, layout: tl.constexpr, pdl: tl.constexpr, starts: tl.constexpr, pieces: tl.constexpr,
    flat: tl.constexpr,
):  # fmt: skip
    """Up to three linears over one x, or two and their SwiGLU, or one and the residual stream: see `decode_linear`."""
    if starts == 1:
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(rows0, tile_o), tl.cdiv(rows1, tile_o)
    w, s, n, o, b, rows, rank, factor, offset, before = w0, s0, n0, o0, b0, rows0, rank0, f0, 0, 0
    local = number
    if mode == 0:
        if number >= blocks0 + blocks1:
            w, s, n, o, b, rows, rank, factor = w2, s2, n2, o2, b2, rows2, rank2, f2
            offset, before, local = rank0 + rank1, rows0 + rows1, number - blocks0 - blocks1
        elif number >= blocks0:
            w, s, n, o, b, rows, rank, factor = w1, s1, n1, o1, b1, rows1, rank1, f1
            offset, before, local = rank0, rows0, number - blocks0
    first = local * tile_o
    if pieces:
        _fetch_ahead(w, row_bytes, piece, first, rows, tile_o, pieces)
    ahead, absmax, nested_absmax = _asked(w, s, n, first, rows, size, form, nested, r, splits, tile_o, tile_i, lead)
    if mode == 2 and form == 2:  # of other formats a tile is too large to be kept for so long
        ahead1, absmax1, nested1 = _asked(w1, s1, n1, first, rows, size, form, nested, r, splits, tile_o, tile_i, lead)
    if pdl:
        tl.extra.cuda.gdc_wait()
    column = first + tl.arange(0, tile_o)
    valid, row = (column < rows)[None], tl.arange(0, r)[:, None]
    ranks = rank0 + rank1 + rank2
    # before the product, during which they arrive
    if norm:
        scale = _inverse_rms(sums, blocks, size, eps, r, blocks_block)
    if mode == 1:
        place = residual + row * rows + column[None]
        old = tl.load(place, mask=valid, other=0.0)
        weight = tl.load(norm_weight + column, mask=column < rows, other=0.0).to(tl.float32)[None]
    total = _product(
        ahead, absmax, nested_absmax, x, w, s, n, code, o, table, first, rows, size,
        form, nested, asm, operands, mine, r, m, splits, tile_o, tile_i, stages, lead, even, steady, flat,
    )  # fmt: skip
    if starts == 2:
        tl.extra.cuda.gdc_launch_dependents()
    if most:
        total += _up(z, b, first, rows, rank, offset, ranks, factor, r, tile_o, parts, most, step, x)
    if norm:
        total *= scale
    if biased:
        total += tl.load(bias + before + column, mask=column < rows, other=0.0).to(tl.float32)[None]
    if mode == 2:
        if form != 2:
            ahead1, absmax1, nested1 = _asked(
                w1, s1, n1, first, rows, size, form, nested, r, splits, tile_o, tile_i, lead
            )
        other = _product(
            ahead1, absmax1, nested1, x, w1, s1, n1, code, o1, table, first, rows, size,
            form, nested, asm, operands, mine, r, m, splits, tile_o, tile_i, stages, lead, even, steady, flat,
        )  # fmt: skip
        if most:
            other += _up(z, b1, first, rows, rank1, rank0, ranks, f1, r, tile_o, parts, most, step, x)
        if norm:
            other *= scale
        if biased:
            other += tl.load(bias + rows0 + column, mask=column < rows, other=0.0).to(tl.float32)[None]
        tl.store(y + row * rows + _order(column, rows, layout)[None], total * tl.sigmoid(total) * other, mask=valid)
    elif mode == 1:
        new = (total + old.to(tl.float32)).to(old.dtype)
        tl.store(place, new, mask=valid)
        new = new.to(tl.float32)
        tl.store(y + row * rows + _order(column, rows, layout)[None], new * weight, mask=valid)
        squares = tl.sum(tl.where(valid, new * new, 0.0), 1)
        tl.store(new_sums + tl.arange(0, r) * blocks0 + number, squares)
    else:
        tl.store(y + row * (rows0 + rows1 + rows2) + before + column[None], total, mask=valid)


@triton.jit(do_not_specialize=["rank0", "rank1", "rank2"])
def _down(
    x, a0, a1, a2, rank0, rank1, rank2, z, size,
    r: tl.constexpr, m: tl.constexpr, parts: tl.constexpr, tile_i: tl.constexpr, layout: tl.constexpr,
    step: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    """z (parts, R, ranks) = x Aᵀ, each part of the columns by itself; `step` rows of one A a program."""
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
    number, part = tl.program_id(0), tl.program_id(1)
    blocks0, blocks1 = tl.cdiv(rank0, step), tl.cdiv(rank1, step)
    a, rank, offset = a0, rank0, 0
    if number >= blocks0 + blocks1:
        a, rank, offset, number = a2, rank2, rank0 + rank1, number - blocks0 - blocks1
    elif number >= blocks0:
        a, rank, offset, number = a1, rank1, rank0, number - blocks0
    inner, slot, lane = number * step + tl.arange(0, step), tl.arange(0, m), tl.arange(0, tile_i)
    width = tl.cdiv(size, parts * tile_i) * tile_i
    if pdl:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((m, step), tl.float32)
    for start in range(part * width, tl.minimum(size, (part + 1) * width), tile_i):
        column = start + lane
        known = column < size
        value = tl.load(x + slot[:, None] * size + column[None], mask=(slot < r)[:, None] & known[None], other=0.0)
        if layout == 1:
            column = start + lane - lane % 8 + tl.where(lane % 8 < 4, 2 * (lane % 8) + 1, 2 * (lane % 8) - 8)
        elif layout == 2:
            column = column % (size // 8) * 8 + column // (size // 8)
        down = tl.load(a + inner[:, None] * size + column[None], mask=(inner < rank)[:, None] & known[None], other=0.0)
        total = tl.dot(value, tl.trans(down.to(value.dtype)), total, input_precision="ieee")
    place = z + (part * r + slot[:, None]) * (rank0 + rank1 + rank2) + offset + inner[None]
    tl.store(place, total, mask=(slot < r)[:, None] & (inner < rank)[None])


@triton.jit
def _embed(tokens, table, norm_weight, residual, y, sums, size, layout: tl.constexpr, block: tl.constexpr, pdl: tl.constexpr):  # fmt: skip  # noqa: E501
    """The residual stream's beginning: one program a row."""
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    token = tl.maximum(tl.load(tokens + row), 0)  # what is no token is seen by its reader
    column = tl.arange(0, block)
    inside = column < size
    value = tl.load(table + token * size + column, mask=inside, other=0.0)
    tl.store(residual + row * size + column, value, mask=inside)
    value = value.to(tl.float32)
    weight = tl.load(norm_weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + _order(column, size, layout), value * weight, mask=inside)
    tl.store(sums + row, tl.sum(value * value, 0))
