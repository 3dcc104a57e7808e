"""What a run left in its out_dir, as far as it got. The files may be anybody's: what is wrong with one is said beside
the run and ends nothing."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from litlora.checkpoint import Shard, read_json, refuse_link
from litlora.errors import InputError
from litlora.flat_yaml import read_flat_yaml
from litlora.peft_format import WEIGHTS
from litlora.run_files import METRICS, ROUNDING, SETTINGS, SUMMARY
from litlora.samples import SAMPLES, Sample, read_samples

MAX_BYTES = {SUMMARY: 100_000, ROUNDING: 100_000, SAMPLES: 20_000_000, METRICS: 100_000_000}
LARGEST_CELL = 131_072  # characters of metrics.csv
T = TypeVar("T")


@dataclass
class Run:
    """One run. `metrics`: the columns of metrics.csv, a value a step, NaN where a cell is empty."""

    path: Path
    settings: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)  # validation loss by how the weights are held
    trainable_parameters: int | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The number of the last step in metrics.csv."""
        return int(self.metrics["step"][-1]) if self.metrics else 0

    @property
    def finished(self) -> bool:
        """summary.json is the last thing that a run writes."""
        return bool(self.summary)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """Empty where metrics.csv lacks it."""
        return self.metrics.get(name, np.empty(0))

    def points(self, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(steps, finite values) of a column."""
        values = self.column(name)
        kept = np.isfinite(values)
        return self.column("step")[: len(values)][kept], values[kept]

    def figure(self, key: str, otherwise: Callable[[Run], float | None]) -> float | None:
        """A number of summary.json; of a run that has none, what metrics.csv says."""
        value = number(self.summary.get(key))
        return value if value is not None else otherwise(self)


def is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (SETTINGS, METRICS))


def read_run(directory: Path) -> Run:
    """All of a run that can be read."""
    run = Run(directory)

    def read(name: str, parse: Callable[[Path], T]) -> T | None:
        file = directory / name
        if not file.is_file():
            return None
        try:
            refuse_link(file)
            if name in MAX_BYTES and file.stat().st_size > MAX_BYTES[name]:
                raise InputError(f"larger than {MAX_BYTES[name] / 1e6:g} MB")
            return parse(file)
        except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            run.problems.append(f"{name} cannot be read: {first[:200]}")
            return None

    run.settings = read(SETTINGS, _settings) or {}
    run.metrics = read(METRICS, lambda file: _metrics(file, run.problems)) or {}
    run.summary = read(SUMMARY, read_json) or {}
    run.samples = read(SAMPLES, lambda file: _samples(file, run.problems)) or []
    run.rounding = read(ROUNDING, _rounding) or {}
    run.trainable_parameters = _trainable(run)
    _remark(run)
    return run


def _remark(run: Run) -> None:
    """What a reader of its figures has to know."""
    if not run.settings:
        run.problems.append(f"no {SETTINGS}: its settings are not known")
    if not run.metrics:
        run.problems.append("no step is in its metrics.csv")
    elif not len(run.points("val_loss")[0]):
        run.problems.append("no validation")
    bad = int((~np.isfinite(run.column("loss"))).sum())
    if bad:
        run.problems.append(f"{bad} of its steps {'has' if bad == 1 else 'have'} no finite loss")


def _settings(file: Path) -> dict[str, str]:
    return {key: _plain(value) for key, value in read_flat_yaml(file).items()}


def _plain(value: object) -> str:
    """A setting as text."""
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _metrics(file: Path, problems: list[str]) -> dict[str, npt.NDArray[np.float64]]:
    """metrics.csv by column. A line that a killed run did not end is left out; of a step that is there twice, the
    later row holds."""
    text = file.read_text(encoding="utf-8")
    whole, _, rest = text.rpartition("\n")
    csv.field_size_limit(LARGEST_CELL)  # of the whole process: reading data raises it
    lines = csv.reader(whole.split("\n"))
    head = next(lines, [])
    if "step" not in head:
        raise InputError("it has no column named step")
    rows: dict[float, list[float]] = {}
    skipped = twice = 0
    for cells in lines:
        values = [_cell(cell) for cell in cells]
        step = values[head.index("step")] if len(values) == len(head) else math.nan
        if not 0 < step < 2**53:
            skipped += 1
            continue
        twice += step in rows
        rows[step] = values
    if rest:
        problems.append("the last line of metrics.csv is cut off, and left out")
    if skipped:
        problems.append(f"{skipped} line{'s' * (skipped != 1)} of metrics.csv cannot be read")
    if twice:
        problems.append(f"metrics.csv has {twice} step{'s' * (twice != 1)} twice: the later row is shown")
    if not rows:
        return {}
    array = np.array([rows[step] for step in sorted(rows)])
    return {name: array[:, place] for place, name in enumerate(head)}


def _cell(text: str) -> float:
    """NaN for what is empty or no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _samples(file: Path, problems: list[str]) -> list[Sample]:
    samples, bad = read_samples(file)
    if bad:
        problems.append(f"{bad} line{'s' * (bad != 1)} of {SAMPLES} cannot be read")
    return samples


def _rounding(file: Path) -> dict[str, float]:
    variants = read_json(file).get("variants")
    if not isinstance(variants, list) or not all(isinstance(variant, dict) for variant in variants):
        raise InputError("it has no list of variants")
    found = {str(variant.get("name")): number(variant.get("val_loss")) for variant in variants}
    return {name: loss for name, loss in found.items() if loss is not None}


def _trainable(run: Run) -> int | None:
    """As the summary says, else as the adapter's file holds them."""
    value = number(run.summary.get("trainable_parameters"))
    if value is not None:
        return int(value)
    for directory in (run.path, run.path / "last"):
        try:
            refuse_link(directory / WEIGHTS)
            return sum(math.prod(info.shape) for info in Shard.open(directory / WEIGHTS).tensors)
        except (InputError, OSError):
            continue
    return None


def number(value: object) -> float | None:
    """A finite number of a JSON file; None for anything else."""
    try:
        fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if fine else None  # type: ignore[arg-type]
    except OverflowError:  # an integer of 400 digits
        return None


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names: the paths without what they all begin with."""
    parents = [path.parent.parts for path in paths]
    shared = 0
    while all(len(parts) > shared for parts in parents) and len({parts[shared] for parts in parents}) == 1:
        shared += 1
    short = [str(Path(*path.parts[shared:])) for path in paths]
    return [path.resolve().name if name in (".", "..") else name for path, name in zip(paths, short, strict=True)]
