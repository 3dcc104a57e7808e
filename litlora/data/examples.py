"""Rows to ids and label masks, as generation will see them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from litlora.data.dataset import Counts, Dataset, default_cache_dir, load, save
from litlora.data.prompts import PromptStyle, Rendered
from litlora.data.rows import Row
from litlora.errors import InputError
from litlora.tokenizer import Bounded, Tokenizer

# Part of the cache's key: to be raised whenever the same rows would give other ids or masks.
_FORMAT = 2
_CHUNK = 4096  # rows
_OVERLONG = ("truncate", "drop", "error")


@dataclass(frozen=True)
class _Options:
    mask_prompt: bool
    max_seq_length: int
    on_overlong: str

    def __post_init__(self) -> None:
        if self.max_seq_length < 2:
            raise InputError("a sequence needs two tokens", where="--max_seq_length", got=self.max_seq_length)
        if self.on_overlong not in _OVERLONG:
            raise InputError("unknown choice", where="--on_overlong", got=self.on_overlong, wanted=", ".join(_OVERLONG))


@dataclass(slots=True)
class _Example:
    """One row's ids and the spans [begin, end) of its ids that are labels."""

    number: int
    ids: npt.NDArray[np.int32]  # a list of them would take nine times the memory
    trained: list[tuple[int, int]]
    straddles: bool = False  # a token would have crossed a bound
    chunked: bool = False


def prepare(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    style: PromptStyle,
    *,
    mask_prompt: bool = False,
    max_seq_length: int,
    on_overlong: str = "truncate",
    cache_dir: Path | None = None,
    use_cache: bool = True,
) -> Dataset:
    """Tokenize rows, or read them from the cache (a file named by the hash of all that the ids depend on).

    Prompt and response are tokenized as one string; the label boundary must be where the prompt's own ids end, and
    where it is not, the row is tokenized in two parts and counted. eos follows every response. Raw text is cut into
    sequences of max_seq_length that overlap by one token, so that every token is a label once.

    Args:
        mask_prompt: train on responses only (False: on prompts too; conversations on assistant turns only, always).
        max_seq_length: in tokens, special ones included.
        on_overlong: truncate (such rows end without eos), drop, or error.
        cache_dir: None is `default_cache_dir()`.

    Raises InputError: no rows, an overlong row under `error`, all rows overlong, every label masked.
    """
    options = _Options(mask_prompt, max_seq_length, on_overlong)
    if not rows:
        raise InputError("there are no rows to train on")
    path = (cache_dir or default_cache_dir()) / f"{_key(rows, tokenizer, style, options)}.npz"
    dataset = load(path) if use_cache else None
    if dataset is None:
        dataset = _build(rows, tokenizer, style, options)
        if use_cache:
            save(dataset, path)
    return dataset


def _key(rows: Sequence[Row], tokenizer: Tokenizer, style: PromptStyle, options: _Options) -> str:
    about = (_FORMAT, tokenizer.fingerprint, tokenizer.eos_id, style.key, asdict(options))
    digest = hashlib.sha256(repr(about).encode())
    for row in rows:
        digest.update(f"{type(row).__name__}{row.key()!r}".encode())
    return digest.hexdigest()


def _build(rows: Sequence[Row], tokenizer: Tokenizer, style: PromptStyle, options: _Options) -> Dataset:
    fitted: list[_Example] = []
    longest = dropped = 0
    truncated: list[int] = []
    straddling: list[int] = []
    for example in _tokenize(rows, tokenizer, style, options.mask_prompt):
        length = len(example.ids)
        if not length:
            raise InputError(f"row {example.number} has no token", fix="take it out, or another --prompt_style")
        straddling += [example.number] if example.straddles else []
        longest = max(longest, length)
        if length <= options.max_seq_length:
            fitted.append(example)
        elif example.chunked:
            fitted.extend(_chunks(example, options.max_seq_length))
        elif options.on_overlong == "error":
            raise InputError(
                f"row {example.number} is too long",
                got=f"{length} tokens",
                wanted=f"at most {options.max_seq_length} (--max_seq_length)",
                fix="raise --max_seq_length, or --on_overlong truncate or drop",
            )
        elif options.on_overlong == "drop":
            dropped += 1
        else:
            truncated.append(example.number)
            fitted.append(replace(example, ids=example.ids[: options.max_seq_length]))
    if not fitted:
        raise InputError(
            "all rows are overlong and dropped",
            got=f"{len(rows)} rows, up to {longest} tokens",
            wanted=f"rows of at most {options.max_seq_length} tokens (--max_seq_length)",
            fix="raise --max_seq_length, or --on_overlong truncate",
        )
    cut, split = (np.array(numbers, dtype=np.int64) for numbers in (truncated, straddling))
    counts = Counts(rows=len(rows), truncated=len(cut), dropped=dropped, straddling=len(split), longest=longest)
    return replace(_flatten(fitted, counts, options), truncated=cut, straddling=split)


