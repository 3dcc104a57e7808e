"""Keys and values of generation, and who attends to what of them: prompts that fill a cache, one new token a row.

The cache is one long list of tokens; where a row's tokens lie in it is its keeper's matter (an `Engine`'s).
Sizes: N tokens, B rows, T tokens of the cache, H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.config import ModelConfig
from litlora.sequences import Packed, View
from litlora.transfer import on_device


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
        for cached, new in ((self.keys[layer], k), (self.values[layer], v)):
            _widest(cached).index_copy_(0, where, _widest(new.to(cached.dtype)))

    def move(self, source: int, target: int, count: int) -> None:
        """Copies `count` tokens; the spans do not overlap."""
        for layer in (*self.keys, *self.values):
            layer[target : target + count] = layer[source : source + count]


def _widest(x: Tensor) -> Tensor:
    """(N, K, D) as (N, bytes / 8) int64, where that is whole: rows are copied element by element, of any size."""
    flat = x.reshape(len(x), -1)
    return flat.view(torch.int64) if flat.shape[1] * flat.element_size() % 8 == 0 else flat


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


PAGE = 64  # tokens


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE)


class Pages:
    """Rows grow page by page, wherever one is free, so that no row keeps what it may never need."""

    def __init__(self, count: int) -> None:
        """Page 0 is of no row."""
        self.free = list(range(count - 1, 0, -1))
        self.of: dict[int, list[int]] = {}  # the pages of each row, in the order of its tokens

    def hold(self, row: int, tokens: int) -> bool:
        """Makes room for so many tokens of a row; False, and nothing changes, where there are too few pages."""
        pages = self.of.setdefault(row, [])
        missing = pages_of(tokens) - len(pages)
        if missing > len(self.free):
            return False
        pages += [self.free.pop() for _ in range(missing)]
        return True

    def give_back(self, row: int) -> None:
        self.free += reversed(self.of.pop(row))

    def places(self, row: int, first: int, count: int) -> Tensor:
        """Where tokens `first` to `first + count - 1` of a row lie, (count,) int64."""
        token = torch.arange(first, first + count)
        return torch.tensor(self.of[row])[token // PAGE] * PAGE + token % PAGE


class Prefill:
    """Whole prompts side by side, which attend as `Packed` and leave their keys and values in the cache."""

    def __init__(self, cache: KVCache, places: Sequence[Tensor], device: torch.device) -> None:
        """Prompt i is written to `places[i]` of the cache, a place for each of its tokens."""
        packed = Packed.of_lengths([len(part) for part in places])
        self.cache, self.where = cache, on_device(torch.cat(list(places)), device)  # (N,)
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

    def __init__(self, cache: KVCache, places: Tensor, first: int, device: torch.device) -> None:
        """Tokens from `first` on of a prompt; `places` of all of its tokens up to the last new one."""
        self.cache, self.where, self.first = cache, on_device(places, device), first
        self.positions = torch.arange(first, len(places), device=device)

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        masks = {window: self._mask(window) for window in set(windows)}
        return [_ContinuationView(self, layer, masks[window]) for layer, window in enumerate(windows)]

    def _mask(self, window: int | None) -> Tensor:
        """(N, all): what each new token sees."""
        distance = self.positions[:, None] - torch.arange(len(self.where), device=self.positions.device)
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@dataclass(frozen=True)
class _ContinuationView:
    prompt: Continuation
    layer: int
    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt, cache = self.prompt, self.prompt.cache
        cache.write(self.layer, prompt.where[prompt.first :], k, v)
        keys, values = cache.keys[self.layer][prompt.where], cache.values[self.layer][prompt.where]
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
