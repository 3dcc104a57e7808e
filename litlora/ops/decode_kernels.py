"""Triton kernels of a decode step: the linears of a few rows at the speed at which their weights can be read, with what
lies between two linears (norm, residual stream, SwiGLU, adapters) in the same kernels.

What reads its weights once is bound by that, so every kernel asks for its first weights before it waits for the kernel
before it (`pdl`: programmatic dependent launch). Products run on tensor cores, rows padded to 16, summed in fp32.

A norm takes no kernel: who writes the residual stream x also writes x · weight and the sums of x² by block; who reads
them multiplies its result by 1/rms. Inputs of 4-bit linears lie as their weights unpack: several rows in EIGHTS, each
eight of them in ORDER; a row alone in PLANES, all first ones of the eights, then all second ones.
Sizes: R rows (a power of two, 16 at most), I in, O out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 16
DENSE, FP8, FOUR_BIT = 0, 1, 2
STORE, ADD, GATED = 0, 1, 2  # what becomes of a product: stored; added to the residual stream; SwiGLU of two
RANKS = 16  # of adapters at a time
BLOCK = 64  # weights that share an absmax
ORDER = (1, 3, 5, 7, 0, 2, 4, 6)  # of eight 4-bit weights once unpacked: a byte's first one is in its high half
PLAIN, EIGHTS, PLANES = 0, 1, 2  # how an input lies


# ---------------------------------------------------------------- 4 bits


def unpacking() -> str:
    """PTX: a word of eight 4-bit numbers ($8) to eight 16-bit floats ($0 to $7) by a table of 16 ($9 to $16: the low
    bytes, then the high ones). Two selections of bytes, one for each half of the table, and one between both."""
    lines = [
        "{ .reg .b32 low, high, half_low, half_high, a, b, p, q, r, s;",
        "and.b32 low, $8, 0x77777777;",
        "shr.b32 half_low, $8, 1;",
        "lop3.b32 half_low, half_low, 0x44444444, 0x32103210, 0xEA;",  # (a & b) | c
        "shr.b32 high, low, 16;",
        "shr.b32 half_high, half_low, 16;",
    ]
    for which, planes in (("low", "pq"), ("high", "rs")):
        for plane, out in enumerate(planes):
            first = 9 + 4 * plane
            lines += [
                f"prmt.b32 a, ${first}, ${first + 1}, {which};",
                f"prmt.b32 b, ${first + 2}, ${first + 3}, {which};",
                f"prmt.b32 {out}, a, b, half_{which};",
            ]
    pairs = (("p", "q", "0x6240"), ("r", "s", "0x6240"), ("p", "q", "0x7351"), ("r", "s", "0x7351"))
    for number, (low, high, which) in enumerate(pairs):
        lines += [f"prmt.b32 a, {low}, {high}, {which};", f"mov.b32 {{${2 * number}, ${2 * number + 1}}}, a;"]
    return "\n".join([*lines, "}"])


def asking() -> str:
    """PTX: a word of eight 4-bit numbers ($8) to eight fp32 ($0 to $7) in the weights' own order, each from the lane of
    the warp that holds it ($9: a table of 16 by lane, twice). One exchange a weight takes less time than selecting
    bytes: the units for integers would be busy longer than the memory."""
    lines = ["{ .reg .b32 w;"]
    for place in range(8):
        lines += [f"shr.b32 w, $8, {4 * place};", f"shfl.sync.idx.b32 ${place ^ 1}, $9, w, 0x100f, 0xffffffff;"]
    return "\n".join([*lines, "}"])


MINE = """{ .reg .b32 lane; .reg .b64 place; mov.u32 lane, %laneid; and.b32 lane, lane, 15; mul.wide.u32 place, lane, 4;
add.s64 place, place, $1; ld.global.f32 $0, [place]; }"""  # a lane's number of the table for `asking`
UNPACKING, ASKING = unpacking(), asking()
OPERANDS, OPERANDS_ASKING = "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r", "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,f"


def byte_planes(code: Tensor, dtype: torch.dtype) -> Tensor:
    """The table of `unpacking` (8,) int32 of 16 numbers, rounded to a 16-bit dtype."""
    halves = code.to(dtype).view(torch.int16).view(torch.uint8).view(16, 2)  # low byte, high byte
    return halves.t().contiguous().view(torch.int32).flatten()


@triton.jit
def _looked_up(words, table, shift: tl.constexpr, like):
    return tl.load(table + ((words >> shift) & 15)).to(like.dtype.element_ty)


@triton.jit
def _unpacked(words, table, like, asm: tl.constexpr, operands: tl.constexpr):
    """(O, W) words -> (O, 8 W) weights without scales, each eight in ORDER, in the dtype that `like` points to."""
    if asm is None:
        a, b = _looked_up(words, table, 0, like), _looked_up(words, table, 8, like)
        c, d = _looked_up(words, table, 16, like), _looked_up(words, table, 24, like)
        e, f = _looked_up(words, table, 4, like), _looked_up(words, table, 12, like)
        g, h = _looked_up(words, table, 20, like), _looked_up(words, table, 28, like)
    else:
        t0, t1, t2, t3 = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
        t4, t5, t6, t7 = tl.load(table + 4), tl.load(table + 5), tl.load(table + 6), tl.load(table + 7)
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            asm, operands, [words, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(like.dtype.element_ty,) * 8, is_pure=True, pack=1,
        )  # fmt: skip
    whole = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    return tl.reshape(whole, (words.shape[0], 8 * words.shape[1]))


@triton.jit
def _planes(x, word, plane):
    """Eight (1, W): what the weights of words are multiplied by, from x in PLANES; 0 behind its end."""
    inside, x = word < plane, x + word
    a, b = tl.load(x, mask=inside, other=0.0), tl.load(x + plane, mask=inside, other=0.0)
    c, d = tl.load(x + 2 * plane, mask=inside, other=0.0), tl.load(x + 3 * plane, mask=inside, other=0.0)
    e, f = tl.load(x + 4 * plane, mask=inside, other=0.0), tl.load(x + 5 * plane, mask=inside, other=0.0)
    g, h = tl.load(x + 6 * plane, mask=inside, other=0.0), tl.load(x + 7 * plane, mask=inside, other=0.0)
    return a, b, c, d, e, f, g, h


@triton.jit
def _weighed(words, table, x, number: tl.constexpr):
    return tl.load(table + ((words >> 4 * (number ^ 1)) & 15)) * x.to(tl.float32)


@triton.jit
def _dotted(words, table, mine, x0, x1, x2, x3, x4, x5, x6, x7, asm: tl.constexpr, operands: tl.constexpr):
    """(O, W) words -> (O, W), the sums of their eight weights without scales times what `_planes` gave."""
    if asm is None:
        total = _weighed(words, table, x0, 0) + _weighed(words, table, x1, 1) + _weighed(words, table, x2, 2)
        total += _weighed(words, table, x3, 3) + _weighed(words, table, x4, 4) + _weighed(words, table, x5, 5)
        total += _weighed(words, table, x6, 6) + _weighed(words, table, x7, 7)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            asm, operands, [words, mine], dtype=(tl.float32,) * 8, is_pure=False, pack=1
        )
        total = a * x0.to(tl.float32)
        total += b * x1.to(tl.float32)
        total += c * x2.to(tl.float32)
        total += d * x3.to(tl.float32)
        total += e * x4.to(tl.float32)
        total += f * x5.to(tl.float32)
        total += g * x6.to(tl.float32)
        total += h * x7.to(tl.float32)
    return total


@triton.jit
def _four_bit_row(
    x, words, scales, nested_scales, code, offset, table, first, rows, size,
    nested: tl.constexpr, asm: tl.constexpr, operands: tl.constexpr, mine_asm: tl.constexpr, tile_o: tl.constexpr,
    tile_i: tl.constexpr, wait: tl.constexpr,
):  # fmt: skip
    """(1, tile_o): x (1, I) times rows of W, fp32. For one row there is little to multiply and much to unpack: each
    thread sums what it has unpacked itself, and the main loop passes nothing between threads but a block's sum."""
    blocks: tl.constexpr = tile_i // 64
    row = tl.minimum(first + tl.arange(0, tile_o), rows - 1)
    word, block = tl.arange(0, tile_i // 8)[None], tl.arange(0, blocks)[None]
    plane = tl.multiple_of(size // 8, 8)
    places = words + row.to(tl.int64)[:, None] * plane + word
    scaled, last = row[:, None] * (size // 64) + block, rows * (size // 64) - 1
    following = tl.load(places, mask=word < plane, other=0)
    at = tl.minimum(scaled, last)
    absmax = tl.load(scales + at)
    if nested:
        nested_absmax, shift = tl.load(nested_scales + at // 256), tl.load(offset)
    if wait:
        tl.extra.cuda.gdc_wait()
    mine = 0.0
    if asm is not None:  # no scalar, though the compiler takes it for one: each thread has its own
        mine = tl.inline_asm_elementwise(
            mine_asm, "=f,l", [(table + 8).to(tl.int64)], tl.float32, is_pure=False, pack=1
        )
    # all that a turn of the loop needs was asked for in the turn before it
    x0, x1, x2, x3, x4, x5, x6, x7 = _planes(x, word, plane)
    total = tl.zeros((tile_o, blocks), tl.float32)
    for start in tl.range(0, plane, tile_i // 8, num_stages=1):
        current, ahead = following, start + tile_i // 8
        y0, y1, y2, y3, y4, y5, y6, y7 = x0, x1, x2, x3, x4, x5, x6, x7
        following = tl.load(places + ahead, mask=ahead + word < plane, other=0)
        x0, x1, x2, x3, x4, x5, x6, x7 = _planes(x, ahead + word, plane)
        if nested:
            scale = tl.load(code + absmax.to(tl.int32)) * nested_absmax + shift
        else:
            scale = absmax
        at = tl.minimum(scaled + ahead // 8, last)
        absmax = tl.load(scales + at)
        if nested:
            nested_absmax = tl.load(nested_scales + at // 256)
        sums = _dotted(current, table, mine, y0, y1, y2, y3, y4, y5, y6, y7, asm, operands)
        total += tl.sum(tl.reshape(sums, (tile_o, blocks, 8)), 2) * scale
    return tl.sum(total, 1)[None]


@triton.jit
def _four_bit(
    x, words, scales, nested_scales, code, offset, table, first, rows, size,
    nested: tl.constexpr, asm: tl.constexpr, operands: tl.constexpr, r: tl.constexpr, m: tl.constexpr,
    splits: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr, wait: tl.constexpr,
):  # fmt: skip
    """(R, tile_o): x times rows of W, fp32.

    The scales stay out of the weights: each of the tile's blocks of 64 columns has rows of the padded product of its
    own, which are scaled as a whole. With `splits` parts of the columns have, too, so that all warps have work; what is
    the product of one part of x and another one of W is left out at the end.
    """
    blocks: tl.constexpr = tile_i // 64
    lane, slot = tl.arange(0, splits * tile_o), tl.arange(0, m)
    row = tl.minimum(first + lane % tile_o, rows - 1)
    part = tl.cdiv(size, splits * tile_i) * tile_i  # columns of a split
    left = lane // tile_o * part
    block, split = slot // r % blocks, slot // (r * blocks)
    column, word = tl.arange(0, tile_i), tl.arange(0, tile_i // 8)
    places = words + row.to(tl.int64)[:, None] * (size // 8) + left[:, None] // 8 + word[None]
    end = (size - left)[:, None] // 8
    here = x + (slot % r * size + split * part)[:, None] + column[None]
    mine = (block[:, None] == column[None] // 64) & (split < splits)[:, None]
    x_end = (size - split * part)[:, None]
    scaled = row[:, None] * (size // 64) + left[:, None] // 64 + tl.arange(0, blocks)[None]
    last = rows * (size // 64) - 1
    following = tl.load(places, mask=word[None] < end, other=0)
    at = tl.minimum(scaled, last)
    absmax = tl.load(scales + at)
    if nested:
        nested_absmax, shift = tl.load(nested_scales + at // 256), tl.load(offset)
    if wait:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((m, splits * tile_o), tl.float32)
    for start in tl.range(0, part, tile_i, num_stages=1):
        value = tl.load(here + start, mask=mine & (start + column[None] < x_end), other=0.0)
        current, ahead = following, start + tile_i
        following = tl.load(places + ahead // 8, mask=ahead // 8 + word[None] < end, other=0)
        if nested:
            scale = tl.load(code + absmax.to(tl.int32)) * nested_absmax + shift
        else:
            scale = absmax
        at = tl.minimum(scaled + ahead // 64, last)  # what lies behind a row is multiplied by 0
        absmax = tl.load(scales + at)
        if nested:
            nested_absmax = tl.load(nested_scales + at // 256)
        weight = _unpacked(current, table, x, asm, operands)
        if asm is not None:  # nothing; but the compiler then lays the operand out as if it came from memory, in order
            weight = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weight], dtype=x.dtype.element_ty, is_pure=False, pack=2)  # fmt: skip  # noqa: E501
        scale = tl.broadcast_to(tl.trans(scale)[None, :, None], (m // (blocks * r), blocks, r, splits * tile_o))
        total += tl.dot(value, tl.trans(weight), input_precision="ieee") * tl.reshape(scale, (m, splits * tile_o))
    total = tl.where(split[:, None] == (lane // tile_o)[None], total, 0.0)
    return tl.sum(tl.sum(tl.reshape(total, (m // r, r, splits, tile_o)), 2), 0)


# ---------------------------------------------------------------- 16 and 8 bits


@triton.jit
def _dense(
    x, w, first, rows, size, r: tl.constexpr, m: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
    stages: tl.constexpr, even: tl.constexpr, wait: tl.constexpr,
):  # fmt: skip
    """(R, tile_o): x times rows of W, fp32."""
    row = tl.minimum(first + tl.arange(0, tile_o), rows - 1).to(tl.int64)
    column, slot = tl.arange(0, tile_i), tl.arange(0, m)
    places = w + row[:, None] * size + column[None]
    here = x + slot[:, None] * size + column[None]
    given = (slot < r)[:, None]
    # a tile of its own, so that it is under way while the kernel before this one still runs
    ahead = tl.load(places, mask=column[None] < size, other=0.0)
    if wait:
        tl.extra.cuda.gdc_wait()
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
    x, w, first, rows, size, tile_o: tl.constexpr, tile_i: tl.constexpr, stages: tl.constexpr, even: tl.constexpr,
    wait: tl.constexpr,
):  # fmt: skip
    """(1, tile_o): x (1, I) times rows of W, fp32, without tensor cores: nothing is padded."""
    row = tl.minimum(first + tl.arange(0, tile_o), rows - 1).to(tl.int64)
    column = tl.arange(0, tile_i)[None]
    places = w + row[:, None] * size + column
    ahead = tl.load(places, mask=column < size, other=0.0)  # under way while the kernel before this one still runs
    if wait:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + column, mask=column < size, other=0.0)
    total = ahead.to(tl.float32) * value.to(tl.float32)
    for start in tl.range(tile_i, size, tile_i, num_stages=stages):
        if even:
            tile = tl.load(places + start)
            value = tl.load(x + start + column)
        else:
            tile = tl.load(places + start, mask=start + column < size, other=0.0)
            value = tl.load(x + start + column, mask=start + column < size, other=0.0)
        total += tile.to(tl.float32) * value.to(tl.float32)
    return tl.sum(total, 1)[None]


# ---------------------------------------------------------------- around the products


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
    tile_i: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, blocks_block: tl.constexpr, layout: tl.constexpr,
    pdl: tl.constexpr, pieces: tl.constexpr, flat: tl.constexpr,
):  # fmt: skip
    """Up to three linears over one x, or two and their SwiGLU, or one and the residual stream: see `decode_linear`."""
    if pdl:
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
    if form == 2 and r == 1:
        total = _four_bit_row(x, w, s, n, code, o, table, first, rows, size, nested, asm, operands, mine, tile_o, tile_i, pdl)  # fmt: skip  # noqa: E501
    elif form == 2:
        total = _four_bit(x, w, s, n, code, o, table, first, rows, size, nested, asm, operands, r, m, splits, tile_o, tile_i, pdl)  # fmt: skip  # noqa: E501
    elif flat:
        total = _dense_row(x, w, first, rows, size, tile_o, tile_i, stages, even, pdl)
    else:
        total = _dense(x, w, first, rows, size, r, m, tile_o, tile_i, stages, even, pdl)
    column = first + tl.arange(0, tile_o)
    valid, row = (column < rows)[None], tl.arange(0, r)[:, None]
    ranks = rank0 + rank1 + rank2
    if form == 1:
        total *= tl.load(s + column, mask=column < rows, other=0.0)[None]
    if most:
        total += _up(z, b, first, rows, rank, offset, ranks, factor, r, tile_o, parts, most, step, x)
    if norm:
        scale = _inverse_rms(sums, blocks, size, eps, r, blocks_block)
        total *= scale
    if biased:
        total += tl.load(bias + before + column, mask=column < rows, other=0.0).to(tl.float32)[None]
    if mode == 2:
        if form == 2 and r == 1:
            other = _four_bit_row(x, w1, s1, n1, code, o1, table, first, rows, size, nested, asm, operands, mine, tile_o, tile_i, False)  # fmt: skip  # noqa: E501
        elif form == 2:
            other = _four_bit(x, w1, s1, n1, code, o1, table, first, rows, size, nested, asm, operands, r, m, splits, tile_o, tile_i, False)  # fmt: skip  # noqa: E501
        elif flat:
            other = _dense_row(x, w1, first, rows, size, tile_o, tile_i, stages, even, False)
        else:
            other = _dense(x, w1, first, rows, size, r, m, tile_o, tile_i, stages, even, False)
        if form == 1:
            other *= tl.load(s1 + column, mask=column < rows, other=0.0)[None]
        if most:
            other += _up(z, b1, first, rows, rank1, rank0, ranks, f1, r, tile_o, parts, most, step, x)
        if norm:
            other *= scale
        if biased:
            other += tl.load(bias + rows0 + column, mask=column < rows, other=0.0).to(tl.float32)[None]
        tl.store(y + row * rows + _order(column, rows, layout)[None], total * tl.sigmoid(total) * other, mask=valid)
    elif mode == 1:
        place = residual + row * rows + column[None]
        old = tl.load(place, mask=valid, other=0.0)
        new = (total + old.to(tl.float32)).to(old.dtype)
        tl.store(place, new, mask=valid)
        weight = tl.load(norm_weight + column, mask=column < rows, other=0.0).to(tl.float32)[None]
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
