"""The hot operations as one table, so that a faster kernel replaces a plain one in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from litlora.ops import reference


@dataclass(frozen=True)
class Ops:
    """rms_norm(x, weight, eps), rope(x, cos, sin), mlp(x, gate, up, down) over linears of any kind, and
    linear_cross_entropy(x, head, labels): shapes in `reference`, which is also what each replacement is held to."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = reference.rope
    mlp: Callable[[Tensor, nn.Module, nn.Module, nn.Module], Tensor] = reference.mlp
    linear_cross_entropy: Callable[[Tensor, nn.Module, Tensor], Tensor] = reference.linear_cross_entropy
