"""Attention of one new token a row over a cache, in one Triton kernel: norms and rotation of q and k, the new key and
value's way into the cache, and softmax over what the row has written, in parts that work side by side.

Where rows are and how long they are is read on the card, so that a captured graph serves every step; its cost grows
with the tokens that are there. A row's tokens lie in pages; a tile of keys never crosses two.
Sizes: B rows, T tokens of the cache, P pages of a row, H heads, K key/value heads, D head dim, S parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from litlora.ops.decode_four_bit import PLAIN
from litlora.ops.decode_kernels import MOST_ROWS, _order

TILE = 64  # keys at a time
LEAST = 4  # tiles of a part: what the parts of a short row leave for each other would take longer
LEAST_ALONE = 6  # of `_alone`, which asks for four at once
BUSY = 2  # programs for each multiprocessor, where a row's length gives so many; of `_alone` one has room on it
LARGEST_HEAD = 256


@triton.jit
def _halves(x, place, weight, cos, sin, pair, known, eps, half: tl.constexpr, norm: tl.constexpr, rotate: tl.constexpr):
    """Both halves of heads that begin at `place` (N, 1): normalized, rotated, each rounded as by itself."""
    first = tl.load(x + place + pair, mask=known, other=0.0)
    second = tl.load(x + place + half + pair, mask=known, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    if norm:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)[:, None]
        left = tl.load(weight + pair, mask=pair < half, other=0.0).to(tl.float32)
        right = tl.load(weight + half + pair, mask=pair < half, other=0.0).to(tl.float32)
        a = ((a * scale).to(first.dtype).to(tl.float32) * left).to(first.dtype).to(tl.float32)
        b = ((b * scale).to(first.dtype).to(tl.float32) * right).to(first.dtype).to(tl.float32)
    if rotate:
        c = tl.load(cos + pair, mask=pair < half, other=0.0).to(tl.float32)
        s = tl.load(sin + pair, mask=pair < half, other=0.0).to(tl.float32)
        a, b = a * c - b * s, b * c + a * s
    return a.to(first.dtype), b.to(first.dtype)


@triton.jit
def _page(table, first, end, page: tl.constexpr, tile: tl.constexpr):
    """(tile,) of the tokens from `first` on in the cache; all of them are in one page. Any place where `first` is not
    before `end`."""
    number = tl.load(table + first // page, mask=first < end, other=0).to(tl.int64)
    return number * page + first % page + tl.arange(0, tile)


@triton.jit
def _tile_of(
    keys, values, table, first, end, width, offset, page: tl.constexpr, tile: tl.constexpr, size: tl.constexpr
):  # fmt: skip
    """A head's keys and values (tile, D) of the tokens from `first` on, 0 from `end` on."""
    place = _page(table, first, end, page, tile)[:, None] * width + offset + tl.arange(0, size)[None]
    known = (first + tl.arange(0, tile) < end)[:, None]
    return tl.load(keys + place, mask=known, other=0.0), tl.load(values + place, mask=known, other=0.0)


