"""What a run says of itself: a progress line, metrics.csv, memory."""

from __future__ import annotations

import csv
import io
import resource
import sys
from pathlib import Path
from types import TracebackType

import torch
from tqdm import tqdm

from litlora.checkpoint import write_text


def peak_memory(device: torch.device) -> float:
    """GB (1e9 bytes): the most the GPU's tensors took since `reset_peak_memory`, or the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def duration(seconds: float) -> str:
    """1:02:03, 2:03 or 3.4 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class MetricsFile:
    """metrics.csv, a row per optimizer step; each row is on disk when `write` returns to the caller."""

    def __init__(self, file: Path, columns: tuple[str, ...]) -> None:
        self.columns = columns
        write_text(file, ",".join(columns) + "\n")
        self.stream = file.open("a", newline="")

    def write(self, row: dict[str, object]) -> None:
        """Missing values stay empty; floats keep all their digits."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow([_cell(row.get(column)) for column in self.columns])
        self.stream.write(line.getvalue())
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def _cell(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


class Progress:
    """A live line on a terminal; off a terminal, plain lines every `interval` steps. All on stderr."""

    def __init__(self, total: int, interval: int, label: str = "training") -> None:
        self.total, self.interval, self.label = total, max(1, interval), label
        self.bar = tqdm(total=total, desc=label, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, number: int, values: dict[str, str], remaining: float) -> None:
        """`number` counts from 1; `remaining` in seconds."""
        if self.bar is not None:
            self.bar.update(number - self.bar.n)
            self.bar.set_postfix(values, refresh=False)
        elif number == 1 or number % self.interval == 0 or number == self.total:
            text = " | ".join(f"{key} {value}" for key, value in values.items())
            say(f"{self.label} step {number}/{self.total} | {text} | {duration(remaining)} left")

    def note(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            say(text)


def say(text: str) -> None:
    """For people: stderr, at once. stdout is for results."""
    print(text, file=sys.stderr, flush=True)
