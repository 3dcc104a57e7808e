"""Loggers besides metrics.csv, in Fabric's form: TensorBoard, and Weights & Biases.

A resumed run goes on in the same curves: what TensorBoard holds of later steps is hidden, and the run at Weights &
Biases keeps its id and takes each step once.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from litlora.checkpoint import write_text
from litlora.errors import InputError
from litlora.metrics import say
from litlora.run_files import TENSORBOARD, WANDB

LOGGERS = ("csv", TENSORBOARD, WANDB)
WANDB_ID = "id.txt"


def require_loggers(names: str) -> list[str]:
    """The names of `--logger a,b`. Raises InputError: unknown, not installed."""
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in LOGGERS:
            raise InputError("unknown --logger", got=name, wanted=", ".join(LOGGERS))
        if name != "csv" and importlib.util.find_spec(name) is None:
            what, fix = f"--logger {name} needs a package that is not installed", f"pip install {name}"
            raise InputError(what, wanted=name, fix=fix)
    return found


class Loggers:
    """Those of one run. One that fails (no network, a full disk) is said and left out; the training goes on."""

    def __init__(self, logger: str, out_dir: Path, settings: Mapping[str, Any], done: int) -> None:
        """`logger`: as the flag; `done`: the steps that a resumed run has. Weights & Biases is reached here, before the
        first step."""
        self.loggers: list[Any] = []
        names = require_loggers(logger)
        if TENSORBOARD in names:
            from lightning_fabric.loggers import TensorBoardLogger

            purge = done + 1 if done else None
            self.loggers.append(TensorBoardLogger(out_dir, name=TENSORBOARD, version="", purge_step=purge))
        if WANDB in names:
            self._try(WandbLogger(out_dir, settings), lambda logger: self.loggers.append(logger.start()))

    def write(self, row: Mapping[str, object], step: int) -> None:
        """The numbers of one row of metrics.csv. They are the system's when this returns: a kill loses none."""
        values = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        for logger in list(self.loggers):
            self._try(logger, lambda logger: (logger.log_metrics(values, step), logger.save()))

    def close(self, status: str) -> None:
        """`status`: success or failed."""
        for logger in list(self.loggers):
            self._try(logger, lambda logger: logger.finalize(status))

    def _try(self, logger: Any, act: Callable[[Any], object]) -> None:
        try:
            act(logger)
        except Exception as error:  # whatever its library raises: it is not worth a run
            self.loggers = [other for other in self.loggers if other is not logger]
            say(f"warning: {type(logger).__name__} failed, and is left out from here on: {error}")


class WandbLogger:
    """A run at Weights & Biases, in out_dir/wandb; its id lies there for a resumed run.

    Lightning's own counts calls, and gives the step as one more metric: after a kill steps would be there twice. Here
    the step is the run's own, which wandb takes in ascending order only.
    """

    def __init__(self, out_dir: Path, settings: Mapping[str, Any]) -> None:
        self.out_dir, self.settings = out_dir, {key: _plain(value) for key, value in settings.items()}
        self.run: Any = None

    def start(self) -> WandbLogger:
        """Raises what wandb raises where it has no account or network."""
        import wandb

        directory = self.out_dir / WANDB
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / WANDB_ID
        run_id = file.read_text().strip() if file.is_file() else secrets.token_hex(4)
        write_text(file, run_id + "\n")
        project = os.environ.get("WANDB_PROJECT", "litlora")
        self.run = wandb.init(
            project=project, name=self.out_dir.name, id=run_id, resume="allow", dir=self.out_dir, config=self.settings
        )
        return self

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def save(self) -> None:
        """wandb has a process that does."""

    def finalize(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "success" else 1)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
