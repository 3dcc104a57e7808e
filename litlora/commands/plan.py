"""`litlora plan`: whether a finetuning run fits, what it holds and needs, from config.json and the data alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from litlora.commands import finetune_flags
from litlora.commands.finetune_job import (
    Job,
    adapter_parameters,
    disk_bytes,
    expected_footprint,
    fit_micro_batch,
    largest_pack,
    note_warmup,
    prepare,
    recipe_of,
    step_packs,
)
from litlora.commands.proposals import Proposal, propose
from litlora.errors import InputError
from litlora.load import parameter_count
from litlora.memory import SPARE, Footprint, MicroBatch, usable_memory
from litlora.metrics import duration, say
from litlora.pace import Card, seconds_of_run

CONTEXT = 0.6e9  # bytes of a card that CUDA itself takes
NAMES = {
    "weights": "frozen weights",
    "constants": "constants of their quantization",
    "adapter": "adapter, with its copy in 16 bit",
    "gradients": "its gradients",
    "optimizer": "optimizer",
    "activations": "activations kept for the backward pass",
    "block": "a block's backward pass",
    "logits": "logits (a chunk; not at the same time as a block)",
    "workspace": "workspace",
}


@dataclass(frozen=True)
class Args(finetune_flags.Args):
    """Say beforehand what a run of finetune_lora with these flags will hold, take and need; nothing is loaded.

    Args:
        gpu: the memory of a card to plan for, such as 24GB; the one in this machine without it
        json: print JSON instead of text
    """

    gpu: str | None = None
    json: bool = False


def run(args: Args, given: frozenset[str] = frozenset()) -> None:
    """Prints the plan on stdout. Raises InputError, and SystemExit(1) where the run does not fit."""
    memory = usable_of(args.gpu) if args.gpu is not None else usable_memory(cuda())
    flags = {"dry_run": True, "accelerator": "cpu", "precision": args.precision or "bf16-true", "resume": None}
    job = prepare(replace(args, **flags), given)  # type: ignore[arg-type]
    if args.accelerator == "cpu":
        say("note: this is the plan of a run on a GPU, whatever --accelerator says")
    note_warmup(args, len(job.plan))
    # without a card to plan for, as one that holds everything
    micro = fit_micro_batch(job, memory if memory is not None else 1e15)
    plan = describe(job, expected_footprint(job, micro, largest_pack(job, micro)), micro, memory)
    card = Card.measured(cuda()) if args.gpu is None else None
    plan["seconds"] = None if card is None else expected_seconds(job, micro, card)
    if plan["fits"] is False:
        assert memory is not None
        plan["proposal"] = as_json(propose(job, memory), job)
    print(json.dumps(plan) if args.json else "\n".join(text(plan)))
    if plan["fits"] is False:
        raise SystemExit(1)


def cuda() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def bytes_of(size: str) -> float:
    """Of --gpu: 24GB is 24e9 bytes, as the makers count; GiB too. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|G|)", size.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise InputError("not a size of memory", where="--gpu", got=size, wanted="such as 24GB")
    return float(found[1]) * (2**30 if found[2].lower() == "gib" else 1e9)


def usable_of(size: str) -> float:
    """Bytes that a run may have of a card. Raises InputError."""
    memory = bytes_of(size) * (1 - SPARE) - CONTEXT
    if memory <= 0:
        raise InputError("a card on which nothing is left for a run", where="--gpu", got=size,
                         wanted=f"more than {CONTEXT / 1e9:.1f} GB, which CUDA itself takes")  # fmt: skip
    return memory


def as_json(proposal: Proposal | None, job: Job) -> dict[str, Any] | None:
    if proposal is None:
        return None
    kept = proposal.micro.describe(job.base.config.num_hidden_layers)
    return {"flags": proposal.flags, "without": proposal.without, "text": proposal.text(), "peak": proposal.peak,
            "micro_batch_tokens": proposal.micro.tokens, "kept": kept}  # fmt: skip


