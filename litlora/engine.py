"""What a decode step works on and what runs it: the rows' numbers on the device, and an `Engine`. The plain one here
calls the model as it is; `decode_graph` has that of a card.
Sizes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from litlora.kv_cache import Decode, KVCache
from litlora.model import Decoder
from litlora.sampling import Sampling
from litlora.transfer import on_device


class State:
    """What the device knows of the rows: slot i of all tensors is the i-th of the rows that are still written."""

    def __init__(self, slots: int, vocabulary: int, sampling: Sampling, device: torch.device) -> None:
        self.sampling, self.vocabulary, self.device = sampling, vocabulary, device
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)  # each row's newest
        self.numbers = torch.zeros(4, slots, dtype=torch.int64, device=device)
        # the newest token's position; a row's tokens so far; its random stream; 1, or 0 for a slot that only fills a
        # captured graph's shape
        self.positions, self.steps, self.streams, self.alive = self.numbers.unbind()
        self.seen: Tensor | None = None  # (slots, V) bool: what a repetition penalty must know
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)

    def reorder(self, order: Sequence[int]) -> None:
        """Slot i gets what slot `order[i]` had."""
        index, count = on_device(torch.tensor(order), self.device), len(order)
        self.tokens[:count] = self.tokens[index]
        if self.seen is not None:
            self.seen[:count] = self.seen[index]

    def upload(self, numbers: Sequence[Sequence[int]]) -> None:
        """Four numbers a slot, see above; the slots behind them are of no row."""
        table = torch.zeros(self.numbers.shape, dtype=torch.int64)
        table[:, : len(numbers)] = torch.tensor(numbers, dtype=torch.int64).t()
        self.numbers.copy_(on_device(table, self.device))

    def look_at(self, slot: int, prompt: Sequence[int]) -> None:
        """A prompt counts for the repetition penalty, too."""
        if self.seen is not None:
            ids = torch.tensor([i for i in prompt if i < self.vocabulary], dtype=torch.int64)
            self.seen[slot] = False
            self.seen[slot].index_fill_(0, on_device(ids, self.device), True)

    def choose(self, logits: Tensor, slots: slice) -> None:
        """The next token of each of `slots`, from logits (B, V or more): from now on the newest one."""
        seen, tokens = None if self.seen is None else self.seen[slots], self.tokens[slots]
        self.sampling.choose(logits[:, : self.vocabulary], seen, self.streams[slots], self.steps[slots], tokens)
        self.numbers[:2, slots] += self.alive[slots]
        if seen is not None:
            seen.scatter_(1, tokens.clamp(min=0)[:, None], True)

    def inputs(self, count: int) -> Tensor:
        """The newest token of the first `count` slots."""
        return self.tokens[:count].clamp(min=0)  # NOT_FINITE is no embedding's number; the reader will raise


class Engine(Protocol):
    """Where rows lie in the cache, and how a step runs. `width`: the slots of a `State` for it."""

    width: int
    cache: KVCache

    def admit(self, row: int, tokens: int, live: int) -> bool:
        """Makes room for a row of so many tokens beside `live` others, if there is enough."""
        ...

    def grow(self, row: int, tokens: int) -> bool:
        """Makes room for so many tokens of a row; False where there is none."""
        ...

    def leave(self, row: int) -> None: ...

    def places(self, row: int, first: int, count: int) -> Tensor:
        """Where tokens from `first` on lie in the cache, (count,) int64, on the host."""
        ...

    def settle(self, rows: list[int], lengths: list[int]) -> None:
        """The live rows by slot have changed; `lengths`: tokens of each in the cache."""
        ...

    def step(self, state: State, lengths: list[int]) -> None:
        """Feeds the newest token of the first slots, of `lengths` tokens before it, and chooses the next."""
        ...


class Eager:
    """The model, called as it is. Slot i has the i-th of equal spans, so that a step reads one block."""

    def __init__(self, model: Decoder, slots: int, capacities: Sequence[int]) -> None:
        embedding = model.model.embed_tokens.weight
        self.model, self.width, self.spacing = model, slots, max(capacities)
        self.slots: dict[int, int] = {}  # of the rows
        self.cache = KVCache(model.config, slots * self.spacing, embedding.dtype, embedding.device)

    def admit(self, row: int, tokens: int, live: int) -> bool:
        self.slots[row] = len(self.slots)
        return True

    def grow(self, row: int, tokens: int) -> bool:
        return True

    def leave(self, row: int) -> None:
        del self.slots[row]

    def places(self, row: int, first: int, count: int) -> Tensor:
        return self.slots[row] * self.spacing + torch.arange(first, first + count)

    def settle(self, rows: list[int], lengths: list[int]) -> None:
        for slot, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if self.slots[row] != slot:
                self.cache.move(self.slots[row] * self.spacing, slot * self.spacing, length)
                self.slots[row] = slot

    def step(self, state: State, lengths: list[int]) -> None:
        count = len(lengths)
        positions = state.positions[:count]
        hidden = self.model(state.inputs(count), Decode(self.cache, positions, lengths, self.spacing))
        state.choose(self.model.lm_head(hidden), slice(0, count))
