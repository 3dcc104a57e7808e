"""The attention of a block on a CUDA card: norm, the linears of q, k and v, rotary embedding, attention.

One kernel puts the adapters on top of the linears' products, and rotates; one autograd Function has it all where the
attention is our own, too. Else the pieces, each held to its namesake in `reference`.
Sizes: N tokens, C hidden, H heads, K key/value heads, D head dim, R rank, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litlora.ops import attention_kernels, kernels, reference
from litlora.ops.attention import Inside, View
from litlora.ops.fused_common import DTYPES, Masks, Norm, cast_like, product_dtype, takes_norm, usable
from litlora.ops.group import Group, factors
from litlora.ops.parts import LARGEST_RANK, Parts
from litlora.ops.reference import Keep


@dataclass(frozen=True)
class _Linears:
    """Linears of the norm of x, forward and backward, without autograd."""

    norm: Norm
    parts: tuple[Parts, ...]
    seed: Tensor
    lean: bool  # the norm is worked out again in the backward pass

    def enter(self, x: Tensor) -> tuple[Group, Tensor, Tensor | None, Any, list[Tensor | None]]:
        """The linears, their x (N, C), z and rounded x; what `backward` takes."""
        cast = Group.cast(self.parts, self.norm.dtype)
        group = Group(self.parts, self.seed, cast)
        y, rstd, rounded = self.norm.of(x, group.rounds)
        z = group.down(y)
        return group, y, z, rounded, [x, rstd, None if self.lean or z is None else y, z, *cast]

    def backward(self, saved: Sequence[Any], past: Tensor, dys: Sequence[Tensor], wanted: bool) -> list[Tensor | None]:
        """The gradients of x, if it is `wanted`, and of the factors."""
        x, rstd, y, z, *cast = saved
        if y is None and z is not None:
            y, _, _ = self.norm.of(x)
        group = Group(self.parts, self.seed, cast)
        dz, gradients = group.gradients(y, z, dys)
        dx = self.norm.backward(group.dx(dz, dys), x, rstd, past) if wanted else None
        return [dx, *cast_like(gradients, self.parts)]


def _linears(
    masks: Masks, x: Tensor, weight: Tensor, eps: float, modules: Sequence[nn.Module], keep: Keep
) -> _Linears | None:
    parts = usable(x, modules)
    if parts is None or not takes_norm(x, weight):
        return None
    return _Linears(Norm(weight, eps, product_dtype(x)), parts, masks.seed, keep != "all")


# ---------------------------------------------------------------- the pieces


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linears: _Linears, *_factors: Tensor | None) -> Any:
        group, y, z, rounded, saved = linears.enter(x)
        ctx.linears = linears
        ctx.save_for_backward(*saved)
        return x, *group.up(y, z, rounded=rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor, *dys: Tensor) -> Any:
        dys = tuple(dy.contiguous() for dy in dys)
        dx, *gradients = ctx.linears.backward(ctx.saved_tensors, past, dys, ctx.needs_input_grad[0])
        return dx, None, *gradients


def norm_linears(
    masks: Masks, x: Tensor, weight: Tensor, eps: float, modules: Sequence[nn.Module], keep: Keep
) -> tuple[Tensor, ...]:
    linears = _linears(masks, x, weight, eps, modules, keep)
    if linears is None:
        return reference.norm_linears(x, weight, eps, modules, keep)
    return _NormLinears.apply(x, linears, *factors(linears.parts))  # type: ignore[no-any-return,no-untyped-call]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return kernels.rope(q.contiguous(), k.contiguous(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        dq, dk = (gradient.contiguous() for gradient in gradients)
        return *kernels.rope(dq, dk, cos, sin, backward=True), None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if q.dtype not in DTYPES:
        return reference.rope(q, k, cos, sin)
    return _Rope.apply(q, k, cos, sin)  # type: ignore[no-any-return,no-untyped-call]


class _RopeAttend(torch.autograd.Function):
    """With our kernels, which also rotate back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, inside: Inside) -> Tensor:
        q, k = kernels.rope(q.contiguous(), k.contiguous(), cos, sin)
        v = v.contiguous()
        out, logsums = attention_kernels.forward(q, k, v, inside.bounds.tiles, inside.window)
        ctx.inside = inside
        ctx.save_for_backward(q, k, v, cos, sin, out, logsums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        d_out, inside = gradients[0].contiguous(), ctx.inside
        found = attention_kernels.backward(ctx.saved_tensors, d_out, inside.bounds.tiles, inside.window)
        return *found, None, None, None


def rope_attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, view: View) -> Tensor:
    records = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    same = q.dtype == k.dtype == v.dtype
    if records and same and isinstance(view, Inside) and attention_kernels.takes(q, view):
        return _RopeAttend.apply(q, k, v, cos, sin, view)  # type: ignore[no-any-return,no-untyped-call]
    q, k = rope(q, k, cos, sin)
    return view.attend(q, k, v)


