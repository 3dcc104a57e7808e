"""Who attends to whom: a packed stream of whole sequences here; what a cache holds, in `kv_cache`.

A Decoder asks a `Sequences` for `positions` and for one view a layer, and each Attention calls `view.attend(q, k, v)`:
no cache, mask or length ever appears in the model.
Sizes: N tokens, S sequences, H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from litlora.ops.attention import Ragged, can_varlen, varlen


class View(Protocol):
    """What one layer sees."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, D), k and v (N, K, D), rotated -> (N, H, D)."""
        ...


class Sequences(Protocol):
    """A stream of tokens and its attention."""

    @property
    def positions(self) -> Tensor:
        """(N,) int64, from 0 in each sequence."""
        ...

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        """One view a layer, given each layer's sliding window."""
        ...


class Packed:
    """Whole examples side by side, attention kept inside each.

    Example: lengths 3 and 2 give positions [0 1 2 0 1], cu_seqlens [0 3 5], max_seqlen 3.
    """

    def __init__(self, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
        self.positions, self.cu_seqlens, self.max_seqlen = positions, cu_seqlens, max_seqlen
        self._ragged: Ragged | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packed:
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        return cls(positions, bounds, max(lengths))

    def ragged(self) -> Ragged:
        if self._ragged is None:
            self._ragged = Ragged(self.cu_seqlens)
        return self._ragged

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        return [_PackedView(self, window) for window in windows]


@dataclass(frozen=True)
class _PackedView:
    packed: Packed
    window: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.window if self.window is not None and self.window < self.packed.max_seqlen else None
        if can_varlen(q, window):
            return varlen(q, k, v, self.packed.cu_seqlens, self.packed.max_seqlen, window)
        return self.packed.ragged().attend(q, k, v, window)
