"""Flags under which a run fits a card, those that cost least first; and what to say where it did not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from litlora.commands.finetune_job import Job, expected_footprint, largest_pack, recipe_of, step_tokens
from litlora.errors import InputError
from litlora.memory import WORKSPACE, MicroBatch, usable_memory
from litlora.pace import choose_micro_batch
from litlora.precision import RunPrecision

RANKS = (64, 16, 8)
LENGTHS = (2048, 1024, 512, 256)
OWN_CUT = {"activation_checkpointing": "auto", "micro_batch_tokens": "auto", "micro_batch_size": None}
LESS = 0.9  # of what was expected and did not fit, cuBLAS' workspace aside


@dataclass(frozen=True)
class Proposal:
    """What to change, None for a flag to leave out; and how steps are cut then."""

    changes: Mapping[str, Any]
    micro: MicroBatch
    job: Job  # with the changes, but for rows that they cut

    @property
    def peak(self) -> float:
        """Bytes; of the largest pack, as in the plan of these flags."""
        if "max_seq_length" in self.changes:
            return recipe_of(self.job).footprint(self.micro).peak
        return expected_footprint(self.job, self.micro, largest_pack(self.job, self.micro)).peak

    @property
    def flags(self) -> dict[str, Any]:
        return {f"--{name}": value for name, value in self.changes.items() if value is not None}

    @property
    def without(self) -> list[str]:
        return [f"--{name}" for name, value in self.changes.items() if value is None]

    def text(self) -> str:
        flags = [f"{flag} {str(value).lower() if value is True else value}" for flag, value in self.flags.items()]
        return " ".join(flags + ([f"without {', '.join(self.without)}"] if self.without else []))

    def spelled_out(self, layers: int) -> Proposal:
        """With what `auto` would choose: where its expectation failed, it is not asked again."""
        cut = {"activation_checkpointing": self.micro.kept.text(layers), "micro_batch_tokens": self.micro.tokens}
        return replace(self, changes={**self.changes, **cut})


def propose(job: Job, memory: float) -> Proposal | None:
    """The first that fits `memory` bytes, each change added to those before it; then without those that were not
    needed. How steps are cut is always `auto`'s."""
    own = _differing(job, OWN_CUT)
    taken: list[dict[str, Any]] = []
    for change in ({}, *_changes(job)):
        if taken and taken[-1].keys() == change.keys():
            taken.pop()
        taken += [change] if change else []
        found = _fitted(job, memory, own, taken)
        if found is None:
            continue
        for spare in reversed(taken[:-1]):
            fewer = [other for other in taken if other is not spare]
            less = _fitted(job, memory, own, fewer)
            if less is not None:
                taken, found = fewer, less
        return found
    return None


def _differing(job: Job, change: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in change.items() if getattr(job.args, name) != value}


def _changes(job: Job) -> Iterator[dict[str, Any]]:
    args, lora = job.args, job.lora
    cheap: list[dict[str, Any]] = [{"precision": "bf16-true"}, {"quantize": "bnb.nf4-dq"}, {"lora_dtype": "bfloat16"}]
    if args.optimizer == "adamw":
        cheap.append({"optimizer": "adamw_8bit"})
    cheap.append({"quantize_head": True})
    yield from filter(None, (_differing(job, change) for change in cheap))
    if job.start is None:
        yield from ({"lora_r": r, "lora_alpha": lora.alpha * r / lora.r} for r in RANKS if r < lora.r)
    cut = {"on_overlong": "truncate"} if args.on_overlong == "error" else {}
    yield from ({"max_seq_length": length, **cut} for length in LENGTHS if length < job.data.longest)


def _fitted(job: Job, memory: float, own: Mapping[str, Any], changes: list[dict[str, Any]]) -> Proposal | None:
    together = {name: value for change in changes for name, value in change.items()}
    args = replace(job.args, **{**own, **together})
    lora = replace(job.lora, r=together.get("lora_r", job.lora.r))
    precision = RunPrecision(str(args.precision), args.quantize, job.device)
    changed = replace(job, args=args, lora=lora, precision=precision)
    recipe = recipe_of(changed)
    longest = min(job.data.longest, together.get("max_seq_length", job.data.longest))
    micro = choose_micro_batch(recipe, longest, memory, steps=step_tokens(job, longest))
    if recipe.footprint(micro).peak > memory:
        return None
    return Proposal({**own, **together}, micro, changed)


def out_of_memory(job: Job, micro: MicroBatch, *, weights: int, adapter: int) -> InputError:
    """What filled the GPU, in GB, and flags under which less is expected than was this time. `weights` and `adapter` in
    bytes, the latter with gradients and optimizer."""
    rows, largest = job.args.micro_batch_size, largest_pack(job, micro)
    room = WORKSPACE + LESS * (expected_footprint(job, micro, largest).peak - WORKSPACE)
    usable = usable_memory(job.device)
    found = propose(job, room if usable is None else min(room, usable))
    held = f"{rows} rows, " if rows else ""
    tokens = int(job.data.dataset.lengths[largest].sum())
    fix = "a smaller model, or a card with more memory"
    if found is not None:
        fix = found.spelled_out(job.base.config.num_hidden_layers).text()
        fix += " --resume_override true" if job.checkpoint is not None else ""
    total = torch.cuda.get_device_properties(job.device).total_memory
    return InputError(
        "out of memory on the GPU",
        where=f"a card of {total / 1e9:.1f} GB",
        got=f"base weights {weights / 1e9:.2f} GB, adapter with gradients and optimizer {adapter / 1e9:.2f} GB, "
        f"the rest activations of {held}{tokens} tokens",
        fix=fix,
    )
