"""Tokens from a Decoder: prompts of unequal length are prefilled side by side without padding, then each step adds one
token to every row; a row that ends leaves the batch.

Prefill, step and choosing touch tensors only; the host reads what was chosen, on a card one step late, so that the
card never waits for it. `_Rows.step` is what a captured graph can replace.
Sizes: B rows still written, N prompt tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from litlora.errors import InputError
from litlora.model import Decoder
from litlora.sampling import NOT_FINITE, Sampling
from litlora.sequences import Decode, KVCache, Packed, Prefill

__all__ = ["Sampling", "check_prompts", "generate", "room"]

PREFILL_TOKENS = 8192  # prompts go through the model together up to this many tokens: bounds the activations


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    vocab_size: int | None = None,
    streams: Sequence[int] | None = None,
    ended: Collection[int] = (),
) -> Iterator[tuple[int, int]]:
    """Yields (row, token) as tokens are known, each row's own in order, a closing stop id included.

    A row ends with one of `stop_ids`, after `max_new_tokens`, at the context's end (see `room`), or once the caller
    puts it into `ended`, which is looked at before every step. Ids from `vocab_size` on are padding of the head and
    never chosen. `streams` number the rows' random draws (default: 0, 1, …), so that a row's text does not depend on
    the batch it is in.

    Raises InputError, before anything runs, for an empty prompt, one that leaves no room in the context, or an id that
    the model does not have; and, while running, when the logits are not finite.
    """
    limits = room(model, prompts, max_new_tokens)
    streams = range(len(prompts)) if streams is None else streams
    rows = _Rows(model, prompts, limits, sampling, vocab_size or model.config.vocab_size, streams)
    return _run(rows, frozenset(stop_ids), ended)


def room(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens each row may get: `max_new_tokens`, or what the context leaves. Raises InputError, see above."""
    config = model.config
    return check_prompts(prompts, max_new_tokens, config.max_position_embeddings, config.vocab_size)


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, context: int, vocabulary: int, names: Sequence[str] = ()
) -> list[int]:
    """`room` for a model that is not loaded yet; `names` say which prompt is meant in messages."""
    if max_new_tokens < 1:
        raise InputError("--max_new_tokens is out of range", got=max_new_tokens, wanted="a whole number from 1 up")
    for number, prompt in enumerate(prompts):
        where = names[number] if names else f"prompt {number + 1}"
        if not prompt:
            raise InputError("an empty prompt: there is no token to begin from", where=where, fix="write something")
        if len(prompt) >= context:
            raise InputError(
                "the prompt is longer than the model's context",
                where=where,
                got=f"{len(prompt)} tokens",
                wanted=f"at most {context - 1} (context {context}, one token to answer)",
                fix="a shorter prompt",
            )
        if max(prompt) >= vocabulary or min(prompt) < 0:
            got = max(prompt) if max(prompt) >= vocabulary else min(prompt)
            wanted = f"0 to {vocabulary - 1} (vocab_size of config.json)"
            raise InputError("a token that the model has no embedding for", where=where, got=got, wanted=wanted)
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


def _run(rows: _Rows, stop_ids: frozenset[int], ended: Collection[int]) -> Iterator[tuple[int, int]]:
    model, training = rows.model, rows.model.training
    late = _reads_late(rows.device)
    model.eval()
    try:
        over: set[int] = set()
        unread = deque([rows.prefill()] if rows.live else [])
        while unread:
            if late and rows.keep(over, ended):
                unread.append(rows.step())
            for row, token in unread.popleft().get():
                if row in over or row in ended:
                    continue  # one step was under way when its end was read
                if token == NOT_FINITE:
                    raise _not_finite(row)
                if token in stop_ids:
                    over.add(row)
                yield row, token
            if not unread and rows.keep(over, ended):
                unread.append(rows.step())
    finally:
        model.train(training)


def _reads_late(device: torch.device) -> bool:
    """Whether the next step is launched before the last one's tokens are read: where the device works by itself."""
    return device.type == "cuda"


def _not_finite(row: int) -> InputError:
    return InputError(
        "the model's logits are not finite",
        where=f"row {row + 1}",
        fix="--precision bf16-true or 32-true if it was 16-true; else the weights or the adapter are damaged",
    )


class _Reading:
    """Chosen tokens on their way to the host, with the rows they belong to."""

    def __init__(self, rows: list[int], tokens: Tensor) -> None:
        self.rows = list(rows)
        self.tokens = tokens.to("cpu", non_blocking=True)  # pinned memory, when it comes from a card
        self.event: torch.cuda.Event | None = None
        if tokens.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(tokens.device))

    def get(self) -> Iterator[tuple[int, int]]:
        if self.event is not None:
            self.event.synchronize()
        return zip(self.rows, self.tokens.tolist(), strict=True)


