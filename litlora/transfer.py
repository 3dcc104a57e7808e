"""Between the host and a card, without waiting for what the card still does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy of what the host made, by way of pinned memory, so that the host waits for nothing the card still does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def on_its_way(x: Tensor) -> Callable[[], list[Any]]:
    """What x holds now, on the host once asked for: a card is not waited for beyond what made x."""
    host = x.to("cpu", non_blocking=True, copy=True)  # pinned memory, when it comes from a card
    arrived = torch.cuda.Event() if x.is_cuda else None
    if arrived is not None:
        arrived.record(torch.cuda.current_stream(x.device))

    def read() -> list[Any]:
        if arrived is not None:
            arrived.synchronize()
        return host.tolist()

    return read
