"""The decode step on a card: one captured graph for each of a few batch sizes, sampling included, over a cache in which
rows grow page by page.

A batch is filled up to the next size by slots of no row, which write to the cache's first page. Up to 16 rows the step
is `FewRows`, where the model's formats allow it; else the model itself, with attention of our own.
Sizes: B slots, P pages of a row at most, H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litlora.engine import State
from litlora.errors import InputError
from litlora.few_rows import FewRows, Unsupported
from litlora.kv_cache import PAGE, KVCache, Pages, bytes_per_token, pages_of
from litlora.model import Decoder
from litlora.ops.decode_attention import LARGEST_HEAD, Workspace, attend
from litlora.ops.decode_kernels import MOST_ROWS
from litlora.sequences import View
from litlora.transfer import on_device

SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)  # of captured batches
WORKING_MEMORY = 1e9  # bytes of the card that the cache leaves for activations
PATIENCE = 8  # steps in larger batches than needed before a smaller one is captured, which costs about what they waste
PATIENCE_FEW = 100  # before `FewRows` is made for a smaller one: its kernels are others, and may not be compiled yet
SAMPLING_MEMORY = 32  # and for sampling, by slot and word of the vocabulary: eight fp32 copies of the logits


def padded(rows: int) -> int:
    """The captured size that holds so many rows."""
    return next((size for size in SIZES if size >= rows), -(-rows // 256) * 256)


def can_capture(model: Decoder) -> bool:
    """Whether the kernels run here."""
    device = model.model.embed_tokens.weight.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return model.config.head_dim % 2 == 0 and model.config.head_dim <= LARGEST_HEAD


class Captured:
    """An `Engine`."""

    def __init__(self, model: Decoder, slots: int, capacities: Sequence[int]) -> None:
        """`capacities`: tokens that each row may need, of which `slots` at most are written at a time. Raises
        InputError where the card cannot hold the longest."""
        embedding = model.model.embed_tokens.weight
        self.model, self.device, self.longest = model, embedding.device, max(capacities)
        self.width = max(MOST_ROWS, padded(slots))
        largest = sorted(capacities)[-slots:]
        pages = pool(model, largest, self.device) + 1
        self.ample = pages > sum(map(pages_of, largest))  # any rows have room, to their ends
        self.cache, self.pages = KVCache(model.config, pages * PAGE, embedding.dtype, self.device), Pages(pages)
        self.rows: list[int] = []  # by slot
        self.slots: dict[int, int] = {}
        self.table = np.zeros((self.width, pages_of(self.longest)), dtype=np.int32)  # pages by slot
        self.device_table = torch.zeros(self.table.shape, dtype=torch.int32, device=self.device)  # (B, P)
        self.stale = False  # whether the device's is not ours
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.forwards: dict[int, Callable[[State], Tensor]] = {}
        self.oversized = 0  # steps in larger batches than needed since the last capture
        self.pool: Any = None  # the memory that the graphs share
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # of captures

    def admit(self, row: int, tokens: int, live: int) -> bool:
        """Only where every other row finds a page for its next tokens, too."""
        enough = self.ample or not live or len(self.pages.free) >= pages_of(tokens + 1) + live
        return enough and self.pages.hold(row, tokens)

    def grow(self, row: int, tokens: int) -> bool:
        before = len(self.pages.of[row])
        if not self.pages.hold(row, tokens):
            return False
        if len(self.pages.of[row]) > before:
            self._list(self.slots[row], row)
        return True

    def leave(self, row: int) -> None:
        self.pages.give_back(row)

    def places(self, row: int, first: int, count: int) -> Tensor:
        return self.pages.places(row, first, count)

    def settle(self, rows: list[int], lengths: list[int]) -> None:
        for slot, row in enumerate(rows):
            if slot >= len(self.rows) or self.rows[slot] != row:
                self._list(slot, row)
        for slot in range(len(rows), len(self.rows)):
            self.table[slot] = 0
        self.rows, self.slots = list(rows), {row: slot for slot, row in enumerate(rows)}
        self.stale = True

    def _list(self, slot: int, row: int) -> None:
        pages = self.pages.of[row]
        self.table[slot, : len(pages)] = pages
        self.stale = True

    def step(self, state: State, lengths: list[int]) -> None:
        if self.stale:
            self.device_table.copy_(on_device(torch.from_numpy(self.table.copy()), self.device))
            self.stale = False
        size = self.size(len(lengths))
        if size not in self.graphs and self.known(size):
            self.capture(size, state)
        if size in self.graphs:
            self.graphs[size].replay()
        else:
            self.run(size, state)

    def known(self, size: int) -> bool:
        """Whether a step of this size can be captured: its kernels are compiled and libraries have started, since it
        or, beyond `FewRows`, another has run as it is."""
        if self.device.type != "cuda":
            return False
        return size in self.forwards or (size > MOST_ROWS and max(self.forwards, default=0) > MOST_ROWS)

    def size(self, rows: int) -> int:
        """The batch that the step runs as: rows that leave do not have a graph captured for every size they pass."""
        size = padded(rows)
        larger = [other for other in self.graphs if other > size]
        if not larger or size in self.forwards:
            return size
        self.oversized = (self.oversized + 1) % ((PATIENCE_FEW if size <= MOST_ROWS else PATIENCE) + 1)
        return min(larger) if self.oversized else size

    def made(self, size: int) -> Callable[[State], Tensor]:
        if size not in self.forwards:
            self.forwards[size] = self.forward(size)
        return self.forwards[size]

    def run(self, size: int, state: State) -> None:
        state.choose(self.made(size)(state), slice(0, size))

    def capture(self, size: int, state: State) -> None:
        """Unlike `torch.cuda.graph` it lets the card go on meanwhile, unless this is the largest graph so far, for
        which there may have to be memory."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        if size > max(self.graphs, default=0):
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        self.made(size)  # what it holds is not the graph's
        graph, kind = torch.cuda.CUDAGraph(), self.device.type
        mixed, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        # autocast would keep casts of its own beyond the graph
        with torch.autocast(kind, dtype, enabled=mixed, cache_enabled=False), torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool, capture_error_mode="relaxed")  # a kernel's variant may still be loaded
            try:
                self.run(size, state)
            finally:
                graph.capture_end()
        self.graphs[size] = graph

    def forward(self, size: int) -> Callable[[State], Tensor]:
        """What gives the logits (B, V) of the first `size` slots."""
        model, cache, table = self.model, self.cache, self.device_table  # not self: a cycle would keep the memory
        config = model.config
        if size <= MOST_ROWS and few_rows_wanted(model):
            try:
                few = FewRows(model, cache, size, self.longest, pdl=has_pdl(self.device))
            except Unsupported:
                pass
            else:
                return lambda state: few(state.tokens[:size], state.positions[:size], table)
        shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        workspace = Workspace.of(size, *shape, self.device)

        def many(state: State) -> Tensor:
            sequences = CachedRows(cache, state.positions[:size], table, workspace)
            return model.lm_head(model(state.inputs(size), sequences))  # type: ignore[no-any-return]

        return many


