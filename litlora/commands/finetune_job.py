"""A finetuning run before it starts: what its flags mean for this base and these data, checked and planned. Nothing is
loaded yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from litlora.checkpoint import require_disk
from litlora.commands.common import Base, TrainingData, load_data
from litlora.commands.finetune_flags import Args, check_flags, check_paths
from litlora.commands.finetune_resume import check_resume, machine, plain
from litlora.commands.prompts import Prompt
from litlora.decode import check_prompts
from litlora.errors import InputError
from litlora.load import meta_decoder, parameter_count
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_parameters
from litlora.memory import Footprint, MicroBatch, Recipe
from litlora.metrics import say
from litlora.optimizers import require_optimizer
from litlora.pace import choose_micro_batch
from litlora.packing import packs, step_plan
from litlora.peft_format import Adapter, targets_of
from litlora.precision import RunPrecision, default_precision, pick_device
from litlora.recompute import Kept
from litlora.resume import Conditions, TrainingCheckpoint, find_checkpoint
from litlora.run_files import RunFiles

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLED_STEPS = 64  # by whose tokens micro-batches are chosen: the first, which more epochs do not change
Plan = list[tuple[int, list[int]]]  # the run's optimizer steps: epoch from 1, examples


@dataclass(frozen=True)
class Job:
    """A run that is checked and ready to be done."""

    args: Args
    device: torch.device
    precision: RunPrecision
    base: Base
    start: Adapter | None  # of --lora_path
    lora: LoRA
    data: TrainingData
    plan: Plan
    question: tuple[str, list[int]] | None  # what is asked at each validation, and its ids
    conditions: Conditions
    checkpoint: TrainingCheckpoint | None  # where the run goes on

    @property
    def patience(self) -> int | None:
        return self.args.early_stopping_patience

    @property
    def save_dtype(self) -> torch.dtype:
        return DTYPES[self.args.save_dtype or self.args.lora_dtype]


def prepare(args: Args, given: frozenset[str]) -> Job:
    """Finds everything that can be wrong before the long work starts. Raises InputError."""
    check_flags(args)
    device = pick_device(args.accelerator)
    args = args if args.precision else replace(args, precision=default_precision(device))
    base = Base.open(args.checkpoint_dir, weights=not args.dry_run)
    kept_of(args, base)
    checkpoint = base.weights.checkpoint if base.weights else None
    start = Adapter.open(args.lora_path, base.config, checkpoint) if args.lora_path else None
    lora = choose_lora(args, given, start)
    resumed = None
    if not args.dry_run:
        check_paths(args)
        resumed = find_checkpoint(args.resume, args.out_dir)
        RunFiles(args.out_dir).check(args.overwrite, args.resume, resumed)
        require_disk(args.out_dir, disk_bytes(args, adapter_parameters(base, lora)))
    precision = RunPrecision(str(args.precision), args.quantize, device)
    require_optimizer(args.optimizer, device)
    data = load_data(args, base, args.prompt_style)
    if args.early_stopping_patience is not None and not data.validation:
        raise InputError("nothing to stop early by", where="--early_stopping_patience", got="no validation rows",
                         fix="--val_split or --val_path")  # fmt: skip
    question = sample_question(args, data, base)
    conditions = Conditions(
        settings=plain(asdict(args) | adapter_settings(lora)),
        base_fingerprint=checkpoint.fingerprint if checkpoint else "",
        data_fingerprint=fingerprint(data),
        device=device.type,
        chosen={},  # known when the model is loaded
        machine=machine(device),
    )
    if resumed is not None:
        check_resume(resumed, conditions, override=args.resume_override)
    plan = plan_steps(args, data)
    return Job(args, device, precision, base, start, lora, data, plan, question, conditions, resumed)


def choose_lora(args: Args, given: frozenset[str], start: Adapter | None) -> LoRA:
    """The flags' LoRA, or the starting adapter's. Raises InputError when flags given by hand contradict that one."""
    if start is None:
        targets = targets_of({flag: getattr(args, flag) for flag in FLAG_TARGETS})
        return LoRA(args.lora_r, args.lora_alpha, args.lora_dropout, targets, rslora=args.lora_rslora)
    held = {"lora_r": start.lora.r, "lora_alpha": start.lora.alpha, "lora_rslora": start.lora.rslora}
    for flag, leaves in FLAG_TARGETS.items():
        held[flag] = any(name.endswith(leaf) for name in start.modules for leaf in leaves)
    wrong = [flag for flag in held if flag in given and getattr(args, flag) != held[flag]]
    if wrong:
        raise InputError(
            "flags that contradict the adapter to start from",
            where=f"--lora_path {args.lora_path}",
            got=", ".join(f"--{flag} {getattr(args, flag)}" for flag in wrong),
            wanted=", ".join(f"{flag} {held[flag]}" for flag in wrong),
            fix="leave these flags out",
        )
    return replace(start.lora, dropout=args.lora_dropout) if "lora_dropout" in given else start.lora


def plan_steps(args: Args, data: TrainingData) -> Plan:
    """All optimizer steps, always over `batch_size` examples, however they will be cut into micro-batches; those
    without any trained token are left out, and said so."""
    trained = np.add.reduceat(data.dataset.flat_trained, data.dataset.offsets[:-1], dtype=np.int64)
    plan: Plan = []
    empty = 0

    def steps() -> Iterator[tuple[int, list[int]]]:
        for epoch in range(1, args.epochs + 1):
            for rows in step_plan(len(data.train), args.batch_size, args.seed, epoch, args.shuffle):
                yield epoch, [data.train[row] for row in rows]

    for epoch, indices in steps():
        if trained[indices].any():
            plan.append((epoch, indices))
        else:
            empty += 1
        if len(plan) == args.max_steps:
            break
    if empty:
        say(f"warning: {empty:,} steps hold no trained token at all and are left out")
    return plan


def kept_of(args: Args, base: Base) -> Kept | None:
    """What --activation_checkpointing asks for; None for auto. Raises InputError."""
    text, layers = args.activation_checkpointing, base.config.num_hidden_layers
    if text == "auto":
        return None
    kept = Kept.parse(text, layers)
    if kept is None:
        wanted = f"auto, none, selective, full, offload, or one of the last three with :N, N from 1 to {layers} blocks"
        raise InputError("not a way to keep activations", where="--activation_checkpointing", got=text, wanted=wanted)
    return kept


def fit_micro_batch(job: Job, memory: float | None) -> MicroBatch:
    """How steps are cut on a GPU with `memory` bytes for the run; None for a CPU."""
    longest, tokens = job.data.longest, job.args.tokens
    if job.args.micro_batch_size:  # packs of so many rows do not depend on a number of tokens
        tokens = int(job.data.dataset.lengths[largest_pack(job, MicroBatch(longest))].sum())
    kept = kept_of(job.args, job.base)
    return choose_micro_batch(recipe_of(job), longest, memory, kept, tokens, step_tokens(job, longest))


def step_tokens(job: Job, longest: int) -> list[int]:
    """Of the first steps, with rows of `longest` tokens at most."""
    lengths = np.minimum(job.data.dataset.lengths, longest)
    return [int(lengths[indices].sum()) for _, indices in job.plan[:SAMPLED_STEPS]]


def step_packs(job: Job, micro: MicroBatch, indices: Sequence[int]) -> list[list[int]]:
    """An optimizer step's examples by micro-batch."""
    rows = job.args.micro_batch_size
    return packs(job.data.dataset, indices, max_tokens=None if rows else micro.tokens, max_rows=rows)


