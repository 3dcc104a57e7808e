"""The operations that a model is made of, and which of them are the fastest here."""

from __future__ import annotations

import torch

from litlora.ops.table import Masks, Ops

__all__ = ["Masks", "Ops", "fastest"]


def fastest(device: torch.device) -> tuple[Ops, str | None]:
    """The operations for training on `device`, and why they are not the fused ones where a GPU cannot run those."""
    if device.type != "cuda":
        return Ops(), None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Ops(), f"{torch.cuda.get_device_name(device)} is older than Ampere"
    try:
        from litlora.ops import fused
    except ImportError as error:  # Windows, or a torch built without it
        return Ops(), f"Triton does not load ({error})"
    return fused.table(device), None
