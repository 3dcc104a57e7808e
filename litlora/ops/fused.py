"""The operations of a CUDA card: cuBLAS products that add into what is there, Triton kernels around them, and backward
passes written by hand that keep only what they need. Each is held to `reference`, which also takes what these cannot:
weights that train themselves, fp64.

Nothing is compiled to a graph, so no length of a pack recompiles anything.
Sizes: N tokens, C hidden, F ffn, H heads, D head dim, V vocabulary, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from litlora.ops import kernels, reference
from litlora.ops.fused_attention import norm_attend
from litlora.ops.fused_common import Masks, Norm, cast_like, product_dtype, takes_norm, usable
from litlora.ops.group import Group, factors
from litlora.ops.parts import Parts
from litlora.ops.reference import Keep
from litlora.ops.table import Ops


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd, _ = kernels.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        return kernels.rms_norm_backward(dys[0].contiguous(), x, weight, rstd, None), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not takes_norm(x, weight):
        return reference.rms_norm(x, weight, eps)
    flat = x.reshape(-1, x.shape[-1])
    return _RMSNorm.apply(flat, weight, eps).view(x.shape)  # type: ignore[no-any-return,no-untyped-call]


class _LinearAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, x: Tensor, parts: tuple[Parts, ...], seed: Tensor, *_factors: Any
    ) -> Tensor:
        cast = Group.cast(parts, x.dtype)
        group = Group(parts, seed, cast)
        z = group.down(x)
        ctx.parts, ctx.seed, ctx.dtype = parts, seed, x.dtype
        ctx.save_for_backward(x if z is not None else None, z, *cast)
        return _on_top(group, x, z, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        x, z, *cast = ctx.saved_tensors
        dy = dys[0].contiguous().to(ctx.dtype)
        group = Group(ctx.parts, ctx.seed, cast)
        dz, gradients = group.gradients(x, z, [dy])
        dx = group.dx(dz, [dy]) if ctx.needs_input_grad[1] else None
        return dys[0], dx, None, None, *cast_like(gradients, ctx.parts)


def _on_top(group: Group, x: Tensor, z: Tensor | None, residual: Tensor) -> Tensor:
    """residual + the group's one linear; a residual stream may be wider than the products (bf16-mixed)."""
    if residual.dtype == x.dtype or z is not None:
        return group.up(x, z, residual)[0]
    return residual + group.up(x, z)[0]


def linear_add(masks: Masks, residual: Tensor, x: Tensor, linear: nn.Module) -> Tensor:
    parts = usable(x, [linear])
    if parts is None:
        return reference.linear_add(residual, x, linear)
    x = x.to(product_dtype(x))
    return _LinearAdd.apply(residual, x, parts, masks.seed, *factors(parts))  # type: ignore[no-any-return,no-untyped-call]


# ---------------------------------------------------------------- MLP


@dataclass
class _Inside:
    """What the MLP of a tile of tokens works out on its way, for its backward pass."""

    y: Tensor | None  # the norm (N, C); None where it was not kept
    rstd: Tensor
    z: Tensor | None
    gate: Tensor  # (N, F), without the adapter's part where `Group.lows` gives that to the kernels
    up: Tensor
    hidden: Tensor | None = None  # (N, F); None where it was not kept
    z_outer: Tensor | None = None

    def tensors(self, lean: bool) -> tuple[Tensor | None, ...]:
        adapted = self.z is not None, self.z_outer is not None
        y, hidden = (t if kept and not lean else None for t, kept in zip((self.y, self.hidden), adapted, strict=True))
        return y, self.rstd, self.z, self.gate, self.up, hidden, self.z_outer


