"""`litlora validate`: the validation loss of a base, base + adapter, or merged model, as training measures it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from litlora.commands.common import held_out, tokenize, validation_batches
from litlora.commands.data_flags import DataArgs
from litlora.commands.models import ModelArgs, OpenModel, explained_memory, open_model
from litlora.commands.rounding import compare, perplexity, table, trained_record, write
from litlora.commands.run_settings import as_in_the_run
from litlora.config import ModelConfig
from litlora.data import load_rows
from litlora.errors import InputError
from litlora.metrics import say
from litlora.model import CausalLoss, Decoder, validation_loss
from litlora.ops import fastest
from litlora.packing import Batch
from litlora.peft_format import Adapter, Record


@dataclass(frozen=True)
class Args(DataArgs):
    """Measure the validation loss of a base, base + adapter, or merged model; prints JSON. With one adapter of
    litlora's, data flags, quantization and precision that are not given are those of its run.

    Args:
        checkpoint_dir: the model's Hugging Face directory: a base or a merged model
        lora_path: an adapter directory, used unmerged; may be given several times
        weights: how much of each adapter, in the order of --lora_path; 1 each without it
        rounding: what rounding costs: the losses of a run's adapter on the weights it was trained over, on the base's
            own, and merged into either, side by side; prints a table, writes rounding.json into --lora_path
        data_path: the training data, of which the held-out rows are taken, with the run's --val_split and --seed
        val_path: a file that is validated on whole, instead
        prompt_style: what the adapter (or the merged model) was trained with, else alpaca
        quantize: the format of the frozen weights; of a run's adapter, without it, the run's, with null none
        quantize_head: also quantize lm_head
        precision: of weights and products; without it a run's, else bf16-true on a GPU that has it, else 32-true
        accelerator: auto takes the GPU where there is one
        micro_batch_tokens: tokens that go through the model at once; only 16-bit rounding depends on it, and without
            it is that of training
    """

    lora_path: tuple[Path, ...] = ()
    weights: str | None = None
    rounding: bool = False
    quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "fp8"] | None = None
    quantize_head: bool = False
    precision: Literal["bf16-true", "bf16-mixed", "32-true"] | None = None
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch_tokens: int | None = None


def run(args: Args, given: frozenset[str] = frozenset()) -> None:
    """Prints {"val_loss": …, "perplexity": …, "rows": …, "trained_tokens": …} on stdout, under --rounding a table.
    `given`: the flags that were set by hand. Raises InputError."""
    record = trained_record(args.checkpoint_dir, args.lora_path) if args.rounding else None
    check(args, record, given)
    if len(args.lora_path) == 1:
        args = as_in_the_run(as_trained(args, given), args.lora_path[0], given)
    model = open_model(model_args(args), otherwise="alpaca")
    path = args.val_path or args.data_path
    rows = load_rows(args.data, path, args.multiturn)
    rows = rows if args.val_path else held_out(rows, args)
    if not rows:
        raise InputError("no row to validate on", where=path, fix="--val_path FILE, or a --val_split above 0")
    dataset = tokenize(args, rows, model.base, model.style, "validation data")
    batches = validation_batches(dataset, range(len(dataset)), args.micro_batch_tokens)
    about: dict[str, Any] = {"rows": len(rows), "trained_tokens": sum(batch.trained_tokens for batch in batches)}
    if record is None:
        loss = measure(model.load(fastest(model.precision.device)[0]), model, batches)  # training's operations
        print(json.dumps({"val_loss": loss, "perplexity": perplexity(loss), **about}))
        return
    found = compare(model, lambda decoder: measure(decoder, model, batches))
    print(table(found))
    if record.val_loss is not None:
        say(f"the run itself recorded {record.val_loss:.5f} at step {record.step}")
    about |= {"precision": model.precision.precision, "device": str(model.precision.device)}
    about |= {**settings(args), "prompt_style": model.style.name}
    say(f"written: {write(args.lora_path[0], found, record, about)}")


def check(args: Args, record: Record | None, given: frozenset[str]) -> None:
    """Raises InputError for flags out of range, or that contradict what --rounding measures."""
    if args.micro_batch_tokens is not None and args.micro_batch_tokens < 1:
        got = args.micro_batch_tokens
        raise InputError("a flag out of range", where="--micro_batch_tokens", got=got, wanted="at least 1")
    if record is not None:
        trained = {"quantize": record.quantize, "quantize_head": record.quantize_head, "weights": None}
        wrong = [f"--{name}" for name in trained if name in given and getattr(args, name) != trained[name]]
        if wrong:
            fix = "leave these flags out"
            raise InputError("--rounding measures the adapter as it was trained", got=", ".join(wrong), fix=fix)


def as_trained(args: Args, given: frozenset[str]) -> Args:
    """`args` with the weights and products of the run that made the one adapter, where they were not `given` by hand;
    says so. Raises InputError."""
    (directory,) = args.lora_path
    record = Adapter.open(directory, ModelConfig.load(args.checkpoint_dir)).record
    if record is None:
        return args
    trained: dict[str, Any] = {
        "quantize": record.quantize,
        "quantize_head": record.quantize_head,
        "precision": record.precision,
    }
    taken = {name: value for name, value in trained.items() if name not in given}
    if taken:
        words = [f"--{name} {value}".replace(" True", " true") for name, value in taken.items() if value]
        say(f"as {directory} was trained: {' '.join(words) or 'not quantized'}")
    return replace(args, **taken)


def model_args(args: Args) -> ModelArgs:
    return ModelArgs(
        checkpoint_dir=args.checkpoint_dir,
        lora_path=args.lora_path,
        weights=args.weights,
        quantize=args.quantize,
        quantize_head=args.quantize_head,
        precision=args.precision,
        accelerator=args.accelerator,
        prompt_style=args.prompt_style,
    )


def measure(decoder: Decoder, model: OpenModel, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy of the trained tokens. Raises InputError when the GPU's memory does not do."""
    tokens = max(len(batch.input_ids) for batch in batches)
    what, fix = f"activations of {tokens} tokens", f"--micro_batch_tokens {max(1, tokens // 2)}"
    with explained_memory(what, fix), model.precision.forward_context():
        return validation_loss(CausalLoss(decoder), batches, model.precision.device)


def settings(args: Args) -> dict[str, Any]:
    """The flags that decide which rows are measured, and how."""
    values = {field.name: getattr(args, field.name) for field in fields(DataArgs)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
