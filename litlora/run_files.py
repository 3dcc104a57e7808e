"""What a finetuning run leaves in its out_dir: the best adapter, the last one in last/, settings, metrics, summary, and
checkpoints/ to resume from. Everything is written under a temporary name first."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import yaml
from torch import nn

from litlora.checkpoint import fsync_directory, require_writable, write_json, write_text
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.lora import FLAG_TARGETS, LoRA, LoRALinear
from litlora.peft_format import CONFIG, RECORD, WEIGHTS, Adapter, Record, save_adapter
from litlora.resume import (
    CHECKPOINTS,
    Conditions,
    Totals,
    TrainingCheckpoint,
    checkpoint_name,
    link,
    remove,
    save_checkpoint,
    step_of,
    whole_checkpoints,
)
from litlora.samples import SAMPLES, keep_samples

COLUMNS = (
    "step", "epoch", "loss", "val_loss", "lr", "grad_norm", "clipped", "tokens", "trained_tokens", "seconds",
    "total_tokens", "total_seconds", "tokens_per_second", "memory_gb", "matmul_share",
    *(f"delta_{leaf}" for leaves in FLAG_TARGETS.values() for leaf in leaves),
)  # fmt: skip
SETTINGS, METRICS, SUMMARY = "hyperparameters.yaml", "metrics.csv", "summary.json"
CARD, ROUNDING = "README.md", "rounding.json"  # of the adapter; the latter of litlora validate
TENSORBOARD, WANDB = "tensorboard", "wandb"  # directories of the loggers
ADAPTER = (WEIGHTS, CONFIG, RECORD)
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")  # as checkpoint.py names them; a killed run leaves some


HEAD = ",".join(COLUMNS) + "\n"


class MetricsFile:
    """metrics.csv, a row per optimizer step. What cannot be written stays here, and `sync` writes the whole file."""

    def __init__(self, file: Path, text: str = "") -> None:
        """`text`: what the file held when the run was interrupted."""
        self.file, self.lines = file, [text or HEAD]
        write_text(file, self.text)
        self.stream: TextIO | None = file.open("a", newline="")

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def write(self, row: Mapping[str, object]) -> None:
        """Missing values stay empty; floats keep all their digits. The row is the system's when this returns."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([_cell(row.get(column)) for column in COLUMNS])
        self.lines.append(line.getvalue())
        try:
            if self.stream is not None:
                self.stream.write(line.getvalue())
                self.stream.flush()
        except OSError:
            self.close()

    def sync(self) -> None:
        """To the disk. Raises OSError where that cannot be."""
        if self.stream is not None and self.file.exists():
            os.fsync(self.stream.fileno())
            return
        self.close()
        write_text(self.file, self.text)
        self.stream = self.file.open("a", newline="")

    def close(self) -> None:
        stream, self.stream = self.stream, None
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()


