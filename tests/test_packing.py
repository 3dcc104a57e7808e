"""Packs hold whole examples, each once, with labels that never cross into a neighbour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litlora.data import Counts, Dataset
from litlora.packing import IGNORED, collate, micro_batches, pad, step_plan


def make(lengths: list[int], seed: int = 0) -> Dataset:
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    trained = random.random(offsets[-1]) < 0.6
    trained[offsets[:-1]] = False
    ids = random.integers(0, 50, offsets[-1]).astype(np.int32)
    return Dataset(ids, trained, offsets, np.arange(1, len(lengths) + 1), Counts(rows=len(lengths)))


datasets = st.lists(st.integers(1, 40), min_size=1, max_size=40).map(make)


def test_the_example_of_the_docstring() -> None:
    dataset = Dataset(
        np.array([1, 2, 3, 4, 5], dtype=np.int32),
        np.array([False, True, True, False, True]),
        np.array([0, 3, 5]),
        np.array([1, 2]),
        Counts(),
    )
    batch = collate(dataset, [0, 1])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert batch.labels.tolist() == [2, 3, IGNORED, 5, IGNORED]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert (batch.max_seqlen, batch.trained_tokens, batch.rows) == (3, 3, (0, 1))
    types = [getattr(batch, name).dtype for name in ("input_ids", "labels", "positions", "cu_seqlens")]
    assert types == [torch.int64, torch.int64, torch.int64, torch.int32]
    moved = batch.to("cpu")
    assert torch.equal(moved.labels, batch.labels)


@given(datasets, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_each_sequence_is_as_if_alone(dataset: Dataset, random) -> None:
    order = list(range(len(dataset)))
    random.shuffle(order)
    batch = collate(dataset, order)
    assert batch.cu_seqlens[-1] == len(batch.input_ids) == dataset.lengths.sum()
    assert batch.max_seqlen == dataset.lengths.max()
    assert batch.trained_tokens == dataset.flat_trained.sum()
    for place, index in enumerate(order):
        begin, end = batch.cu_seqlens[place], batch.cu_seqlens[place + 1]
        alone = collate(dataset, [index])
        assert torch.equal(batch.input_ids[begin:end], alone.input_ids)
        assert torch.equal(batch.labels[begin:end], alone.labels)
        assert batch.positions[begin:end].tolist() == list(range(end - begin))
        ids, trained = dataset.ids(index), dataset.trained(index)
        wanted = [int(ids[i + 1]) if trained[i + 1] else IGNORED for i in range(len(ids) - 1)]
        assert alone.labels.tolist() == [*wanted, IGNORED]
    padded = pad(batch, len(batch.input_ids) + 7, len(batch.kept) + 2, len(order) + 3)
    for rows in (batch.single_rows(), padded.single_rows()):
        for index, row in zip(order, rows, strict=True):
            alone = collate(dataset, [index])
            assert (row.rows, row.max_seqlen) == (alone.rows, alone.max_seqlen)
            for name in ("input_ids", "labels", "kept", "positions", "cu_seqlens"):
                assert torch.equal(getattr(row, name), getattr(alone, name)), name


@given(datasets, st.integers(1, 120))
@settings(deadline=None)
def test_token_packs_keep_the_budget_and_every_row(dataset: Dataset, budget: int) -> None:
    indices = list(range(len(dataset)))[::-1]
    batches = micro_batches(dataset, indices, max_tokens=budget)
    assert sorted(row for batch in batches for row in batch.rows) == sorted(indices)
    assert sum(batch.trained_tokens for batch in batches) == dataset.flat_trained.sum()
    for batch in batches:
        assert len(batch.input_ids) <= budget or len(batch.rows) == 1
        places = [indices.index(row) for row in batch.rows]
        assert places == sorted(places)
    again = micro_batches(dataset, indices, max_tokens=budget)
    assert [batch.rows for batch in again] == [batch.rows for batch in batches]


def test_token_packs_are_few_and_nearly_equal() -> None:
    random = np.random.default_rng(1)
    dataset = make(np.clip(random.lognormal(4.7, 0.5, 128), 40, 1000).astype(int).tolist())
    total = int(dataset.lengths.sum())
    batches = micro_batches(dataset, range(128), max_tokens=8192)
    sizes = [len(batch.input_ids) for batch in batches]
    assert len(batches) == -(-total // 8192)
    assert max(sizes) - min(sizes) < 0.02 * max(sizes)


def test_row_batches_keep_order() -> None:
    dataset = make([3] * 7)
    batches = micro_batches(dataset, [6, 5, 4, 3, 2, 1, 0], max_rows=3)
    assert [batch.rows for batch in batches] == [(6, 5, 4), (3, 2, 1), (0,)]
    assert [batch.rows for batch in micro_batches(dataset, [1, 0])] == [(1, 0)]
    assert micro_batches(dataset, [], max_tokens=10) == []
    with pytest.raises(ValueError, match="not by both"):
        micro_batches(dataset, [0], max_tokens=1, max_rows=1)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None)
def test_steps_cover_an_epoch(n: int, batch_size: int, seed: int, epoch: int) -> None:
    plan = step_plan(n, batch_size, seed, epoch, shuffle=True)
    assert sorted(i for step in plan for i in step) == list(range(n))
    assert all(len(step) == batch_size for step in plan[:-1])
    assert plan == step_plan(n, batch_size, seed, epoch, shuffle=True)
    straight = step_plan(n, batch_size, seed, epoch, shuffle=False)
    assert [i for step in straight for i in step] == list(range(n))


def test_the_order_depends_on_seed_and_epoch_and_is_the_same_everywhere() -> None:
    plans = [step_plan(100, 100, seed, epoch, True)[0] for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(set(map(tuple, plans))) == 4
    assert step_plan(8, 8, 1, 0, True) == [[6, 1, 2, 3, 4, 7, 5, 0]]
