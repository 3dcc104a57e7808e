"""Plain torch operations: right on every device and dtype, the truth that faster ones are tested against.

Sizes: N tokens, C hidden, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litlora.ops.attention import View

Keep = Literal["all", "lean", "input"]  # for the backward pass: lean: no norms, no SwiGLU; input: nothing else
LOGITS_BYTES = 256 * 2**20  # of logits held at a time
TILE = 9216  # tokens of an MLP at a time where its backward pass works everything out again


def logit_bytes(item: int, in_fp32: bool) -> int:
    """That a fused operation holds of a logit at its widest. `item`: bytes in the products' dtype; `in_fp32`: the
    product is, for the head's adapter to be added to it."""
    return item + 4 if in_fp32 and item < 4 else item


def at_least_fp32(x: Tensor) -> Tensor:
    """fp64 stays, so that tests can be exact."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fp32_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 from the products' fp32 sums: what is still to be added, or an adapter's gradient, is not lost in
    their rounding to 16 bit."""
    if a.element_size() >= 4:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C), weight (C,): normalized in fp32, cast, then scaled, in this order as transformers does."""
    wide = at_least_fp32(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q (N, H, D) and k (N, K, D) by cos, sin (N, 1, D/2)."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def norm_attend(
    x: Tensor,
    weight: Tensor,
    eps: float,
    modules: Sequence[nn.Module],
    norms: Sequence[nn.Module] | None,
    cos: Tensor,
    sin: Tensor,
    view: View,
    keep: Keep = "all",
) -> tuple[Tensor, Tensor]:
    """x (N, C), the residual stream that goes on, and the attention (N, H, D) of its norm. modules: q, k, v; norms: of
    each head of q and of k, where there are any; cos, sin (N, 1, D/2)."""
    x, *projected = norm_linears(x, weight, eps, modules, keep)
    q, k, v = heads(projected, norms, cos)
    return x, rope_attend(q, k, v, cos, sin, view)


def heads(projected: Sequence[Tensor], norms: Sequence[nn.Module] | None, cos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (N, H, D), k and v (N, K, D) of the three linears' outputs."""
    q, k, v = (y.view(len(y), -1, 2 * cos.shape[-1]) for y in projected)
    return (q, k, v) if norms is None else (norms[0](q), norms[1](k), v)


def rope_attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, view: View) -> Tensor:
    """Attention (N, H, D) of q (N, H, D), k and v (N, K, D); q and k are rotated first, as `rope` does."""
    q, k = rope(q, k, cos, sin)
    return view.attend(q, k, v)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pair of dimension i is i + D/2, as in Hugging Face's layout."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def norm_linears(
    x: Tensor, weight: Tensor, eps: float, modules: Sequence[nn.Module], keep: Keep = "all"
) -> tuple[Tensor, ...]:
    """x (N, C), the residual stream that goes on, and each linear's output (N, O) of its norm. What is kept here is
    autograd's choice: litlora.recompute works round it."""
    y = rms_norm(x, weight, eps)
    return x, *(module(y) for module in modules)


def linear_add(residual: Tensor, x: Tensor, linear: nn.Module) -> Tensor:
    """residual (N, O) + linear(x)."""
    return residual + linear(x)  # type: ignore[no-any-return]


def norm_mlp(x: Tensor, weight: Tensor, eps: float, modules: Sequence[nn.Module], keep: Keep = "all") -> Tensor:
    """x (N, C) + SwiGLU of its norm; modules: gate, up, down."""
    gate, up, down = modules
    y = rms_norm(x, weight, eps)
    return x + down(F.silu(gate(y)) * up(y))  # type: ignore[no-any-return]


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