class _Rows:
    """The rows that are still written: slot i of the cache and of all tensors is row `live[i]`."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        vocab_size: int,
        streams: Sequence[int],
    ) -> None:
        embedding = model.model.embed_tokens.weight
        self.model, self.prompts, self.sampling, self.device = model, prompts, sampling, embedding.device
        self.dtype, self.vocab_size = embedding.dtype, min(vocab_size, model.config.vocab_size)
        self.live = list(range(len(prompts)))
        self.left = list(limits)  # tokens that a row may still get, by row
        self.written = [len(prompt) for prompt in prompts]  # tokens of a row in the cache, by row
        self.streams = torch.tensor(list(streams), dtype=torch.int64, device=self.device)  # (B,)
        self.steps = torch.zeros_like(self.streams)  # (B,) tokens chosen so far
        self.positions = torch.tensor(self.written, dtype=torch.int64, device=self.device)  # (B,) of the next token

    @torch.inference_mode()
    def prefill(self) -> _Reading:
        """The prompts into the cache, and each row's first token."""
        # the last token of a row is chosen but never fed back
        length = max(n + left - 1 for n, left in zip(self.written, self.left, strict=True))
        self.cache = KVCache(self.model.config, len(self.prompts), length, self.dtype, self.device)
        self.seen: Tensor | None = None  # (B, V) bool
        if self.sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(self.prompts), self.vocab_size, dtype=torch.bool, device=self.device)
            for slot, prompt in enumerate(self.prompts):
                ids = torch.tensor([i for i in prompt if i < self.vocab_size], dtype=torch.int64, device=self.device)
                self.seen[slot, ids] = True
        return self._choose(torch.cat([self._last_hidden(group) for group in self._groups()]))

    def _groups(self) -> Iterator[range]:
        """Rows in order, as many at a time as PREFILL_TOKENS hold, and at least one."""
        start = tokens = 0
        for row, length in enumerate(self.written):
            if row > start and tokens + length > PREFILL_TOKENS:
                yield range(start, row)
                start, tokens = row, 0
            tokens += length
        yield range(start, len(self.written))

    def _last_hidden(self, rows: range) -> Tensor:
        """(rows, C) of the prompts' last tokens."""
        packed = Packed.of_lengths([self.written[row] for row in rows])
        packed = Packed(packed.positions.to(self.device), packed.cu_seqlens.to(self.device), packed.max_seqlen)
        ids = torch.tensor([i for row in rows for i in self.prompts[row]], device=self.device)  # (N,)
        hidden: Tensor = self.model(ids, Prefill(packed, self.cache, rows))
        return hidden[packed.cu_seqlens[1:].long() - 1]

    @torch.inference_mode()
    def step(self) -> _Reading:
        """Feeds each row's newest token and chooses the next."""
        longest = max(self.written[row] for row in self.live) + 1
        ids = self.tokens.clamp(min=0)  # NOT_FINITE is no embedding's number; the reader will raise
        hidden = self.model(ids, Decode(self.positions, self.cache, longest))
        self.positions = self.positions + 1
        for row in self.live:
            self.written[row] += 1
        return self._choose(hidden)

    def _choose(self, hidden: Tensor) -> _Reading:
        """hidden (B, C)."""
        logits = self.model.lm_head(hidden)[:, : self.vocab_size]
        self.tokens = self.sampling.choose(logits, self.seen, self.streams, self.steps)
        self.steps = self.steps + 1
        if self.seen is not None:
            self.seen.scatter_(1, self.tokens.clamp(min=0)[:, None], True)
        for row in self.live:
            self.left[row] -= 1
        return _Reading(self.live, self.tokens)

    def keep(self, over: Collection[int], ended: Collection[int]) -> bool:
        """Lets the rows go that are over; whether any is left. What the host knows beforehand (a row's limit) is never
        fed once too often, so nothing is written behind the cache's end."""
        kept = [s for s, row in enumerate(self.live) if self.left[row] and row not in over and row not in ended]
        if kept and len(kept) < len(self.live):
            self._compact(kept)
        return bool(kept)

    @torch.inference_mode()
    def _compact(self, kept: list[int]) -> None:
        """The last slots move into those that became free; the cache is a view of its first slots from then on."""
        count = len(kept)
        movers = [slot for slot in kept if slot >= count]
        holes = sorted(set(range(count)) - set(kept))
        order = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        longest = max((self.written[self.live[slot]] for slot in movers), default=0)
        cache = copy.copy(self.cache)
        cache.rows = count
        for name in ("keys", "values"):
            layers = getattr(cache, name)
            if movers:
                for layer in layers:
                    layer[holes, :longest] = layer[movers, :longest]
            setattr(cache, name, [layer[:count] for layer in layers])
        self.cache = cache
        index = torch.tensor(order, device=self.device)
        self.live = [self.live[slot] for slot in order]
        self.tokens, self.positions = self.tokens[index], self.positions[index]
        self.streams, self.steps = self.streams[index], self.steps[index]
        self.seen = None if self.seen is None else self.seen[index]