def _cell(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


@dataclass
class RunFiles:
    """The files of one run."""

    out_dir: Path
    settings: str = ""  # the text of hyperparameters.yaml

    @property
    def last(self) -> Path:
        return self.out_dir / "last"

    @property
    def checkpoints(self) -> Path:
        return self.out_dir / CHECKPOINTS

    @property
    def settings_file(self) -> Path:
        return self.out_dir / SETTINGS

    @property
    def is_finished(self) -> bool:
        """Whether the closing figures were written."""
        return (self.out_dir / SUMMARY).is_file()

    @property
    def newest_checkpoint(self) -> Path | None:
        """None also where the directory cannot be read."""
        try:
            return next(iter(whole_checkpoints(self.checkpoints)), None)
        except OSError:
            return None

    @property
    def has_adapter(self) -> bool:
        """Whether this run has saved one already."""
        return (self.out_dir / RECORD).is_file()

    def check(self, overwrite: bool, resume: str | None, checkpoint: TrainingCheckpoint | None) -> None:
        """Raises InputError when out_dir cannot be written, or holds something that would be lost. `checkpoint` is what
        `resume` found."""
        if checkpoint is not None and not checkpoint.metrics.startswith(HEAD):
            what, got = "the columns of metrics.csv are those of another version", checkpoint.metrics.partition("\n")[0]
            raise InputError(what, where=checkpoint.directory, got=got[:500], wanted=HEAD.strip())
        own = whole_checkpoints(self.checkpoints)
        if checkpoint is not None and checkpoint.directory.resolve().parent == self.checkpoints.resolve():
            later = [path for path in own if step_of(path) > checkpoint.totals.step]
            if later and resume != "auto" and not overwrite:
                got = f"{len(later)} later ones, up to {later[0].name}"
                fix = "--resume auto, another --out_dir, or --overwrite true"
                raise InputError("resuming would take later checkpoints away", where=self.out_dir, got=got, fix=fix)
            overwrite = True
        elif resume is not None and self.checkpoints.is_dir() and not own and not self.is_finished:
            overwrite = True  # killed before its first: nothing is lost
        fix = "another --out_dir, or --overwrite true"
        if own:
            fix = "--resume auto to go on from the checkpoint in it, " + fix
        require_writable(self.out_dir, overwrite=overwrite, fix=fix)

    def start(self, settings: Mapping[str, object]) -> MetricsFile:
        """Makes the directory, takes away what an overwritten run left, and writes the settings."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        remove(self.checkpoints)  # first: nobody shall resume from what is being overwritten
        self.checkpoints.mkdir()
        for name in (*ADAPTER, SETTINGS, METRICS, SUMMARY, SAMPLES, CARD, ROUNDING):
            (self.out_dir / name).unlink(missing_ok=True)
        for name in (self.last.name, TENSORBOARD, WANDB):
            remove(self.out_dir / name)
        return self._begin(settings, "")

    def resume(self, settings: Mapping[str, object], checkpoint: TrainingCheckpoint) -> MetricsFile:
        """Puts metrics and best adapter back as they were at the checkpoint; later checkpoints go."""
        if checkpoint.directory.resolve().parent != self.checkpoints.resolve():  # another run's: it begins here
            self.start(settings).close()
        for path in whole_checkpoints(self.checkpoints):
            if step_of(path) > checkpoint.totals.step:
                remove(path)
        for file in checkpoint.best:
            temporary = self.out_dir / f".{file.name}.{secrets.token_hex(4)}.tmp"
            link(file, temporary)
            os.replace(temporary, self.out_dir / file.name)
        for name in (SUMMARY, CARD, ROUNDING):
            (self.out_dir / name).unlink(missing_ok=True)
        keep_samples(self.out_dir, checkpoint.totals.step)
        return self._begin(settings, checkpoint.metrics)

    def _begin(self, settings: Mapping[str, object], metrics: str) -> MetricsFile:
        self.clean()
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        self.settings = yaml.safe_dump(plain, sort_keys=False)
        write_text(self.out_dir / SETTINGS, self.settings)
        return MetricsFile(self.out_dir / METRICS, metrics)

    def clean(self) -> None:
        """Takes away what a killed run was writing."""
        for directory in (self.out_dir, self.last, self.checkpoints):
            for path in directory.iterdir() if directory.is_dir() else ():
                if TEMPORARY.fullmatch(path.name):
                    remove(path)

    def save_adapter(
        self, modules: Mapping[str, LoRALinear], lora: LoRA, record: Record, dtype: torch.dtype, *, best: bool
    ) -> None:
        """Writes the adapter as the best one, in out_dir, or as the last one."""
        directory = self.out_dir if best else self.last
        temporary = directory / f".adapter.{secrets.token_hex(4)}.tmp"
        temporary.mkdir(parents=True)
        try:
            save_adapter(temporary, modules, lora, record, dtype)
            for name in ADAPTER:  # all of it is on the disk by now: what is left needs no space
                os.replace(temporary / name, directory / name)
            fsync_directory(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in {directory / SETTINGS, self.out_dir / SETTINGS}:
            if directory == self.last or not path.exists():  # out_dir may have vanished and come back
                write_text(path, self.settings)

    def save_checkpoint(
        self,
        totals: Totals,
        conditions: Conditions,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        metrics: MetricsFile,
        keep: int,
    ) -> None:
        """With metrics and best adapter so far; the newest `keep` stay, this one among them."""
        metrics.sync()
        best = [self.out_dir / name for name in ADAPTER] if self.has_adapter else []
        directory = self.checkpoints / checkpoint_name(totals.step)
        save_checkpoint(directory, totals, conditions, model, optimizer, device, metrics.text, best)
        for path in whole_checkpoints(self.checkpoints)[keep:]:
            remove(path)

    def check_saved(self, modules: Mapping[str, LoRALinear], config: ModelConfig, dtype: torch.dtype) -> None:
        """Opens what was saved, once, as anybody would. Raises RuntimeError when it is not what is in memory."""
        Adapter.open(self.out_dir, config)
        adapter = Adapter.open(self.last, config)
        for name, module in modules.items():
            factors = adapter.factors(name)
            pairs = ((factors.A, module.lora_A.weight), (factors.B, module.lora_B.weight))
            if not all(torch.equal(saved, live.detach().cpu().to(dtype)) for saved, live in pairs):
                raise RuntimeError(f"the saved adapter differs from the trained one at {name} ({self.last})")

    def summarize(self, summary: Mapping[str, object], card: str) -> None:
        """`card`: the adapter's README.md. The summary comes last: with it the run is finished."""
        write_text(self.out_dir / CARD, card)
        write_json(self.out_dir / SUMMARY, summary)
