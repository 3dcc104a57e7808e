"""Proof of training: litlora finetune_lora, as a user runs it, has the loss of transformers + PEFT at every step.

Equal initial A and B (an adapter that PEFT saved untrained), equal rows in the file's order, dropout 0, fp32. The
reference tokenizes, pads, masks and averages on its own: nothing of litlora is in it.
"""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from litlora.cli import call

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALL_BLOCKS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NF4 = "bnb.nf4"


@dataclass(frozen=True)
class Run:
    """What both sides are told."""

    base: Path
    rows: list[dict[str, str]]
    steps: int
    batch_size: int
    longest: int
    mask_prompt: bool
    quantize: str | None = None
    learning_rate: float = 1e-3
    warmup: int = 5
    schedule: str = "cosine"
    weight_decay: float = 0.01


def prompt_of(row: dict[str, str]) -> str:
    return (WITH_INPUT if row["input"] else WITHOUT_INPUT).format(**row)


Encode = Callable[[str], list[int]]


def choose_rows(rows: list[dict[str, str]], encode: Encode, count: int, longest: int) -> list[dict[str, str]]:
    """The first rows whose prompt ids begin the ids of the whole text (what a straddling token means is our choice);
    of those, the ones that reach their response within `longest`."""
    chosen = []
    for row in rows:
        prompt = encode(prompt_of(row))
        if encode(prompt_of(row) + row["output"])[: len(prompt)] == prompt and len(prompt) < longest - 8:
            chosen.append(row)
        if len(chosen) == count:
            return chosen
    raise AssertionError(f"only {len(chosen)} such rows")


# The reference: transformers + PEFT, padded batches


def reference_model(run: Run) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {}
    if run.quantize:
        assert run.quantize == NF4
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        settings["device_map"] = "cpu"
    return AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32, **settings)


def save_untrained_adapter(run: Run, directory: Path, targets: list[str]) -> None:
    """PEFT's own start, A random and B zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    get_peft_model(reference_model(run), config).save_pretrained(directory)


def padded(run: Run, rows: list[dict[str, str]], encode: Encode, eos: int) -> tuple[torch.Tensor, ...]:
    """ids, attention mask and labels (S, L), padded on the right."""
    examples = [[*encode(prompt_of(row) + row["output"]), eos][: run.longest] for row in rows]
    length = max(map(len, examples))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), -100)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[i, : len(example)], mask[i, : len(example)] = torch.tensor(example), 1
        first = len(encode(prompt_of(row))) if run.mask_prompt else 1
        labels[i, first : len(example)] = torch.tensor(example)[first:]
    return ids, mask, labels


def train_reference(run: Run, adapter: Path, encode: Encode, eos: int) -> tuple[list[float], Any]:
    from peft import PeftModel
    from transformers import get_scheduler

    model = PeftModel.from_pretrained(reference_model(run), adapter, is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=run.weight_decay)
    schedule = get_scheduler(run.schedule, optimizer, run.warmup, run.steps)
    losses = []
    for step in range(run.steps):
        rows = run.rows[step * run.batch_size : (step + 1) * run.batch_size]
        ids, mask, labels = padded(run, rows, encode, eos)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())  # the mean over all trained tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule.step()
        losses.append(loss.item())
    return losses, model


# Ours: the command line


def train_ours(run: Run, adapter: Path, out: Path) -> list[float]:
    """The losses of metrics.csv."""
    data = out.with_suffix(".json")
    data.write_text(json.dumps(run.rows))
    flags = {
        "checkpoint_dir": run.base, "out_dir": out, "data": "alpaca", "data_path": data, "val_split": 0,
        "mask_prompt": run.mask_prompt, "max_seq_length": run.longest, "shuffle": False, "precision": "32-true",
        "accelerator": "cpu", "learning_rate": run.learning_rate, "batch_size": run.batch_size, "epochs": 1,
        "micro_batch_tokens": 3 * run.longest, "max_steps": run.steps, "weight_decay": run.weight_decay,
        "warmup_steps": run.warmup, "lr_schedule": run.schedule, "lora_path": adapter,
    }  # fmt: skip
    if run.quantize:
        flags["quantize"] = run.quantize
    assert call(["finetune_lora", *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]) == 0
    with (out / "metrics.csv").open() as stream:
        return [float(row["loss"]) for row in csv.DictReader(stream)]


def hold_side_by_side(run: Run, targets: list[str], encode: Encode, eos: int, tmp_path: Path, within: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, PEFT and bitsandbytes among themselves
        save_untrained_adapter(run, tmp_path / "start", targets)
        theirs, model = train_reference(run, tmp_path / "start", encode, eos)
    ours = train_ours(run, tmp_path / "start", tmp_path / "ours")
    assert len(ours) == len(theirs) == run.steps
    apart = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    print(f"\nloss {theirs[0]:.6f} -> {theirs[-1]:.6f}, furthest apart {max(apart):.2e} (relative)")
    assert max(apart) < within, f"step {apart.index(max(apart)) + 1}: {max(apart):.2e} relative"
    assert sum(theirs[-5:]) < 0.97 * sum(theirs[:5]), "nothing was learnt: nothing was tested"
    saved, trained = load_file(tmp_path / "ours" / "adapter_model.safetensors"), dict(model.named_parameters())
    for key, tensor in saved.items():
        wanted = trained[key.replace(".weight", ".default.weight")]
        assert (tensor - wanted).norm() < 30 * within * wanted.norm(), f"{key} ended elsewhere"


@pytest.fixture
def stories(material: Callable[[str], Path]) -> tuple[Path, list[dict[str, str]], Encode]:
    """stories260K, real Alpaca rows and sentencepiece itself."""
    import sentencepiece

    base, rows = material("stories260K-hf"), json.loads(material("alpaca/alpaca_5000.json").read_text())
    processor = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))

    def encode(text: str) -> list[int]:
        return [1, *processor.encode(text)]

    return base, rows, encode


@pytest.mark.parametrize(
    ("targets", "mask_prompt", "quantize", "within"),
    [
        (["q_proj", "v_proj"], False, None, 1e-4),
        ([*ALL_BLOCKS, "lm_head"], True, None, 1e-4),
        (ALL_BLOCKS, False, NF4, 1e-3),
    ],
    ids=["fp32, query and value", "fp32, all and masked prompts", "nf4, blocks"],
)
def test_50_steps_on_stories260k(
    targets: list[str], mask_prompt: bool, quantize: str | None, within: float, stories: Any, tmp_path: Path
) -> None:
    base, rows, encode = stories
    chosen = choose_rows(rows, encode, 200, 160)
    run = Run(base, chosen, steps=50, batch_size=4, longest=160, mask_prompt=mask_prompt, quantize=quantize)
    hold_side_by_side(run, targets, encode, 2, tmp_path, within)


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "within"), [(None, 1e-4), (NF4, 1e-3)], ids=["fp32", "nf4"])
def test_10_steps_on_smollm2(
    quantize: str | None, within: float, smollm2: Path, material: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = json.loads(material("alpaca/alpaca_5000.json").read_text())
    chosen = choose_rows(rows[:200], tokenizer.encode, 40, 128)
    run = Run(smollm2, chosen, 10, 4, 128, False, quantize, learning_rate=1e-3, warmup=2)
    hold_side_by_side(run, ["q_proj", "v_proj"], tokenizer.encode, tokenizer.eos_token_id, tmp_path, within)
