"""`litlora finetune_lora`: base model + instruction data -> adapter. Read top to bottom."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from litlora import __version__
from litlora.commands.common import record_style
from litlora.commands.finetune_flags import Args, seconds_of
from litlora.commands.finetune_job import (
    DTYPES,
    Job,
    announce,
    expected_footprint,
    fit_micro_batch,
    kept_of,
    largest_pack,
    prepare,
    step_packs,
)
from litlora.commands.finetune_report import Measures
from litlora.commands.finetune_training import Training
from litlora.commands.models import explained_memory
from litlora.commands.proposals import out_of_memory
from litlora.errors import InputError
from litlora.load import load_model
from litlora.loggers import Loggers
from litlora.lora import adapt, lora_modules, lora_parameters
from litlora.memory import MicroBatch, usable_memory
from litlora.metrics import Progress, reset_peak_memory, say
from litlora.model import CausalLoss, Decoder
from litlora.ops import fastest
from litlora.optimizers import make_optimizer, make_schedule
from litlora.packing import Batch, collate
from litlora.peft_format import Record, load_factors
from litlora.resume import Totals
from litlora.run_files import RunFiles
from litlora.train import Stop, train

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def run(args: Args, given: frozenset[str] = frozenset()) -> None:
    """`given`: the flags that were set by hand, which may not contradict --lora_path. Exits with 130 or 143 where
    SIGINT or SIGTERM ended the run."""
    stop = Stop(seconds_of(args.max_time))
    job = prepare(args, given)
    announce(job)
    if args.dry_run or is_finished(job):
        return
    from litlora.fabric import open_fabric  # only now: it takes seconds

    make_deterministic(args.deterministic)
    fabric = open_fabric(job.device, job.precision)
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
    decoder.kept = micro.kept
    settings = job.conditions.settings | {
        "micro_batch_tokens": "auto" if args.micro_batch_size else micro.tokens,
        "activation_checkpointing": micro.kept.text(job.base.config.num_hidden_layers),
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
    if job.checkpoint is None:
        return fit_micro_batch(job, usable_memory(job.device))
    micro, kept = job.checkpoint.chosen(MicroBatch), kept_of(job.args, job.base)
    if kept is not None:
        micro = replace(micro, policy=kept.policy, blocks=kept.blocks)
    return replace(micro, tokens=job.args.tokens or micro.tokens)


def say_micro_batches(job: Job, micro: MicroBatch, largest: list[int]) -> None:
    rows = job.args.micro_batch_size
    size = f"{rows} rows" if rows else f"up to {micro.tokens:,} tokens"
    text = f"micro-batches: {size}, {micro.describe(job.base.config.num_hidden_layers)}"
    if job.device.type == "cuda":
        text += f"; expected peak {expected_footprint(job, micro, largest).peak / 1e9:.2f} GB"
    if not job.args.quiet:
        say(text)


def fit(training: Training, stop: Stop) -> str | None:
    """The steps that are left, with validations and saves between them. Returns why the run was stopped, None at its
    end. Raises TrainingError when it cannot go on."""
    job, args, totals = training.job, training.job.args, training.totals
    schedule = make_schedule(args.lr_schedule, args.warmup_steps, len(job.plan))
    largest = largest_pack(job, training.micro)
    say_micro_batches(job, training.micro, largest)
    steps = train(
        training.fabric, training.model, training.optimizer, batches(job, training.micro, totals.step),
        learning_rate=args.learning_rate, schedule=schedule, max_norm=args.max_norm, done=totals.step,
        largest=collate(job.data.dataset, largest),
    )  # fmt: skip
    with stop, training.progress:
        while not training.ended:
            step = next(steps)
            totals.count(step)
            due = totals.step == len(job.plan) or totals.step % args.eval_interval == 0
            training.log(step, training.evaluate() if due else {})
            if stop.reason:
                break
            if totals.step % args.save_interval == 0:
                training.save()
        training.save(final=True)
        training.require_saved()
        return None if training.ended else stop.reason


def batches(job: Job, micro: MicroBatch, done: int) -> Iterator[tuple[int, list[Batch]]]:
    """(epoch, micro-batches) of each optimizer step after the first `done`."""
    for epoch, indices in job.plan[done:]:
        yield epoch, [collate(job.data.dataset, pack) for pack in step_packs(job, micro, indices)]


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
    """What filled the GPU, and flags that take less."""
    job, decoder = training.job, training.decoder
    adapter = sum(p.numel() * p.element_size() for p in lora_parameters(decoder))
    everything = sum(p.numel() * p.element_size() for p in decoder.parameters())
    # with its gradient and AdamW's two moments
    return out_of_memory(job, training.micro, weights=everything - adapter, adapter=4 * adapter)


def make_deterministic(deterministic: bool) -> None:
    """The same bits in every run: sums on a GPU are otherwise added up in any order."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(deterministic)
