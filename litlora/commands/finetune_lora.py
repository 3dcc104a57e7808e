"""`litlora finetune_lora`: base model + instruction data -> adapter. Read top to bottom."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from lightning.fabric import Fabric

from litlora import __version__
from litlora.checkpoint import require_disk
from litlora.commands.common import Base, TrainingData, load_data, record_style
from litlora.commands.finetune_flags import Args, check_flags, check_paths, seconds_of
from litlora.commands.finetune_report import Measures
from litlora.commands.finetune_resume import check_resume, machine, plain
from litlora.commands.finetune_training import Training
from litlora.commands.models import explained_memory
from litlora.commands.prompts import Prompt
from litlora.decode import check_prompts
from litlora.errors import InputError
from litlora.load import load_model, meta_decoder, parameter_count
from litlora.loggers import Loggers
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_modules, lora_parameters
from litlora.memory import MicroBatch, choose_micro_batch, out_of_memory
from litlora.metrics import Progress, reset_peak_memory, say
from litlora.model import CausalLoss, Decoder
from litlora.ops import fastest
from litlora.optimizers import make_optimizer, make_schedule, require_optimizer
from litlora.packing import Batch, micro_batches, step_plan
from litlora.peft_format import Adapter, Record, load_factors, targets_of
from litlora.precision import RunPrecision, default_precision, pick_device
from litlora.resume import Conditions, Totals, TrainingCheckpoint, find_checkpoint
from litlora.run_files import RunFiles
from litlora.train import FabricPrecision, Stop, train

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
    conditions: Conditions
    checkpoint: TrainingCheckpoint | None  # where the run goes on

    @property
    def patience(self) -> int | None:
        return self.args.early_stopping_patience

    @property
    def save_dtype(self) -> torch.dtype:
        return DTYPES[self.args.save_dtype or self.args.lora_dtype]


def run(args: Args, given: frozenset[str] = frozenset()) -> None:
    """`given`: the flags that were set by hand, which may not contradict --lora_path. Exits with 130 or 143 where
    SIGINT or SIGTERM ended the run."""
    stop = Stop(seconds_of(args.max_time))
    job = prepare(args, given)
    announce(job)
    if args.dry_run or is_finished(job):
        return
    make_deterministic(args.deterministic)
    fabric = Fabric(accelerator=job.device.type, devices=1, plugins=[FabricPrecision(job.precision)])
    fabric.seed_everything(args.seed, verbose=False)
    training = set_up(job, fabric, build(job))
    try:
        stopped = fit(training, stop)
    except torch.cuda.OutOfMemoryError as error:
        raise memory_advice(training) from error
    finally:
        training.close()
    if stopped is None:
        training.finish()
    else:
        training.say_stopped(stopped)
        raise SystemExit(stop.exit_code)


def prepare(args: Args, given: frozenset[str]) -> Job:
    """Finds everything that can be wrong before the long work starts. Raises InputError."""
    check_flags(args)
    device = pick_device(args.accelerator)
    args = args if args.precision else replace(args, precision=default_precision(device))
    base = Base.open(args.checkpoint_dir, weights=not args.dry_run)
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


def is_finished(job: Job) -> bool:
    """Whether the run that would be resumed came to its end already."""
    finished = RunFiles(job.args.out_dir).is_finished
    if job.checkpoint is None or not finished or not job.checkpoint.totals.ended(len(job.plan), job.patience):
        return False
    more = "--epochs or --max_steps goes on, --overwrite true without --resume starts again"
    say(f"nothing left to do: the run in {job.args.out_dir} is finished ({more})")
    return True


def build(job: Job) -> Decoder:
    """The model, each tensor read, quantized and moved, and the adapter over it."""
    args, base = job.args, job.base
    assert base.weights is not None
    fix = "--accelerator cpu, or a smaller model" if args.quantize else "--quantize bnb.nf4-dq"
    ops, plain = fastest(job.device)
    if plain:
        say(f"note: the plain operations are used, which are slower: {plain}")
    with explained_memory(f"the weights of {args.checkpoint_dir}", fix):
        decoder = load_model(
            base.weights,
            job.precision.quantizer,
            dtype=job.precision.dtype,
            device=job.device,
            ops=ops,
            quantize_head=args.quantize_head,
        )
    adapt(decoder, job.lora, DTYPES[args.lora_dtype])
    if job.start is not None:
        for name, module in lora_modules(decoder).items():
            load_factors(module, job.start.factors(name))
    return decoder


def set_up(job: Job, fabric: Fabric, decoder: Decoder) -> Training:
    """Optimizer, micro-batches and files: fresh, or as the checkpoint left them."""
    args, checkpoint, files = job.args, job.checkpoint, RunFiles(job.args.out_dir)
    optimizer = make_optimizer(args.optimizer, lora_parameters(decoder), args.learning_rate, args.weight_decay)
    model, optimizer = fabric.setup(CausalLoss(decoder), optimizer)
    micro = choose_micro(job)
    decoder.checkpoint_blocks = micro.checkpointed
    settings = job.conditions.settings | {
        "micro_batch_tokens": None if args.micro_batch_size else micro.tokens,
        "activation_checkpointing": "full" if micro.checkpointed else "none",
        "resume_override": False,  # it was meant for this once
    }
    conditions = replace(job.conditions, settings=settings, chosen=asdict(micro))
    if checkpoint is None:
        totals, metrics = Totals(), files.start(settings)
    else:
        checkpoint.restore(decoder, optimizer)
        totals, metrics = checkpoint.totals, files.resume(settings, checkpoint)
        say(f"resuming after step {totals.step:,} of {len(job.plan):,}, from {checkpoint.directory}")
    reset_peak_memory(job.device)
    measures = Measures.of(job.base.config, lora_modules(decoder), micro, job.precision)
    training = Training(
        job, fabric, decoder, model, optimizer, micro, first_record(job), conditions, files, metrics, totals,
        job.data.validation_batches(), Progress(len(job.plan), args.log_interval, quiet=args.quiet), measures,
        Loggers(args.logger, args.out_dir, settings, totals.step),
    )  # fmt: skip
    if checkpoint is not None:
        checkpoint.restore_random(job.device)  # last: what is drawn meanwhile does not count
    return training


def choose_micro(job: Job) -> MicroBatch:
    """What the free memory holds, or held when the run began; flags given by hand come first."""
    args = job.args
    if job.checkpoint is not None:
        micro = job.checkpoint.chosen(MicroBatch)
        if args.activation_checkpointing != "auto":
            micro = replace(micro, checkpointed=args.activation_checkpointing == "full")
    else:
        itemsize, longest = job.precision.compute.itemsize, job.data.longest
        micro = choose_micro_batch(job.base.config, itemsize, longest, job.device, args.activation_checkpointing)
    return replace(micro, tokens=args.micro_batch_tokens or micro.tokens)


def fit(training: Training, stop: Stop) -> str | None:
    """The steps that are left, with validations and saves between them. Returns why the run was stopped, None at its
    end. Raises TrainingError when it cannot go on."""
    job, args, totals = training.job, training.job.args, training.totals
    schedule = make_schedule(args.lr_schedule, args.warmup_steps, len(job.plan))
    steps = train(
        training.fabric, training.model, training.optimizer, batches(job, training.micro, totals.step),
        learning_rate=args.learning_rate, schedule=schedule, max_norm=args.max_norm, done=totals.step,
    )  # fmt: skip
    with stop, training.progress:
        while not training.ended and not stop.reason:
            step = next(steps)
            totals.count(step)
            due = totals.step == len(job.plan) or totals.step % args.eval_interval == 0
            training.log(step, training.evaluate() if due else {})
            if totals.step % args.save_interval == 0:
                training.save()
        training.save()
        training.require_saved()
        return None if training.ended else stop.reason


def batches(job: Job, micro: MicroBatch, done: int) -> Iterator[tuple[int, list[Batch]]]:
    """(epoch, micro-batches) of each optimizer step after the first `done`."""
    rows = job.args.micro_batch_size
    for epoch, indices in job.plan[done:]:
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


def memory_advice(training: Training) -> InputError:
    """What filled the GPU, and the cheapest flag that takes less."""
    job, decoder = training.job, training.decoder
    adapter = sum(p.numel() * p.element_size() for p in lora_parameters(decoder))
    everything = sum(p.numel() * p.element_size() for p in decoder.parameters())
    return out_of_memory(
        weights=everything - adapter,
        adapter=4 * adapter,  # itself, its gradient, AdamW's two moments
        micro=training.micro,
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


def make_deterministic(deterministic: bool) -> None:
    """The same bits in every run: sums on a GPU are otherwise added up in any order."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(deterministic)


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
    if args.warmup_steps >= steps:
        say(
            f"note: --warmup_steps {args.warmup_steps} is not less than the number of steps, {steps}: "
            "the learning rate never reaches its peak"
        )
