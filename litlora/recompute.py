"""What blocks keep for the backward pass, and where: everything, all but what is cheap to work out again, only their
inputs, or those in the host's memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

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
    """A block's input between its two forward passes: on the card, or in the host's memory, from where it is fetched
    while the block after it goes through its backward pass."""

    def __init__(self, x: Tensor, before: _Held | None) -> None:
        self.x: Tensor | None = x
        self.before, self.needs_gradient = before, x.requires_grad
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.host: list[Tensor] | None = None  # its bytes
        self.ready: torch.cuda.Event | None = None

    def get(self) -> Tensor:
        """Where it has left, once."""
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
        side = _Side.of(self.device)
        self.host = side.take(x.nbytes)
        side.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(side.stream):
            for piece, part in _paired(self.host, x):
                piece.copy_(part, non_blocking=True)
        x.record_stream(side.stream)

    def fetch(self) -> None:
        """Begins the way back."""
        assert self.host
        side = _Side.of(self.device)
        side.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(side.stream):
            self.x = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            for piece, part in _paired(self.host, self.x):
                part.copy_(piece, non_blocking=True)
            self.ready = side.stream.record_event()
        side.free += self.host
        self.host = []


PIECE = 2**24  # bytes of pinned memory: torch rounds every piece up to a power of two


class _Side:
    """Where inputs wait, and the stream on which they leave and come back: in order, so that a piece is free once its
    reading was asked for."""

    devices: ClassVar[dict[torch.device, _Side]] = {}

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.free: list[Tensor] = []

    @classmethod
    def of(cls, device: torch.device) -> _Side:
        return cls.devices.get(device) or cls.devices.setdefault(device, cls(device))

    def take(self, size: int) -> list[Tensor]:
        """Pieces for so many bytes."""
        count = -(-size // PIECE)
        while len(self.free) < count:
            try:
                self.free.append(torch.empty(PIECE, dtype=torch.uint8, pin_memory=True))
            except RuntimeError as error:
                raise InputError(
                    "the host's memory does not hold the blocks' inputs",
                    where="--activation_checkpointing offload",
                    got=f"no {size / 1e9:.2f} GB more for a block of a micro-batch",
                    fix="--activation_checkpointing full, or a smaller --micro_batch_tokens",
                ) from error
        return [self.free.pop() for _ in range(count)]


def _paired(pieces: list[Tensor], x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of the host's memory, and the bytes of x, which is contiguous, that belong there."""
    for piece, part in zip(pieces, x.view(-1).view(torch.uint8).split(PIECE), strict=True):
        yield piece[: len(part)], part


def _without_products() -> Any:
    """Products and attention keep what they gave; the rest is worked out again."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = str(operation)
        kept = "mm" in name or "attention" in name
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
