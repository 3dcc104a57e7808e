"""Tokens from a Decoder: prompts of unequal length are prefilled side by side without padding, then each step adds one
token to every row. A row that ends leaves at once, and a prompt that waits takes its place.

Prefill, step and choosing touch tensors only; the host reads what was chosen, on a card a few steps late, so that the
card never waits for it. How the model runs is an `Engine`'s matter.
Sizes: B rows still written, N prompt tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from litlora.engine import Eager, Engine, State
from litlora.errors import InputError
from litlora.kv_cache import Continuation, Prefill
from litlora.model import Decoder
from litlora.sampling import NOT_FINITE, Sampling
from litlora.transfer import on_device, on_its_way

__all__ = ["Sampling", "check_prompts", "generate", "room"]

PREFILL_TOKENS = 8192  # prompts go through the model together up to this many tokens: more are no faster
PREFILL_MEMORY = 7e8  # or to what takes so many bytes at the MLP, the widest moment
CONTINUED_TOKENS = 2048  # of a prompt longer than that, beyond its first piece
FEW_ROWS = 16  # side by side, so that a step is short, and rows that have ended cost nothing while nobody waits


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
    side_by_side: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields (row, token) as tokens are known, each row's own in order, a closing stop id included.

    A row ends with one of `stop_ids`, after `max_new_tokens`, at the context's end (see `room`), or once the caller
    puts it into `ended`, which is looked at before every step. Ids from `vocab_size` on are padding of the head and
    never chosen. `streams` number the rows' random draws (default: 0, 1, …), so that a row's text does not depend on
    the batch it is in. `side_by_side`: rows written at a time at most; the others wait, in order, for a place.

    Raises InputError, before anything runs, for an empty prompt, one that leaves no room in the context, or an id that
    the model does not have; and, while running, when the logits are not finite.
    """
    limits = room(model, prompts, max_new_tokens)
    streams = range(len(prompts)) if streams is None else streams
    vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    rows = _Rows(model, prompts, limits, sampling, vocab_size, streams, side_by_side or len(prompts))
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
    model.eval()
    try:
        over: set[int] = set()
        unread: deque[_Reading] = deque()
        while True:
            joining, crowded = rows.joining(), False
            if joining:
                unread.append(rows.prefill(joining))
            elif rows.live and rows.grow():
                unread.append(rows.step())
            elif rows.live and not unread:
                rows.put_back()
            elif unread:
                crowded = True  # what is still under way may end rows that others make room for
            else:
                return
            while unread and (len(unread) > _late(rows.device, len(rows.live)) or crowded or not rows.live):
                for row, token in unread.popleft().get():
                    if row in over or row in ended:
                        continue  # steps were under way when its end was read
                    if token == NOT_FINITE:
                        raise _not_finite(row)
                    if token in stop_ids:
                        over.add(row)
                    rows.ids[row].append(token)
                    yield row, token
                rows.leave(over, ended)
            rows.leave(over, ended)
    finally:
        model.train(training)


def _late(device: torch.device, rows: int) -> int:
    """How many steps go on before the tokens of one are read: none where the device does not work by itself. One is
    enough where a step is long; few rows' steps take hardly longer than the host does, which is late at times."""
    if device.type != "cuda":
        return 0
    return 3 if rows <= FEW_ROWS else 1


def _not_finite(row: int) -> InputError:
    return InputError(
        "the model's logits are not finite",
        where=f"row {row + 1}",
        fix="--precision bf16-true or 32-true if it was 16-true; else the weights or the adapter are damaged",
    )


class _Reading:
    """Chosen tokens on their way to the host, with the rows they belong to."""

    def __init__(self, rows: Sequence[int], tokens: Tensor) -> None:
        self.rows, self.read = list(rows), on_its_way(tokens)

    def get(self) -> Iterator[tuple[int, int]]:
        return zip(self.rows, self.read(), strict=True)


def make_engine(model: Decoder, slots: int, capacities: Sequence[int]) -> Engine:
    """What runs the steps here. Raises InputError where the cache does not fit."""
    if model.model.embed_tokens.weight.is_cuda:
        try:
            from litlora.decode_graph import Captured, can_capture
        except ImportError:  # no Triton: Windows, or a torch built without it
            return Eager(model, slots, capacities)
        if can_capture(model):
            return Captured(model, slots, capacities)
    return Eager(model, slots, capacities)


