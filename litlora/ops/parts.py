"""What a linear is made of, as it says itself by `parts()`: all that a fused operation knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

LARGEST_RANK = 64  # that the kernels of adapters hold in registers; products and sums of torch's own take larger ones


class FrozenMatrix(Protocol):
    """A weight (O, I) that never trains, in any format; no autograd."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def rounds(self) -> bool:
        """Whether `prepare` rounds rows to fp8, which the norm before them can do while it has them. Such products end
        in 16 bit and add nothing by themselves; others read `add` in their own epilogue, at no cost (cuBLAS rounds the
        product first)."""
        ...

    def prepare(self, x: Tensor) -> Any:
        """What `mm` takes for x (N, I)."""
        ...

    def mm(self, x: Any, add: Tensor | None = None) -> Tensor:
        """x Wᵀ (N, O); into `add`, added to what it holds, where given."""
        ...

    def mm_fp32(self, x: Tensor) -> Tensor:
        """x Wᵀ (N, O) in fp32; not where it `rounds`, whose products end in 16 bit."""
        ...

    def mm_each(self, others: Sequence[Any], x: Any) -> list[Tensor]:
        """`mm` (N, O_j) of this one and `others`, all of one format; rows may be strided."""
        ...

    def sum_mm_t(self, others: Sequence[Any], gradients: Sequence[Tensor], add: Tensor | None) -> Tensor:
        """gradients (N, O_j) -> the sum of gradient_j W_j (N, I) over this one and `others`; into `add` as `mm`."""
        ...


@dataclass(frozen=True)
class Parts:
    """x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ; without A and B a linear that is not adapted."""

    frozen: FrozenMatrix
    A: Tensor | None = None  # (R, I)
    B: Tensor | None = None  # (O, R)
    scale: float = 1.0
    dropout: float = 0.0  # as in use: 0 outside of training
    key: int = 0  # which adapter of the model: its own dropout masks under the common seed


def parts_of(linears: Sequence[nn.Module]) -> tuple[Parts, ...] | None:
    """The parts of all, or None where one of them has a weight that trains itself (no `parts`)."""
    found: list[Parts] = []
    for linear in linears:
        parts = linear.parts() if hasattr(linear, "parts") else None  # type: ignore[operator]
        if parts is None:
            return None
        found.append(parts)
    return tuple(found)
