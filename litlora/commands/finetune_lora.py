"""`litlora finetune_lora`: base model + instruction data -> adapter. Read top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric import Fabric

from litlora import __version__
from litlora.checkpoint import require_disk
from litlora.commands.common import Base, TrainingData, load_data, record_style
from litlora.commands.models import explained_memory
from litlora.commands.prompts import Prompt
from litlora.decode import Sampling, check_prompts, generate
from litlora.errors import InputError
from litlora.load import load_model, meta_decoder, parameter_count
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_modules, lora_parameters
from litlora.memory import MicroBatch, choose_micro_batch, out_of_memory
from litlora.metrics import Progress, duration, peak_memory, reset_peak_memory, say
from litlora.model import CausalLoss, Decoder, validation_loss
from litlora.optimizers import make_optimizer, make_schedule, require_optimizer
from litlora.packing import Batch, micro_batches, step_plan
from litlora.peft_format import Adapter, Record, load_factors, targets_of
from litlora.precision import RunPrecision, default_precision, pick_device
from litlora.run_files import RunFiles
from litlora.train import FabricPrecision, Step, train


@dataclass(frozen=True)
class Args:
    """Finetune a Hugging Face model with LoRA, or QLoRA with --quantize.

    Args:
        checkpoint_dir: the base model's Hugging Face directory
        out_dir: where the adapter goes (the last one in last/), metrics.csv, summary.json, hyperparameters.yaml
        data: the kind of data; json has instruction columns, messages or conversations, text is plain text
        data_path: the data file; alpaca, lima and dolly are fetched from the hub without it
        val_path: validation data of the same kind, instead of a split
        val_split: validation rows as a count or a share, 0 for none; 2000, or 5 % where there are fewer than 20000 rows
        multiturn: train on all turns of LIMA's conversations instead of the first
        prompt_style: alpaca, chat (the model's own template), none, or a template file
        mask_prompt: train on the response only
        max_seq_length: tokens a row may have; the model's context without it
        on_overlong: what to do with rows that are longer
        shuffle: false keeps the file's order, in every epoch
        precision: of weights and products; bf16-true on a GPU that has it, else 32-true
        quantize: QLoRA: the format of the frozen weights
        quantize_head: also quantize lm_head
        accelerator: auto takes the GPU where there is one
        devices: how many; 1 for now
        learning_rate: peak of the schedule
        batch_size: examples per optimizer step
        micro_batch_tokens: tokens per micro-batch; as many as the free memory holds without it
        micro_batch_size: examples per micro-batch, instead of micro_batch_tokens
        activation_checkpointing: full recomputes each block in the backward pass; auto does where a row needs it
        epochs: passes over the data
        max_steps: optimizer steps at most
        weight_decay: AdamW's or SGD's, on all adapter weights
        warmup_steps: optimizer steps in which the rate rises from 0
        max_norm: clip gradients to this norm; no clipping without it
        optimizer: adamw_8bit holds its state in 8 bit
        lr_schedule: after the warm-up; cosine is half a cycle
        lora_r: rank
        lora_alpha: the update is scaled by alpha / r
        lora_dropout: on the adapter's input
        lora_query: adapt q_proj
        lora_key: adapt k_proj
        lora_value: adapt v_proj
        lora_projection: adapt o_proj
        lora_mlp: adapt gate_proj, up_proj and down_proj
        lora_head: adapt lm_head
        lora_rslora: scale by alpha / sqrt(r)
        lora_dtype: of the adapter while it trains
        save_dtype: of the adapter's file; lora_dtype without it
        lora_path: start from this adapter, ours or PEFT's; its r, alpha and targets hold
        eval_interval: optimizer steps between validations
        log_interval: optimizer steps between plain progress lines, off a terminal
        sample_prompt: an instruction to answer at each validation; the first validation row's without it
        seed: of the adapter's start, dropout, data order and split
        overwrite: replace a run that is in out_dir
        dry_run: needs only config.json, tokenizer and data; prints parameters, tokens, steps, and stops
    """

    checkpoint_dir: Path
    out_dir: Path = Path("out/finetune_lora")
    data: Literal["alpaca", "lima", "dolly", "json", "text"] = "alpaca"
    data_path: Path | None = None
    val_path: Path | None = None
    val_split: float | None = None
    multiturn: bool = False
    prompt_style: str | None = None
    mask_prompt: bool = False
    max_seq_length: int | None = None
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    shuffle: bool = True
    precision: Literal["bf16-true", "bf16-mixed", "32-true"] | None = None
    quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq"] | None = None
    quantize_head: bool = False
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    learning_rate: float = 3e-4
    batch_size: int = 128
    micro_batch_tokens: int | None = None
    micro_batch_size: int | None = None
    activation_checkpointing: Literal["auto", "none", "full"] = "auto"
    epochs: int = 1
    max_steps: int | None = None
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_norm: float | None = None
    optimizer: Literal["adamw", "sgd", "adamw_8bit"] = "adamw"
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    lora_query: bool = True
    lora_key: bool = False
    lora_value: bool = True
    lora_projection: bool = False
    lora_mlp: bool = False
    lora_head: bool = False
    lora_rslora: bool = False
    lora_dtype: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    lora_path: Path | None = None
    eval_interval: int = 100
    log_interval: int = 10
    sample_prompt: str | None = None
    seed: int = 1337
    overwrite: bool = False
    dry_run: bool = False


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(args: Args, given: frozenset[str] = frozenset()) -> None:
    """`given`: the flags that were set by hand, which may not contradict --lora_path."""
    # 1. everything that can be wrong is found before the long work starts
    check_flags(args)
    files = RunFiles(args.out_dir)
    device = pick_device(args.accelerator)
    args = args if args.precision else replace(args, precision=default_precision(device))
    base = Base.open(args.checkpoint_dir, weights=not args.dry_run)
    checkpoint = base.weights.checkpoint if base.weights else None
    start = Adapter.open(args.lora_path, base.config, checkpoint) if args.lora_path else None
    lora = choose_lora(args, given, start)
    dtype = DTYPES[args.save_dtype or args.lora_dtype]
    if not args.dry_run:
        check_paths(args)
        files.check(args.overwrite)
        require_disk(args.out_dir, 2 * adapter_parameters(base, lora) * dtype.itemsize + 10_000_000)
    precision = RunPrecision(str(args.precision), args.quantize, device)
    require_optimizer(args.optimizer, device)
    data = load_data(args, base, args.prompt_style)
    question = sample_question(args, data, base)
    steps = count_steps(args, len(data.train))
    announce(args, base, data, lora, steps)
    if args.dry_run:
        return

    # 2. the model: each tensor read, quantized and moved; then the adapter over it
    fabric = Fabric(accelerator=device.type, devices=1, plugins=[FabricPrecision(precision)])
    fabric.seed_everything(args.seed, verbose=False)
    assert base.weights is not None
    with explained_memory(f"the weights of {args.checkpoint_dir}", load_fix(args)):
        decoder = load_model(
            base.weights, precision.quantizer, dtype=precision.dtype, device=device, quantize_head=args.quantize_head
        )
    weight_bytes = sum(p.numel() * p.element_size() for p in decoder.parameters())
    adapt(decoder, lora, DTYPES[args.lora_dtype])
    if start is not None:
        for name, module in lora_modules(decoder).items():
            load_factors(module, start.factors(name))
    optimizer = make_optimizer(args.optimizer, lora_parameters(decoder), args.learning_rate, args.weight_decay)
    model, optimizer = fabric.setup(CausalLoss(decoder), optimizer)
    micro = choose_micro_batch(
        base.config, precision.compute.itemsize, data.longest, device, args.activation_checkpointing
    )
    micro = replace(micro, tokens=args.micro_batch_tokens or micro.tokens)
    decoder.checkpoint_blocks = micro.checkpointed

    # 3. the steps
    style, template = record_style(data.style)
    record = Record(
        base_name=str(args.checkpoint_dir),
        base_fingerprint=base.weights.checkpoint.fingerprint,
        quantize=args.quantize,
        quantize_head=args.quantize_head,
        precision=str(args.precision),
        prompt_style=style,
        prompt_template=template,
        tokenizer_fingerprint=base.tokenizer.fingerprint,
        step=0,
        val_loss=None,
        litlora_version=__version__,
    )
    csv = files.start(asdict(args) | adapter_settings(lora))
    reset_peak_memory(device)
    schedule = make_schedule(args.lr_schedule, args.warmup_steps, steps)
    validation = data.validation_batches(micro.tokens)
    seconds, tokens, best, val_loss = 0.0, 0, float("inf"), None
    step = None
    try:
        with Progress(steps, args.log_interval) as progress:
            for step in train(
                fabric,
                model,
                optimizer,
                batches(args, data, micro, steps),
                learning_rate=args.learning_rate,
                schedule=schedule,
                max_norm=args.max_norm,
            ):
                seconds, tokens = seconds + step.seconds, tokens + step.tokens
                val_loss = None
                if step.number % args.eval_interval == 0 or step.number == steps:
                    if validation:
                        val_loss = validation_loss(model, validation, device)
                        answer = sample(question, base, decoder, fabric)
                        progress.note(f"step {step.number}: validation loss {val_loss:.4f}{answer}")
                    record = replace(record, step=step.number, val_loss=val_loss)
                    is_best = val_loss is None or val_loss < best
                    best = min(best, val_loss) if val_loss is not None else best
                    files.save(lora_modules(decoder), lora, record, dtype, best=is_best)
                csv.write(row(step, val_loss, seconds, tokens, device))
                progress.step(
                    step.number, live(step, seconds, tokens, device), seconds / step.number * (steps - step.number)
                )
    except torch.cuda.OutOfMemoryError as error:
        adapter_bytes = sum(p.numel() * p.element_size() * 4 for p in lora_parameters(decoder))
        raise out_of_memory(
            weights=weight_bytes, adapter=adapter_bytes, micro=micro, micro_batch_size=args.micro_batch_size,
            longest=data.longest, quantize=args.quantize, device=device,
        ) from error  # fmt: skip
    finally:
        csv.close()

    # 4. what came of it
    if step is None:
        raise InputError("no step was taken: every row's labels are masked", where=args.data_path)
    files.check_saved(lora_modules(decoder), base.config, dtype)
    summary = summarize(step, seconds, tokens, None if best == float("inf") else best, val_loss, decoder, device)
    files.summarize(summary)
    report(summary, args)


def check_flags(args: Args) -> None:
    """Raises InputError for flags out of range."""
    for name in ("batch_size", "epochs", "eval_interval", "log_interval", "lora_r", "devices"):
        _require(name, getattr(args, name), getattr(args, name) >= 1, "at least 1")
    for name in ("max_steps", "micro_batch_tokens", "micro_batch_size", "max_seq_length"):
        value = getattr(args, name)
        _require(name, value, value is None or value >= 1, "at least 1")
    for name in ("warmup_steps", "weight_decay"):
        _require(name, getattr(args, name), 0 <= getattr(args, name) < math.inf, "0 or more")
    _require("learning_rate", args.learning_rate, 0 < args.learning_rate < math.inf, "above 0")
    _require("seed", args.seed, 0 <= args.seed < 2**32, "0 to 2**32 - 1")
    _require("max_norm", args.max_norm, args.max_norm is None or args.max_norm > 0, "above 0")
    _require("devices", args.devices, args.devices == 1, "1: several GPUs are not supported yet")
    if args.micro_batch_tokens is not None and args.micro_batch_size is not None:
        raise InputError("two sizes of a micro-batch", got="--micro_batch_tokens and --micro_batch_size", wanted="one")


def check_paths(args: Args) -> None:
    """Raises InputError where the run would replace what it is made from."""
    out = args.out_dir.resolve()
    for flag, path in (("checkpoint_dir", args.checkpoint_dir), ("lora_path", args.lora_path)):
        if path is not None and path.resolve() in (out, out / "last"):
            raise InputError(f"the run would replace --{flag}", where=args.out_dir, got=path, fix="another --out_dir")


def load_fix(args: Args) -> str:
    """What to do where the weights alone are too much for the GPU."""
    return "--accelerator cpu, or a smaller model" if args.quantize else "--quantize bnb.nf4-dq"


def _require(flag: str, value: object, fine: bool, wanted: str) -> None:
    if not fine:
        raise InputError("a flag out of range", where=f"--{flag}", got=value, wanted=wanted)


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


def count_steps(args: Args, rows: int) -> int:
    steps = args.epochs * -(-rows // args.batch_size)
    return min(steps, args.max_steps or steps)


def batches(args: Args, data: TrainingData, micro: MicroBatch, steps: int) -> Iterator[tuple[int, list[Batch]]]:
    """(epoch from 1, micro-batches) of each optimizer step: always over `batch_size` examples, however it is cut."""
    for epoch in range(1, args.epochs + 1):
        for rows in step_plan(len(data.train), args.batch_size, args.seed, epoch, args.shuffle):
            if steps == 0:
                return
            steps -= 1
            indices = [data.train[row] for row in rows]
            max_tokens = None if args.micro_batch_size else micro.tokens
            yield epoch, micro_batches(data.dataset, indices, max_tokens=max_tokens, max_rows=args.micro_batch_size)


def sample_question(args: Args, data: TrainingData, base: Base) -> tuple[str, list[int]] | None:
    """What is asked at each validation, and its ids: --sample_prompt, else a validation row's. Raises InputError for a
    flag's text that does not fit the model."""
    instruction, extra = (args.sample_prompt, "") if args.sample_prompt else data.sample or (None, "")
    if instruction is None:
        return None
    ids = base.tokenizer.encode_prompt(Prompt("--sample_prompt", instruction, extra).render(data.style))
    check_prompts([ids], 1, base.config.max_position_embeddings, base.config.vocab_size, ["--sample_prompt"])
    return instruction, ids


def sample(question: tuple[str, list[int]] | None, base: Base, decoder: Decoder, fabric: Fabric) -> str:
    """What the model now answers to the sample prompt, greedily."""
    if question is None:
        return ""
    instruction, ids = question
    decoder.eval()
    with fabric.autocast():
        stop_ids, vocab_size = base.tokenizer.stop_ids, base.tokenizer.vocab_size
        answer = generate(decoder, [ids], Sampling(), max_new_tokens=64, stop_ids=stop_ids, vocab_size=vocab_size)
        text = base.tokenizer.decode([token for _, token in answer])
    return f"\n  {instruction!r} -> {text.strip()!r}"


def announce(args: Args, base: Base, data: TrainingData, lora: LoRA, steps: int) -> None:
    total, trainable = parameter_count(base.config), adapter_parameters(base, lora)
    say(f"model: {args.checkpoint_dir}: {total:,} parameters, {args.quantize or 'not quantized'}, {args.precision}")
    say(f"adapter: r {lora.r}, alpha {lora.alpha:g}, {', '.join(lora.targets)}: {trainable:,} trainable parameters")
    per_epoch = -(-len(data.train) // args.batch_size)
    say(
        f"training: {len(data.train):,} rows, {data.train_tokens:,} tokens, {steps:,} steps of {args.batch_size} rows "
        f"({per_epoch:,} an epoch); validation: {len(data.validation):,} rows"
    )
    if args.warmup_steps >= steps:
        say(f"note: --warmup_steps {args.warmup_steps} is not less than the {steps} steps: the rate never gets full")


def row(step: Step, val_loss: float | None, seconds: float, tokens: int, device: torch.device) -> dict[str, object]:
    """One row of metrics.csv."""
    return {
        "step": step.number,
        "epoch": step.epoch,
        "loss": step.loss,
        "val_loss": val_loss,
        "lr": step.learning_rate,
        "grad_norm": step.grad_norm,
        "tokens": step.tokens,
        "trained_tokens": step.trained_tokens,
        "seconds": step.seconds,
        "total_tokens": tokens,
        "total_seconds": seconds,
        "tokens_per_second": step.tokens / step.seconds,
        "memory_gb": peak_memory(device),
    }


def live(step: Step, seconds: float, tokens: int, device: torch.device) -> dict[str, str]:
    """The progress line."""
    return {
        "loss": f"{step.loss:.4f}",
        "lr": f"{step.learning_rate:.2e}",
        "tokens/s": f"{tokens / seconds:,.0f}",
        "memory": f"{peak_memory(device):.2f} GB",
    }


def summarize(
    step: Step,
    seconds: float,
    tokens: int,
    best: float | None,
    final: float | None,
    decoder: Decoder,
    device: torch.device,
) -> dict[str, object]:
    """summary.json."""
    return {
        "training_seconds": seconds,
        "steps": step.number,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_memory_gb": peak_memory(device),
        "trainable_parameters": sum(p.numel() for p in lora_parameters(decoder)),
        "train_loss": step.loss,
        "val_loss": final,
        "best_val_loss": best,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def report(summary: dict[str, object], args: Args) -> None:
    """The articles' closing lines."""
    say(f"Training time: {summary['training_seconds']:.2f} s ({duration(float(str(summary['training_seconds'])))})")
    say(f"Tokens: {summary['tokens']:,} ({summary['tokens_per_second']:,.0f} tokens/s)")
    say(f"Memory used: {summary['peak_memory_gb']:.2f} GB")
    say(f"Trainable parameters: {summary['trainable_parameters']:,}")
    if summary["val_loss"] is not None:
        say(f"Validation loss: {summary['val_loss']:.4f} (best {summary['best_val_loss']:.4f})")
    say(f"Adapter: {args.out_dir} (the last one: {args.out_dir / 'last'})")
    say(f"Next: litlora generate --checkpoint_dir {args.checkpoint_dir} --lora_path {args.out_dir} --prompt '...'")
