"""The same finetuning twice: by transformers + PEFT, and by litlora's command line.

The reference tokenizes, pads, masks and averages on its own: nothing of litlora is in it. `quality.py` holds the two
side by side on a card, `tests/test_training_parity.py` on a CPU.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litlora.cli import call

Row = dict[str, str]
Encode = Callable[[str], list[int]]
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """What both sides are told."""

    base: Path
    rows: Sequence[Row]  # in this order, batch_size a step
    steps: int
    batch_size: int
    longest: int  # tokens of a row
    mask_prompt: bool
    quantize: str | None = None  # bnb.nf4 or bnb.fp4 for both
    learning_rate: float = 1e-3
    warmup: int = 5
    schedule: str = "cosine"
    weight_decay: float = 0.01
    precision: str = "32-true"
    device: str = "cpu"
    validation: Sequence[Row] = ()  # after the last step


def prompt_of(row: Row) -> str:
    return (WITH_INPUT if row["input"] else WITHOUT_INPUT).format(**row)


def open_tokenizer(base: Path) -> tuple[Encode, int]:
    """(text to ids by the library that made the tokenizer, each text once; the end's id)"""
    if (base / "tokenizer.json").exists():
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
        encode: Encode = lambda text: fast.encode(text).ids  # noqa: E731
    else:
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
        encode = lambda text: [pieces.bos_id(), *pieces.encode(text)]  # noqa: E731
    return lru_cache(maxsize=None)(encode), int(json.loads((base / "config.json").read_text())["eos_token_id"])


def choose_rows(rows: Sequence[Row], encode: Encode, count: int, longest: int) -> list[Row]:
    """The first rows whose prompt ids begin the ids of the whole text (what a straddling token means is our choice);
    of those, the ones that reach their response within `longest`. Raises ValueError where there are fewer."""
    chosen: list[Row] = []
    for row in rows:
        prompt = encode(prompt_of(row))
        if encode(prompt_of(row) + row["output"])[: len(prompt)] == prompt and len(prompt) < longest - 8:
            chosen.append(row)
        if len(chosen) == count:
            return chosen
    raise ValueError(f"only {len(chosen)} such rows of {count}")


# ---------------------------------------------------------------- the reference: transformers + PEFT, padded batches


def reference_model(run: Run) -> Any:
    """The base, its blocks' linears in 4 bit where the run says so, quantized from the weights in the run's dtype."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, settings = DTYPES[run.precision], dict[str, Any]()
    if run.quantize:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type={"bnb.nf4": "nf4", "bnb.fp4": "fp4"}[run.quantize],
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(run.base, dtype=dtype, device_map=run.device, **settings)


def save_untrained_adapter(run: Run, directory: Path, targets: list[str]) -> None:
    """PEFT's own start, A random and B zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    get_peft_model(reference_model(run), config).save_pretrained(directory)


def padded(run: Run, rows: Sequence[Row], encode: Encode, eos: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels (S, L), padded on the right."""
    examples = [[*encode(prompt_of(row) + row["output"]), eos][: run.longest] for row in rows]
    length = max(map(len, examples))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), -100)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[i, : len(example)], mask[i, : len(example)] = torch.tensor(example), 1
        first = len(encode(prompt_of(row))) if run.mask_prompt else 1
        labels[i, first : len(example)] = torch.tensor(example)[first:]
    return ids.to(run.device), mask.to(run.device), labels.to(run.device)


def loss_sum(model: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The sum of all trained tokens' cross-entropies, and their number."""
    logits, wanted = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float(), labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"), int((wanted != -100).sum())


def steps_of(run: Run, rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    return (rows[start : start + run.batch_size] for start in range(0, len(rows), run.batch_size))


def train_reference(run: Run, adapter: Path, encode: Encode, eos: int) -> tuple[list[float], Any]:
    """Each step's loss, and the trained model."""
    from peft import PeftModel
    from transformers import get_scheduler

    model = PeftModel.from_pretrained(reference_model(run), adapter, is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=run.weight_decay)
    schedule = get_scheduler(run.schedule, optimizer, run.warmup, run.steps)
    losses = []
    for rows in steps_of(run, run.rows[: run.steps * run.batch_size]):
        total, count = loss_sum(model, *padded(run, rows, encode, eos))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()
        losses.append(total.item() / count)
    return losses, model


@torch.no_grad()
def validate_reference(run: Run, model: Any, encode: Encode, eos: int) -> float:
    """The mean over all trained tokens of the validation rows."""
    model.eval()
    parts = [loss_sum(model, *padded(run, rows, encode, eos)) for rows in steps_of(run, run.validation)]
    return sum(total.item() for total, _ in parts) / sum(count for _, count in parts)


# ---------------------------------------------------------------- ours: the command line


def train_ours(run: Run, out: Path, **more: object) -> tuple[list[float], dict[str, Any]]:
    """Each step's loss, of metrics.csv, and summary.json. `more`: further flags."""
    flags: dict[str, object] = {
        "checkpoint_dir": run.base, "out_dir": out, "data": "alpaca", "mask_prompt": run.mask_prompt,
        "max_seq_length": run.longest, "shuffle": False, "precision": run.precision, "accelerator": run.device,
        "learning_rate": run.learning_rate, "batch_size": run.batch_size, "epochs": 1, "max_steps": run.steps,
        "micro_batch_tokens": 3 * run.longest, "weight_decay": run.weight_decay, "warmup_steps": run.warmup,
        "lr_schedule": run.schedule,
    }  # fmt: skip
    flags |= {"quantize": run.quantize} if run.quantize else {}
    for name, rows in (("data_path", run.rows), ("val_path", run.validation)):
        if rows:
            flags[name] = out.with_name(f"{out.name}.{name}.json")
            Path(str(flags[name])).write_text(json.dumps(rows))
    flags |= {"eval_interval": run.steps} if run.validation else {"val_split": 0}
    words = [word for key, value in (flags | more).items() for word in (f"--{key}", str(value))]
    if call(["finetune_lora", *words]) != 0:
        raise RuntimeError("finetune_lora failed")
    with (out / "metrics.csv").open() as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream)]
    return losses, json.loads((out / "summary.json").read_text())
