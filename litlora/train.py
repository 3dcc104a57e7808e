"""The training loop: one denominator per optimizer step, the trained tokens of the whole step."""

from __future__ import annotations

import gc
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from litlora.graphs import Captured, Eager, Launcher, MicroStep, fastest_micro_step
from litlora.optimizers import state_bytes
from litlora.packing import Batch
from litlora.transfer import on_its_way


class TrainingError(RuntimeError):
    """The run cannot go on, through no fault of the program (losses that are no numbers, a disk that is full)."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. Where its loss or gradient was not finite it was not applied, and says so."""

    number: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's trained tokens
    learning_rate: float
    grad_norm: float  # before clipping
    clipped: bool
    tokens: int  # all that went through the model
    trained_tokens: int
    seconds: float
    bad_rows: tuple[int, ...] = ()  # the examples that gave no finite number: the step was not applied


def train(
    fabric: Launcher,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[int, Sequence[Batch]]],
    *,
    learning_rate: float,
    schedule: Callable[[int], float],
    max_norm: float | None,
    done: int = 0,
    largest: Batch | None = None,
) -> Iterator[Step]:
    """Runs the optimizer steps of `batches`, (epoch, micro-batches) each, and yields after every one.

    `model` is the CausalLoss that fabric.setup gave back; `schedule` is the learning rate's factor by step from 0;
    `done` steps were taken before. `largest`: the run's largest micro-batch, else the first step's; by it is chosen how
    they are launched, and on a GPU it is tried before the first step, if not in it, so that a run that will not fit
    fails at once.
    A step without a trained token is skipped and not counted.
    """
    model.train()  # once, it goes through a thousand modules: who evaluates between two steps puts it back
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps = iter(batches)
    first = list(islice(steps, 1))
    if largest is None:
        largest = max(
            (batch for _, step in first for batch in step), key=lambda batch: len(batch.input_ids), default=None
        )
    number, tokens = done, 0 if largest is None else len(largest.input_ids)
    micro_step, room = fastest_micro_step(fabric, model, parameters, tokens), []
    if largest is not None and fabric.device.type == "cuda":
        room = _room(optimizer, fabric.device)
        # a first step that holds it is the trial itself: a single long row takes minutes
        if isinstance(micro_step, Captured) or all(len(b.input_ids) < tokens for _, step in first for b in step):
            _rehearse(micro_step, largest, optimizer, fabric.device)
            room.clear()
    ahead = _Ahead(_Work.of(epoch, step, micro_step) for epoch, step in chain(first, steps))
    with _settled(), ahead as works:
        started = time.perf_counter()
        for work in works:
            if work.trained == 0:
                continue
            rate = learning_rate * schedule(number)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, norm, bad_rows = _optimizer_step(fabric, model, optimizer, micro_step, work, max_norm, room, works)
            number += 1
            clipped = max_norm is not None and norm > max_norm and not bad_rows
            seconds = time.perf_counter() - started
            yield Step(number, work.epoch, loss, rate, norm, clipped, work.tokens, work.trained, seconds, bad_rows)
            started = time.perf_counter()


def _room(optimizer: torch.optim.Optimizer, device: torch.device) -> list[Tensor]:
    """What a micro-batch after the first step meets: every gradient, and the room of the optimizer's state, which is
    given back."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    return [torch.empty(0 if optimizer.state else state_bytes(optimizer), dtype=torch.uint8, device=device)]


def _rehearse(micro_step: MicroStep, batch: Batch, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Forward and backward of a micro-batch, whose gradient is thrown away."""
    with undisturbed(device):
        micro_step(micro_step.prepare(batch), max(1, batch.trained_tokens))
    optimizer.zero_grad(set_to_none=not micro_step.keeps_gradients)


@contextmanager
def _settled() -> Iterator[None]:
    """What is there by now is left out when Python looks for garbage: half a million objects, 0.1 to 0.3 s every ten
    steps or so, for which the card waits."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class _Work:
    """One optimizer step's micro-batches, prepared, and what they held before."""

    epoch: int
    micro_batches: Sequence[Batch]
    tokens: int
    trained: int

    @classmethod
    def of(cls, epoch: int, micro_batches: Sequence[Batch], micro_step: MicroStep) -> _Work:
        tokens = sum(len(batch.input_ids) for batch in micro_batches)
        trained = sum(batch.trained_tokens for batch in micro_batches)
        return cls(epoch, [micro_step.prepare(batch) for batch in micro_batches], tokens, trained)


