"""What rounding costs: the validation losses of one adapter on the weights that it was trained over, on the base's own,
and merged into either. Each is worked out in memory, tensor by tensor; no merged directory is needed."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litlora import __version__
from litlora.checkpoint import write_json
from litlora.commands.models import OpenModel, explained_memory
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.load import Weights, load_model
from litlora.merge import Merge
from litlora.metrics import say
from litlora.model import Decoder
from litlora.ops import fastest
from litlora.peft_format import Adapter, Record
from litlora.precision import RunPrecision
from litlora.run_files import ROUNDING

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def trained_record(checkpoint_dir: Path, lora_path: tuple[Path, ...]) -> Record:
    """What the one adapter's run was. Raises InputError for several, and for one that litlora did not make or that
    nothing can be written beside."""
    if len(lora_path) != 1:
        got = f"{len(lora_path)} times --lora_path"
        raise InputError("--rounding is about one adapter", got=got, wanted="the out_dir of a run")
    (directory,) = lora_path
    record = Adapter.open(directory, ModelConfig.load(checkpoint_dir)).record
    if record is None:
        what = "the adapter does not say what it was trained over"
        raise InputError(what, where=directory, wanted="the out_dir of a run of litlora finetune_lora")
    if not os.access(directory, os.W_OK):
        raise InputError(f"{ROUNDING} cannot be written", where=directory, fix="a copy of the directory")
    return record


def variants(model: OpenModel) -> Iterator[tuple[str, Callable[[], Decoder]]]:
    """Name and loader of each, the adapter as it was trained first. `model` is opened as it was trained."""
    base = model.base.weights
    assert base is not None
    trained, merged = model.precision.quantizer.name, Merge(base, model.adapters, model.weights)
    dense = RunPrecision(model.precision.precision, None, model.precision.device)
    ops = fastest(dense.device)[0]  # training's, so that the first line is what training saw
    own = SHORT[merged.out_dtype(merged.source(f"{min(merged.adapted)}.weight"))]

    def load(weights: Weights) -> Callable[[], Decoder]:
        return lambda: load_model(weights, dense.quantizer, dtype=dense.dtype, device=dense.device, ops=ops).eval()

    if trained is not None:
        yield f"adapter on {trained}", lambda: model.load(ops)
    unquantized = replace(model, precision=dense, quantize_head=False)
    yield f"adapter on {own}", lambda: unquantized.load(ops)
    yield f"merged into {own}", load(merged)
    if trained is not None:
        yield f"merged onto {trained}-rounded {own}", load(replace(merged, base_rounding=trained))


def compare(model: OpenModel, measure: Callable[[Decoder], float]) -> list[dict[str, Any]]:
    """Name and validation loss of every variant, one model in memory at a time."""
    found = []
    for name, load in variants(model):
        say(f"measuring: {name}")
        with explained_memory(f"the weights of {model.base.path}", "--accelerator cpu"):
            loss = measure(load())
        gc.collect()
        found.append({"name": name, "val_loss": loss, "perplexity": perplexity(loss)})
    return found


def perplexity(loss: float) -> float:
    """e^loss; infinite where no float64 holds it (a base of damaged weights)."""
    return math.exp(loss) if loss < 709 else math.inf


def table(found: list[dict[str, Any]]) -> str:
    """Against the first."""
    width = max(len(variant["name"]) for variant in found)
    lines = [f"{'':{width}}    val loss  perplexity  difference"]
    for name, loss, perplexity in (variant.values() for variant in found):
        difference = f"{loss - found[0]['val_loss']:+12.5f}" if len(lines) > 1 else ""
        lines.append(f"{name:<{width}}  {loss:10.5f}  {perplexity:10.4f}{difference}")
    return "\n".join(lines)


def write(directory: Path, found: list[dict[str, Any]], record: Record, about: Mapping[str, Any]) -> Path:
    """rounding.json beside the adapter: `litlora report` shows it."""
    recorded = {"step": record.step, "recorded_val_loss": record.val_loss, "litlora_version": __version__}
    write_json(directory / ROUNDING, {"variants": found, **recorded, **about})
    return directory / ROUNDING