def expected_seconds(job: Job, micro: MicroBatch, card: Card) -> float:
    """Of training on `card`, from some of the run's steps."""
    sample = job.plan[:: max(1, len(job.plan) // 50)]
    packs = (pack for _, indices in sample for pack in step_packs(job, micro, indices))
    lengths = [job.data.dataset.lengths[pack] for pack in packs]
    return seconds_of_run(recipe_of(job), micro, lengths, card) * len(job.plan) / len(sample)


def describe(job: Job, footprint: Footprint, micro: MicroBatch, memory: float | None) -> dict[str, Any]:
    """The plan; sizes in bytes."""
    args, data, steps = job.args, job.data, len(job.plan)
    cut = [step_packs(job, micro, indices) for _, indices in job.plan[:: max(1, steps // 20)]]
    parameters = adapter_parameters(job.base, job.lora)
    return {
        "model": str(args.checkpoint_dir),
        "parameters": parameter_count(job.base.config),
        "trainable_parameters": parameters,
        "quantize": args.quantize,
        "precision": args.precision,
        "rows": len(data.train),
        "longest_row": data.longest,
        "steps": steps,
        "tokens": sum(int(data.dataset.lengths[indices].sum()) for _, indices in job.plan),
        "micro_batch_tokens": micro.tokens,
        "micro_batches_per_step": sum(map(len, cut)) / max(1, len(cut)),
        "activation_checkpointing": micro.kept.text(job.base.config.num_hidden_layers),
        "kept": micro.describe(job.base.config.num_hidden_layers),
        "parts": footprint.parts(),
        "peak": footprint.peak,
        "gpu": memory,
        "fits": None if memory is None else footprint.peak <= memory,
        "host": recipe_of(job).host_bytes(micro),
        "disk": disk_bytes(args, parameters),
    }


def text(plan: dict[str, Any]) -> Iterator[str]:
    yield (
        f"model: {plan['model']}: {plan['parameters']:,} parameters, {plan['quantize'] or 'not quantized'}, "
        f"{plan['precision']}; {plan['trainable_parameters']:,} trainable"
    )
    packs = round(plan["micro_batches_per_step"], 1)
    yield (
        f"training: {plan['rows']:,} rows, the longest of {plan['longest_row']:,} tokens; {plan['steps']:,} "
        f"step{'s' * (plan['steps'] != 1)}, {plan['tokens']:,} tokens; {packs:.3g} "
        f"micro-batch{'es' * (packs != 1)} of up to {plan['micro_batch_tokens']:,} tokens a step, {plan['kept']}"
    )
    yield "memory on the GPU, GB:"
    for name, size in plan["parts"].items():
        if size or name != "constants":
            yield f"  {size / 1e9:8.2f}  {NAMES[name]}"
    yield f"  {plan['peak'] / 1e9:8.2f}  peak"
    if plan["host"]:
        yield f"  {plan['host'] / 1e9:8.2f}  of the host's memory beside it, pinned: the blocks' inputs"
    if plan["gpu"] is None:
        yield "no GPU in this machine: --gpu 24GB says whether it fits such a card"
    else:
        fits = "fits" if plan["fits"] else "does not fit"
        yield f"{fits} into the {plan['gpu'] / 1e9:.2f} GB that a run may use there"
    if plan.get("proposal"):
        proposal = plan["proposal"]
        yield (
            f"this fits: {proposal['text']}: peak {proposal['peak'] / 1e9:.2f} GB, micro-batches of "
            f"{proposal['micro_batch_tokens']:,} tokens, {proposal['kept']}"
        )
    elif plan["fits"] is False:
        yield "nothing that can be switched makes it fit: a smaller model"
    if plan["seconds"] is not None:
        yield f"time: about {duration(plan['seconds'])} of training on this card"
    else:
        yield "time: said on the machine that has the card, without --gpu"
    yield f"disk: {plan['disk'] / 1e6:,.0f} MB in --out_dir"
