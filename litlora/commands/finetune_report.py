"""What a finetuning run says: before it starts, while it runs, and at its end."""

from __future__ import annotations

import torch

from litlora.commands.finetune_flags import Args
from litlora.lora import lora_parameters
from litlora.metrics import duration, peak_memory, say
from litlora.model import Decoder
from litlora.resume import Totals
from litlora.train import Step


def row(step: Step, val_loss: float | None, totals: Totals, device: torch.device) -> dict[str, object]:
    """One row of metrics.csv."""
    return {
        "step": step.number,
        "epoch": step.epoch,
        "loss": step.loss,
        "val_loss": val_loss,
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
        "loss": f"{step.loss:.4f}",
        "lr": f"{step.learning_rate:.2e}",
        "tokens/s": f"{totals.tokens / totals.seconds:,.0f}",
        "memory": f"{peak_memory(device):.2f} GB",
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