def few_rows_wanted(model: Decoder) -> bool:
    """In 16 bit, all of it: the kernels' products are made for tensor cores."""
    embedding = model.model.embed_tokens.weight
    return embedding.dtype.itemsize == 2 and not torch.is_autocast_enabled(embedding.device.type)


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel may begin before the one in front of it has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def pool(model: Decoder, capacities: Sequence[int], device: torch.device) -> int:
    """How many pages the cache has: for all of `capacities`, or what the card's memory leaves, but for the longest.
    Raises InputError where that does not fit."""
    needed = [pages_of(tokens) for tokens in capacities]
    if device.type != "cuda":
        return sum(needed)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    size = PAGE * bytes_per_token(model.config, model.model.embed_tokens.weight.dtype)
    working = WORKING_MEMORY + SAMPLING_MEMORY * len(capacities) * model.config.vocab_size
    room, least = int((free - working) / size), max(needed)
    if least * size > free:
        raise InputError(
            "out of memory on the GPU",
            where=f"keys and values of {max(capacities)} tokens",
            got=f"{free / 1e9:.2f} GB free",
            wanted=f"{least * size / 1e9:.2f} GB",
            fix="a smaller --max_new_tokens, or --quantize bnb.nf4-dq",
        )
    return max(least, min(sum(needed), room))


@dataclass(frozen=True)
class CachedRows:
    """One new token a slot, at `positions` (B,) of the rows whose pages are in `table` (B or more, P)."""

    cache: KVCache
    positions: Tensor
    table: Tensor
    workspace: Workspace

    def views(self, windows: Sequence[int | None]) -> Sequence[View]:
        return [_RowsView(self, layer, window) for layer, window in enumerate(windows)]


@dataclass(frozen=True)
class _RowsView:
    rows: CachedRows
    layer: int
    window: int | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = self.rows
        keys, values = rows.cache.keys[self.layer], rows.cache.values[self.layer]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        q, k, v = (x.contiguous() for x in (q, k, v))
        attend(q, k, v, keys, values, rows.positions, rows.table, PAGE, rows.workspace, self.window, out)
        return out
