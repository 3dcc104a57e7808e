"""What the fused operations share: which x they take, the norm in front of linears, where dropout masks come from.

Sizes: N tokens, C hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from litlora.ops import kernels
from litlora.ops.group import factors
from litlora.ops.low_rank import SEEDS
from litlora.ops.parts import Parts, parts_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def usable(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Parts, ...] | None:
    """The parts of linears that a fused operation takes over x; else None."""
    return parts_of(linears) if product_dtype(x) in DTYPES else None


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    return x.dtype in DTYPES and x.dtype == weight.dtype and not weight.requires_grad


def cast_like(gradients: Sequence[Tensor | None], parts: Sequence[Parts]) -> list[Tensor | None]:
    """The factors' gradients in the factors' dtypes."""
    return [None if g is None or f is None else g.to(f.dtype) for g, f in zip(gradients, factors(parts), strict=True)]


@dataclass(frozen=True)
class Norm:
    weight: Tensor  # (C,)
    eps: float
    dtype: torch.dtype  # of the products

    def of(self, x: Tensor, rounds: bool = False) -> tuple[Tensor, Tensor, Any]:
        """The norm (N, C), 1/rms (N,) and, if it `rounds`, the norm in fp8 for `Group.up`."""
        return kernels.rms_norm(x, self.weight, self.eps, self.dtype, rounds=rounds)

    def backward(self, dy: Tensor, x: Tensor, rstd: Tensor, past: Tensor, out: Tensor | None = None) -> Tensor:
        """The gradient of x, `past` being what went by."""
        return kernels.rms_norm_backward(dy, x, self.weight, rstd, past.contiguous(), out)


class Masks:
    """The seed of a micro-batch's dropout masks, on the card. It is drawn from torch's CPU generator, which is seeded,
    saved and restored like every other; a recomputed block finds the seed of its forward pass."""

    def __init__(self, device: torch.device) -> None:
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.recomputing = False

    def begin(self) -> None:
        """New masks, in a tensor of its own: a loss that still waits for its backward pass keeps the old ones."""
        if not (self.seed.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.seed = torch.full_like(self.seed, self.draw())

    def renew(self) -> None:
        """New masks in the same tensor, where a captured graph reads it."""
        self.seed.fill_(self.draw())

    @contextmanager
    def recompute(self) -> Iterator[None]:
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False

    @staticmethod
    def draw() -> int:
        return int(torch.randint(SEEDS, ()))
