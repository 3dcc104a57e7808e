"""One setting's figures: a model with random weights, its adapter and steps, by the same calls as finetune_lora."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import breakdown
import torch
from settings import Setting, config_of, mean_length, random_rows

from litlora.fabric import open_fabric
from litlora.load import RandomWeights, load_model, parameter_count
from litlora.lora import adapt, lora_parameters
from litlora.memory import MicroBatch, Recipe, usable_memory
from litlora.metrics import peak_memory, reset_peak_memory
from litlora.model import CausalLoss, Decoder
from litlora.ops import Ops, fastest
from litlora.optimizers import make_optimizer, make_schedule, require_optimizer
from litlora.pace import Card, choose_micro_batch, seconds_of_run
from litlora.packing import Batch, micro_batches, packs
from litlora.precision import RunPrecision, pick_device
from litlora.recompute import Kept
from litlora.train import Step, train

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ARTICLE_ROWS = 50_000  # the LoRA articles' run: so many Alpaca rows, once


def choose_ops(name: str, device: torch.device) -> Ops:
    """The one place where a run's operations are chosen: `auto`, as finetune_lora does, or the plain ones."""
    return fastest(device)[0] if name == "auto" else Ops()


class Run:
    """A loaded setting: model, adapter, optimizer, rows. `row` collects what is known of it."""

    def __init__(self, setting: Setting, ops: str, rows: int | None) -> None:
        """`rows`: all that are trained on, once; else as many as the setting's steps take. Raises InputError for what
        this machine or version cannot do."""
        self.setting, self.device, self.config = setting, pick_device("auto"), config_of(setting.model)
        precision = "bf16-true" if self.device.type == "cuda" else "32-true"
        self.precision = RunPrecision(precision, setting.quantize, self.device)
        require_optimizer(setting.optimizer, self.device)
        self.fabric = open_fabric(self.device, self.precision)
        torch.manual_seed(0)
        reset_peak_memory(self.device)
        started = time.perf_counter()
        decoder = self.load(choose_ops(ops, self.device))
        self.row: Row = {"parameters": parameter_count(self.config), "weights_gb": gigabytes(decoder)}
        adapt(decoder, setting.lora, DTYPES[setting.lora_dtype])
        parameters = lora_parameters(decoder)
        optimizer = make_optimizer(setting.optimizer, parameters, 3e-4, 0.01)
        self.model, self.optimizer = self.fabric.setup(CausalLoss(decoder), optimizer)
        breakdown.synchronize(self.device)
        self.row |= {"load_seconds": time.perf_counter() - started, "load_peak_gb": peak_memory(self.device)}
        count = rows or setting.batch_size * (setting.warmup + setting.steps)
        self.data = random_rows(count, self.config.vocab_size, setting.length)
        self.micro = self.cut(decoder)
        self.row |= {"micro_batch_tokens": self.micro.tokens, "recomputed": self.micro.recomputed > 0}
        self.row |= {"kept": self.micro.describe(self.config.num_hidden_layers)}
        self.row["trainable"] = sum(p.numel() for p in parameters)

    def load(self, ops: Ops) -> Decoder:
        weights, precision = RandomWeights(self.config, torch.bfloat16, self.device), self.precision
        return load_model(weights, precision.quantizer, dtype=precision.dtype, device=self.device, ops=ops)

    def cut(self, decoder: Decoder) -> MicroBatch:
        """How a step is cut into micro-batches."""
        setting, precision = self.setting, self.precision
        recipe = Recipe(
            self.config, setting.lora, setting.quantize, False, precision.dtype, precision.compute,
            DTYPES[setting.lora_dtype], setting.optimizer,
        )  # fmt: skip
        longest, memory = int(self.data.lengths.max()), usable_memory(self.device)
        memory = setting.card_gb * 1e9 if setting.card_gb and memory else memory
        kept = Kept.parse(setting.checkpointing, self.config.num_hidden_layers)
        steps = [int(self.data.lengths[rows].sum()) for rows in self.plan()]
        micro = choose_micro_batch(recipe, longest, memory, kept, setting.length, steps)
        lengths = [
            self.data.lengths[p] for rows in self.plan() for p in packs(self.data, rows, max_tokens=micro.tokens)
        ]
        largest = replace(micro, tokens=max(int(pack.sum()) for pack in lengths))
        self.row["predicted_peak_gb"] = recipe.footprint(largest).peak / 1e9
        if (card := Card.measured(self.device)) is not None:
            tokens = sum(int(pack.sum()) for pack in lengths)
            self.row["predicted_tokens_per_second"] = tokens / seconds_of_run(recipe, micro, lengths, card)
            self.row["card_matmul"], self.row["card_memory"] = card.matmul, card.memory
        decoder.kept = micro.kept
        return micro

    def plan(self) -> list[list[int]]:
        """The rows of each optimizer step."""
        size, total = self.setting.batch_size, len(self.data)
        return [list(range(start, min(start + size, total))) for start in range(0, total, size)]

    def steps(self, plan: list[list[int]]) -> Iterator[Step]:
        """Trains; each step's rows are packed when it is their turn, as in a run."""

        def batches() -> Iterator[tuple[int, list[Batch]]]:
            for rows in plan:
                yield 1, micro_batches(self.data, rows, max_tokens=self.micro.tokens)

        rate = {"learning_rate": 3e-4, "schedule": make_schedule("constant", 0, 1)}
        return train(self.fabric, self.model, self.optimizer, batches(), max_norm=None, **rate)  # type: ignore[arg-type]


