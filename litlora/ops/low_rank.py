"""Triton kernels of the adapters' thin products: z Bᵀ on top of what is there, the gradients of B and z, dropout
before A.

They take contiguous CUDA tensors of any 16- or 32-bit float dtype, sum in fp32 and round once on the way out.
Sizes: N tokens, R rank, I in, O out, J adapters that read one x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

Low = tuple[Tensor, Tensor]  # z (N, R), whose rows may be strided, and b (O, R): z bᵀ is still to be added


def power(n: int) -> int:
    return int(triton.next_power_of_2(n))


@triton.jit
def low_tile(z, b, row, column, here, across, z_stride, b_row, b_column, rank, r: tl.constexpr):
    """A tile of z bᵀ in fp32; nothing where rank is 0."""
    inner = tl.arange(0, r)
    deep = inner < rank
    left = tl.load(z + row[:, None] * z_stride + inner[None, :], mask=here & deep[None, :], other=0.0)
    right = tl.load(b + column[None, :] * b_row + inner[:, None] * b_column, mask=across & deep[:, None], other=0.0)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _scaled_copy(x, y, size, factor, program, block: tl.constexpr):
    """A program's part, if it has one; its number among the programs behind these."""
    place = program * block + tl.arange(0, block)
    inside = (place >= 0) & (place < size)
    tl.store(y + place, tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor, mask=inside)
    return program - tl.cdiv(size, block)


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "n4", "n5"])
def _scaled_copies(
    x0, x1, x2, x3, x4, x5, y0, y1, y2, y3, y4, y5, n0, n1, n2, n3, n4, n5, f0, f1, f2, f3, f4, f5, block: tl.constexpr
):
    program = _scaled_copy(x0, y0, n0, f0, tl.program_id(0), block)
    program = _scaled_copy(x1, y1, n1, f1, program, block)
    program = _scaled_copy(x2, y2, n2, f2, program, block)
    program = _scaled_copy(x3, y3, n3, f3, program, block)
    program = _scaled_copy(x4, y4, n4, f4, program, block)
    _scaled_copy(x5, y5, n5, f5, program, block)


def scaled_copies(xs: Sequence[Tensor], ys: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Each of up to six x times its factor into its y, of any shape, contiguous. In one launch of many programs:
    torch's kernel for lists of tensors gives such small ones to a program each, which takes eight times as long."""
    block, none = 1024, 6 - len(xs)
    sizes = [x.numel() for x in xs]
    _scaled_copies[(sum(triton.cdiv(size, block) for size in sizes),)](
        *xs,
        *[xs[0]] * none,
        *ys,
        *[ys[0]] * none,
        *sizes,
        *[0] * none,
        *factors,
        *[1.0] * none,
        block=block,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["rows"])
def _low_rank_add(
    z, b, base, also, y, rows, size, rank, z_stride, b_row, b_column,
    second: tl.constexpr, tile: tl.constexpr, block: tl.constexpr, r: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    column = tl.program_id(1) * block + tl.arange(0, block)
    here, across = (row < rows)[:, None], (column < size)[None, :]
    value = low_tile(z, b, row, column, here, across, z_stride, b_row, b_column, rank, r)
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
    second, tile, block = base if also is None else also.contiguous(), 64, 128
    _low_rank_add[(triton.cdiv(rows, tile), triton.cdiv(size, block))](
        z, b, base, second, y, rows, size, rank, z.stride(0), b.stride(0), b.stride(1),
        second=also is not None, tile=tile, block=block, r=max(16, power(rank)), num_warps=4,
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
    tile, block, r = 256 if wide else 64, 64, max(16, power(rank))
    tiles = triton.cdiv(rows, tile)
    share = triton.cdiv(triton.cdiv(size, max(1, GRADIENT_PROGRAMS // tiles)), block) * block
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


GRADIENT_PROGRAMS = 264  # two for each multiprocessor of an H100, as many as have room there: a few more wait for all


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
        tile=tile, block=block, r=max(16, power(rank)), num_warps=4, num_stages=4,
    )  # fmt: skip
    return z


def dropped_up(dz: Tensor, a: Tensor, seed: Tensor, key: int, first: int, p: float) -> Tensor:
    """dx (N, I): the sum over J of the mask of j times dz_j a_j. dz (N, J·R)."""
    rows, (count, rank, size) = len(dz), a.shape
    dx = torch.empty(rows, size, dtype=dz.dtype, device=dz.device)
    tile, block = 64, 128
    _dropped_up[(triton.cdiv(rows, tile), triton.cdiv(size, block))](
        dz, a, dx, seed, key, first, rows, size, rank, count, count * rank, _threshold(p), 1 / (1 - p),
        tile=tile, block=block, r=max(16, power(rank)), num_warps=4,
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
        tile=tile, block=block, r=max(16, power(rank)), num_warps=4,
    )  # fmt: skip
    return parts.sum(0)
