"""What a decode step launches: linears of a few rows with all that follows them, in one kernel each.

Sizes: R rows (a power of two, 16 at most), I in, O out, C hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from litlora.ops.decode_four_bit import (
    ASKING,
    BLOCK,
    EIGHTS,
    MINE,
    NESTED,
    OPERANDS,
    OPERANDS_ASKING,
    PLAIN,
    PLANES,
    UNPACKING,
)
from litlora.ops.decode_kernels import AT_END, AT_ONCE, MOST_ROWS, RANKS, STORE, _down, _embed, _linear
from litlora.ops.decode_products import FOUR_BIT, FP8


@dataclass(frozen=True)
class Weight:
    """A frozen weight (O, I) as the kernels read it."""

    form: int
    data: Tensor  # (O, I), or words of eight 4-bit numbers (O · I / 8,) int32
    rows: int
    size: int
    scales: Tensor | None = None  # of rows (O,) in fp8; absmax in 4 bits
    nested: tuple[Tensor, Tensor, Tensor] | None = None  # of the absmax itself: absmax, code, offset
    # `byte_planes` of the 4-bit code and the bits of the code itself (24,) int32; only the code where there is no PTX
    table: Tensor | None = None
    bias: Tensor | None = None  # (O,)


@dataclass(frozen=True)
class Factors:
    """A low-rank update factor · B A."""

    A: Tensor  # (r, I)
    B: Tensor  # (O, r)
    factor: float


@dataclass(frozen=True)
class Tile:
    """How a weight is read: `rows` x `columns` at a time, by so many warps; the columns in `splits` parts at once."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
    splits: int = 1
    ahead: int = 0  # bytes of each row that a program has brought into the card's cache before it may read its x
    flat: bool = False  # one row of x, without tensor cores
    lead: int = 1  # where flat: so many tiles, 1 or 2, are asked for before x is known


FEW = 8192  # rows, below which a program takes fewer of them, so that every multiprocessor has work


def layout_of(words: bool, rows: int) -> int:
    """How an input lies that 4-bit linears read (`words`) or others."""
    return PLAIN if not words else PLANES if rows == 1 else EIGHTS


def tile_of(weight: Weight, outputs: int, rows: int, dtype: torch.dtype) -> Tile:
    """For a product with so many rows of x, of a launch that writes so many columns."""
    few = outputs < FEW
    if dtype == torch.float32:  # no tensor cores: small enough for the registers
        return Tile(16, 64, 4) if weight.form == FOUR_BIT else Tile(16, 32, 4, stages=2)
    if weight.form == FOUR_BIT:
        if rows == 1:
            return Tile(16, 1024, 8) if few else Tile(32, 512, 4)
        return Tile(16, 256, 4, splits=4) if rows <= 4 else Tile(32, 128, 8, splits=2)
    if rows == 1:
        return Tile(8, 1024, 4, stages=3 if weight.form == FP8 else 4, flat=True, lead=2)
    return Tile(32, 256, 4, stages=4) if weight.form == FP8 and not few else Tile(16, 256, 2, stages=4)


def _power(n: int) -> int:
    return int(triton.next_power_of_2(n))


