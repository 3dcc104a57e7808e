"""`litlora validate`: the validation loss of a base, base + adapter, or merged model, as training measures it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litlora.commands.common import held_out, tokenize, validation_batches
from litlora.commands.data_flags import DataArgs
from litlora.commands.models import ModelArgs, explained_memory, open_model
from litlora.data import load_rows
from litlora.errors import InputError
from litlora.model import CausalLoss, validation_loss


@dataclass(frozen=True)
class Args(DataArgs):
    """Measure the validation loss of a base, base + adapter, or merged model; prints JSON.

    Args:
        checkpoint_dir: the model's Hugging Face directory: a base or a merged model
        lora_path: an adapter directory, used unmerged; may be given several times
        weights: how much of each adapter, in the order of --lora_path; 1 each without it
        data_path: the training data, of which the held-out rows are taken, with the run's --val_split and --seed
        val_path: a file that is validated on whole, instead
        prompt_style: what the adapter (or the merged model) was trained with, else alpaca
        quantize: the format of the frozen weights
        quantize_head: also quantize lm_head
        precision: of weights and products; bf16-true on a GPU that has it, else 32-true
        accelerator: auto takes the GPU where there is one
        micro_batch_tokens: tokens that go through the model at once; the loss does not depend on it
    """

    lora_path: tuple[Path, ...] = ()
    weights: str | None = None
    quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq"] | None = None
    quantize_head: bool = False
    precision: Literal["bf16-true", "bf16-mixed", "32-true"] | None = None
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch_tokens: int | None = None


def run(args: Args) -> None:
    """Prints {"val_loss": …, "perplexity": …, "rows": …, "trained_tokens": …} on stdout. Raises InputError."""
    if args.micro_batch_tokens is not None and args.micro_batch_tokens < 1:
        got = args.micro_batch_tokens
        raise InputError("a flag out of range", where="--micro_batch_tokens", got=got, wanted="at least 1")
    model_args = ModelArgs(
        checkpoint_dir=args.checkpoint_dir,
        lora_path=args.lora_path,
        weights=args.weights,
        quantize=args.quantize,
        quantize_head=args.quantize_head,
        precision=args.precision,
        accelerator=args.accelerator,
        prompt_style=args.prompt_style,
    )
    model = open_model(model_args, otherwise="alpaca")
    path = args.val_path or args.data_path
    rows = load_rows(args.data, path, args.multiturn)
    rows = rows if args.val_path else held_out(rows, args)
    if not rows:
        raise InputError("no row to validate on", where=path, fix="--val_path FILE, or a --val_split above 0")
    dataset = tokenize(args, rows, model.base, model.style, "validation data")

    decoder = model.load()
    device = model.precision.device
    batches = validation_batches(dataset, range(len(dataset)), args.micro_batch_tokens)
    tokens = max(len(batch.input_ids) for batch in batches)
    what, fix = f"activations of {tokens} tokens", f"--micro_batch_tokens {max(1, tokens // 2)}"
    with explained_memory(what, fix), model.precision.forward_context():
        loss = validation_loss(CausalLoss(decoder), batches, device)
    trained = sum(batch.trained_tokens for batch in batches)
    print(json.dumps({"val_loss": loss, "perplexity": math.exp(loss), "rows": len(rows), "trained_tokens": trained}))
