"""Linears over one x, adapted or not: their products forward and backward, without autograd.

Sizes: N tokens, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from litlora.ops import low_rank
from litlora.ops.low_rank import Low
from litlora.ops.parts import LARGEST_RANK, Parts
from litlora.ops.reference import fp32_mm

TOGETHER = 2048  # tokens from which on one kernel for the gradients of B and z is faster than a product each


class Group:
    """The A of all are one matrix (ΣR, I), so that x is read once for them; the scale is folded into B."""

    def __init__(self, parts: Sequence[Parts], seed: Tensor, factors: Sequence[Tensor], first: int = 0) -> None:
        """`factors`: what `cast` made of the parts; `first`: the row of the stream at which x begins, for dropout."""
        self.parts, self.seed, self.first = parts, seed, first
        self.adapted = [(index, p) for index, p in enumerate(parts) if p.A is not None]
        self.dropout = self.adapted[0][1].dropout if self.adapted else 0.0
        self.a: Tensor | None = factors[0] if factors else None
        self.b: Sequence[Tensor] = factors[1:]
        self.key = self.adapted[0][1].key if self.adapted else 0
        self.ranks = [b.shape[1] for b in self.b]
        self.rounds = any(p.frozen.rounds for p in parts)
        self.together = len(set(self.ranks)) == 1 and self.ranks[0] <= LARGEST_RANK

    @staticmethod
    def cast(parts: Sequence[Parts], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """(A of all, each scaled B) in the products' dtype. Saved for the backward pass as any tensor, so that
        checkpointing drops and remakes them."""
        tops, lows = [p.A for p in parts if p.A is not None], [p.B for p in parts if p.B is not None]
        if not tops:
            return ()
        a = torch.empty(sum(map(len, tops)), tops[0].shape[1], dtype=dtype, device=tops[0].device)
        bs = [torch.empty(b.shape, dtype=dtype, device=b.device) for b in lows]
        scales = [1.0] * len(tops) + [p.scale for p in parts if p.B is not None]
        low_rank.scaled_copies([*tops, *lows], [*a.split([len(top) for top in tops]), *bs], scales)
        return a, *bs

    def _split(self, z: Tensor) -> list[Tensor]:
        return list(z.split(self.ranks, dim=1))

    def down(self, x: Tensor) -> Tensor | None:
        """z (N, ΣR) = dropout(x) Aᵀ."""
        if self.a is None:
            return None
        if not self.dropout:
            return x @ self.a.t()
        if self.together:
            return low_rank.dropped_down(
                x, self.a.view(len(self.ranks), self.ranks[0], -1), self.seed, self.key, self.first, self.dropout
            )
        pairs = enumerate(self.a.split(self.ranks))
        return torch.cat([self._dropped(x, which) @ a.t() for which, a in pairs], dim=1)

    def _dropped(self, x: Tensor, which: int) -> Tensor:
        return low_rank.dropped(x, self.seed, self.key, self.first, which, self.dropout)

    def up(
        self, x: Tensor, z: Tensor | None, base: Tensor | None = None, rounded: tuple[Tensor, Tensor] | None = None
    ) -> list[Tensor]:
        """The outputs (N, O), each on top of `base`, which is kept (in inference mode, where nobody needs it again, the
        output may take its place); without z, of the frozen weights only. `rounded`: x in fp8 with the scales of its
        rows, where that is there already."""
        pairs = zip(self._split(z), self.b, strict=True) if z is not None else ()
        low = {index: pair for (index, _), pair in zip(self.adapted, pairs, strict=False)}
        prepared: dict[type, Any] = {}  # by format: x is rounded once for all linears of one
        for p in self.parts:
            if type(p.frozen) not in prepared:
                known = rounded is not None and p.frozen.rounds
                prepared[type(p.frozen)] = rounded if known else p.frozen.prepare(x)
        return [_output(p, prepared[type(p.frozen)], low.get(index), base) for index, p in enumerate(self.parts)]

    def products(self, x: Tensor, rounded: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """As `up`, of the frozen weights only, which are all of one format; without their biases, and rows may be
        strided. The last one's in fp32 if it is adapted: to the others' more is done than to add and round."""
        first, *others = (p.frozen for p in self.parts)
        prepared: Any = first.prepare(x) if rounded is None else rounded
        if self.parts[-1].A is None or first.rounds:
            return first.mm_each(others, prepared)
        return [*first.mm_each(others[:-1], prepared), others[-1].mm_fp32(prepared)]

    def lows(self, z: Tensor | None) -> list[Low | None] | None:
        """What `up` would add to each product, for a kernel that adds it itself; None where a rank is too large."""
        if z is None or max(self.ranks) > LARGEST_RANK:
            return None
        found: list[Low | None] = [None] * len(self.parts)
        for (index, _), pair in zip(self.adapted, zip(self._split(z), self.b, strict=True), strict=True):
            found[index] = pair
        return found

    def gradients(
        self, x: Tensor | None, z: Tensor | None, dys: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dz (N, ΣR), and the gradients of A and B of each linear in turn, fp32. x and z are None where none is
        adapted."""
        dz, found = self.low_gradients(z, dys)
        self.add_tops(found, x, dz)
        return dz, found

    def low_gradients(self, z: Tensor | None, dys: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """dz, and of the factors' gradients those of each B."""
        found: list[Tensor | None] = [None] * (2 * len(self.parts))
        if z is None:
            return None, found
        dz = torch.empty_like(z)
        for (index, p), part, low, b in zip(self.adapted, self._split(dz), self._split(z), self.b, strict=True):
            if b.shape[1] <= LARGEST_RANK and len(low) >= TOGETHER:
                found[2 * index + 1] = low_rank.low_rank_gradients(dys[index], low, b, part, p.scale)
            else:
                torch.mm(dys[index], b, out=part)
                found[2 * index + 1] = fp32_mm(dys[index].t(), low) * p.scale
        return dz, found

    def add_tops(self, found: list[Tensor | None], x: Tensor | None, dz: Tensor | None) -> None:
        """The gradient of each A."""
        if x is not None and dz is not None:
            for (index, _), gradient in zip(self.adapted, self._top_gradients(dz, x), strict=True):
                found[2 * index] = gradient

    def dz(self, dys: Sequence[Tensor]) -> Tensor | None:
        """By itself, where z is not known yet; `add_bottoms` follows."""
        if not self.adapted:
            return None
        return torch.cat([dys[index] @ b for (index, _), b in zip(self.adapted, self.b, strict=True)], dim=1)

    def add_bottoms(self, found: list[Tensor | None], z: Tensor, dys: Sequence[Tensor]) -> None:
        """The gradient of each B."""
        for (index, p), low in zip(self.adapted, self._split(z), strict=True):
            found[2 * index + 1] = fp32_mm(dys[index].t(), low) * p.scale

    def dx(self, dz: Tensor | None, dys: Sequence[Tensor]) -> Tensor:
        """The gradient (N, I) of x; that of the frozen weights only where `dz` is None."""
        first, *others = (p.frozen for p in self.parts)
        if dz is None:
            return first.sum_mm_t(others, dys, None)
        if not first.rounds:
            return first.sum_mm_t(others, dys, self._low_rank_dx(dz))
        dx = first.sum_mm_t(others, dys, None)
        if self.a is None or self.dropout:
            return dx.add_(self._low_rank_dx(dz))
        return _add_low_rank(dz, self.a.t(), dx)

    def low_dx(self, dz: Tensor | None) -> Low | None:
        """What the adapters add to `dx`, for a kernel that adds it itself; None where that is not one product."""
        if dz is None or self.a is None or self.dropout or len(self.a) > LARGEST_RANK:
            return None
        return dz, self.a

    def _top_gradients(self, dz: Tensor, x: Tensor) -> Sequence[Tensor]:
        if not self.dropout:
            return list(fp32_mm(dz.t(), x).split(self.ranks))
        if self.together:
            return low_rank.dropped_a(dz, x, self.seed, self.key, self.first, self.dropout, len(self.ranks)).unbind()
        return [fp32_mm(part.t(), self._dropped(x, which)) for which, part in enumerate(self._split(dz))]

    def _low_rank_dx(self, dz: Tensor) -> Tensor:
        assert self.a is not None
        if not self.dropout:
            return dz @ self.a
        if self.together:
            return low_rank.dropped_up(
                dz, self.a.view(len(self.ranks), self.ranks[0], -1), self.seed, self.key, self.first, self.dropout
            )
        parts = enumerate(zip(self._split(dz), self.a.split(self.ranks), strict=True))
        return torch.stack([self._dropped(part @ a, which) for which, (part, a) in parts]).sum(0)


def _output(p: Parts, x: Any, low: Low | None, base: Tensor | None) -> Tensor:
    """x Wᵀ + bias + z bᵀ + base, x as prepared, in the dtype of the base or else of z.

    For many steps an adapter adds less than half of what 16 bits tell apart. On top of what is rounded already that is
    nothing, or, where two rounded numbers end midway, far too much; so product, adapter and base are summed in fp32 and
    rounded once. Where products end in 16 bit (fp8), what that costs is small beside their own error.
    """
    if low is not None:
        y = _add_low_rank(*low, p.frozen.mm(x) if p.frozen.rounds else p.frozen.mm_fp32(x), base)
    elif base is None:
        y = p.frozen.mm(x)
    elif p.frozen.rounds:
        y = p.frozen.mm(x).add_(base)
    else:
        y = p.frozen.mm(x, base if torch.is_inference_mode_enabled() else base.clone())
    return y if p.frozen.bias is None else y.add_(p.frozen.bias.to(y.dtype))


def _add_low_rank(z: Tensor, b: Tensor, y: Tensor, also: Tensor | None = None) -> Tensor:
    """y + also + z bᵀ in the dtype of `also` or else of z, into y where that is its own."""
    dtype = z.dtype if also is None else also.dtype
    if b.shape[1] <= LARGEST_RANK:
        out = y if y.dtype == dtype else torch.empty_like(y, dtype=dtype)
        return low_rank.low_rank_add(z, b, y, out, also)
    if y.dtype == z.dtype:
        y = torch.addmm(y, z, b.t(), out=y)
        return y if also is None else also + y
    low = z @ b.t()
    y = y if also is None else y.add_(also)
    return torch.add(y, low, out=low) if dtype == low.dtype else y.add_(low).to(dtype)


def factors(parts: Sequence[Parts]) -> list[Tensor | None]:
    return [side for p in parts for side in (p.A, p.B)]
