"""Answers as text while they come: tokens of several rows to final pieces of text, up to a stop token or string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from litlora.decode import generate, room
from litlora.errors import InputError
from litlora.model import Decoder
from litlora.sampling import Sampling
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """New text of one row. `tokens`: how many the row has by now. `end` on its last piece: "stop" (a stop token or
    string), "length" (max_new_tokens) or "context" (the model's context is full)."""

    row: int
    text: str
    tokens: int
    end: str | None = None


def answers(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    streams: Sequence[int] | None = None,
    side_by_side: int | None = None,
) -> Iterator[Piece]:
    """Yields each row's text as soon as it is final: half a character, or what may become a stop string, is held back.

    Neither stop tokens nor stop strings, nor what comes after them, are part of the text. `streams`, `side_by_side` and
    errors: see `litlora.decode.generate`.
    """
    limits = room(model, prompts, max_new_tokens)
    stop_ids = {*tokenizer.stop_ids, *_special_stops(tokenizer, stop)}
    rows = [_Row(tokenizer, prompt, stop) for prompt in prompts]
    ended: set[int] = set()
    tokens = generate(
        model,
        prompts,
        sampling,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        vocab_size=tokenizer.vocab_size,
        streams=streams,
        ended=ended,
        side_by_side=side_by_side,
    )
    for number, token in tokens:
        row, end = rows[number], None
        row.tokens += 1
        if token in stop_ids:
            text, end = row.finish(), "stop"
        else:
            text = row.push(token)
            if not row.stops.found and row.tokens == limits[number]:
                text, end = text + row.finish(), "length" if row.tokens == max_new_tokens else "context"
            if row.stops.found:
                end = "stop"
                ended.add(number)
        if text or end:
            yield Piece(number, text, row.tokens, end)


def _special_stops(tokenizer: Tokenizer, stop: Iterable[str]) -> list[int]:
    """Stop strings that are special tokens: these never show in the text, so they must be met as ids."""
    found = [tokenizer.token_id(text) for text in stop]
    return [token_id for token_id in found if token_id is not None and not tokenizer.decode([token_id])]


class _Row:
    """One row's way from ids to text."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.stream, self.stops, self.tokens = tokenizer.stream(prompt), StopStrings(stop), 0

    def push(self, token: int) -> str:
        return self.stops.push(self.stream.push(token))

    def finish(self) -> str:
        return self.stops.push(self.stream.flush()) + self.stops.flush()


class StopStrings:
    """Lets text through up to the first stop string, wherever the pieces it comes in are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises InputError for an empty one."""
        if not all(stops):
            raise InputError("an empty stop string", where="--stop", wanted="at least one character")
        self._stops, self._held, self.found = stops, "", False

    def push(self, text: str) -> str:
        """What is certain to be in front of a stop string; `found` tells that one was complete."""
        if self.found:
            return ""
        text = self._held + text
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def in_order(pieces: Iterable[Piece], rows: int) -> Iterator[Piece]:
    """The same pieces with each row's together and the rows in order: the first unfinished one comes live."""
    held: list[list[Piece]] = [[] for _ in range(rows)]
    current = 0
    for piece in pieces:
        held[piece.row].append(piece)
        while current < rows and held[current]:
            ready, held[current] = held[current], []
            yield from ready
            if not ready[-1].end:
                break
            current += 1