@dataclass(frozen=True)
class _SwiGLU:
    """x + the MLP of x's norm, forward and backward, without autograd."""

    norm: Norm
    parts: tuple[Parts, ...]  # gate, up, down
    seed: Tensor

    def groups(self, casts: Sequence[Tensor], first: int = 0) -> tuple[Group, Group]:
        adapted = sum(p.A is not None for p in self.parts[:2])
        split = adapted + 1 if adapted else 0
        inner = Group(self.parts[:2], self.seed, casts[:split], first)
        return inner, Group(self.parts[2:], self.seed, casts[split:], first)

    def casts(self) -> tuple[Tensor, ...]:
        dtype = self.norm.dtype
        return *Group.cast(self.parts[:2], dtype), *Group.cast(self.parts[2:], dtype)

    def enter(self, inner: Group, x: Tensor) -> _Inside:
        y, rstd, rounded = self.norm.of(x, inner.rounds)
        z = inner.down(y)
        gate, up = inner.up(y, z if inner.lows(z) is None else None, rounded=rounded)
        return _Inside(y, rstd, z, gate, up)

    def leave(self, inner: Group, outer: Group, x: Tensor, inside: _Inside) -> Tensor:
        inside.hidden = kernels.swiglu(inside.gate, inside.up, *(inner.lows(inside.z) or (None, None)))
        inside.z_outer = outer.down(inside.hidden)
        return _on_top(outer, inside.hidden, inside.z_outer, x)

    def backward(
        self, inner: Group, outer: Group, x: Tensor, inside: _Inside, past: Tensor, out: Tensor | None, last_use: bool
    ) -> list[Tensor | None]:
        """The factors' gradients; that of x into `out`, where it is wanted. What `inside` does not hold is worked out
        again; on its `last_use` it is written over."""
        dy = past.contiguous().to(inside.gate.dtype)
        hidden, z_outer, again = inside.hidden, inside.z_outer, None
        dz_outer, last = outer.low_gradients(z_outer, [dy])
        if z_outer is None:
            dz_outer = outer.dz([dy])
        if hidden is None and dz_outer is not None:
            hidden = again = inside.up if last_use else torch.empty_like(inside.gate)
        low = outer.low_dx(dz_outer)
        d_hidden = outer.dx(dz_outer if low is None else None, [dy])
        low_gate, low_up = inner.lows(inside.z) or (None, None)
        dys = kernels.swiglu_backward(d_hidden, inside.gate, inside.up, low_gate, low_up, low, again, last_use)
        if z_outer is None and hidden is not None and (z_outer := outer.down(hidden)) is not None:
            outer.add_bottoms(last, z_outer, [dy])
        outer.add_tops(last, hidden, dz_outer)
        y = self.norm.of(x)[0] if inside.y is None and inside.z is not None else inside.y
        dz, gradients = inner.gradients(y, inside.z, dys)
        if out is not None:
            self.norm.backward(inner.dx(dz, dys), x, inside.rstd, past, out)
        return [*gradients, *last]


class _NormMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: _SwiGLU, lean: bool, *_factors: Any) -> Tensor:
        casts = mlp.casts()
        inner, outer = mlp.groups(casts)
        inside = mlp.enter(inner, x)
        y = mlp.leave(inner, outer, x, inside)
        ctx.mlp = mlp
        ctx.save_for_backward(x, *inside.tensors(lean), *casts)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor) -> Any:
        x, *saved = ctx.saved_tensors
        inner, outer = ctx.mlp.groups(saved[7:])
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        gradients = ctx.mlp.backward(inner, outer, x, _Inside(*saved[:7]), past, dx, last_use=False)
        return dx, None, None, *cast_like(gradients, ctx.mlp.parts)