def gigabytes(module: torch.nn.Module) -> float:
    """Of its parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 1e9


def measure(setting: Setting, ops: str = "auto", rows: int | None = None, listing: Path | None = None) -> Row:
    """A setting's figures. `rows`: train once on so many, all timed. `listing`: one more step is profiled, and its
    slowest kernels are appended to this file."""
    started = time.perf_counter()
    run = Run(setting, ops, rows)
    plan = run.plan()
    training = run.steps([*plan, plan[0], plan[0]])
    reset_peak_memory(run.device)
    losses, marks = [], [time.perf_counter()]
    for step in islice(training, len(plan)):
        losses.append(step.loss)
        marks.append(time.perf_counter())
    breakdown.synchronize(run.device)
    marks[-1] = time.perf_counter()  # the last optimizer update, too
    row = run.row | {"first_step_seconds": marks[1] - started, "peak_gb": peak_memory(run.device)}
    if run.device.type == "cuda":
        row["reserved_gb"] = torch.cuda.max_memory_reserved(run.device) / 1e9
    row |= speed(run, plan, marks)
    row |= {"first_loss": losses[0], "last_loss": losses[-1]}
    if not all(map(math.isfinite, losses)):
        row["error"] = "a loss is no number"
    if listing:
        row["profile"] = profiled(setting.name, training, run.device, listing)
    return row


def speed(run: Run, plan: list[list[int]], marks: list[float]) -> Row:
    """tokens/s over the steps after the warm-up, and the articles' run: measured, or what it takes at that rate.
    `marks`: when the first step began, and each one's end."""
    warm = min(run.setting.warmup, len(plan) - 1)
    tokens = sum(int(run.data.lengths[rows].sum()) for rows in plan[warm:])
    rate = tokens / (marks[-1] - marks[warm])
    row = {
        "tokens_per_second": rate,
        "tokens_per_step": tokens / (len(plan) - warm),
        "timed_steps": len(plan) - warm,
        "slowest_step": max(b - a for a, b in zip(marks[warm:], marks[warm + 1 :], strict=False)),
    }
    if run.setting.length is None:
        whole = len(run.data) == ARTICLE_ROWS
        seconds = marks[-1] - marks[0] if whole else ARTICLE_ROWS * mean_length() / rate
        row |= {"articles_minutes": seconds / 60, "articles_measured": whole}
    return row


def profiled(name: str, training: Iterator[Step], device: torch.device, listing: Path) -> Row:
    """What is left of `training` is one step twice: timed, then under the profiler."""
    breakdown.synchronize(device)
    started = time.perf_counter()
    next(training)
    breakdown.synchronize(device)
    wall = time.perf_counter() - started
    kernels, profiled_wall = breakdown.kernels_of(lambda: next(training), device)
    with listing.open("a") as stream:
        stream.write(f"== {name}, one optimizer step\n{breakdown.top(kernels)}")
    return breakdown.summarize(kernels, wall) | {"profiled_wall_ms": 1e3 * profiled_wall}
