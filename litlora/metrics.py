"""What a run says of itself: a progress line, and its memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from types import TracebackType

import torch
from tqdm import tqdm


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


class Progress:
    """A live line on a terminal; off a terminal, plain lines every `interval` steps; `quiet`: neither. On stderr."""

    def __init__(self, total: int, interval: int, label: str = "training", *, quiet: bool = False) -> None:
        self.total, self.interval, self.label, self.quiet = total, max(1, interval), label, quiet
        self.started, self.done = time.perf_counter(), 0
        self.bar = None
        if sys.stderr.isatty() and not quiet:
            # the bar has what the figures leave of the line
            self.bar = tqdm(total=total, desc=f"0/{total}", dynamic_ncols=True, bar_format="{desc}  |{bar}|")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()

    def step(self, number: int, values: Mapping[str, str], remaining: float | None = None) -> None:
        """`number` counts from 1 (a resumed run's goes on). `remaining` in seconds; without it, at the pace of this
        process so far, with all that happens between the steps."""
        self.done += 1
        if remaining is None:
            remaining = (time.perf_counter() - self.started) / self.done * (self.total - number)
        left = f"{duration(remaining)} left"
        figures = [f"{key} {value}" for key, value in values.items()]
        if self.bar is not None:  # a narrow terminal cuts the end off: the time left stands in front
            self.bar.set_description_str("  ".join([f"{number}/{self.total}", left, *figures]), refresh=False)
            self.bar.update(number - self.bar.n)
        elif not self.quiet and (number == 1 or number % self.interval == 0 or number == self.total):
            say(" | ".join([f"{self.label} step {number}/{self.total}", *figures, left]))

    def note(self, text: str) -> None:
        """A line of its own, above the live one; nothing when quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """As `note`, also when quiet."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            say(text)


def say(text: str) -> None:
    """For people: stderr, at once. stdout is for results."""
    print(text, file=sys.stderr, flush=True)
