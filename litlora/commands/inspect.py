"""`litlora inspect`: what a model will really see of the data, before it is trained. Needs no weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from litlora.commands.common import Base, TrainingData, prepare_data, read_rows, row_limit
from litlora.commands.data_flags import DataArgs
from litlora.commands.inspect_report import report
from litlora.data import Dataset, Row
from litlora.data.inspection import Check, Inspected, check_split, token_texts
from litlora.errors import InputError
from litlora.tokenizer import Tokenizer

BINS = 12  # of the histogram, up to the 99th percentile; what is longer is in a last one
PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Args(DataArgs):
    """Show what the model will really see of the data: rows as text and ids, lengths, template, stop tokens, and
    whatever is wrong with which rows. Takes finetune_lora's data flags and needs no weights.

    Args:
        show: how many training rows to show
        row: show the row of this number, whole; may be given several times
        json: print JSON instead of text
        strict: exit with 1 when there is any warning
    """

    show: int = 3
    row: tuple[int, ...] = ()
    json: bool = False
    strict: bool = False


def run(args: Args) -> None:
    """Prints the report on stdout. Raises InputError, and SystemExit(1) for a warning under `strict`."""
    if args.show < 0:
        raise InputError("a flag out of range", where="--show", got=args.show, wanted="0 or more")
    base = Base.open(args.checkpoint_dir, weights=False)
    rows, val_rows = read_rows(args)
    wanted = [find(number, rows) for number in args.row]
    data = prepare_data(args, base, args.prompt_style, rows, val_rows)
    checks = all_checks(args, base, data, rows, val_rows)
    shown = wanted or [int(data.dataset.rows[i]) for i in data.train[: args.show]]
    examples = [example(number, data, base.tokenizer) for number in shown]
    warnings = [check for found in checks.values() for check in found if check.warning and check.rows]
    about = describe(args, base, data)
    if args.json:
        listed = {file: [asdict(check) for check in found] for file, found in checks.items()}
        print(json.dumps({**about, "checks": listed, "warnings": len(warnings), "examples": examples}))
    else:
        terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        text = "\n".join(report(about, checks, examples, colours=terminal, whole=bool(wanted)))
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    if warnings and args.strict:
        raise SystemExit(1)


def find(number: int, rows: Sequence[Row]) -> int:
    """Raises InputError for a row that is not in the file."""
    if all(row.number != number for row in rows):
        span = f"{rows[0].number} to {rows[-1].number}"
        raise InputError("no such row in the data", where="--row", got=number, wanted=span)
    return number


def all_checks(
    args: Args, base: Base, data: TrainingData, rows: Sequence[Row], val_rows: Sequence[Row]
) -> dict[str, list[Check]]:
    """By file."""
    limit = row_limit(args, base)
    held = {row.number for row in val_rows}
    file = str(args.data_path or args.data)
    checks = {file: Inspected(rows, data.dataset, base.tokenizer, data.style, limit).checks()}
    if args.val_path is None:
        checks[file] += check_split([row for row in rows if row.number not in held], val_rows)
    else:
        validation = Inspected(val_rows, data.validation_dataset, base.tokenizer, data.style, limit)
        checks[str(args.val_path)] = validation.checks() + check_split(rows, val_rows)
    return checks


def describe(args: Args, base: Base, data: TrainingData) -> dict[str, Any]:
    """All that is not about single rows."""
    tokenizer, config = base.tokenizer, base.config
    return {
        "checkpoint_dir": str(args.checkpoint_dir),
        "model_type": config.model_type,
        "context": config.max_position_embeddings,
        "max_seq_length": row_limit(args, base),
        "on_overlong": args.on_overlong,
        "mask_prompt": args.mask_prompt,
        "prompt_style": data.style.name,
        "template": data.style.prompt("{instruction}", "{input}"),
        "added_before": [named(token, tokenizer) for token in tokenizer.prefix],
        "ends": ends(data.dataset, tokenizer),
        "stop_tokens": [named(token, tokenizer) for token in tokenizer.stop_ids],
        "training": measure(data.dataset, data.train),
        "validation": measure(data.validation_dataset, data.validation) if data.validation else None,
    }


def named(token: int, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"id": token, "text": tokenizer.token_text(token)}


def measure(dataset: Dataset, indices: Sequence[int]) -> dict[str, Any]:
    """Counts, percentiles and histogram of the lengths, in tokens, after truncation."""
    lengths = dataset.lengths[indices]
    longest = int(lengths.max())
    trained = np.add.reduceat(dataset.flat_trained, dataset.offsets[:-1], dtype=np.int64)[indices]
    percentiles = {f"p{p}": int(np.percentile(lengths, p, method="inverted_cdf")) for p in PERCENTILES}
    width = next(step << k for k in range(32) for step in (2, 3) if BINS * (step << k) >= percentiles["p99"])
    places = np.minimum((lengths - 1) // width, BINS)
    return {
        "sequences": len(lengths),
        "tokens": int(lengths.sum()),
        "trained_tokens": int(trained.sum()),
        "lengths": {"min": int(lengths.min()), "mean": float(lengths.mean()), **percentiles, "max": longest},
        "histogram": [
            {"from": i * width + 1, "to": min((i + 1) * width, longest) if i < BINS else longest, "sequences": count}
            for i, count in enumerate(np.bincount(places).tolist())
            if i >= places.min()
        ],
    }


def ends(dataset: Dataset, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The tokens that rows end with, the most frequent first, three at most."""
    last = np.flatnonzero(np.append(dataset.rows[1:] != dataset.rows[:-1], True))  # a document is several sequences
    tokens, counts = np.unique(dataset.flat_ids[dataset.offsets[1:][last] - 1], return_counts=True)
    found = sorted(zip(counts.tolist(), tokens.tolist(), strict=True), reverse=True)
    return [{**named(token, tokenizer), "rows": count} for count, token in found[:3]]


def example(number: int, data: TrainingData, tokenizer: Tokenizer) -> dict[str, Any]:
    """A row of the data as the model sees it, token by token (of a document the first sequence). Raises InputError for
    a row that was dropped."""
    places = np.flatnonzero(data.dataset.rows == number)
    if not len(places):
        raise InputError("the row is too long and dropped", where="--row", got=number, fix="--on_overlong truncate")
    index = int(places[0])
    ids = data.dataset.ids(index).tolist()
    return {
        "row": number,
        "part": "training" if index in data.train else "validation",
        "sequences": len(places),
        "ids": ids,
        "texts": token_texts(tokenizer, ids),
        "trained": data.dataset.trained(index).tolist(),
    }
