"""What blocks keep for the backward pass, and where: everything, all but what is cheap to work out again, only their
inputs, or those in the host's memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from litlora.errors import InputError
from litlora.ops import Masks

POLICIES = ("none", "selective", "full", "offload")  # each keeps less on the card than the one before it


@dataclass(frozen=True)
class Kept:
    """`none`: everything is kept. `selective`: of the first `blocks`, or of all where that is 0, all but norms and
    SwiGLU. `full`: of the first `blocks` only the input, of the others as `selective`. `offload`: as `full`, but the
    inputs wait in the host's memory."""

    policy: str = "none"
    blocks: int = 0

    @classmethod
    def parse(cls, text: str, layers: int) -> Kept | None:
        """A policy, for all of a model's `layers` or, as `full:20`, for so many blocks. None where it is none."""
        found = re.fullmatch(r"none|(selective|full|offload)(?::([1-9]\d{0,5}))?", text)
        if found is None:
            return None
        blocks = int(found[2] or layers)
        return None if blocks > layers else cls(found[1], blocks) if found[1] else cls()

    def text(self, layers: int) -> str:
        """What `parse` takes."""
        return f"{self.policy}:{self.blocks}" if 0 < self.blocks < layers else self.policy


class Runner:
    """The blocks of one forward pass, in turn. `masks` of the fused operations, which do most of this themselves."""

    def __init__(self, kept: Kept, masks: Masks | None) -> None:
        self.kept, self.masks, self.number = kept, masks, 0
        self.last: _Held | None = None

    def __call__(self, block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        self.number += 1
        policy, first = self.kept.policy, self.number <= self.kept.blocks
        if policy == "none" or (policy == "selective" and self.kept.blocks and not first):
            return block(x, *rest)  # type: ignore[no-any-return]
        if first and policy != "selective":
            return self._recomputed(block, x, *rest)
        if self.masks is None:  # dropout draws from torch's generators, whose state is kept for the second time
            return checkpoint(block, x, *rest, use_reentrant=False, context_fn=_without_products)  # type: ignore[no-any-return]
        return block(x, *rest, keep="lean")  # type: ignore[no-any-return]

    def _recomputed(self, block: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        held = self.last = _Held(x, self.last)
        again: Callable[[], Any] = nullcontext if self.masks is None else self.masks.recompute
        y: Tensor = checkpoint(
            lambda held, *rest: block(held.get(), *rest, keep="input"), held, *rest,
            use_reentrant=False, preserve_rng_state=self.masks is None, context_fn=lambda: (nullcontext(), again()),
        )  # fmt: skip
        if self.kept.policy == "offload" and x.is_cuda:
            held.leave()
        return y


class _Held:
    """A block's input between its two forward passes: on the card, or pinned in the host's memory, from where it is
    fetched while the block after it goes through its backward pass."""

    def __init__(self, x: Tensor, before: _Held | None) -> None:
        self.x: Tensor | None = x
        self.before, self.device = before, x.device
        self.needs_gradient = x.requires_grad
        self.host: Tensor | None = None
        self.ready: torch.cuda.Event | None = None

    def get(self) -> Tensor:
        if self.host is None:
            assert self.x is not None
            return self.x
        if self.x is None:
            self.fetch()
        x, self.x = self.x, None
        assert x is not None
        assert self.ready is not None
        here = torch.cuda.current_stream(self.device)
        here.wait_event(self.ready)
        x.record_stream(here)
        if self.before is not None:
            self.before.fetch()
        return x.requires_grad_(self.needs_gradient)

    def leave(self) -> None:
        x, self.x = self.x, None
        assert x is not None
        stream = _copies(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            self.host = _pinned(x)
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)

    def fetch(self) -> None:
        """Begins the way back."""
        assert self.host is not None
        stream = _copies(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            self.x = self.host.to(self.device, non_blocking=True)
            self.ready = stream.record_event()


def _pinned(x: Tensor) -> Tensor:
    try:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    except RuntimeError as error:
        raise InputError(
            "the host's memory does not hold the blocks' inputs",
            where="--activation_checkpointing offload",
            got=f"no {x.numel() * x.element_size() / 1e9:.2f} GB more for a block of a micro-batch",
            fix="--activation_checkpointing full, or a smaller --micro_batch_tokens",
        ) from error


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which inputs leave and come back."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _without_products() -> Any:
    """Products and attention keep what they gave; the rest is worked out again."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operation)
        kept = "mm" in name or "attention" in name
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
