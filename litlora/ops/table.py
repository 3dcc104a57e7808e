"""The hot operations as one table, so that a faster kernel replaces a plain one in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from litlora.ops import reference


class Masks(Protocol):
    """Where dropout masks come from that are not torch's."""

    def begin(self) -> None:
        """New masks for the forward pass that starts."""
        ...

    def renew(self) -> None:
        """New masks for the replay of a captured graph."""
        ...

    def recompute(self) -> AbstractContextManager[None]:
        """Inside it a block is run again for its backward pass only: its output may be anything."""
        ...


@dataclass(frozen=True)
class Ops:
    """Shapes and meaning are in `reference`, which is also what each replacement is held to."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    residual_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = reference.residual_norm
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = reference.rope
    linears: Callable[[Tensor, Sequence[nn.Module]], tuple[Tensor, ...]] = reference.linears
    linear_add: Callable[[Tensor, Tensor, nn.Module], Tensor] = reference.linear_add
    mlp: Callable[[Tensor, Tensor, nn.Module, nn.Module, nn.Module], Tensor] = reference.mlp
    linear_cross_entropy: Callable[[Tensor, nn.Module, Tensor], Tensor] = reference.linear_cross_entropy
    masks: Masks | None = None  # None: dropout draws from torch's generators
