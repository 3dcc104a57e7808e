"""The hot operations as one table, so that a faster kernel replaces a plain one in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from litlora.ops import reference
from litlora.ops.attention import View
from litlora.ops.reference import Keep


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


NormAttend = Callable[
    [Tensor, Tensor, float, Sequence[nn.Module], Sequence[nn.Module] | None, Tensor, Tensor, View, Keep],
    tuple[Tensor, Tensor],
]


@dataclass(frozen=True)
class Ops:
    """Shapes and meaning are in `reference`, which is also what each replacement is held to."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    norm_attend: NormAttend = reference.norm_attend
    linear_add: Callable[[Tensor, Tensor, nn.Module], Tensor] = reference.linear_add
    norm_mlp: Callable[[Tensor, Tensor, float, Sequence[nn.Module], Keep], Tensor] = reference.norm_mlp
    linear_cross_entropy: Callable[[Tensor, nn.Module, Tensor], Tensor] = reference.linear_cross_entropy
    masks: Masks | None = None  # None: dropout draws from torch's generators
