"""What several commands do alike: open a base, prepare data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.config import ModelConfig
from litlora.data import STYLES, Conversation, Dataset, Instruction, PromptStyle, load_rows, prepare, split
from litlora.errors import InputError
from litlora.load import Directory
from litlora.metrics import say
from litlora.packing import Batch, micro_batches
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True)
class Base:
    """A base model's directory, opened but not loaded. `weights` is None on a dry run, which needs none."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer
    weights: Directory | None

    @classmethod
    def open(cls, path: Path, *, weights: bool = True) -> Base:
        """Raises InputError for whatever is missing, corrupt, unsupported or does not fit."""
        config = ModelConfig.load(path)
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocab_size > config.vocab_size:
            raise InputError(
                "the tokenizer has more ids than the model",
                where=path,
                got=f"{tokenizer.vocab_size} ids",
                wanted=f"at most config.json's vocab_size, {config.vocab_size}",
            )
        return cls(path, config, tokenizer, Directory.open(path) if weights else None)


@dataclass(frozen=True)
class TrainingData:
    """Tokenized rows; `train` and `validation` are indices into their datasets."""

    dataset: Dataset
    train: list[int]
    validation_dataset: Dataset
    validation: list[int]
    style: PromptStyle
    sample: tuple[str, str] | None  # instruction and input of the first validation row, where it has one

    @property
    def train_tokens(self) -> int:
        return int(self.dataset.lengths[self.train].sum())

    @property
    def longest(self) -> int:
        lengths = [self.dataset.lengths[self.train], self.validation_dataset.lengths[self.validation]]
        return max(int(part.max()) for part in lengths if len(part))

    def validation_batches(self, max_tokens: int) -> list[Batch]:
        return micro_batches(self.validation_dataset, self.validation, max_tokens=max_tokens, max_rows=None)


def load_data(args: Any, base: Base) -> TrainingData:
    """Rows, split and ids by the data flags of finetune_lora and validate. Raises InputError for bad data."""
    rows = load_rows(args.data, args.data_path, args.multiturn)
    own_template = any(isinstance(row, Conversation) and row.own_template for row in rows)
    style = PromptStyle.load(args.prompt_style or ("chat" if own_template else "alpaca"), base.tokenizer)
    limit = base.config.max_position_embeddings
    length = min(limit, args.max_seq_length or limit)
    if (args.max_seq_length or 0) > limit:
        say(f"note: --max_seq_length {args.max_seq_length} is cut to the model's context of {limit}")
    options = {"mask_prompt": args.mask_prompt, "max_seq_length": length, "on_overlong": args.on_overlong}
    dataset = prepare(rows, base.tokenizer, style, **options)
    report_counts(dataset, "data", length, args.on_overlong)
    if args.val_path is not None:
        val_rows = load_rows(args.data, args.val_path, args.multiturn)
        val_dataset = prepare(val_rows, base.tokenizer, style, **options)
        report_counts(val_dataset, "validation data", length, args.on_overlong)
        train, validation = list(range(len(dataset))), list(range(len(val_dataset)))
    else:
        val_dataset = dataset
        _, held_out = split(len(rows), args.val_split, args.seed)
        val_rows = [rows[i] for i in held_out]
        numbers = {row.number for row in val_rows}
        train = [i for i in range(len(dataset)) if int(dataset.rows[i]) not in numbers]
        validation = [i for i in range(len(dataset)) if int(dataset.rows[i]) in numbers]
    if not len(train):
        raise InputError("no row is left to train on", where=args.data_path, fix="more rows, or a smaller --val_split")
    first = val_rows[0] if val_rows else None
    sample = (first.instruction, first.input) if isinstance(first, Instruction) else None
    return TrainingData(dataset, train, val_dataset, validation, style, sample)


def report_counts(dataset: Dataset, what: str, length: int, on_overlong: str) -> None:
    """What became of the rows, on one line and only where there is something to say."""
    counts = dataset.counts
    text = f"{what}: {counts.rows:,} rows, {counts.tokens:,} tokens, {counts.trained_tokens:,} of them trained"
    for number, what_happened in (
        (counts.truncated, f"truncated to {length} tokens (these end without eos)"),
        (counts.dropped, f"longer than {length} tokens and dropped"),
        (counts.straddling, "with a token across the prompt's end, tokenized in two parts"),
        (counts.masked, "without any trained token"),
    ):
        text += f"; {number:,} {what_happened}" if number else ""
    say(text)


def record_style(style: PromptStyle) -> tuple[str, str | None]:
    """(prompt_style, prompt_template) of an adapter's record: a template file's text is kept, not its path alone."""
    return style.name, style.source if style.name not in STYLES else None
