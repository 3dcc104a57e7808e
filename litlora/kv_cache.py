"""Keys and values of generation, and who attends to what of them: prompts that fill a cache, one new token a row.

A row's tokens lie side by side in the cache, from its `start` on; the cache knows nothing else of rows.
Sizes: N tokens, B rows, T tokens of the cache, H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.config import ModelConfig
from litlora.sequences import Packed, View


class KVCache:
    """Per layer (T, K, D)."""

    def __init__(self, config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device | str) -> None:
        shape = (tokens, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        # zeros: what a mask hides is multiplied by 0, and 0 times no number would be no number
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def write(self, layer: int, where: Tensor, k: Tensor, v: Tensor) -> None:
        """k and v (N, K, D) to the places `where` (N,)."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, where, k.to(keys.dtype))
        values.index_copy_(0, where, v.to(values.dtype))

    def move(self, source: int, target: int, count: int) -> None:
        """Copies `count` tokens; the spans do not overlap."""
        for layer in (*self.keys, *self.values):
            layer[target : target + count] = layer[source : source + count]


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of what the host made, by way of pinned memory, so that the host waits for nothing the card still does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


class Spans:
    """Free tokens of the cache: a row gets the first span that is long enough."""

    def __init__(self, first: int, end: int) -> None:
        self.free = [(first, end)]  # in order, never side by side
        self.taken: dict[int, int] = {}  # start -> end

    def take(self, tokens: int) -> int | None:
        """The start of a span, None where none is long enough."""
        tokens = max(1, tokens)
        for index, (start, end) in enumerate(self.free):
            if end - start >= tokens:
                self.free[index : index + 1] = [(start + tokens, end)] if end - start > tokens else []
                self.taken[start] = start + tokens
                return start
        return None

    def give_back(self, start: int) -> None:
        insort(self.free, (start, self.taken.pop(start)))
        index = next(i for i, span in enumerate(self.free) if span[0] == start)
        for left in (index, index - 1):  # with the span behind it, then with the one in front
            if 0 <= left < len(self.free) - 1 and self.free[left][1] == self.free[left + 1][0]:
                self.free[left : left + 2] = [(self.free[left][0], self.free[left + 1][1])]


class Prefill:
    """Whole prompts side by side, which attend as `Packed` and leave their keys and values in the cache."""

    def __init__(self, cache: KVCache, lengths: Sequence[int], starts: Sequence[int], device: torch.device) -> None:
        """Prompt i, of `lengths[i]` tokens, is written from `starts[i]` on."""
        packed = Packed.of_lengths(lengths)
        where = torch.tensor(starts).repeat_interleave(torch.tensor(lengths)) + packed.positions
        self.cache, self.where = cache, on_device(where, device)  # (N,)
        positions, bounds = on_device(packed.positions, device), on_device(packed.cu_seqlens, device)
        self.packed = Packed(positions, bounds, packed.max_seqlen)
        self.positions = self.packed.positions

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        inner = self.packed.views(windows)
        return [_PrefillView(self, view, layer) for layer, view in enumerate(inner)]


@dataclass(frozen=True)
class _PrefillView:
    prefill: Prefill
    inner: View
    layer: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.prefill.cache.write(self.layer, self.prefill.where, k, v)
        return self.inner.attend(q, k, v)


class Continuation:
    """The next tokens of one prompt, which also see what the cache holds of it."""

    def __init__(self, cache: KVCache, start: int, first: int, count: int, device: torch.device) -> None:
        """Tokens `first` to `first + count - 1` of a prompt that is written from `start` on."""
        self.cache, self.start, self.end = cache, start, first + count
        self.positions = torch.arange(first, self.end, device=device)

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        masks = {window: self._mask(window) for window in set(windows)}
        return [_ContinuationView(self, layer, masks[window]) for layer, window in enumerate(windows)]

    def _mask(self, window: int | None) -> Tensor:
        """(N, end): what each new token sees."""
        distance = self.positions[:, None] - torch.arange(self.end, device=self.positions.device)
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@dataclass(frozen=True)
class _ContinuationView:
    prompt: Continuation
    layer: int
    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt = self.prompt
        prompt.cache.write(self.layer, prompt.start + prompt.positions, k, v)
        span = slice(prompt.start, prompt.start + prompt.end)
        keys, values = prompt.cache.keys[self.layer][span], prompt.cache.values[self.layer][span]
        return _attention(q[None], keys[None].to(q.dtype), values[None].to(q.dtype), self.mask)[0]


class Decode:
    """One new token for each of B rows, row i written from i · `spacing` on; it sees what its row wrote before."""

    def __init__(self, cache: KVCache, positions: Tensor, lengths: Sequence[int], spacing: int) -> None:
        """positions (B,) of the new tokens; `lengths`: how many tokens each row has before it, as the host knows."""
        self.cache, self.positions, self.spacing, self.longest = cache, positions, spacing, max(lengths) + 1
        self.where = torch.arange(len(positions), device=positions.device) * spacing + positions

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        masks = {window: self._mask(window) for window in set(windows)}
        return [_DecodeView(self, layer, window, masks[window]) for layer, window in enumerate(windows)]

    def _mask(self, window: int | None) -> Tensor | None:
        """(B, 1, 1, longest): what each new token sees; one row alone is cut to that instead."""
        if len(self.positions) == 1:
            return None
        distance = self.positions[:, None] - torch.arange(self.longest, device=self.positions.device)
        seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
        return seen[:, None, None]


@dataclass(frozen=True)
class _DecodeView:
    decode: Decode
    layer: int
    window: int | None
    mask: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        decode, rows = self.decode, len(q)
        decode.cache.write(self.layer, decode.where, k, v)
        first = 0 if self.mask is not None or self.window is None else max(0, decode.longest - self.window)
        keys, values = (
            tokens[: rows * decode.spacing].unflatten(0, (rows, decode.spacing))[:, first : decode.longest].to(q.dtype)
            for tokens in (decode.cache.keys[self.layer], decode.cache.values[self.layer])
        )
        return _attention(q[:, None], keys, values, self.mask)[:, 0]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, N, H, D), k and v (B, T, K, D) -> (B, N, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
