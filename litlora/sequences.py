"""Who attends to whom: a packed stream in training, prompts that fill a cache, one new token a row.

A Decoder asks a `Sequences` for `positions` and for one view a layer, and each Attention calls `view.attend(q, k, v)`:
no cache, mask or length ever appears in the model.
Sizes: N tokens, S sequences, B rows of the cache, T its length, H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.config import ModelConfig
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


class KVCache:
    """Keys and values of B rows of up to T tokens, per layer (B, T, K, D)."""

    def __init__(
        self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (rows, length, config.num_key_value_heads, config.head_dim)
        self.rows, self.length = rows, length
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]


class Prefill:
    """Prompts side by side, which attend as `Packed` and leave their keys and values in the cache."""

    def __init__(self, packed: Packed, cache: KVCache, rows: Sequence[int] | None = None) -> None:
        """Sequence i of `packed` fills row `rows[i]` (i itself without `rows`) from position 0."""
        self.packed, self.cache, self.positions = packed, cache, packed.positions
        bounds = packed.cu_seqlens.tolist()
        lengths = [stop - start for start, stop in pairwise(bounds)]
        row = torch.tensor(range(len(lengths)) if rows is None else rows)
        self.token_rows = row.repeat_interleave(torch.tensor(lengths)).to(packed.positions.device)  # (N,)

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        inner = self.packed.views(windows)
        return [_PrefillView(self, view, layer) for layer, view in enumerate(inner)]


@dataclass(frozen=True)
class _PrefillView:
    prefill: Prefill
    inner: View
    layer: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, where = self.prefill.cache, (self.prefill.token_rows, self.prefill.positions)
        cache.keys[self.layer][where] = k.to(cache.keys[self.layer].dtype)
        cache.values[self.layer][where] = v.to(cache.values[self.layer].dtype)
        return self.inner.attend(q, k, v)


class Decode:
    """One new token for each row of the cache, at `positions` (B,); it sees what its row wrote before, and itself."""

    def __init__(self, positions: Tensor, cache: KVCache, longest: int) -> None:
        """`longest`: an upper bound of positions + 1, known to the host, so that only written keys are read."""
        self.positions, self.cache, self.longest = positions, cache, min(longest, cache.length)

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        key = torch.arange(self.longest, device=self.positions.device)
        masks: dict[int | None, Tensor] = {}
        for window in set(windows):
            mask = key[None, :] <= self.positions[:, None]
            if window is not None:
                mask &= key[None, :] > self.positions[:, None] - window
            masks[window] = mask[:, None, None, :]  # (B, 1, 1, T)
        return [_DecodeView(self, layer, masks[window]) for layer, window in enumerate(windows)]


@dataclass(frozen=True)
class _DecodeView:
    decode: Decode
    layer: int
    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.decode.cache.keys[self.layer], self.decode.cache.values[self.layer]
        row = torch.arange(len(q), device=q.device)
        keys[row, self.decode.positions] = k.to(keys.dtype)
        values[row, self.decode.positions] = v.to(values.dtype)
        longest = self.decode.longest
        out = F.scaled_dot_product_attention(
            q[:, :, None],  # (B, H, 1, D)
            keys[:, :longest].transpose(1, 2).to(q.dtype),
            values[:, :longest].transpose(1, 2).to(q.dtype),
            attn_mask=self.mask,
            enable_gqa=True,
        )
        return out.squeeze(2)