class _Ahead:
    """The items, each worked out in another thread from `begin` on, or else when it is asked for."""

    def __init__(self, items: Iterator[_Work]) -> None:
        self.items, self.pool = items, ThreadPoolExecutor(1, "batches")
        self.coming: Future[_Work | None] | None = None

    def begin(self) -> None:
        if self.coming is None:
            self.coming = self.pool.submit(next, self.items, None)

    def __iter__(self) -> Iterator[_Work]:
        while True:
            self.begin()
            assert self.coming is not None
            item, self.coming = self.coming.result(), None
            if item is None:
                return
            yield item

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()


def _optimizer_step(
    fabric: Launcher,
    model: Any,
    optimizer: torch.optim.Optimizer,
    micro_step: MicroStep,
    work: _Work,
    max_norm: float | None,
    room: list[Tensor],
    works: _Ahead,
) -> tuple[float, float, tuple[int, ...]]:
    """(mean loss, gradient norm before clipping, bad rows) of one step over all its micro-batches. `room` is given back
    before the optimizer needs it.

    The card has nothing to do from the update's end until the next step's first kernels: what the host can do before it
    waits, and the next of `works`, come before.
    """
    losses = [micro_step(batch, work.trained) for batch in work.micro_batches]
    room.clear()
    norm = _grad_norm(optimizer)
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    figures = torch.stack([(total / work.trained).float(), norm.float()])

    def update() -> None:
        if max_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        optimizer.step()
        clear()

    clear = partial(optimizer.zero_grad, set_to_none=not micro_step.keeps_gradients)
    read = on_its_way(figures)
    updated = _updated_if_finite(optimizer, figures, update)
    works.begin()
    mean, size = read()  # the only wait for the card in a step
    bad_rows: tuple[int, ...] = ()
    if not (math.isfinite(mean) and math.isfinite(size)):
        bad_rows = _bad_rows(fabric, model, optimizer, work, losses)
        clear()
    elif not updated:
        update()
    return mean, size, bad_rows


def _updated_if_finite(optimizer: torch.optim.Optimizer, figures: Tensor, update: Callable[[], None]) -> bool:
    """Calls `update`, a step of the optimizer that is one only if all `figures` are finite, which the card finds out by
    itself: so it is under way before the host has seen them. False, and nothing is done, where the optimizer cannot:
    torch's fused ones can, by what its GradScaler uses."""
    own: Any = getattr(optimizer, "optimizer", optimizer)  # Fabric wraps it
    if not own.defaults.get("fused"):
        return False
    own.found_inf = (~figures.isfinite()).any().float()
    try:
        update()
    finally:
        del own.found_inf
    return True


def _grad_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    return torch.nn.utils.get_total_norm(
        [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    )


def _bad_rows(
    fabric: Launcher,
    model: Any,
    optimizer: torch.optim.Optimizer,
    work: _Work,
    losses: Sequence[Tensor],
) -> tuple[int, ...]:
    """The rows that by themselves give no finite loss or gradient, of the micro-batches whose loss is not finite, else
    of all; where there is none, all rows of these micro-batches.

    Looks once more, row by row, only after a bad step, with the random generators put back as they were.
    """
    bad = [batch for batch, loss in zip(work.micro_batches, losses, strict=True) if not math.isfinite(loss.item())]
    bad = bad or list(work.micro_batches)
    once = Eager(fabric, model)

    def fails(row: Batch) -> bool:
        optimizer.zero_grad(set_to_none=False)
        loss = once(row, work.trained)
        return not (math.isfinite(loss.item()) and math.isfinite(_grad_norm(optimizer).item()))

    with undisturbed(fabric.device):
        rows = [row for batch in bad for row in batch.single_rows() if row.trained_tokens and fails(row)]
    return tuple(sorted(row for batch in rows or bad for row in batch.rows))


def undisturbed(device: torch.device) -> AbstractContextManager[None]:
    """What happens inside leaves torch's random generators, host and device, as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class Stop:
    """Why the run shall end after the step under way: SIGINT, SIGTERM, or its time is over. A second signal acts as it
    always does, at once. Handlers are set inside a `with` block only, and only in the main thread."""

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds` from now on."""
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.signal: signal.Signals | None = None
        self.before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        if self.signal is not None:
            return self.signal.name
        return "--max_time" if self.deadline is not None and time.monotonic() >= self.deadline else None

    @property
    def exit_code(self) -> int:
        """As shells count: 130 for SIGINT, 143 for SIGTERM; 0 when the time is over."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # under nohup it stays ignored
                    self.before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.__exit__(None, None, None)
        # not print: the signal may have come in the middle of one
        os.write(2, f"\n{self.signal.name}: finishing this step, then saving; once more stops at once\n".encode())
