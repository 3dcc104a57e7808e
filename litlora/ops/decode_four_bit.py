"""Triton device functions: x times rows of a weight in 4 bits, for a few rows of x, and the PTX that unpacks it.

Inputs lie as the weights unpack: several rows in EIGHTS, each eight of them in ORDER; a row alone in PLANES, all first
ones of the eights, then all second ones.
Sizes: R rows (a power of two, 16 at most), I in, O out, W words of eight 4-bit numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # weights that share an absmax
NESTED = 256  # absmax that share one of their own
ORDER = (1, 3, 5, 7, 0, 2, 4, 6)  # of eight 4-bit weights once unpacked: a byte's first one is in its high half
PLAIN, EIGHTS, PLANES = 0, 1, 2  # how an input lies


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


def asking(select: bool) -> str:
    """PTX: two words of eight 4-bit numbers ($16, $17) to eight fp32 each in the weights' own order, those of the first
    word in $0, $2, …, of the second in $1, $3, …

    A number is looked up in the lane of the warp that holds it ($18, $19: a table of 16 by lane, twice). With `select`
    the first four of the first word are selected as `unpacking` does instead, in bf16 (word i of its table is
    $(20 + 2i)): exchanges alone keep their unit busy longer than the memory takes, and so would selections alone.
    """
    lines = ["{ .reg .b32 w, low, half, a, b, p, q;"]
    if select:
        lines += [
            "and.b32 low, $16, 0x7777;",
            "shr.b32 half, $16, 1;",
            "lop3.b32 half, half, 0x4444, 0x3210, 0xEA;",
        ]
        for first, out in ((20, "p"), (28, "q")):
            lines += [
                f"prmt.b32 a, ${first}, ${first + 2}, low;",
                f"prmt.b32 b, ${first + 4}, ${first + 6}, low;",
                f"prmt.b32 {out}, a, b, half;",
            ]
        for pair, which in ((0, "0x5140"), (4, "0x7362")):
            lines += [f"prmt.b32 a, p, q, {which};", "shl.b32 b, a, 16;", f"mov.b32 ${pair + 2}, b;"]
            lines += ["and.b32 b, a, 0xffff0000;", f"mov.b32 ${pair}, b;"]
    for word in range(2):
        for place in range(4 if select and word == 0 else 0, 8):
            lines += [f"shr.b32 w, ${16 + word}, {4 * place};"]
            lines += [f"shfl.sync.idx.b32 ${2 * (place ^ 1) + word}, ${18 + word}, w, 0x100f, 0xffffffff;"]
    return "\n".join([*lines, "}"])


MINE = """{ .reg .b32 lane; .reg .b64 place; mov.u32 lane, %laneid; and.b32 lane, lane, 15; mul.wide.u32 place, lane, 4;
add.s64 place, place, $1; ld.global.f32 $0, [place]; }"""  # a lane's number of the table for `asking`
UNPACKING, OPERANDS = unpacking(), "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r,r,r,r"
ASKING = {torch.bfloat16: asking(select=True), torch.float16: asking(select=False)}
OPERANDS_ASKING = ",".join(["=&f"] * 16 + ["r"] * 2 + ["f"] * 2 + ["r"] * 16)


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
def _planes(x, word, plane, even: tl.constexpr):
    """Eight (W, 1): what the weights of words are multiplied by, from x in PLANES. `even`: none is behind its end,
    where it is 0."""
    x += word
    if even:
        a, b, c, d = tl.load(x), tl.load(x + plane), tl.load(x + 2 * plane), tl.load(x + 3 * plane)
        e, f, g, h = tl.load(x + 4 * plane), tl.load(x + 5 * plane), tl.load(x + 6 * plane), tl.load(x + 7 * plane)
    else:
        inside = word < plane
        a, b = tl.load(x, mask=inside, other=0.0), tl.load(x + plane, mask=inside, other=0.0)
        c, d = tl.load(x + 2 * plane, mask=inside, other=0.0), tl.load(x + 3 * plane, mask=inside, other=0.0)
        e, f = tl.load(x + 4 * plane, mask=inside, other=0.0), tl.load(x + 5 * plane, mask=inside, other=0.0)
        g, h = tl.load(x + 6 * plane, mask=inside, other=0.0), tl.load(x + 7 * plane, mask=inside, other=0.0)
    return a, b, c, d, e, f, g, h


@triton.jit
def _weighed(words, table, x, number: tl.constexpr):
    return tl.load(table + ((words >> 4 * (number ^ 1)) & 15)) * x.to(tl.float32)


@triton.jit
def _dotted(
    words, table, mine, t0, t1, t2, t3, t4, t5, t6, t7, x0, x1, x2, x3, x4, x5, x6, x7, asm: tl.constexpr,
    operands: tl.constexpr,
):  # fmt: skip
    """(W, O) words -> (W, O), the sums of their eight weights without scales times what `_planes` gave."""
    if asm is None:
        total = _weighed(words, table, x0, 0) + _weighed(words, table, x1, 1) + _weighed(words, table, x2, 2)
        total += _weighed(words, table, x3, 3) + _weighed(words, table, x4, 4) + _weighed(words, table, x5, 5)
        total += _weighed(words, table, x6, 6) + _weighed(words, table, x7, 7)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            asm, operands, [words, mine, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.float32,) * 8, is_pure=False, pack=2,
        )  # fmt: skip
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
    following, absmax, nested_absmax, x, words, scales, nested_scales, code, offset, table, first, rows, size,
    nested: tl.constexpr, asm: tl.constexpr, operands: tl.constexpr, mine_asm: tl.constexpr, tile_o: tl.constexpr,
    tile_i: tl.constexpr, even: tl.constexpr, steady: tl.constexpr,
):  # fmt: skip
    """(1, tile_o): x (1, I) times rows of W, fp32. For one row there is little to multiply and much to unpack: each
    thread sums what it has unpacked itself, and the main loop passes nothing between threads."""
    quads: tl.constexpr = tile_i // 32  # of four words, which a thread has; two of them share a scale
    places, word, scaled = _row_places(words, first, rows, size, tile_o, tile_i)
    plane, last = tl.multiple_of(size // 8, 8), rows * (size // 64) - 1
    shift = 0.0
    if nested:
        shift = tl.load(offset)
    mine, t0, t1, t2, t3, t4, t5, t6, t7 = 0.0, 0, 0, 0, 0, 0, 0, 0, 0
    if asm is not None:
        t0, t1, t2, t3 = tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3)
        t4, t5, t6, t7 = tl.load(table + 4), tl.load(table + 5), tl.load(table + 6), tl.load(table + 7)
        # no scalar, though the compiler takes it for one: each thread has its own
        mine = tl.inline_asm_elementwise(
            mine_asm, "=f,l", [(table + 8).to(tl.int64)], tl.float32, is_pure=False, pack=1
        )
    # all that a turn of the loop needs was asked for in the turn before it
    x0, x1, x2, x3, x4, x5, x6, x7 = _planes(x, word, plane, even)
    total = tl.zeros((quads, tile_o), tl.float32)
    for start in tl.range(0, plane, tile_i // 8, num_stages=1):
        current, ahead = following, start + tile_i // 8
        y0, y1, y2, y3, y4, y5, y6, y7 = x0, x1, x2, x3, x4, x5, x6, x7
        if even:  # behind the last turn the same once more: without masks it takes less than with them
            ahead = tl.minimum(ahead, plane - tile_i // 8)
            following = tl.load(places + ahead)
        else:
            following = tl.load(places + ahead, mask=ahead + word < plane, other=0)
        x0, x1, x2, x3, x4, x5, x6, x7 = _planes(x, ahead + word, plane, even)
        if nested:
            scale = tl.load(code + absmax.to(tl.int32)) * nested_absmax + shift
        else:
            scale = absmax.to(tl.float32)
        at = scaled + (ahead >> 3)
        if not even:
            at = tl.minimum(at, last)  # what lies behind a row is multiplied by 0
        absmax = tl.load(scales + at)
        if nested and not steady:
            nested_absmax = tl.load(nested_scales + (at >> 8))
        sums = _dotted(
            current, table, mine, t0, t1, t2, t3, t4, t5, t6, t7, y0, y1, y2, y3, y4, y5, y6, y7, asm, operands
        )
        total += tl.sum(tl.reshape(sums, (quads, 4, tile_o)), 1) * scale
    return tl.sum(total, 0)[None]


@triton.jit
def _row_places(words, first, rows, size, tile_o: tl.constexpr, tile_i: tl.constexpr):
    """(W, tile_o) of the first words, (W, 1) of the words in their row, and (W / 4, tile_o) of their scales. Columns
    lie along the first axis: so the compiler gives the scales to the threads that have their words."""
    row = tl.minimum(first + tl.arange(0, tile_o), rows - 1)
    word, quad = tl.arange(0, tile_i // 8)[:, None], tl.arange(0, tile_i // 32)[:, None]
    plane = tl.multiple_of(size // 8, 8)
    return words + row.to(tl.int64)[None] * plane + word, word, row[None] * (size // 64) + quad // 2


@triton.jit
def _places(words, first, rows, size, splits: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr):
    """Of the first words of `splits` parts of the columns, where those end, and of their scales."""
    lane = tl.arange(0, splits * tile_o)
    row = tl.minimum(first + lane % tile_o, rows - 1)
    left = lane // tile_o * (tl.cdiv(size, splits * tile_i) * tile_i)
    word = tl.arange(0, tile_i // 8)[None]
    places = words + row.to(tl.int64)[:, None] * (size // 8) + left[:, None] // 8 + word
    end = (size - left)[:, None] // 8
    scaled = row[:, None] * (size // 64) + left[:, None] // 64 + tl.arange(0, tile_i // 64)[None]
    return places, word, end, scaled


@triton.jit
def _four_bit(
    following, absmax, nested_absmax, x, words, scales, nested_scales, code, offset, table, first, rows, size,
    nested: tl.constexpr, asm: tl.constexpr, operands: tl.constexpr, r: tl.constexpr, m: tl.constexpr,
    splits: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """(R, tile_o): x times rows of W, fp32.

    The scales stay out of the weights: each of the tile's blocks of 64 columns has rows of the padded product of its
    own, which are scaled as a whole. With `splits` parts of the columns have, too, so that all warps have work; what is
    the product of one part of x and another one of W is left out at the end.
    """
    blocks: tl.constexpr = tile_i // 64
    places, word, end, scaled = _places(words, first, rows, size, splits, tile_o, tile_i)
    last = rows * (size // 64) - 1
    lane, slot = tl.arange(0, splits * tile_o), tl.arange(0, m)
    part = tl.cdiv(size, splits * tile_i) * tile_i  # columns of a split
    block, split = slot // r % blocks, slot // (r * blocks)
    column = tl.arange(0, tile_i)
    here = x + (slot % r * size + split * part)[:, None] + column[None]
    mine = (block[:, None] == column[None] // 64) & (split < splits)[:, None]
    x_end = (size - split * part)[:, None]
    shift = 0.0
    if nested:
        shift = tl.load(offset)
    total = tl.zeros((m, splits * tile_o), tl.float32)
    for start in tl.range(0, part, tile_i, num_stages=1):
        value = tl.load(here + start, mask=mine & (start + column[None] < x_end), other=0.0)
        current, ahead = following, start + tile_i
        following = tl.load(places + ahead // 8, mask=ahead // 8 + word < end, other=0)
        if nested:
            scale = tl.load(code + absmax.to(tl.int32)) * nested_absmax + shift
        else:
            scale = absmax.to(tl.float32)
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
