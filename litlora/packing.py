"""Examples to micro-batches: whole examples side by side in one stream, never padded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from litlora.data import Dataset

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """A packed stream of N tokens in S sequences.

    `labels[i]` is the id that position i predicts (shifted already), -100 where nothing is trained; the last position
    of each sequence is always -100. Sequence s is `[cu_seqlens[s], cu_seqlens[s + 1])`.
    """

    input_ids: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64
    kept: Tensor  # (T,) int64: the T positions that have a label; known to the host, so that the card need not wait
    positions: Tensor  # (N,) int64, from 0 in each sequence
    cu_seqlens: Tensor  # (S + 1,) int32
    max_seqlen: int
    rows: tuple[int, ...]  # (S,) indices into the dataset

    @property
    def trained_tokens(self) -> int:
        return len(self.kept)

    def single_rows(self) -> Iterator[Batch]:
        """Each sequence as a batch of its own."""
        bounds = self.cu_seqlens.tolist()
        for row, begin, end in zip(self.rows, bounds, bounds[1:], strict=False):  # a padded batch has more bounds
            ids, labels, positions = (part[begin:end] for part in (self.input_ids, self.labels, self.positions))
            kept = (labels != IGNORED).nonzero().squeeze(1)
            alone = torch.tensor([0, end - begin], dtype=torch.int32)
            yield Batch(ids, labels, kept, positions, alone, end - begin, (row,))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from while the host goes on."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; to a CUDA device through pinned memory, so that the copy overlaps the host's work."""
        device = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
            return tensor.to(device)

        return self._map(move)

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            kept=move(self.kept),
            positions=move(self.positions),
            cu_seqlens=move(self.cu_seqlens),
        )


def collate(dataset: Dataset, indices: Sequence[int]) -> Batch:
    """Pack examples in the given order.

    Example: rows of 3 and 2 tokens [a b c] [d e], all trained, give input_ids [a b c d e], labels [b c -100 e -100],
    positions [0 1 2 0 1], cu_seqlens [0 3 5].
    """
    if len(indices) == 0:
        raise ValueError("a batch needs at least one example")
    ids = np.concatenate([dataset.ids(i) for i in indices]).astype(np.int64)
    trained = np.concatenate([dataset.trained(i) for i in indices])
    lengths = np.array([len(dataset.ids(i)) for i in indices], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    labels = np.full(len(ids), IGNORED, dtype=np.int64)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORED)
    labels[bounds[1:] - 1] = IGNORED  # what follows a sequence's last token is another sequence
    positions = np.arange(len(ids), dtype=np.int64) - np.repeat(bounds[:-1], lengths)
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        kept=torch.from_numpy((labels != IGNORED).nonzero()[0]),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        rows=tuple(int(i) for i in indices),
    )


def pad(batch: Batch, tokens: int, kept: int, sequences: int) -> Batch:
    """The batch with so many tokens, trained positions and sequences, none fewer than it has. What is added trains
    nothing and is attended to by nobody: one sequence of tokens, the rest empty, and as positions the stream's last,
    which never has a label.

    Example: lengths 3 and 2 padded to 8 tokens and 4 sequences give cu_seqlens [0 3 5 8 8].
    """
    more = tokens - len(batch.input_ids)
    bounds = [*batch.cu_seqlens.tolist(), *([tokens] if more else [])]
    if more < 0 or len(batch.kept) > kept or len(bounds) > sequences + 1:
        raise ValueError("a batch does not fit where it is to be padded to")
    bounds += [tokens] * (sequences + 1 - len(bounds))
    return Batch(
        input_ids=torch.cat([batch.input_ids, torch.zeros(more, dtype=torch.int64)]),
        labels=torch.cat([batch.labels, torch.full((more,), IGNORED)]),
        kept=torch.cat([batch.kept, torch.full((kept - len(batch.kept),), tokens - 1)]),
        positions=torch.cat([batch.positions, torch.arange(more)]),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=max(batch.max_seqlen, more),
        rows=batch.rows,
    )


def micro_batches(
    dataset: Dataset, indices: Sequence[int], *, max_tokens: int | None = None, max_rows: int | None = None
) -> list[Batch]:
    """One optimizer step's examples in micro-batches, as `packs` puts them together."""
    return [collate(dataset, pack) for pack in packs(dataset, indices, max_tokens=max_tokens, max_rows=max_rows)]


def packs(
    dataset: Dataset, indices: Sequence[int], *, max_tokens: int | None = None, max_rows: int | None = None
) -> list[list[int]]:
    """One optimizer step's examples by micro-batch; each example is in exactly one.

    Args:
        max_tokens: packs of nearly equal length, as few as hold at most so many tokens each; a longer example is a
            pack of its own.
        max_rows: so many examples a micro-batch, in the given order. Neither: all in one.
    """
    if max_tokens is not None and max_rows is not None:
        raise ValueError("micro-batches are limited by tokens or by rows, not by both")
    if max_rows is not None:
        groups = [list(indices[start : start + max_rows]) for start in range(0, len(indices), max_rows)]
    elif max_tokens is not None:
        lengths = [int(dataset.offsets[i + 1] - dataset.offsets[i]) for i in indices]
        groups = [[indices[place] for place in pack] for pack in _spread(lengths, max_tokens)]
    else:
        groups = [list(indices)]
    return [group for group in groups if group]


def _spread(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places 0…n-1 in packs of nearly equal length. Longest first into the emptiest pack; one pack more where that
    exceeds the budget. Places keep their order in a pack, packs the order of their first place."""
    alone = [[place] for place, length in enumerate(lengths) if length > budget]
    rest = [place for place, length in enumerate(lengths) if length <= budget]
    rest.sort(key=lambda place: (-lengths[place], place))
    packs: list[list[int]] = []
    for count in range(math.ceil(sum(lengths[place] for place in rest) / budget), len(rest) + 1):
        packs, sizes = [[] for _ in range(count)], [0] * count
        for place in rest:
            emptiest = sizes.index(min(sizes))
            packs[emptiest].append(place)
            sizes[emptiest] += lengths[place]
        if max(sizes, default=0) <= budget:
            break
    return sorted(sorted(pack) for pack in [*packs, *alone] if pack)


def step_plan(n: int, batch_size: int, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """Indices 0…n-1 of one epoch in optimizer steps of batch_size; a last partial step is kept.

    The order depends on seed and epoch alone, on every machine alike; `shuffle` False keeps the file's.
    """
    if shuffle:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(n, generator=generator).tolist()
    else:
        order = list(range(n))
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]