def largest_pack(job: Job, micro: MicroBatch) -> list[int]:
    """Of the whole run's micro-batches the examples of the one with most tokens, also in a resumed run: launched in
    another way it would have other last digits."""
    lengths = job.data.dataset.lengths
    every = (pack for _, indices in job.plan for pack in step_packs(job, micro, indices))
    return max(every, key=lambda pack: (lengths[pack].sum(), lengths[pack].max()))


def expected_footprint(job: Job, micro: MicroBatch, largest: Sequence[int]) -> Footprint:
    """What the run will hold on a GPU, at its `largest_pack`."""
    tokens = int(job.data.dataset.lengths[largest].sum())
    return recipe_of(job).footprint(replace(micro, tokens=tokens))


def adapter_parameters(base: Base, lora: LoRA) -> int:
    """Counted on the meta device."""
    decoder = meta_decoder(base.config)
    adapt(decoder, lora)
    return sum(p.numel() for p in lora_parameters(decoder))


def recipe_of(job: Job) -> Recipe:
    """What the run's memory depends on."""
    args, precision = job.args, job.precision
    return Recipe(
        job.base.config, job.lora, args.quantize, args.quantize_head, precision.dtype, precision.compute,
        DTYPES[args.lora_dtype], args.optimizer,
    )  # fmt: skip


