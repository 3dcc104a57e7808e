"""What several commands do alike: open a base, prepare data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from litlora.commands.data_flags import DataArgs
from litlora.config import ModelConfig
from litlora.data import STYLES, Conversation, Dataset, Instruction, PromptStyle, Row, load_rows, prepare, split
from litlora.errors import InputError
from litlora.load import Directory
from litlora.metrics import say
from litlora.packing import Batch, micro_batches
from litlora.tokenizer import Tokenizer

VALIDATION_TOKENS = 2048  # a pack; without gradients it takes little memory wherever a model trains


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
    sample: tuple[str, str] | None  # instruction and input of a validation row

    @property
    def train_tokens(self) -> int:
        return int(self.dataset.lengths[self.train].sum())

    @property
    def longest(self) -> int:
        lengths = [self.dataset.lengths[self.train], self.validation_dataset.lengths[self.validation]]
        return max(int(part.max()) for part in lengths if len(part))

    def validation_batches(self) -> list[Batch]:
        return validation_batches(self.validation_dataset, self.validation)


def validation_batches(dataset: Dataset, indices: Sequence[int], max_tokens: int | None = None) -> list[Batch]:
    """Rows in packs that do not depend on how a run trains: in 16 bit another pack is another rounding, and a fresh
    process shall measure what training measured."""
    return micro_batches(dataset, indices, max_tokens=max_tokens or VALIDATION_TOKENS)


def default_style(rows: Sequence[Row], tokenizer: Tokenizer) -> PromptStyle:
    """alpaca, and the model's own template for messages and conversations."""
    own_template = any(isinstance(row, Conversation) and row.own_template for row in rows)
    return PromptStyle.load("chat" if own_template else "alpaca", tokenizer)


def row_limit(args: DataArgs, base: Base) -> int:
    """Tokens a row may have."""
    limit = base.config.max_position_embeddings
    return limit if args.max_seq_length is None else min(limit, args.max_seq_length)


def tokenize(args: DataArgs, rows: Sequence[Row], base: Base, style: PromptStyle, what: str) -> Dataset:
    """Rows to ids by the data flags; says what became of them. Raises InputError for bad data."""
    length = row_limit(args, base)
    if (args.max_seq_length or 0) > length:
        say(f"note: --max_seq_length {args.max_seq_length} is cut to the model's context of {length}")
    try:
        dataset = prepare(
            rows,
            base.tokenizer,
            style,
            mask_prompt=args.mask_prompt,
            max_seq_length=length,
            on_overlong=args.on_overlong,
        )
    except InputError as error:
        path = args.val_path if what == "validation data" and args.val_path else args.data_path
        raise InputError(f"{error}\n  file:   {path or args.data}") from None
    quiet = getattr(args, "quiet", False) and not getattr(args, "dry_run", False)  # finetune_lora's
    report_counts(dataset, what, length, quiet=quiet)
    return dataset


def load_data(args: DataArgs, base: Base, prompt_style: str | None) -> TrainingData:
    """Rows, split and ids by the data flags. Raises InputError for bad data."""
    return prepare_data(args, base, prompt_style, *read_rows(args))


def read_rows(args: DataArgs) -> tuple[list[Row], list[Row]]:
    """All rows of the data, and those to validate on: some of them, or a file's own. A file or a split that is not
    right is known before anything is tokenized. Raises InputError."""
    rows = load_rows(args.data, args.data_path, args.multiturn)
    return rows, load_rows(args.data, args.val_path, args.multiturn) if args.val_path else held_out(rows, args)


def prepare_data(
    args: DataArgs, base: Base, prompt_style: str | None, rows: Sequence[Row], val_rows: Sequence[Row]
) -> TrainingData:
    """What `read_rows` gave, as ids. Raises InputError for bad data."""
    style = PromptStyle.load(prompt_style, base.tokenizer) if prompt_style else default_style(rows, base.tokenizer)
    dataset = tokenize(args, rows, base, style, "data")
    if args.val_path is not None:
        val_dataset = tokenize(args, val_rows, base, style, "validation data")
        train, validation = list(range(len(dataset))), list(range(len(val_dataset)))
    else:
        val_dataset = dataset
        numbers = {row.number for row in val_rows}
        train = [i for i in range(len(dataset)) if int(dataset.rows[i]) not in numbers]
        validation = [i for i in range(len(dataset)) if int(dataset.rows[i]) in numbers]
    if not train:
        raise InputError("no row is left to train on", where=args.data_path, fix="more rows, or a smaller --val_split")
    length = args.max_seq_length or base.config.max_position_embeddings
    for verb, part, indices in (("train", dataset, train), ("validate", val_dataset, validation)):
        if indices and not any(part.trained(i).any() for i in indices):
            raise InputError(
                f"every label of the rows to {verb} on is masked",
                where=args.val_path if part is not dataset else args.data_path,
                got=f"{len(indices)} rows, --max_seq_length {length}",
                fix="raise --max_seq_length so that it holds more than the prompts",
            )
    return TrainingData(dataset, train, val_dataset, validation, style, sample_of(val_rows, base, style))


def sample_of(rows: Sequence[Row], base: Base, style: PromptStyle) -> tuple[str, str] | None:
    """Instruction and input of the first row whose prompt leaves room for an answer."""
    for row in rows:
        if isinstance(row, Instruction):
            length = len(base.tokenizer.encode_prompt(style.prompt(row.instruction, row.input)))
            if 0 < length < base.config.max_position_embeddings:
                return row.instruction, row.input
    return None


def held_out(rows: Sequence[Row], args: DataArgs) -> list[Row]:
    """The rows that a run with these flags validates on."""
    return [rows[i] for i in split(len(rows), args.val_split, args.seed)[1]]


def report_counts(dataset: Dataset, what: str, length: int, *, quiet: bool) -> None:
    """What became of the rows, on one line; `quiet`: only where some are not as they were."""
    counts = dataset.counts
    text = f"{what}: {counts.rows:,} rows, {counts.tokens:,} tokens, {counts.trained_tokens:,} of them trained"
    changes = [
        (counts.truncated, f"truncated to {length} tokens (these end without eos)"),
        (counts.dropped, f"longer than {length} tokens and dropped"),
        (counts.straddling, "with a token across the prompt's end, tokenized in two parts"),
        (counts.masked, "without any trained token"),
    ]
    found = [f"{number:,} {what_happened}" for number, what_happened in changes if number]
    if found or not quiet:
        say("; ".join([text, *found]))


def record_style(style: PromptStyle) -> tuple[str, str | None]:
    """(prompt_style, prompt_template) of an adapter's record: a template file's text is kept, not its path alone."""
    return style.name, style.source if style.name not in STYLES else None