# ---------------------------------------------------------------- all of it at once


def _heads(
    linears: _Linears, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """q (N, H, D), k and v (N, K, D), rotated; what `_Linears.backward` takes."""
    group, y, z, rounded, saved = linears.enter(x)
    lows = group.lows(z) or (None, None, None)
    return *kernels.low_rope(group.products(y, rounded), lows, cos, sin), saved


class _NormAttend(torch.autograd.Function):
    """Keeps what `_NormLinears` and `_RopeAttend` keep."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, linears: _Linears, cos: Tensor, sin: Tensor, inside: Inside, *_factors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v, saved = _heads(linears, x, cos, sin)
        out, logsums = attention_kernels.forward(q, k, v, inside.bounds.tiles, inside.window)
        ctx.linears, ctx.inside = linears, inside
        ctx.save_for_backward(q, k, v, cos, sin, out, logsums, *saved)
        return x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor, d_out: Tensor) -> Any:
        saved, inside = ctx.saved_tensors, ctx.inside
        found = attention_kernels.backward(saved[:7], d_out.contiguous(), inside.bounds.tiles, inside.window)
        dys = [gradient.flatten(1) for gradient in found]
        dx, *gradients = ctx.linears.backward(saved[7:], past, dys, ctx.needs_input_grad[0])
        return dx, None, None, None, None, *gradients


def _puts_on_top(parts: Sequence[Parts], cos: Tensor) -> bool:
    """Whether `low_rope` can add the adapters to the frozen products of all, and rotate."""
    alike = len({type(p.frozen) for p in parts}) == 1 and 2 * cos.shape[-1] in attention_kernels.HEAD_DIMS
    return alike and all(p.frozen.bias is None and (p.B is None or p.B.shape[1] <= LARGEST_RANK) for p in parts)


def norm_attend(
    masks: Masks,
    x: Tensor,
    weight: Tensor,
    eps: float,
    modules: Sequence[nn.Module],
    norms: Sequence[nn.Module] | None,
    cos: Tensor,
    sin: Tensor,
    view: View,
    keep: Keep,
) -> tuple[Tensor, Tensor]:
    linears = _linears(masks, x, weight, eps, modules, keep)
    if linears is not None and norms is None and _puts_on_top(linears.parts, cos):
        sides = factors(linears.parts)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *sides))):
            q, k, v, _ = _heads(linears, x, cos, sin)
            return x, view.attend(q, k, v)
        q = x.new_empty(0, 1, 2 * cos.shape[-1], dtype=linears.norm.dtype)  # of the kind that there will be
        if isinstance(view, Inside) and attention_kernels.takes(q, view):
            return _NormAttend.apply(x, linears, cos, sin, view, *sides)  # type: ignore[no-any-return,no-untyped-call]
    x, *projected = norm_linears(masks, x, weight, eps, modules, keep)
    q, k, v = reference.heads(projected, norms, cos)
    return x, rope_attend(q, k, v, cos, sin, view)
