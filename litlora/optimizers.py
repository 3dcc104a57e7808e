"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from litlora.errors import InputError

OPTIMIZERS = ("adamw", "sgd", "adamw_8bit")
SCHEDULES = ("constant", "linear", "cosine")


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """torch's AdamW and SGD with their own defaults, or bitsandbytes' AdamW with its state in 8 bit."""
    parameters = list(parameters)
    if name == "adamw":
        fused = parameters[0].is_cuda
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay)
    if name == "adamw_8bit":
        import bitsandbytes as bnb

        optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=weight_decay)
        return optimizer
    raise InputError("unknown --optimizer", got=name, wanted=", ".join(OPTIMIZERS))


def moment_bytes(name: str, itemsize: int) -> int:
    """An optimizer's state a parameter of `itemsize` bytes: AdamW's two moments, in its dtype or in a byte each."""
    return {"adamw": 2 * itemsize, "adamw_8bit": 2, "sgd": 0}[name]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer of `make_optimizer` holds after its first step."""
    own = getattr(optimizer, "optimizer", optimizer)  # Fabric wraps it
    name = {torch.optim.AdamW: "adamw", torch.optim.SGD: "sgd"}.get(type(own), "adamw_8bit")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(p.numel() * moment_bytes(name, p.element_size()) for p in parameters)


def require_optimizer(name: str, device: torch.device) -> None:
    """Raises InputError where the optimizer cannot run: bitsandbytes' is tried once."""
    if name != "adamw_8bit":
        return
    try:
        trial = nn.Parameter(torch.zeros(4096, device=device))
        trial.grad = torch.ones_like(trial)
        make_optimizer(name, [trial], 1e-3, 0.0).step()
    except Exception as error:  # whatever bitsandbytes raises where its library does not load
        raise InputError(
            "this machine cannot run the 8-bit optimizer",
            where=f"--optimizer {name} on {device}",
            got=f"{type(error).__name__}: {error}",
            fix="install a bitsandbytes that supports this machine, or --optimizer adamw",
        ) from error


def make_schedule(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate's factor at optimizer step k = 0, 1, …, as transformers' schedules of the same names: it rises
    as k / warmup_steps, then stays, falls to 0 in a line, or falls to 0 in half a cosine."""
    if name not in SCHEDULES:
        raise InputError("unknown --lr_schedule", got=name, wanted=", ".join(SCHEDULES))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if name == "constant":
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1.0 - done if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
