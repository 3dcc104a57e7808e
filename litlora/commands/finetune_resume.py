"""Whether a run may go on from a checkpoint: the same base, the same data, and flags that leave the maths as it was."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from litlora import __version__
from litlora.commands.finetune_flags import Args
from litlora.errors import InputError
from litlora.metrics import say
from litlora.resume import Conditions, TrainingCheckpoint

# Flags that leave every step as it was. Paths may move: what they lead to is compared by content.
HARMLESS = frozenset(
    """checkpoint_dir data_path val_path out_dir save_dtype eval_interval early_stopping_patience save_interval
    keep_last resume resume_override accelerator max_time max_bad_steps log_interval logger quiet sample_prompt
    overwrite dry_run""".split()
)
# What the checkpoint's tensors are of: no override changes that.
FIXED = frozenset(
    """lora_r lora_query lora_key lora_value lora_projection lora_mlp lora_head lora_dtype optimizer""".split()
)
RESTARTED = frozenset(["optimizer", "lora_dtype"])  # of these, an adapter to start from decides nothing
LENGTH = frozenset(["epochs", "max_steps"])  # harmless where the learning rate does not depend on the number of steps
DATA = frozenset("data multiturn prompt_style mask_prompt max_seq_length on_overlong val_split seed".split())
AUTO = {"micro_batch_tokens": "auto", "activation_checkpointing": "auto"}  # then the checkpoint's choice holds


def machine(device: torch.device) -> dict[str, str]:
    """On another, the last digits of a product may differ."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = {} if device.type == "cuda" else {"CPU threads": str(torch.get_num_threads())}
    return {"litlora": __version__, "torch": torch.__version__, "device": card} | threads


def plain(settings: Mapping[str, object]) -> dict[str, Any]:
    """As JSON and YAML hold them."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def check_resume(checkpoint: TrainingCheckpoint, now: Conditions, *, override: bool) -> None:
    """Says which flags differ. Raises InputError where the run would not be the same one."""
    was = checkpoint.conditions
    new = "a new run: another --out_dir"
    anew = f"{new}, with --lora_path to start from this run's adapter"
    changed = _changed(was.settings, now.settings)
    if was.base_fingerprint != now.base_fingerprint:
        got, wanted = (f"{side.settings.get('checkpoint_dir')} ({side.base_fingerprint[:12]})" for side in (now, was))
        raise InputError("the checkpoint was made on another base model", where=checkpoint.directory, got=got,
                         wanted=wanted, fix=f"--checkpoint_dir with that one, or {new}")  # fmt: skip
    if was.data_fingerprint != now.data_fingerprint:
        got = _listed({name: pair for name, pair in changed.items() if name in DATA}) or "other rows, or another split"
        raise InputError("the data are not those of the checkpoint", where=checkpoint.directory, got=got, fix=anew)
    length_matters = (was.settings.get("lr_schedule"), now.settings["lr_schedule"]) != ("constant", "constant")
    harmless = HARMLESS if length_matters else HARMLESS | LENGTH
    maths = {name: pair for name, pair in changed.items() if name not in harmless}
    if was.device != now.device:
        maths["accelerator"] = was.device, now.device
    fixed = {name: pair for name, pair in maths.items() if name in FIXED}
    if fixed or (maths and not override):
        raise InputError(
            "flags that change the maths of the run that is resumed",
            where=checkpoint.directory,
            got=_listed(fixed or maths),
            fix="leave them as they were, "
            + (
                f"or {anew if fixed.keys() <= RESTARTED else new}"
                if fixed
                else "take them with --resume_override true, or start again: --overwrite true without --resume"
            ),
        )
    noted = {name: pair for name, pair in changed.items() if name not in ("resume", "resume_override", "overwrite")}
    if noted:
        say(f"resuming with other flags: {_listed(noted)}")
    other = {name: (was.machine.get(name), text) for name, text in now.machine.items() if was.machine.get(name) != text}
    if other:
        say(f"note: resuming elsewhere, so the last digits may differ from an uninterrupted run's: {_listed(other)}")


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """(was, now) of every flag that differs; a flag that the checkpoint does not know had its default."""
    defaults = plain({field.name: field.default for field in fields(Args)})
    before = {name: was.get(name, defaults.get(name)) for name in now}
    return {
        name: (before[name], value)
        for name, value in now.items()
        if before[name] != value and not (name in AUTO and AUTO[name] == value)
    }


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {before}, now {after}" for name, (before, after) in changed.items())