class Linear:
    """One launch: linears over the same x (R, I), and what follows them."""

    def __init__(
        self,
        weights: Sequence[Weight],
        factors: Sequence[Factors | None],
        mode: int,
        rows: int,
        dtype: torch.dtype,
        *,
        words: bool = False,
        pdl: bool = False,
        starts: int | None = None,
        ahead: bool = False,
    ) -> None:
        """`words`: what is written is read by a 4-bit linear. `pdl`: begins before the kernel in front has ended;
        `starts`: when it lets the next one begin so (AT_END: not at all); default: AT_ONCE with `pdl`.
        `ahead`: with `pdl`, all of the weights are fetched into the card's cache while the kernel in front still runs.
        All weights are of one format and size."""
        first = weights[0]
        self.weights, self.factors, self.mode, self.rows = weights, factors, mode, rows
        self.layout, self.pdl = layout_of(words, rows), pdl
        self.starts = (AT_ONCE if pdl else AT_END) if starts is None else starts
        self.size, self.outputs = first.size, sum(weight.rows for weight in weights)
        self.tile = tile_of(first, self.outputs, rows, dtype)
        self.blocks = triton.cdiv(first.rows, self.tile.rows)  # of sums of squares, in mode ADD
        self.row_bytes = first.data.element_size() * first.data.numel() // first.rows
        # one for each thread, in multiples of the 16 bytes that the card takes
        self.pieces = max(1, 32 * self.tile.warps // self.tile.rows)
        fetched = self.row_bytes if ahead else min(self.tile.ahead, self.row_bytes)
        self.piece = min(self.row_bytes, 16 * triton.cdiv(fetched, 16 * self.pieces))
        if not (fetched and pdl and self.row_bytes % 16 == 0):
            self.pieces = 0
        self.bias: Tensor | None = None
        if any(weight.bias is not None for weight in weights):
            zeros = torch.zeros
            parts = [zeros(w.rows, dtype=dtype, device=w.data.device) if w.bias is None else w.bias for w in weights]
            self.bias = torch.cat(parts)
        ranks = [0 if f is None else len(f.A) for f in factors]
        self.ranks = [*ranks, 0, 0][:3]
        self.z: Tensor | None = None
        if any(ranks):
            # of many small sums one program cannot make all; of large ranks they would be too many to add up
            self.parts = max(1, 16 // _power(triton.cdiv(max(ranks), RANKS)))
            self.z = torch.empty(self.parts, rows, sum(ranks), dtype=torch.float32, device=first.data.device)

    def launch(
        self,
        x: Tensor,
        y: Tensor,
        *,
        norm: tuple[Tensor, int, float] | None = None,
        residual: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """x (R, I) to y (R, O); in mode GATED y is silu(first) · second.

        `norm`: sums of squares (R, blocks) of what x is a scaled copy of, their number and eps: the result is divided
        by its rms. `residual` (mode ADD): the residual stream (R, O), added to in place, the weight (O,) of the norm
        that follows, and its sums of squares (R, self.blocks); y is the stream times that weight.
        """
        tile, first, given, rows = self.tile, self.weights[0], len(self.weights), self.rows
        weights = [*self.weights, first, first][:3]
        count = [weight.rows if index < given else 0 for index, weight in enumerate(weights)]
        adapted = [*self.factors, None, None][:3]
        sides = [first.data if f is None else f.B for f in adapted]
        if self.z is not None:
            self._launch_down(x, adapted)
            default = next(f.B for f in adapted if f is not None)
            sides = [default if f is None else f.B for f in adapted]
        sums, blocks, eps = norm or (x, 1, 0.0)
        stream, norm_weight, new_sums = residual or (y, y, y)
        scales = [weight.data if weight.scales is None else weight.scales for weight in weights]
        nested = [weight.nested or (first.data, first.data, first.data) for weight in weights]
        programs = [triton.cdiv(number, tile.rows) for number in count]
        four_bit, m = first.form == FOUR_BIT, MOST_ROWS
        if four_bit:
            m = max(m, tile.columns // BLOCK * tile.splits * rows)
        asm: tuple[str | None, str] = UNPACKING, OPERANDS
        if rows == 1 and x.dtype in ASKING:
            asm = ASKING[x.dtype], OPERANDS_ASKING
        if not (four_bit and first.table is not None and first.table.dtype == torch.int32):
            asm = None, ""
        _linear[(sum(programs) if self.mode == STORE else programs[0],)](
            x, sums, blocks, eps, *(weight.data for weight in weights), *scales, *(n[0] for n in nested),
            *(n[2] for n in nested), nested[0][1], first.data if first.table is None else first.table,
            x if self.bias is None else self.bias, x if self.z is None else self.z, *sides, *self.ranks,
            *(0.0 if f is None else f.factor for f in adapted), y, stream, norm_weight, new_sums, self.size, *count,
            self.row_bytes, self.piece,
            mode=self.mode, form=first.form, nested=first.nested is not None, asm=asm[0],
            operands=asm[1], mine=MINE, norm=norm is not None, biased=self.bias is not None,
            most=RANKS * triton.cdiv(max(self.ranks), RANKS), parts=1 if self.z is None else self.parts, step=RANKS,
            r=rows, m=m, splits=tile.splits, tile_o=tile.rows, tile_i=tile.columns, stages=tile.stages, lead=tile.lead,
            even=self.size % tile.columns == 0, steady=NESTED * BLOCK % self.size == 0, blocks_block=_power(blocks),
            layout=self.layout, pdl=self.pdl, starts=self.starts, pieces=self.pieces, flat=tile.flat,
            num_warps=tile.warps, **_options(self.pdl),
        )  # fmt: skip

    def _launch_down(self, x: Tensor, adapted: Sequence[Factors | None]) -> None:
        default = next(f.A for f in adapted if f is not None)
        tops = [default if f is None else f.A for f in adapted]
        programs = sum(triton.cdiv(rank, RANKS) for rank in self.ranks)
        _down[(programs, self.parts)](
            x, *tops, *self.ranks, self.z, self.size, r=self.rows, m=MOST_ROWS, parts=self.parts, tile_i=64,
            layout=layout_of(self.weights[0].form == FOUR_BIT, self.rows), step=RANKS, pdl=self.pdl, num_warps=4,
            **_options(self.pdl),
        )  # fmt: skip


def embed(
    tokens: Tensor,
    table: Tensor,
    weight: Tensor,
    residual: Tensor,
    y: Tensor,
    sums: Tensor,
    *,
    words: bool,
    pdl: bool,
) -> None:
    """Rows of the embedding `table` (V, C) for tokens (R,) to the residual stream (R, C); times the first norm's weight
    to y (R, C); their sums of squares (R, 1). `words`: 4-bit linears read it."""
    size = table.shape[1]
    _embed[(len(tokens),)](
        tokens, table, weight, residual, y, sums, size, layout=layout_of(words, len(tokens)), block=_power(size),
        pdl=pdl, num_warps=8, **_options(pdl),
    )  # fmt: skip


def _options(pdl: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if pdl else {}