class _Rows:
    """The host's book: which rows wait, which are written in which slot, and what each may still get."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        sampling: Sampling,
        vocabulary: int,
        streams: Sequence[int],
        slots: int,
    ) -> None:
        self.model, self.streams = model, list(streams)
        self.device = model.model.embed_tokens.weight.device
        self.ids = [list(prompt) for prompt in prompts]  # of each row, with the tokens of its answer that were read
        self.waiting = deque(range(len(prompts)))
        self.live: list[int] = []  # rows by slot
        self.slots = min(slots, len(prompts))
        self.left = list(limits)  # tokens that a row may still get
        self.chosen = [0] * len(prompts)
        self.cached = [0] * len(prompts)  # tokens of a live row in the cache
        # the last token of a row is chosen but never fed back
        self.capacities = [len(prompt) + left - 1 for prompt, left in zip(prompts, limits, strict=True)]
        self.stale = False  # whether the device's numbers are not ours
        self.settings = (vocabulary, sampling)
        config, item = model.config, model.model.embed_tokens.weight.element_size()
        width = 3 * config.intermediate_size + 2 * config.hidden_size
        self.at_once = max(1, min(PREFILL_TOKENS, int(PREFILL_MEMORY / (item * width))))  # tokens of prompts

    def start(self) -> None:
        """Takes the memory, when the first prompt needs it. Raises InputError where there is too little."""
        self.engine = make_engine(self.model, self.slots, self.capacities)
        self.state = State(self.engine.width, *self.settings, self.device)

    @torch.inference_mode()
    def joining(self) -> list[int]:
        """The rows that wait and now get a slot: not at every free one, so that several prompts share a prefill."""
        free = self.slots - len(self.live)
        if not self.waiting or free < min(len(self.waiting), max(1, self.slots // 16)):
            return []
        if not hasattr(self, "engine"):
            self.start()
        found: list[int] = []
        while self.waiting and len(found) < free:
            row = self.waiting[0]
            if not self.engine.admit(row, len(self.ids[row]), len(self.live) + len(found)):
                break
            found.append(self.waiting.popleft())
        return found

    @torch.inference_mode()
    def prefill(self, rows: list[int]) -> _Reading:
        """The prompts into the cache, and each row's next token."""
        slots = slice(len(self.live), len(self.live) + len(rows))
        self.live += rows
        for row in rows:
            self.cached[row] = len(self.ids[row]) - 1  # but for the newest, as between two steps
        self.upload()
        for slot, row in enumerate(rows, slots.start):
            self.state.look_at(slot, self.ids[row])
        hidden = torch.cat([self.last_hidden(group) for group in self.groups(rows)])
        self.state.choose(self.model.lm_head(hidden), slots)
        return self.reading(rows, slots)

    def groups(self, rows: list[int]) -> Iterator[list[int]]:
        """Rows in order, as many at a time as `at_once` holds, and at least one."""
        group: list[int] = []
        tokens = 0
        for row in rows:
            if group and tokens + len(self.ids[row]) > self.at_once:
                yield group
                group, tokens = [], 0
            group.append(row)
            tokens += len(self.ids[row])
        yield group

    def last_hidden(self, rows: list[int]) -> Tensor:
        """(rows, C) of the prompts' last tokens. A prompt longer than `at_once` is alone, and goes in pieces."""
        cache, engine = self.engine.cache, self.engine
        pieces = [self.ids[row][: self.at_once] for row in rows]
        places = [engine.places(row, 0, len(piece)) for row, piece in zip(rows, pieces, strict=True)]
        hidden: Tensor = self.model(
            self.to_device([i for piece in pieces for i in piece]), Prefill(cache, places, self.device)
        )
        lengths, prompt, first = [len(piece) for piece in pieces], self.ids[rows[0]], len(pieces[0])
        while first < len(prompt):
            piece = prompt[first : first + min(CONTINUED_TOKENS, self.at_once)]
            where = engine.places(rows[0], 0, first + len(piece))
            hidden = self.model(self.to_device(piece), Continuation(cache, where, first, self.device))
            first, lengths = first + len(piece), [len(piece)]
        return hidden[self.to_device(lengths).cumsum(0) - 1]

    def to_device(self, numbers: Sequence[int]) -> Tensor:
        return on_device(torch.tensor(numbers), self.device)

    def grow(self) -> bool:
        """Whether the cache has room for the next token of every live row."""
        return all(self.engine.grow(row, self.cached[row] + 1) for row in self.live)

    @torch.inference_mode()
    def step(self) -> _Reading:
        """Feeds each row's newest token and chooses the next."""
        if self.stale:
            self.upload()
        self.engine.step(self.state, [self.cached[row] for row in self.live])
        return self.reading(self.live, slice(0, len(self.live)))

    def upload(self) -> None:
        """What the host knows of the live rows, in slot order."""
        numbers = [(self.cached[row], self.chosen[row], self.streams[row], 1) for row in self.live]
        self.state.upload(numbers)
        self.engine.settle(self.live, [self.cached[row] for row in self.live])
        self.stale = False

    def reading(self, rows: Sequence[int], slots: slice) -> _Reading:
        for row in rows:
            self.left[row] -= 1
            self.cached[row] += 1
            self.chosen[row] += 1
        return _Reading(rows, self.state.tokens[slots])

    def leave(self, over: Collection[int], ended: Collection[int]) -> None:
        """Lets the rows go that are over. What the host knows beforehand (a row's limit) is never fed once too often:
        no row grows beyond what it was said to need."""
        kept = [s for s, row in enumerate(self.live) if self.left[row] and row not in over and row not in ended]
        if len(kept) < len(self.live):
            self.keep(kept)

    def put_back(self) -> None:
        """The last of the prompts waits again, with what it has of its answer, so that the others have room."""
        row = max(self.live)
        self.keep([slot for slot, other in enumerate(self.live) if other != row])
        self.waiting.appendleft(row)

    @torch.inference_mode()
    def keep(self, slots: list[int]) -> None:
        """Only these slots stay; the last of them move into those that became free."""
        count = len(slots)
        for slot in set(range(len(self.live))) - set(slots):
            self.engine.leave(self.live[slot])
        holes = sorted(set(range(count)) - set(slots))
        order = list(range(count))
        for hole, mover in zip(holes, (slot for slot in slots if slot >= count), strict=True):
            order[hole] = mover
        self.live = [self.live[slot] for slot in order]
        if holes:
            self.state.reorder(order)
        self.engine.settle(self.live, [self.cached[row] for row in self.live])
        self.stale = True