@triton.jit
def _alone(
    q, k, v, new, cos, sin, q_weight, k_weight, eps, keys, values, table, begin, end, lowest, width, head, scale,
    is_last, half: tl.constexpr, page: tl.constexpr, tile: tl.constexpr, norm: tl.constexpr, rotate: tl.constexpr,
    pdl: tl.constexpr,
):  # fmt: skip
    """One query over the tokens from `begin` to `end`, and over its own where `is_last`: the largest score, the sum of
    weights and that of weighted values, (1,), (1,) and (1, D).

    The latency of few short loads is all there is: so no tensor cores, the newest token never comes from the cache,
    four tiles are asked for before q is there, and what each of a tile's tokens has summed stays apart until the end.
    """
    size: tl.constexpr = 2 * half
    slot, dim, pair = tl.arange(0, tile), tl.arange(0, size)[None], tl.arange(0, half)[None]
    one = tl.zeros((1, 1), tl.int32)
    offset = head * size
    key1, value1 = _tile_of(keys, values, table, begin, end, width, offset, page, tile, size)
    key2, value2 = _tile_of(keys, values, table, begin + tile, end, width, offset, page, tile, size)
    key3, value3 = _tile_of(keys, values, table, begin + 2 * tile, end, width, offset, page, tile, size)
    key4, value4 = _tile_of(keys, values, table, begin + 3 * tile, end, width, offset, page, tile, size)
    if pdl:
        tl.extra.cuda.gdc_wait()
        # not earlier: the next kernel fetches its weights into the cache, through which the one before still reads
        tl.extra.cuda.gdc_launch_dependents()
    first_half, second_half = _halves(q, one, q_weight, cos, sin, pair, pair < half, eps, half, norm, rotate)
    query = tl.reshape(tl.permute(tl.join(first_half, second_half), (0, 2, 1)), (1, size)).to(tl.float32)
    best, total = tl.full((tile,), -1e38, tl.float32), tl.zeros((tile,), tl.float32)
    mean = tl.zeros((tile, size), tl.float32)
    if is_last:
        first_half, second_half = _halves(k, one, k_weight, cos, sin, pair, pair < half, eps, half, norm, rotate)
        key = tl.reshape(tl.permute(tl.join(first_half, second_half), (0, 2, 1)), (1, size))
        value = tl.load(v + dim)
        tl.store(keys + new + dim, key)
        tl.store(values + new + dim, value)
        own = tl.sum(query * key.to(query.dtype), 1) * scale
        best = tl.where(slot == 0, own, best)
        total = tl.where(slot == 0, 1.0, 0.0)
        mean = tl.where((slot == 0)[:, None], value.to(tl.float32), 0.0)
    for first in range(begin, end, tile):
        key, value, seen = key1, value1, (first + slot >= lowest) & (first + slot < end)
        key1, value1, key2, value2, key3, value3 = key2, value2, key3, value3, key4, value4
        key4, value4 = _tile_of(keys, values, table, first + 4 * tile, end, width, offset, page, tile, size)
        score = tl.where(seen, tl.sum(key.to(tl.float32) * query, 1) * scale, -1e38)
        higher = tl.maximum(best, score)
        weight, fade = tl.where(seen, tl.exp2(score - higher), 0.0), tl.exp2(best - higher)
        total = total * fade + weight
        mean = mean * fade[:, None] + weight[:, None] * value.to(tl.float32)
        best = higher
    highest = tl.max(best, 0)
    weight = tl.exp2(best - highest)
    one = tl.zeros((1,), tl.float32)
    return highest + one, tl.sum(total * weight, 0) + one, tl.sum(mean * weight[:, None], 0)[None]


@triton.jit
def _grouped(
    q, k, v, newest, cos, sin, q_weight, k_weight, eps, keys, values, table, begin, end, lowest, width, head, scale,
    is_last, group: tl.constexpr, group_block: tl.constexpr, half: tl.constexpr, half_block: tl.constexpr,
    page: tl.constexpr, tile: tl.constexpr, norm: tl.constexpr, rotate: tl.constexpr,
):  # fmt: skip
    """The queries that read one key/value head, on tensor cores, over the tokens from `begin` to `end`, and over their
    own, `newest`, where `is_last`: what `_alone` gives, (group_block,) and (group_block, D).

    Their own token comes last: of what is needed before the loop, which asks for keys and values tiles ahead, each
    load is waited for.
    """
    size: tl.constexpr = 2 * half
    dim, member = tl.arange(0, 2 * half_block)[None, :], tl.arange(0, group_block)[:, None]
    pair = tl.arange(0, half_block)[None, :]
    heads = (head * group + member) * size
    mine = (member < group) & (pair < half)
    q1, q2 = _halves(q, heads, q_weight, cos, sin, pair, mine, eps, half, norm, rotate)
    best = tl.full((group_block,), -1e38, tl.float32)
    total = tl.zeros((group_block,), tl.float32)
    mean = tl.zeros((group_block, 2 * half_block), tl.float32)
    for first in range(begin, end, tile):
        token = first + tl.arange(0, tile)
        seen = (token >= lowest) & (token < end)
        known = seen[:, None]
        place = _page(table, first, end, page, tile)[:, None] * width + head * size
        k1 = tl.load(keys + place + pair, mask=known & (pair < half), other=0.0).to(q1.dtype)
        k2 = tl.load(keys + place + half + pair, mask=known & (pair < half), other=0.0).to(q1.dtype)
        score = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        score = tl.dot(q2, tl.trans(k2), score, input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -1e38)
        higher = tl.maximum(best, tl.max(score, 1))
        weight = tl.where(seen[None, :], tl.exp2(score - higher[:, None]), 0.0)
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weight, 1)
        value = tl.load(values + place + dim, mask=known & (dim < size), other=0.0).to(q1.dtype)
        mean = tl.dot(weight.to(value.dtype), value, mean * fade[:, None], input_precision="ieee")
        best = higher
    if is_last:
        one = tl.zeros((1, 1), tl.int32)
        new = head * size + one
        k1, k2 = _halves(k, new, k_weight, cos, sin, pair, (pair < half) & (one == 0), eps, half, norm, rotate)
        place = newest * width + head * size + one
        tl.store(keys + place + pair, k1, mask=pair < half)
        tl.store(keys + place + half + pair, k2, mask=pair < half)
        own_value = tl.load(v + new + dim, mask=dim < size, other=0.0)
        tl.store(values + place + dim, own_value, mask=dim < size)
        own = tl.sum(q1.to(tl.float32) * k1.to(tl.float32) + q2.to(tl.float32) * k2.to(tl.float32), 1) * scale
        higher = tl.maximum(best, own)
        fade, weight_of_own = tl.exp2(best - higher), tl.exp2(own - higher)
        total = total * fade + weight_of_own
        mean = mean * fade[:, None] + weight_of_own[:, None] * own_value.to(tl.float32)
        best = higher
    return best, total, mean