def _render(row: Row, style: PromptStyle) -> Rendered:
    try:
        return style.render(row)
    except InputError as error:
        raise InputError(f"row {row.number} cannot be rendered: {error}") from error


def _tokenize(rows: Sequence[Row], tokenizer: Tokenizer, style: PromptStyle, mask_prompt: bool) -> Iterator[_Example]:
    """Examples in the order of the rows. Two chunks are under way: while the tokenizer's library, which lets go of
    the interpreter, works on one, Python works on the other."""

    def work(start: int) -> list[_Example]:
        chunk = rows[start : start + _CHUNK]
        rendered = [_render(row, style) for row in chunk]
        texts = ["".join([text for text, _ in item.segments]) for item in rendered]
        bounds = [list(itertools.accumulate([len(text) for text, _ in item.segments[:-1]])) for item in rendered]
        found = tokenizer.encode_at(texts, bounds)
        return [_example(*parts, tokenizer, mask_prompt) for parts in zip(chunk, rendered, found, strict=True)]

    with ThreadPoolExecutor(2) as pool:
        for examples in pool.map(work, range(0, len(rows), _CHUNK)):
            yield from examples


def _example(row: Row, item: Rendered, found: Bounded, tokenizer: Tokenizer, mask_prompt: bool) -> _Example:
    """A row's ids with its special tokens, and its labels; tokenized in parts where a token straddles a bound."""
    ids, ends = found
    if straddles := None in ends:
        ids, ends = _in_parts(item, tokenizer)
    lead = tokenizer.lead(ids)
    ids = lead + ids
    if item.add_eos:
        ids.append(tokenizer.eos_id)
    borders = [0, *[end + len(lead) for end in ends if end is not None], len(ids)]
    spans = [(borders[i], borders[i + 1]) for i, (_, trained) in enumerate(item.segments) if trained]
    masked = mask_prompt or item.masked
    return _Example(
        row.number, np.array(ids, dtype=np.int32), spans if masked else [(0, len(ids))], straddles, item.chunked
    )


def _in_parts(item: Rendered, tokenizer: Tokenizer) -> Bounded:
    """The segments' ids one after the other, and where each but the last ends."""
    ids: list[int] = []
    ends: list[int | None] = []
    for position, (text, _) in enumerate(item.segments):
        ids += tokenizer.encode_continuation(text) if position else tokenizer.encode(text, special=False)
        ends.append(len(ids))
    return ids, ends[:-1]


def _chunks(example: _Example, size: int) -> Iterator[_Example]:
    """Sequences of `size` ids that overlap by one: the last id of one is where the next one predicts from."""
    for start in range(0, len(example.ids) - 1, size - 1):
        ids = example.ids[start : start + size]
        yield _Example(example.number, ids, [(0, len(ids))])


def _flatten(examples: Sequence[_Example], counts: Counts, options: _Options) -> Dataset:
    lengths = [len(example.ids) for example in examples]
    offsets = np.zeros(len(examples) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    total = int(offsets[-1])
    ids = np.concatenate([example.ids for example in examples])
    trained = np.zeros(total, dtype=np.bool_)
    for start, length, example in zip(offsets.tolist(), lengths, examples, strict=False):
        for begin, end in example.trained:
            trained[start + min(begin, length) : start + min(end, length)] = True
    trained[offsets[:-1]] = False  # nothing predicts a first token
    labels = np.add.reduceat(trained, offsets[:-1], dtype=np.int64)
    if not labels.any():
        raise InputError(
            "every label is masked: there is nothing to train on",
            got=f"{counts.rows} rows, --max_seq_length {options.max_seq_length}",
            fix="raise --max_seq_length so that it holds more than the prompts",
        )
    numbers = np.array([example.number for example in examples], dtype=np.int64)
    done = Counts(
        **{**asdict(counts), "tokens": total, "trained_tokens": int(labels.sum()), "masked": int((labels == 0).sum())}
    )
    return Dataset(ids, trained, offsets, numbers, done)