class _TiledNormMLP(torch.autograd.Function):
    """Keeps its input only: the backward pass goes through it tile by tile, forward and back. So where a block is run
    again for its backward pass, there is nothing to do here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: _SwiGLU, again: bool, *_factors: Any) -> Tensor:
        ctx.mlp = mlp
        ctx.save_for_backward(x)
        if again:
            return torch.empty_like(x)
        casts, ys = mlp.casts(), []
        for rows in _tiles(x):
            inner, outer = mlp.groups(casts, rows.start)
            ys.append(mlp.leave(inner, outer, x[rows], mlp.enter(inner, x[rows])))
        return ys[0] if len(ys) == 1 else torch.cat(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor) -> Any:
        (x,), mlp, casts = ctx.saved_tensors, ctx.mlp, ctx.mlp.casts()
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = []
        for rows in _tiles(x):
            inner, outer = mlp.groups(casts, rows.start)
            out = None if dx is None else dx[rows]
            inside = mlp.enter(inner, x[rows])
            sums = _added(sums, mlp.backward(inner, outer, x[rows], inside, past[rows], out, last_use=True))
        return dx, None, None, *cast_like(sums, mlp.parts)


def _tiles(x: Tensor) -> Iterator[slice]:
    """Of equal size, so that their products are of one shape."""
    count = -(-len(x) // reference.TILE)
    size = -(-len(x) // count)
    return (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))


def _added(sums: list[Tensor | None], more: list[Tensor | None]) -> list[Tensor | None]:
    if not sums:
        return more
    return [new if old is None or new is None else old.add_(new) for old, new in zip(sums, more, strict=True)]


def norm_mlp(masks: Masks, x: Tensor, weight: Tensor, eps: float, modules: Sequence[nn.Module], keep: Keep) -> Tensor:
    parts = usable(x, modules)
    if parts is None or not takes_norm(x, weight):
        return reference.norm_mlp(x, weight, eps, modules, keep)
    mlp = _SwiGLU(Norm(weight, eps, product_dtype(x)), parts, masks.seed)
    if keep == "input":
        return _TiledNormMLP.apply(x, mlp, masks.recomputing, *factors(parts))  # type: ignore[no-any-return,no-untyped-call]
    return _NormMLP.apply(x, mlp, keep == "lean", *factors(parts))  # type: ignore[no-any-return,no-untyped-call]


# ---------------------------------------------------------------- the head and its loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is worked out along with the loss, chunk by chunk, so that no logits are kept or made twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, parts: tuple[Parts, ...], seed: Tensor, *_factors: Any) -> Tensor:
        ctx.parts, cast = parts, Group.cast(parts, x.dtype)
        needed = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:])
        held = reference.logit_bytes(x.element_size(), parts[0].A is not None and not parts[0].frozen.rounds)
        rows = max(1, reference.LOGITS_BYTES // (held * parts[0].frozen.out_features))
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = [None, None]
        for start in range(0, len(x), rows):
            group = Group(parts, seed, cast, start)
            piece = x[start : start + rows]
            z = group.down(piece)
            (logits,) = group.up(piece, z)
            losses = kernels.cross_entropy(logits, labels[start : start + rows], gradient=needed)
            total += losses.sum()
            if needed:
                dz, gradients = group.gradients(piece, z, [logits])
                sums = _added(sums, gradients)
                if dx is not None:
                    dx[start : start + rows] = group.dx(dz, [logits])
            del logits  # before there are the next ones
        ctx.save_for_backward(dx, *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        dx, *sums = (None if saved is None else saved * gradients[0] for saved in ctx.saved_tensors)
        return dx, None, None, None, *cast_like(sums, ctx.parts)


def linear_cross_entropy(masks: Masks, x: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    parts = usable(x, [head])
    if parts is None:
        return reference.linear_cross_entropy(x, head, labels)
    x = x.to(product_dtype(x))
    return _LinearCrossEntropy.apply(x, labels, parts, masks.seed, *factors(parts))  # type: ignore[no-any-return,no-untyped-call]


def table(device: torch.device) -> Ops:
    masks = Masks(device)
    return Ops(
        rms_norm=rms_norm,
        norm_attend=partial(norm_attend, masks),
        linear_add=partial(linear_add, masks),
        norm_mlp=partial(norm_mlp, masks),
        linear_cross_entropy=partial(linear_cross_entropy, masks),
        masks=masks,
    )
