"""The flags of finetune_lora: what they are called, and what they may be."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litlora.commands.data_flags import DataArgs
from litlora.errors import InputError
from litlora.loggers import require_loggers


@dataclass(frozen=True)
class Args(DataArgs):
    """Finetune a Hugging Face model with LoRA, or QLoRA with --quantize.

    Args:
        out_dir: where the adapter goes (the last one in last/), metrics.csv, summary.json, hyperparameters.yaml
        shuffle: false keeps the file's order, in every epoch
        precision: of weights and products; bf16-true on a GPU that has it, else 32-true
        quantize: QLoRA: the format of the frozen weights
        quantize_head: also quantize lm_head
        accelerator: auto takes the GPU where there is one
        devices: how many; 1 for now
        learning_rate: peak of the schedule
        batch_size: examples per optimizer step
        micro_batch_tokens: tokens per micro-batch; auto: as many as the free memory holds and the card makes use of
        micro_batch_size: examples per micro-batch, instead of micro_batch_tokens
        activation_checkpointing: what the backward pass works out again instead of keeping it: none; selective: norms
            and SwiGLU (selective:20: of the first 20 blocks); full: every block (full:20: the first 20, of the others
            as selective); offload, offload:20: so, with the blocks' inputs in the host's memory; auto: the fastest
            that fits
        epochs: passes over the data
        max_steps: optimizer steps at most
        weight_decay: AdamW's or SGD's, on all adapter weights
        warmup_steps: optimizer steps in which the rate rises from 0
        max_norm: clip gradients to this norm; no clipping without it
        max_bad_steps: so many steps in a row without a finite loss and gradient end the run; none is applied
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
        early_stopping_patience: end the run after so many validations in a row without a better loss
        save_interval: optimizer steps between checkpoints, which --resume goes on from
        keep_last: checkpoints to keep
        resume: auto goes on from the newest checkpoint in out_dir, or starts where there is none; or a checkpoint's or
            run's directory
        resume_override: take flags that change the maths when resuming
        max_time: save and end after so long, counted from the command's start; 90m, 1h30m or 45s
        deterministic: the same bits in every run on a GPU too, which costs speed
        log_interval: optimizer steps between plain progress lines, off a terminal
        logger: csv (metrics.csv is always written), tensorboard, wandb, or several with commas between
        quiet: no progress lines; warnings and the closing figures stay
        sample_prompt: an instruction to answer at each validation; the first validation row's without it
        overwrite: replace a run that is in out_dir
        dry_run: needs only config.json, tokenizer and data; prints parameters, tokens, steps, and stops
    """

    out_dir: Path = Path("out/finetune_lora")
    shuffle: bool = True
    precision: Literal["bf16-true", "bf16-mixed", "32-true"] | None = None
    quantize: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "fp8"] | None = None
    quantize_head: bool = False
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    learning_rate: float = 3e-4
    batch_size: int = 128
    micro_batch_tokens: int | Literal["auto"] = "auto"
    micro_batch_size: int | None = None
    activation_checkpointing: str = "auto"
    epochs: int = 1
    max_steps: int | None = None
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_norm: float | None = None
    max_bad_steps: int = 5
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
    early_stopping_patience: int | None = None
    save_interval: int = 100
    keep_last: int = 2
    resume: str | None = None
    resume_override: bool = False
    max_time: str | None = None
    deterministic: bool = False
    log_interval: int = 10
    logger: str = "csv"
    quiet: bool = False
    sample_prompt: str | None = None
    overwrite: bool = False
    dry_run: bool = False

    @property
    def tokens(self) -> int | None:
        """Of --micro_batch_tokens; None for auto."""
        return None if self.micro_batch_tokens == "auto" else self.micro_batch_tokens


def check_flags(args: Args) -> None:
    """Raises InputError for flags out of range."""
    for name in (
        "batch_size", "epochs", "eval_interval", "save_interval", "keep_last", "log_interval", "lora_r", "devices",
        "max_bad_steps",
    ):  # fmt: skip
        require(name, getattr(args, name), getattr(args, name) >= 1, "at least 1")
    require("micro_batch_tokens", args.micro_batch_tokens, args.tokens is None or args.tokens >= 1, "at least 1")
    for name in ("max_steps", "micro_batch_size", "max_seq_length", "early_stopping_patience"):
        value = getattr(args, name)
        require(name, value, value is None or value >= 1, "at least 1")
    for name in ("warmup_steps", "weight_decay"):
        require(name, getattr(args, name), 0 <= getattr(args, name) < math.inf, "0 or more")
    require("learning_rate", args.learning_rate, 0 < args.learning_rate < math.inf, "above 0")
    require("seed", args.seed, 0 <= args.seed < 2**32, "0 to 2**32 - 1")
    require("max_norm", args.max_norm, args.max_norm is None or args.max_norm > 0, "above 0")
    require("devices", args.devices, args.devices == 1, "1: several GPUs are not supported yet")
    seconds_of(args.max_time)
    require_loggers(args.logger)
    if args.tokens is not None and args.micro_batch_size is not None:
        raise InputError("two sizes of a micro-batch", got="--micro_batch_tokens and --micro_batch_size", wanted="one")


def seconds_of(max_time: str | None) -> float | None:
    """Of --max_time. Raises InputError."""
    if max_time is None:
        return None
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", max_time)
    total = sum(int(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    require("max_time", max_time, total > 0, "such as 90m, 1h30m or 45s")
    return float(total)


def check_paths(args: Args) -> None:
    """Raises InputError where the run would replace what it is made from."""
    out = args.out_dir.resolve()
    for flag, path in (("checkpoint_dir", args.checkpoint_dir), ("lora_path", args.lora_path)):
        if path is not None and path.resolve() in (out, out / "last"):
            raise InputError(f"the run would replace --{flag}", where=args.out_dir, got=path, fix="another --out_dir")


def require(flag: str, value: object, fine: bool, wanted: str) -> None:
    if not fine:
        raise InputError("a flag out of range", where=f"--{flag}", got=value, wanted=wanted)
