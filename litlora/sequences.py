"""Who attends to whom: a packed stream of whole sequences here; what a cache holds, in `kv_cache`.

A Decoder asks a `Sequences` for `positions` and for one view a layer, and each Attention calls `view.attend(q, k, v)`:
no cache, mask or length ever appears in the model.
Sizes: N tokens, S sequences, H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from litlora.ops.attention import Bounds, Inside, View

__all__ = ["Packed", "Sequences", "View"]


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

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packed:
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        return cls(positions, bounds, max(lengths))

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        bounds, longest = Bounds(self.cu_seqlens, self.max_seqlen, len(self.positions)), self.max_seqlen
        return [Inside(bounds, None if window is None or window >= longest else window) for window in windows]
