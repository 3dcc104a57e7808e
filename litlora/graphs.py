"""Micro-batches as captured CUDA graphs: thousands of launches become one, so that the card never waits for the host.

A graph holds fixed shapes. A micro-batch is padded up to one of a few lengths by tokens that belong to nobody (about
1.5 % of it), and each length used is captured once (half a second), all in one memory pool.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from litlora.ops import Masks
from litlora.packing import Batch, pad


class Launcher(Protocol):
    """What is used of Lightning's Fabric."""

    @property
    def device(self) -> torch.device: ...

    def backward(self, tensor: Tensor) -> None: ...


class MicroStep(Protocol):
    """Forward and backward of one micro-batch."""

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradients must stay the tensors that they are: zero them, do not drop them."""
        ...

    def prepare(self, batch: Batch) -> Batch:
        """The host's part, which may be done beforehand and in another thread."""
        ...

    def __call__(self, batch: Batch, trained: int) -> Tensor:
        """The loss sum, detached, of a prepared batch; its gradient over `trained` tokens is added to what the
        parameters hold."""
        ...


STEPS = 32  # lengths between a power of two and the next: padding wastes a 32nd at most
LEAST = 32  # tokens between two lengths


class Eager:
    """Operation by operation."""

    keeps_gradients = False

    def __init__(self, fabric: Launcher, model: nn.Module) -> None:
        self.fabric, self.model = fabric, model

    def prepare(self, batch: Batch) -> Batch:
        return batch.pinned() if self.fabric.device.type == "cuda" else batch

    def __call__(self, batch: Batch, trained: int) -> Tensor:
        loss: Tensor = self.model(batch.to(self.fabric.device))
        self.fabric.backward(loss / trained)
        return loss.detach()


@dataclass(frozen=True)
class Shape:
    """What a graph is captured for. The same micro-batch always gives the same one, whatever ran before."""

    tokens: int
    kept: int
    sequences: int
    max_seqlen: int

    @classmethod
    def of(cls, batch: Batch) -> Shape:
        tokens = len(batch.input_ids)
        step = max(LEAST, (1 << (tokens - 1).bit_length()) // (2 * STEPS))
        size = _up(tokens, step)
        longest = 1 << (max(128, step, batch.max_seqlen) - 1).bit_length()
        kept = _up(len(batch.kept), max(LEAST, size // 8))
        return cls(size, min(size, kept), _up(len(batch.rows) + 1, 32), longest)

    def pad(self, batch: Batch) -> Batch:
        """To just this shape."""
        return pad(batch, self.tokens, self.kept, self.sequences)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class Captured:
    """One launch a micro-batch; operation by operation where something in it waits for the host (attention in fp32)."""

    keeps_gradients = True

    def __init__(self, fabric: Launcher, model: nn.Module, masks: Masks, parameters: list[nn.Parameter]) -> None:
        self.fabric, self.model, self.masks, self.parameters = fabric, model, masks, parameters
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.graphs: dict[Shape, _Graph] = {}
        self.eager: Eager | None = None

    def prepare(self, batch: Batch) -> Batch:
        return Shape.of(batch).pad(batch).pinned()

    def __call__(self, batch: Batch, trained: int) -> Tensor:
        if not self.graphs and self.eager is None and not self._warm_up():
            self.eager = Eager(self.fabric, self.model)
        if self.eager is not None:
            return self.eager(batch, trained)
        shape = Shape.of(batch)  # of a padded batch, its own
        graph = self.graphs.get(shape)
        if graph is None:
            graph = self.graphs[shape] = _Graph(self, shape)
        self.masks.renew()
        return graph.replay(batch, trained)

    def _warm_up(self) -> bool:
        """A tiny micro-batch, so that kernels are compiled and libraries have started before anything is captured.
        False where it waited for the host."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        state = torch.get_rng_state()
        ids = torch.zeros(LEAST, dtype=torch.int64)
        bounds = torch.tensor([0, LEAST], dtype=torch.int32)
        tiny = Batch(ids, ids, torch.arange(LEAST - 1), torch.arange(LEAST), bounds, LEAST, (0,)).to(self.fabric.device)
        eager, captures = Eager(self.fabric, self.model), True
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # the one of the captures: a stream has a workspace of its own
            eager(tiny, 1)
            try:
                with _no_waiting():
                    eager(tiny, 1)
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                captures = False
        torch.cuda.current_stream().wait_stream(self.stream)
        torch._foreach_zero_([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        torch.set_rng_state(state)
        return captures


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Inside it an operation that waits for the card raises RuntimeError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not see every kind of waiting
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def fastest_micro_step(fabric: Launcher, model: nn.Module, parameters: list[nn.Parameter], tokens: int) -> MicroStep:
    """How `model`, a CausalLoss, goes through micro-batches of so many tokens: captured where the fused operations run
    and the host would take longer to launch a block's kernels than the card to run them. Where the card is the slower
    one anyhow, padding to a graph's shape only costs (1.5 to 2 % on packs of 8,192 tokens of a 7B, H100)."""
    decoder = model.decoder
    masks = decoder.ops.masks  # type: ignore[union-attr]
    offloads = decoder.kept.policy == "offload"  # type: ignore[union-attr]  # the host's memory is not to be captured
    if masks is None or offloads or tokens * _block_work(decoder) > LAUNCH_BOUND:  # type: ignore[arg-type]
        return Eager(fabric, model)
    return Captured(fabric, model, masks, parameters)  # type: ignore[arg-type]


LAUNCH_BOUND = 8e11  # weights of a block times tokens: 4,000 tokens of a 7B, 5 ms on an H100


def _block_work(decoder: nn.Module) -> float:
    """Weights that each token meets in a block; half in fp8, which a card multiplies twice as fast."""
    block = next(iter(decoder.model.layers))  # type: ignore[union-attr,arg-type]
    weights = (p for p in block.parameters() if not p.requires_grad and p.dim() == 2)
    shares = {torch.float8_e4m3fn: 0.5, torch.uint8: 2.0}  # a byte of 4-bit weights is two of them
    return float(sum(p.numel() * shares.get(p.dtype, 1.0) for p in weights))


class _Graph:
    def __init__(self, owner: Captured, shape: Shape) -> None:
        self.shape, device = shape, owner.fabric.device

        def empty(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.batch = Batch(
            input_ids=empty(shape.tokens),
            labels=empty(shape.tokens),
            kept=empty(shape.kept),
            positions=empty(shape.tokens),
            cu_seqlens=empty(shape.sequences + 1, dtype=torch.int32),
            max_seqlen=shape.max_seqlen,
            rows=(),
        )
        self.scale = torch.ones((), device=device)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # "thread_local": another thread is making the next batches, and pins memory as a capture may not
        with torch.cuda.graph(self.graph, owner.pool, owner.stream, capture_error_mode="thread_local"):
            loss = owner.model(self.batch)
            owner.fabric.backward(loss * self.scale)
            self.loss: Any = loss.detach()

    def replay(self, batch: Batch, trained: int) -> Tensor:
        for name in ("input_ids", "labels", "kept", "positions", "cu_seqlens"):
            getattr(self.batch, name).copy_(getattr(batch, name), non_blocking=True)
        self.scale.fill_(1 / trained)
        self.graph.replay()
        return self.loss.clone()  # type: ignore[no-any-return]
