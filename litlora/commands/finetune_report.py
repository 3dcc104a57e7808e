"""What a finetuning run says: before it starts, while it runs, and at its end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from litlora.checkpoint import read_json
from litlora.commands.download import RECORD as DOWNLOAD
from litlora.commands.finetune_flags import Args
from litlora.commands.finetune_job import Job
from litlora.config import ModelConfig
from litlora.deltas import Deltas
from litlora.errors import InputError
from litlora.flops import StepFlops, matmul_rate
from litlora.lora import LoRALinear, lora_parameters
from litlora.memory import MicroBatch
from litlora.metrics import duration, peak_memory, say
from litlora.model import Decoder
from litlora.model_card import INSTRUCTION, Card
from litlora.peft_format import Record
from litlora.precision import RunPrecision
from litlora.resume import Totals
from litlora.train import Step


@dataclass(frozen=True)
class Measures:
    """What is measured beside a step's own figures."""

    deltas: Deltas
    flops: StepFlops
    rate: float | None  # of the card's products, FLOP/s

    @classmethod
    def of(
        cls, config: ModelConfig, modules: Mapping[str, LoRALinear], micro: MicroBatch, precision: RunPrecision
    ) -> Measures:
        flops = StepFlops.of(config, modules, recomputed=micro.recomputed)
        return cls(Deltas(modules), flops, matmul_rate(precision.device, precision.compute))

    def weight_changes(self) -> dict[str, float | None]:
        """‖ΔW‖ / ‖W‖ by column."""
        return {f"delta_{target}": ratio for target, ratio in self.deltas.by_target().items()}

    def matmul_share(self, step: Step, lengths: npt.NDArray[np.int64]) -> float | None:
        """Of the card's rate, over a step with rows of these lengths."""
        flop = self.flops.count(lengths, step.trained_tokens)
        return None if self.rate is None else flop / (step.seconds * self.rate)


def row(step: Step, totals: Totals, device: torch.device) -> dict[str, object]:
    """A step's own columns of metrics.csv."""
    return {
        "step": step.number,
        "epoch": step.epoch,
        "loss": step.loss,
        "lr": step.learning_rate,
        "grad_norm": step.grad_norm,
        "clipped": int(step.clipped),
        "tokens": step.tokens,
        "trained_tokens": step.trained_tokens,
        "seconds": step.seconds,
        "total_tokens": totals.tokens,
        "total_seconds": totals.seconds,
        "tokens_per_second": step.tokens / step.seconds,
        "memory_gb": peak_memory(device),
    }


def live(step: Step, totals: Totals, device: torch.device) -> dict[str, str]:
    """The progress line."""
    return {
        "epoch": str(step.epoch),
        "loss": f"{step.loss:.4f}",
        "lr": f"{step.learning_rate:.2e}",
        "tokens/s": f"{totals.tokens / totals.seconds:,.0f}",
        "mem": f"{peak_memory(device):.2f} GB",
    }


def summarize(totals: Totals, decoder: Decoder, device: torch.device) -> dict[str, object]:
    """summary.json: of the whole run, however often it was resumed."""
    return {
        "training_seconds": totals.seconds,
        "steps": totals.step,
        "bad_steps": totals.bad_steps,
        "clipped_steps": totals.clipped_steps,
        "tokens": totals.tokens,
        "tokens_per_second": totals.tokens / totals.seconds,
        "peak_memory_gb": totals.peak_memory_gb,
        "trainable_parameters": sum(p.numel() for p in lora_parameters(decoder)),
        "train_loss": totals.loss,
        "val_loss": totals.val_loss,
        "best_val_loss": totals.best_val_loss,
        "best_step": totals.best_step,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def card(job: Job, record: Record, summary: Mapping[str, object]) -> str:
    """The adapter's README.md. Its examples ask --sample_prompt, or a question of nobody's data."""
    args, data = job.args, job.data
    instruction = args.sample_prompt or ("Once upon a time" if args.data == "text" else INSTRUCTION)
    prompt = instruction if args.data == "text" else data.style.prompt(instruction)
    return Card(
        directory=args.out_dir,
        record=record,
        lora=job.lora,
        settings=job.conditions.settings,
        summary=summary,
        rows=(len(data.train), len(data.validation)),
        tokens=data.train_tokens,
        instruction=instruction,
        prompt=None if data.style.name == "chat" and args.data != "text" else prompt,
        hub_name=hub_name(args.checkpoint_dir),
    ).text()


def hub_name(directory: Path) -> str | None:
    """What a base is called on the Hub, where `litlora download` brought it from there."""
    try:
        name = read_json(directory / DOWNLOAD).get("repo_id")
    except (InputError, OSError):
        return None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) else None


def report(summary: dict[str, object], args: Args) -> None:
    """The articles' closing lines."""
    seconds = float(str(summary["training_seconds"]))
    say(f"Training time: {seconds:.2f} s" + (f" ({duration(seconds)})" if seconds >= 60 else ""))
    say(f"Tokens: {summary['tokens']:,} ({summary['tokens_per_second']:,.0f} tokens/s)")
    say(f"Memory used: {summary['peak_memory_gb']:.2f} GB")
    say(f"Trainable parameters: {summary['trainable_parameters']:,}")
    if summary["val_loss"] is not None:
        say(f"Validation loss: {summary['val_loss']:.4f} (best {summary['best_val_loss']:.4f})")
    say(f"Adapter: {args.out_dir} (the last one: {args.out_dir / 'last'})")
    say(f"Next: litlora generate --checkpoint_dir {args.checkpoint_dir} --lora_path {args.out_dir} --prompt '...'")
