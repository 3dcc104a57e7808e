"""A run's checkpoints: all that it takes to go on as if the run had never stopped. The base is never in one.

`out_dir/checkpoints/step-00000100/` holds state.json (totals, settings, fingerprints), state.safetensors (the adapter
in the dtype it trains in, the optimizer's state, the random generators), metrics.csv (its rows so far) and best/ (the
best adapter so far, as hard links: no second copy on the disk). The order of the data follows from seed and step. A
checkpoint takes its name only when it is whole and on the disk.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from litlora.checkpoint import (
    Shard,
    TensorInfo,
    atomic_directory,
    atomic_file,
    fsync_directory,
    make_header,
    read_json,
    refuse_links,
    write_json,
    write_shard,
    write_text,
)
from litlora.errors import InputError
from litlora.metrics import say

if TYPE_CHECKING:
    from litlora.train import Step

CHECKPOINTS = "checkpoints"
STATE, TENSORS, METRICS, BEST = "state.json", "state.safetensors", "metrics.csv", "best"
FORMAT = 1
NAME = re.compile(r"step-\d{8,}")
T = TypeVar("T")


@dataclass
class Totals:
    """What a run has done so far, over all its sessions."""

    step: int = 0  # also the place in the plan of steps
    seconds: float = 0.0  # of training
    tokens: int = 0
    loss: float | None = None  # of the last step; None where it was no number
    val_loss: float | None = None  # where it was validated after this step
    best_val_loss: float | None = None
    best_step: int | None = None
    validations_without_gain: int = 0
    bad_steps: int = 0  # not applied: loss or gradient were not finite
    bad_steps_in_a_row: int = 0
    clipped_steps: int = 0
    peak_memory_gb: float = 0.0

    def count(self, step: Step) -> None:
        self.step, self.loss, self.val_loss = step.number, step.loss if math.isfinite(step.loss) else None, None
        self.seconds += step.seconds
        self.tokens += step.tokens
        self.clipped_steps += step.clipped
        self.bad_steps += bool(step.bad_rows)
        self.bad_steps_in_a_row = self.bad_steps_in_a_row + 1 if step.bad_rows else 0

    def ended(self, steps: int, patience: int | None) -> bool:
        """Whether no step is left, or the validation loss has not got better for long enough."""
        return self.step >= steps or (patience is not None and self.validations_without_gain >= patience)


@dataclass(frozen=True)
class Conditions:
    """What a run depends on: under others it would be another run."""

    settings: dict[str, Any]  # every flag, and what the starting adapter or `auto` put in its place
    base_fingerprint: str
    data_fingerprint: str
    device: str  # cpu or cuda
    chosen: dict[str, Any]  # what was fitted to the free memory
    machine: dict[str, str]  # versions and hardware: another gives slightly other digits


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checkpoint, its header read and checked; tensors are read when they are restored."""

    directory: Path
    totals: Totals
    conditions: Conditions
    optimizer: dict[str, Any]  # what of the optimizer's state is no tensor
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, directory: Path) -> TrainingCheckpoint:
        """Raises InputError for what is missing or damaged."""
        file = directory / STATE
        refuse_links(directory)
        raw = read_json(file)
        if raw.get("format") != FORMAT:
            raise InputError("a checkpoint of another format", where=file, got=raw.get("format"), wanted=FORMAT)
        optimizer = raw.get("optimizer")
        if not isinstance(optimizer, dict) or not all(type(value) in (int, float) for value in optimizer.values()):
            raise _damaged(file, "no state of the optimizer")
        totals, conditions = _parse(Totals, raw.get("totals"), file), _parse(Conditions, raw.get("conditions"), file)
        if totals.step < 0:
            raise _damaged(file, f"step {totals.step}")
        try:
            shard = Shard.open(directory / TENSORS)
        except InputError as error:
            raise _damaged(directory / TENSORS, str(error).splitlines()[0]) from None
        if raw.get("tensors") != _digest(shard.header):
            raise _damaged(directory / TENSORS, f"other tensors than {STATE} says")
        return cls(directory, totals, conditions, optimizer, {info.name: info for info in shard.tensors})

    def chosen(self, cls: type[T]) -> T:
        """What was fitted to the free memory. Raises InputError."""
        return _parse(cls, self.conditions.chosen, self.directory / STATE)

    @property
    def metrics(self) -> str:
        """metrics.csv up to this step. Raises InputError."""
        try:
            return (self.directory / METRICS).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise _damaged(self.directory / METRICS, error) from None

    @property
    def best(self) -> list[Path]:
        """The files of the best adapter so far; none before the first was saved."""
        directory = self.directory / BEST
        return sorted(directory.iterdir()) if directory.is_dir() else []

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts adapter and optimizer back, in place. Raises InputError when they do not fit."""
        parameters = trained_parameters(model)
        found = {
            name.removeprefix("adapter."): info for name, info in self.tensors.items() if name.startswith("adapter.")
        }
        wrong = found.keys() ^ parameters.keys()
        wrong |= {name for name in found.keys() - wrong if _kind(found[name]) != _kind(parameters[name])}
        if wrong:
            what = "the checkpoint's adapter does not fit this run's"
            raise InputError(what, where=self.directory, got=", ".join(sorted(wrong)[:4]))
        with torch.no_grad():
            for name, info in found.items():
                parameters[name].copy_(self._read(info))
        try:
            optimizer.state.clear()
            for key, value in self.optimizer.items():
                name, _, entry = key.rpartition(".")
                optimizer.state[parameters[name]][entry] = value
            for key, info in self.tensors.items():
                if key.startswith("optimizer."):
                    name, _, entry = key.removeprefix("optimizer.").rpartition(".")
                    optimizer.state[parameters[name]][entry] = self._read(info).to(parameters[name].device)
        except (KeyError, RuntimeError) as error:
            raise _damaged(self.directory / TENSORS, f"{type(error).__name__}: {error}") from None

    def _read(self, info: TensorInfo) -> Tensor:
        """Raises InputError where a value is no number: nothing that a run has saved."""
        tensor = info.read()
        if tensor.is_floating_point() and tensor.isnan().any():
            raise _damaged(self.directory / TENSORS, f"{info.name} holds NaN")
        return tensor

    def restore_random(self, device: torch.device) -> None:
        """Puts the random generators back: the last thing before the next step. Raises InputError."""
        try:
            states = {name: info.read() for name, info in self.tensors.items() if name.startswith("random.")}
            set_random_state(states, device)
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError, OverflowError) as error:
            raise _damaged(self.directory / TENSORS, f"{type(error).__name__}: {error}") from None


def save_checkpoint(
    directory: Path,
    totals: Totals,
    conditions: Conditions,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    metrics: str,
    best: Iterable[Path],
) -> None:
    """Writes `directory` atomically. Raises OSError or InputError where it cannot be written."""
    tensors = {f"adapter.{name}": parameter.detach() for name, parameter in trained_parameters(model).items()}
    scalars: dict[str, Any] = {}
    for name, parameter in trained_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            elif value is not None:
                scalars[f"{name}.{key}"] = value
    tensors |= random_state(device)
    header = make_header([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()], {})
    state = {
        "format": FORMAT,
        "totals": asdict(totals),
        "conditions": asdict(conditions),
        "optimizer": scalars,
        "tensors": _digest(header),
    }
    with atomic_directory(directory, overwrite=True) as temporary:
        write_shard(temporary / TENSORS, header, tensors.values())
        write_text(temporary / METRICS, metrics)
        (temporary / BEST).mkdir()
        for file in best:
            link(file, temporary / BEST / file.name)
        fsync_directory(temporary / BEST)
        write_json(temporary / STATE, state)


def find_checkpoint(resume: str | None, out_dir: Path) -> TrainingCheckpoint | None:
    """The checkpoint that --resume means: `auto` the newest of out_dir or none, else one of a directory (a checkpoint,
    or a run, whose newest is taken). Raises InputError where a directory has none."""
    if resume is None:
        return None
    directory = out_dir if resume == "auto" else Path(resume)
    if resume != "auto" and (directory / STATE).is_file():
        return TrainingCheckpoint.open(directory)
    found = whole_checkpoints(directory / CHECKPOINTS)
    for number, path in enumerate(found, 1):
        try:
            return TrainingCheckpoint.open(path)
        except InputError as error:  # not a kill's doing: a checkpoint takes its name when it is whole
            if number == len(found):
                raise
            say(f"warning: {error}\n  the checkpoint before it is taken")
    if resume != "auto":
        wanted = f"a checkpoint (a directory with {STATE}), or a run's out_dir with {CHECKPOINTS}/ in it"
        raise InputError("no checkpoint to resume from", where=f"--resume {resume}", wanted=wanted)
    return None


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def whole_checkpoints(directory: Path) -> list[Path]:
    """The newest first. What a killed run was writing has another name."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def remove(path: Path) -> None:
    """Under another name first: nothing half removed is ever taken for whole."""
    if not os.path.lexists(path):
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    os.replace(path, old)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none. Our files are replaced, never written to."""
    try:
        os.link(source, target)
    except OSError:
        with source.open("rb") as stream, atomic_file(target) as copy:
            shutil.copyfileobj(stream, copy)


def _kind(tensor: Tensor | TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators of Python, numpy, torch and the device, as tensors."""
    _, words, gauss = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    state = {
        "random.python": torch.tensor(words),
        "random.numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]]),
        "random.gauss": torch.tensor([math.nan if gauss is None else gauss, numpy["gauss"]], dtype=torch.float64),
        "random.torch": torch.get_rng_state(),
    }
    return state | ({"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    gauss, cached = state["random.gauss"].tolist()
    random.setstate((3, tuple(state["random.python"].tolist()), None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = state["random.numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["random.torch"])
    if device.type == "cuda" and "random.cuda" in state:
        torch.cuda.set_rng_state(state["random.cuda"], device)


def _parse(cls: type[T], raw: object, file: Path) -> T:
    """A dataclass from JSON, its keys and types checked. Raises InputError."""
    if not isinstance(raw, dict):
        raise _damaged(file, f"{cls.__name__} is {type(raw).__name__}")
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,), "bool": (bool,), "float": (int, float), "str": (str,), "int | None": (int, type(None)),
        "float | None": (int, float, type(None)), "dict[str, Any]": (dict,), "dict[str, str]": (dict,),
    }  # fmt: skip
    wanted = {field.name: kinds[str(field.type)] for field in fields(cls)}  # type: ignore[arg-type]
    wrong = sorted(raw.keys() ^ wanted.keys())
    wrong += [name for name, kind in wanted.items() if name in raw and type(raw[name]) not in kind]
    if wrong:
        raise _damaged(file, ", ".join(wrong))
    try:
        return cls(**raw)
    except ValueError as error:
        raise _damaged(file, error) from error


def _digest(header: bytes) -> str:
    """Of names, dtypes and shapes: with one tensor fewer the optimizer would begin anew for it, or fail."""
    return hashlib.blake2b(header, digest_size=16).hexdigest()


def _damaged(file: Path, got: object) -> InputError:
    return InputError("a damaged checkpoint", where=file, got=got, fix="--resume with an older one, if there is one")
