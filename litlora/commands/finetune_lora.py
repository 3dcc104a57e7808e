"""`litlora finetune_lora`: base model + instruction data -> adapter. Read top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from litlora import __version__
from litlora.checkpoint import require_disk
from litlora.commands.common import Base, TrainingData, load_data, record_style
from litlora.commands.finetune_flags import Args, check_flags, check_paths
from litlora.commands.finetune_report import live, report, row, summarize
from litlora.commands.models import explained_memory
from litlora.commands.prompts import Prompt
from litlora.decode import Sampling, check_prompts, generate
from litlora.errors import InputError
from litlora.load import load_model, meta_decoder, parameter_count
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_modules, lora_parameters
from litlora.memory import MicroBatch, choose_micro_batch, out_of_memory
from litlora.metrics import Progress, reset_peak_memory, say
from litlora.model import CausalLoss, Decoder, validation_loss
from litlora.optimizers import make_optimizer, make_schedule, require_optimizer
from litlora.packing import Batch, micro_batches, step_plan
from litlora.peft_format import Adapter, Record, load_factors, targets_of
from litlora.precision import RunPrecision, default_precision, pick_device
from litlora.run_files import RunFiles
from litlora.train import FabricPrecision, train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Plan = list[tuple[int, list[int]]]  # the run's optimizer steps: epoch from 1, examples


@dataclass(frozen=True)
class Job:
    """A run that is checked and ready to be done; nothing is loaded yet."""

    args: Args
    device: torch.device
    precision: RunPrecision
    base: Base
    start: Adapter | None  # of --lora_path
    lora: LoRA
    data: TrainingData
    plan: Plan
    question: tuple[str, list[int]] | None  # what is asked at each validation, and its ids

    @property
    def save_dtype(self) -> torch.dtype:
        return DTYPES[self.args.save_dtype or self.args.lora_dtype]


def run(args: Args, given: frozenset[str] = frozenset()) -> None:
    """`given`: the flags that were set by hand, which may not contradict --lora_path."""
    job = prepare(args, given)
    announce(job)
    if args.dry_run:
        return
    fabric = Fabric(accelerator=job.device.type, devices=1, plugins=[FabricPrecision(job.precision)])
    fabric.seed_everything(args.seed, verbose=False)
    decoder = build(job)
    fit(job, fabric, decoder)


def prepare(args: Args, given: frozenset[str]) -> Job:
    """Finds everything that can be wrong before the long work starts. Raises InputError."""
    check_flags(args)
    device = pick_device(args.accelerator)
    args = args if args.precision else replace(args, precision=default_precision(device))
    base = Base.open(args.checkpoint_dir, weights=not args.dry_run)
    checkpoint = base.weights.checkpoint if base.weights else None
    start = Adapter.open(args.lora_path, base.config, checkpoint) if args.lora_path else None
    lora = choose_lora(args, given, start)
    if not args.dry_run:
        check_paths(args)
        RunFiles(args.out_dir).check(args.overwrite)
        itemsize = DTYPES[args.save_dtype or args.lora_dtype].itemsize
        require_disk(args.out_dir, 2 * adapter_parameters(base, lora) * itemsize + 10_000_000)
    precision = RunPrecision(str(args.precision), args.quantize, device)
    require_optimizer(args.optimizer, device)
    data = load_data(args, base, args.prompt_style)
    return Job(
        args, device, precision, base, start, lora, data, plan_steps(args, data), sample_question(args, data, base)
    )


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


def build(job: Job) -> Decoder:
    """The model, each tensor read, quantized and moved, and the adapter over it."""
    args, base = job.args, job.base
    assert base.weights is not None
    fix = "--accelerator cpu, or a smaller model" if args.quantize else "--quantize bnb.nf4-dq"
    with explained_memory(f"the weights of {args.checkpoint_dir}", fix):
        decoder = load_model(
            base.weights,
            job.precision.quantizer,
            dtype=job.precision.dtype,
            device=job.device,
            quantize_head=args.quantize_head,
        )
    adapt(decoder, job.lora, DTYPES[args.lora_dtype])
    if job.start is not None:
        for name, module in lora_modules(decoder).items():
            load_factors(module, job.start.factors(name))
    return decoder


def fit(job: Job, fabric: Fabric, decoder: Decoder) -> None:
    """The steps, with validation and saves between them. Raises InputError when the GPU's memory does not do."""
    args, data, device, files = job.args, job.data, job.device, RunFiles(job.args.out_dir)
    optimizer = make_optimizer(args.optimizer, lora_parameters(decoder), args.learning_rate, args.weight_decay)
    model, optimizer = fabric.setup(CausalLoss(decoder), optimizer)
    itemsize = job.precision.compute.itemsize
    micro = choose_micro_batch(job.base.config, itemsize, data.longest, device, args.activation_checkpointing)
    micro = replace(micro, tokens=args.micro_batch_tokens or micro.tokens)
    decoder.checkpoint_blocks = micro.checkpointed
    validation = data.validation_batches()
    record, modules, steps = first_record(job), lora_modules(decoder), len(job.plan)
    csv = files.start(asdict(args) | adapter_settings(job.lora))
    seconds, tokens, best, val_loss, step = 0.0, 0, float("inf"), None, None
    reset_peak_memory(device)
    settings: dict[str, Any] = {"learning_rate": args.learning_rate, "max_norm": args.max_norm}
    settings["schedule"] = make_schedule(args.lr_schedule, args.warmup_steps, steps)
    try:
        with Progress(steps, args.log_interval) as progress:
            for step in train(fabric, model, optimizer, batches(job, micro), **settings):
                seconds, tokens, val_loss = seconds + step.seconds, tokens + step.tokens, None
                if step.number % args.eval_interval == 0 or step.number == steps:
                    if validation:
                        val_loss = validation_loss(model, validation, device)
                        answer = sample(job, decoder, fabric)
                        progress.note(f"step {step.number}: validation loss {val_loss:.4f}{answer}")
                    record = replace(record, step=step.number, val_loss=val_loss)
                    is_best = val_loss is None or val_loss < best
                    best = min(best, val_loss) if val_loss is not None else best
                    files.save(modules, job.lora, record, job.save_dtype, best=is_best)
                csv.write(row(step, val_loss, seconds, tokens, device))
                left = seconds / step.number * (steps - step.number)
                progress.step(step.number, live(step, seconds, tokens, device), left)
    except torch.cuda.OutOfMemoryError as error:
        raise memory_advice(job, decoder, micro) from error
    except KeyboardInterrupt:
        if step is not None:
            record = replace(record, step=step.number, val_loss=val_loss)
            files.save(modules, job.lora, record, job.save_dtype, best=not files.has_adapter)
            say(f"interrupted after step {step.number} of {steps}: the adapter of that step is in {files.last}")
        raise
    finally:
        csv.close()
    assert step is not None  # plan_steps holds at least one
    files.check_saved(modules, job.base.config, job.save_dtype)
    summary = summarize(step, seconds, tokens, None if best == float("inf") else best, val_loss, decoder, device)
    files.summarize(summary)
    report(summary, args)


