"""The training loop: one denominator per optimizer step, the trained tokens of the whole step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import Precision
from torch import Tensor, nn

from litlora.packing import Batch
from litlora.precision import RunPrecision

# Fabric advises tf32 products at every start: the precision here is the user's flag
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


class TrainingError(RuntimeError):
    """The run cannot go on, through no fault of the program (a loss that is no number)."""


class FabricPrecision(Precision):  # type: ignore[misc]  # Fabric has no types here
    """A RunPrecision, which names quantizer and dtypes, as Fabric's plugin.

    Fabric's own BitsandbytesPrecision swaps every Linear after loading and goes through fp16; with ours the model was
    loaded right, tensor by tensor, and a cast would round the quantizers' constants.
    """

    def __init__(self, run: RunPrecision) -> None:
        self.precision = run.precision
        self.run = run

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.run.forward_context()


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    number: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's trained tokens
    learning_rate: float
    grad_norm: float
    tokens: int  # all that went through the model
    trained_tokens: int
    seconds: float


def train(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[int, Sequence[Batch]]],
    *,
    learning_rate: float,
    schedule: Callable[[int], float],
    max_norm: float | None,
) -> Iterator[Step]:
    """Runs the optimizer steps of `batches`, (epoch, micro-batches) each, and yields after every one.

    `model` is the CausalLoss that fabric.setup gave back; `schedule` is the learning rate's factor by step from 0.
    A step without a trained token is skipped and not counted. Raises TrainingError when the loss is no number.
    """
    number = 0
    for epoch, micro_batches in batches:
        started = time.perf_counter()
        trained = sum(batch.trained_tokens for batch in micro_batches)
        if trained == 0:
            continue
        rate = learning_rate * schedule(number)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, norm = _optimizer_step(fabric, model, optimizer, micro_batches, trained, max_norm)
        number += 1
        tokens = sum(len(batch.input_ids) for batch in micro_batches)
        yield Step(number, epoch, loss, rate, norm, tokens, trained, time.perf_counter() - started)


def _optimizer_step(
    fabric: Fabric,
    model: Any,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    trained: int,
    max_norm: float | None,
) -> tuple[float, float]:
    """(mean loss, gradient norm before clipping) of one step over all its micro-batches."""
    model.train()
    total: Tensor | None = None
    for index, batch in enumerate(micro_batches):
        with fabric.no_backward_sync(model, enabled=index < len(micro_batches) - 1):
            loss = model(batch.to(fabric.device))
            fabric.backward(loss / trained)
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    mean, size = (total / trained).item(), norm.item()  # the only wait for the card in a step
    if not torch.isfinite(torch.tensor([mean, size])).all():
        rows = sorted(row for batch in micro_batches for row in batch.rows)
        raise TrainingError(
            f"the loss is {mean}, the gradient norm {size}: the step was not taken\n"
            f"  where:  rows {rows[:8]}{'…' if len(rows) > 8 else ''}\n"
            "  fix:    a lower --learning_rate, --max_norm 1.0, or --precision bf16-true / 32-true"
        )
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_([p for g in optimizer.param_groups for p in g["params"]], max_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean, size
