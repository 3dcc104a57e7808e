"""samples.jsonl: what the model answered at each validation, a line an answer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from litlora.checkpoint import write_text
from litlora.errors import InputError

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """An answer after so many optimizer steps."""

    step: int
    prompt: str
    answer: str


def add_sample(directory: Path, sample: Sample) -> None:
    """Appends it. Raises OSError where that cannot be."""
    with (directory / SAMPLES).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(sample)) + "\n")


def keep_samples(directory: Path, steps: int) -> None:
    """Takes away what a run answered after `steps` steps: it goes on from there, and will answer again."""
    file = directory / SAMPLES
    if file.is_file():
        samples, _ = read_samples(file)
        kept = [json.dumps(asdict(sample)) + "\n" for sample in samples if sample.step <= steps]
        write_text(file, "".join(kept))


def read_samples(file: Path) -> tuple[list[Sample], int]:
    """The answers by step, each prompt's once a step, and how many lines are none. Raises OSError, InputError."""
    found: dict[tuple[int, str], Sample] = {}
    bad = 0
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise InputError("not a text file", where=file) from None
    for line in filter(str.strip, lines):
        try:
            raw = json.loads(line)
            sample = Sample(raw["step"], raw["prompt"], raw["answer"])
        except (ValueError, TypeError, KeyError, RecursionError):
            bad += 1
            continue
        if type(sample.step) is int and isinstance(sample.prompt, str) and isinstance(sample.answer, str):
            found[sample.step, sample.prompt] = sample
        else:
            bad += 1
    return sorted(found.values(), key=lambda sample: sample.step), bad