def batches(job: Job, micro: MicroBatch) -> Iterator[tuple[int, list[Batch]]]:
    """(epoch, micro-batches) of each optimizer step."""
    rows = job.args.micro_batch_size
    for epoch, indices in job.plan:
        yield epoch, micro_batches(job.data.dataset, indices, max_tokens=None if rows else micro.tokens, max_rows=rows)


def first_record(job: Job) -> Record:
    """What litlora.json says, before the first step."""
    assert job.base.weights is not None
    style, template = record_style(job.data.style)
    return Record(
        base_name=str(job.args.checkpoint_dir),
        base_fingerprint=job.base.weights.checkpoint.fingerprint,
        quantize=job.args.quantize,
        quantize_head=job.args.quantize_head,
        precision=str(job.args.precision),
        prompt_style=style,
        prompt_template=template,
        tokenizer_fingerprint=job.base.tokenizer.fingerprint,
        step=0,
        val_loss=None,
        litlora_version=__version__,
    )


def memory_advice(job: Job, decoder: Decoder, micro: MicroBatch) -> InputError:
    """What filled the GPU, and the cheapest flag that takes less."""
    adapter = sum(p.numel() * p.element_size() for p in lora_parameters(decoder))
    everything = sum(p.numel() * p.element_size() for p in decoder.parameters())
    return out_of_memory(
        weights=everything - adapter,
        adapter=4 * adapter,  # itself, its gradient, AdamW's two moments
        micro=micro,
        micro_batch_size=job.args.micro_batch_size,
        longest=job.data.longest,
        quantize=job.args.quantize,
        device=job.device,
    )


def adapter_parameters(base: Base, lora: LoRA) -> int:
    """Counted on the meta device."""
    decoder = meta_decoder(base.config)
    adapt(decoder, lora)
    return sum(p.numel() for p in lora_parameters(decoder))


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


def sample(job: Job, decoder: Decoder, fabric: Fabric) -> str:
    """What the model now answers to the sample question, greedily."""
    if job.question is None:
        return ""
    instruction, ids = job.question
    tokenizer = job.base.tokenizer
    decoder.eval()
    with fabric.autocast():
        stop_ids, vocab_size = tokenizer.stop_ids, tokenizer.vocab_size
        answer = generate(decoder, [ids], Sampling(), max_new_tokens=64, stop_ids=stop_ids, vocab_size=vocab_size)
        text = tokenizer.decode([token for _, token in answer])
    return f"\n  {instruction!r} -> {text.strip()!r}"


def announce(job: Job) -> None:
    """What is about to be done: all that a dry run says."""
    args, base, data, lora, steps = job.args, job.base, job.data, job.lora, len(job.plan)
    total, trainable = parameter_count(base.config), adapter_parameters(base, lora)
    say(f"model: {args.checkpoint_dir}: {total:,} parameters, {args.quantize or 'not quantized'}, {args.precision}")
    say(f"adapter: r {lora.r}, alpha {lora.alpha:g}, {', '.join(lora.targets)}: {trainable:,} trainable parameters")
    per_epoch = -(-len(data.train) // args.batch_size)
    steps_of = f"{steps:,} step{'s' * (steps != 1)} of {args.batch_size} rows"
    say(
        f"training: {len(data.train):,} rows, {data.train_tokens:,} tokens, {steps_of} "
        f"({per_epoch:,} an epoch); validation: {len(data.validation):,} rows"
    )
    if args.warmup_steps >= steps:
        say(
            f"note: --warmup_steps {args.warmup_steps} is not less than the number of steps, {steps}: "
            "the learning rate never reaches its peak"
        )