def disk_bytes(args: Args, parameters: int) -> int:
    """What a run leaves: two adapters, and the checkpoints, one more while it is written."""
    saved, trained = DTYPES[args.save_dtype or args.lora_dtype].itemsize, DTYPES[args.lora_dtype].itemsize
    state = {"adamw": 2 * trained, "adamw_8bit": 3, "sgd": 0}[args.optimizer]
    return parameters * (2 * saved + (args.keep_last + 1) * (trained + state)) + 10_000_000


def fingerprint(data: TrainingData) -> str:
    """Of the ids, the labels and the split: what the steps are made from."""
    digest = hashlib.blake2b(digest_size=16)
    for dataset, indices in ((data.dataset, data.train), (data.validation_dataset, data.validation)):
        for array in (dataset.flat_ids, dataset.flat_trained, dataset.offsets, np.array(indices)):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def adapter_settings(lora: LoRA) -> dict[str, object]:
    """What hyperparameters.yaml says of the adapter: a starting adapter's values, not the flags' defaults."""
    flags: dict[str, object] = {
        flag: any(leaf in lora.targets for leaf in leaves) for flag, leaves in FLAG_TARGETS.items()
    }
    named = {"lora_r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "lora_rslora": lora.rslora}
    return flags | named


def sample_question(args: Args, data: TrainingData, base: Base) -> tuple[str, list[int]] | None:
    """What is asked at each validation, and its ids: --sample_prompt, else a validation row's. Raises InputError for a
    flag's text that does not fit the model."""
    instruction, extra = (args.sample_prompt, "") if args.sample_prompt else data.sample or (None, "")
    if instruction is None:
        return None
    ids = base.tokenizer.encode_prompt(Prompt("--sample_prompt", instruction, extra).render(data.style))
    check_prompts([ids], 1, base.config.max_position_embeddings, base.config.vocab_size, ["--sample_prompt"])
    return instruction, ids


def announce(job: Job) -> None:
    """What is about to be done: all that a dry run says."""
    args, base, data, lora, steps = job.args, job.base, job.data, job.lora, len(job.plan)
    total, trainable = parameter_count(base.config), adapter_parameters(base, lora)
    tell = say if args.dry_run or not args.quiet else lambda text: None
    tell(f"model: {args.checkpoint_dir}: {total:,} parameters, {args.quantize or 'not quantized'}, {args.precision}")
    tell(f"adapter: r {lora.r}, alpha {lora.alpha:g}, {', '.join(lora.targets)}: {trainable:,} trainable parameters")
    per_epoch = -(-len(data.train) // args.batch_size)
    steps_of = f"{steps:,} step{'s' * (steps != 1)} of {args.batch_size} rows"
    tell(
        f"training: {len(data.train):,} rows, {data.train_tokens:,} tokens, {steps_of} "
        f"({per_epoch:,} an epoch); validation: {len(data.validation):,} rows"
    )
    note_warmup(args, steps)


def note_warmup(args: Args, steps: int) -> None:
    if args.warmup_steps >= steps:
        say(
            f"note: --warmup_steps {args.warmup_steps} is not less than the number of steps, {steps}: "
            "the learning rate never reaches its peak"
        )