@triton.jit(do_not_specialize=["window", "most_pages"])
def _attend(
    q, k, v, q_stride, kv_stride, cos, sin, q_weight, k_weight, eps, keys, values, positions, table, most_pages,
    out, sums, bounds, arrived, scale, window, kv_heads,
    group: tl.constexpr, group_block: tl.constexpr, half: tl.constexpr, half_block: tl.constexpr, parts: tl.constexpr,
    page: tl.constexpr, tile: tl.constexpr, least: tl.constexpr, windowed: tl.constexpr, norm: tl.constexpr,
    rotate: tl.constexpr, layout: tl.constexpr, alone: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    lowest = 0
    if windowed:
        lowest = tl.maximum(position - window + 1, 0)
    start = lowest // tile * tile
    # the newest token is not read from the cache
    share = tl.maximum(tl.cdiv(tl.cdiv(position - start, parts), tile), least) * tile
    used = tl.maximum(tl.cdiv(position - start, share), 1)
    begin = start + part * share
    end = tl.minimum(begin + share, position)
    table += row * most_pages
    size: tl.constexpr = 2 * half
    width = kv_heads * size  # of a token
    cos, sin = cos + position * half, sin + position * half
    # nothing above depends on the kernels of this step
    if pdl and not alone:
        tl.extra.cuda.gdc_wait()
        # not earlier: the next kernel fetches its weights into the cache, through which the one before still reads
        tl.extra.cuda.gdc_launch_dependents()
    if part >= used:
        if pdl and alone:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        return
    dim, member = tl.arange(0, 2 * half_block)[None, :], tl.arange(0, group_block)[:, None]
    newest = tl.load(table + position // page).to(tl.int64) * page + position % page
    if alone:
        best, total, mean = _alone(
            q + row * q_stride + head * size, k + row * kv_stride + head * size, v + row * kv_stride + head * size,
            newest * width + head * size, cos, sin, q_weight, k_weight, eps, keys, values, table, begin, end,
            lowest, width, head, scale, part == used - 1, half, page, tile, norm, rotate, pdl,
        )  # fmt: skip
    else:
        best, total, mean = _grouped(
            q + row * q_stride, k + row * kv_stride, v + row * kv_stride, newest, cos, sin, q_weight, k_weight, eps,
            keys, values, table, begin, end, lowest, width, head, scale, part == used - 1, group, group_block, half,
            half_block, page, tile, norm, rotate,
        )  # fmt: skip
    lane = tl.arange(0, group_block)
    number = (row * kv_heads + head) * group + lane  # of the head, among all rows
    whole = kv_heads * group * size
    target = row * whole + _order((head * group + member) * size + dim, whole, layout)
    written = (member < group) & (dim < size)
    if used == 1:
        tl.store(out + target, mean / total[:, None], mask=written)
        return
    tl.store(sums + (number[:, None] * parts + part) * size + dim, mean, mask=written)
    tl.store(bounds + (number * parts + part) * 2, best, mask=lane < group)
    tl.store(bounds + (number * parts + part) * 2 + 1, total, mask=lane < group)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row * kv_heads + head, 1, sem="acq_rel") < used - 1:
        return
    tl.store(arrived + row * kv_heads + head, 0)  # for the next layer
    other = tl.arange(0, parts)
    for each in range(0, group):  # all parts of a head at once: one after the other, each would wait for the memory
        one = ((row * kv_heads + head) * group + each) * parts + other
        best_of = tl.load(bounds + one * 2, mask=other < used, other=-1e38, cache_modifier=".cg")
        weight = tl.load(bounds + one * 2 + 1, mask=other < used, other=0.0, cache_modifier=".cg")
        known = (other < used)[:, None] & (dim < size)
        value = tl.load(sums + one[:, None] * size + dim, mask=known, other=0.0, cache_modifier=".cg")
        scaled = tl.exp2(best_of - tl.max(best_of, 0))
        joined = tl.sum(value * scaled[:, None], 0) / tl.sum(weight * scaled, 0)
        column = tl.arange(0, 2 * half_block)
        target_of = row * whole + _order((head * group + each) * size + column, whole, layout)
        tl.store(out + target_of, joined, mask=column < size)


def _power(n: int) -> int:
    return int(triton.next_power_of_2(n))


@dataclass(frozen=True)
class Workspace:
    """What parts of one row leave for each other; `arrived` is zero between two launches."""

    parts: int
    sums: Tensor  # (B, H, S, D) fp32
    bounds: Tensor  # (B, H, S, 2) fp32
    arrived: Tensor  # (B, K) int32

    @classmethod
    def of(cls, rows: int, heads: int, kv_heads: int, head_dim: int, device: torch.device) -> Workspace:
        """As many parts as keep the whole card busy when all rows are long."""
        processors = 132
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        busy = 1 if heads == kv_heads else BUSY
        parts = min(64, _power(triton.cdiv(busy * processors, rows * kv_heads)))
        sums = torch.empty(rows, heads, parts, head_dim, dtype=torch.float32, device=device)
        bounds = torch.empty(rows, heads, parts, 2, dtype=torch.float32, device=device)
        return cls(parts, sums, bounds, torch.zeros(rows, kv_heads, dtype=torch.int32, device=device))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    table: Tensor,
    page: int,
    workspace: Workspace,
    window: int | None,
    out: Tensor,
    *,
    rotation: tuple[Tensor, Tensor] | None = None,
    norms: tuple[Tensor, Tensor, float] | None = None,
    layout: int = PLAIN,
    pdl: bool = False,
) -> None:
    """q (B, H, D) at `positions` (B,) of rows whose tokens lie in the pages `table` (B or more, P) int32, of `page`
    tokens, of keys and values (T, K, D), into which k and v (B, K, D) are written -> out (B, H, D).

    q, k and v may be strided by row. `rotation`: cos and sin (positions, D/2), where q and k are not rotated yet;
    `norms`: the weights (D,) of their norms, and eps. `layout`: of what is written.
    """
    (rows, heads, size), kv_heads = q.shape, k.shape[1]
    group, half = heads // kv_heads, size // 2
    cos, sin = rotation or (q, q)
    q_weight, k_weight, eps = norms or (q, q, 0.0)
    options = {"launch_pdl": True} if pdl else {}
    alone = group == 1 and half == _power(half) and rows <= MOST_ROWS
    tile = min(page, TILE if q.dtype != torch.float32 else 16)
    _attend[(rows * kv_heads, workspace.parts)](
        q, k, v, q.stride(0), k.stride(0), cos, sin, q_weight, k_weight, eps, keys, values, positions, table,
        table.stride(0), out, workspace.sums, workspace.bounds, workspace.arrived,
        math.log2(math.e) / math.sqrt(size), window or 0, kv_heads,
        group=group, group_block=1 if alone else max(16, _power(group)), half=half,
        half_block=half if alone else max(16, _power(half)), parts=workspace.parts, page=page, tile=tile,
        least=LEAST_ALONE if alone else LEAST, windowed=window is not None, norm=norms is not None,
        rotate=rotation is not None, layout=layout, alone=alone, pdl=pdl, num_warps=8 if alone else 4,
        num_stages=3 if size <= 128 else 2,
        **options,
    )  # fmt: skip
