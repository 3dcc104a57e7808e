"""Plain torch operations: right on every device and dtype, the truth that faster ones are tested against.

Sizes: N tokens, C hidden, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 256 * 2**20  # fp32 logits held at a time


def at_least_fp32(x: Tensor) -> Tensor:
    """fp64 stays, so that tests can be exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C), weight (C,): normalized in fp32, cast, then scaled, in this order as transformers does."""
    wide = at_least_fp32(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def residual_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x, its norm): the residual stream goes on beside what is normalized."""
    return x, rms_norm(x, weight, eps)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q (N, H, D) and k (N, K, D) by cos, sin (N, 1, D/2)."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pair of dimension i is i + D/2, as in Hugging Face's layout."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def linears(x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Each linear's output, of the same x (N, I)."""
    return tuple(module(x) for module in modules)


def linear_add(residual: Tensor, x: Tensor, linear: nn.Module) -> Tensor:
    """residual (N, O) + linear(x)."""
    return residual + linear(x)  # type: ignore[no-any-return]


def mlp(residual: Tensor, x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """residual (N, C) + SwiGLU of x (N, C)."""
    return residual + down(F.silu(gate(x)) * up(x))  # type: ignore[no-any-return]


def linear_cross_entropy(x: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of x (T, C) under labels (T,), fp32 scalar: trained positions only.

    No more than LOGITS_BYTES of logits are held: where one chunk does not do, each is recomputed in the backward pass.
    """
    vocabulary = int(head.out_features)  # type: ignore[arg-type]
    rows = max(1, LOGITS_BYTES // (4 * vocabulary))
    if len(labels) <= rows:
        return _chunk_loss(head, x, labels)
    # preserve_rng_state keeps a dropout in front of the head's LoRA the same in the recomputation
    chunk = partial(checkpoint, _chunk_loss, head, use_reentrant=False, preserve_rng_state=True)
    parts = [chunk(*pair) for pair in zip(x.split(rows), labels.split(rows), strict=True)]
    return torch.stack(parts).sum()


def _chunk_loss(head: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(at_least_fp32(head(x)), labels, reduction="sum")
