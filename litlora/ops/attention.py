"""Causal attention over sequences of unequal length, without a padded batch around it.

Sizes: N tokens in the packed stream, S sequences, L padded length, H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class View(Protocol):
    """What one layer sees."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, D), k and v (N, K, D), rotated -> (N, H, D)."""
        ...


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(L, L) bool: a query sees itself and the window - 1 keys before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


class Ragged:
    """Where the tokens of a packed stream lie when sequences of like length are put side by side.

    The sequences are sorted into groups by length (powers of two), so that one long row does not pad the others.
    Causal attention never looks to the right, so right-padding needs no mask.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        """cu_seqlens (S+1,): where each sequence starts, and the stream's end."""
        bounds = cu_seqlens.tolist()
        groups: dict[int, list[tuple[int, int]]] = {}
        for start, stop in pairwise(bounds):
            if stop > start:
                groups.setdefault((stop - start - 1).bit_length(), []).append((start, stop))
        self.gathers: list[Tensor] = []  # (S_g, L_g) token numbers a group; a pad repeats the stream's token 0
        valid: list[Tensor] = []
        order: list[Tensor] = []
        for group in groups.values():
            starts, stops = torch.tensor(group).unbind(1)
            index = starts[:, None] + torch.arange(int((stops - starts).max()))
            inside = index < stops[:, None]
            self.gathers.append((index * inside).to(cu_seqlens.device))
            valid.append(inside.flatten().nonzero().squeeze(1).to(cu_seqlens.device))
            order.append(index[inside])
        self.valid = valid
        self.inverse = torch.cat(order).argsort().to(cu_seqlens.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
        outputs = []
        for gather, valid in zip(self.gathers, self.valid, strict=True):
            length = gather.shape[1]
            qs, ks, vs = (t[gather].transpose(1, 2) for t in (q, k, v))  # (S_g, heads, L_g, D)
            mask = window_mask(length, window, q.device) if window is not None and window < length else None
            out = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, valid))
        return torch.cat(outputs).index_select(0, self.inverse)


TILE = 64


@dataclass(frozen=True)
class Tiles:
    """The tiles of TILE tokens that each sequence is cut into: where each starts, and its sequence's first token and
    end, (T,) int32. T depends on N and S only, so that a captured graph serves every batch of its shape; a tile that is
    left over starts at its end."""

    starts: Tensor
    firsts: Tensor
    ends: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> Tiles:
        """cu_seqlens (S+1,) int32; the card is not waited for."""
        sequences = len(cu_seqlens) - 1
        counts = (cu_seqlens.diff() + (TILE - 1)) // TILE
        bounds = counts.cumsum(0)
        tile = torch.arange(tokens // TILE + sequences, device=cu_seqlens.device)
        which = torch.searchsorted(bounds, tile, right=True).clamp(max=sequences - 1)
        firsts, ends = cu_seqlens[which], cu_seqlens[which + 1]
        starts = firsts + TILE * (tile - (bounds - counts)[which])
        return cls(torch.where(tile < bounds[-1], starts, ends).int(), firsts, ends)


class Bounds:
    """Where the sequences of a packed stream lie, and what attention works out of that once for all layers."""

    def __init__(self, cu_seqlens: Tensor, longest: int, tokens: int) -> None:
        """cu_seqlens (S+1,) int32; `longest` of the sequences, at least."""
        self.cu_seqlens, self.longest, self.tokens = cu_seqlens, longest, tokens

    @cached_property
    def ragged(self) -> Ragged:
        return Ragged(self.cu_seqlens)

    @cached_property
    def tiles(self) -> Tiles:
        return Tiles.of(self.cu_seqlens, self.tokens)


@dataclass(frozen=True)
class Inside:
    """The view of a packed stream: each token sees its own sequence up to itself, as far as the window reaches."""

    bounds: Bounds
    window: int | None  # None where it is not shorter than every sequence

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if can_varlen(q):
            return varlen(q, k, v, self.bounds, self.window)[0]
        return self.bounds.ragged.attend(q, k, v, self.window)


def can_varlen(q: Tensor) -> bool:
    """Whether `varlen` takes this: a CUDA card since Ampere, 16 bit, heads of up to 256, a torch built with flash
    attention."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > 256 or q.shape[-1] % 8:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, window: int | None) -> tuple[Tensor, Tensor]:
    """Flash attention on the packed stream itself; arguments as `Ragged.attend`. Also the natural logarithm (H, N) fp32
    of each query's sum of exponentials, which has no gradient.

    It is what torch.nn.attention.varlen calls. That module's operation imports torch._dynamo, which takes up to 4 s of
    the time to a first token, and torch 2.10 and 2.11 give it no windows.
    """
    starts, longest = bounds.cu_seqlens, bounds.longest
    out, logsums, *_ = torch.ops.aten._flash_attention_forward.default(
        q, k, v, starts, starts, longest, longest, 0.0, window is None, False,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return out, logsums
