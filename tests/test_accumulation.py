"""The training loop. One denominator per optimizer step: how a step is cut into micro-batches changes nothing, to the
last digits."""

from __future__ import annotations

import gc
from itertools import islice

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from litlora.config import ModelConfig, Rope
from litlora.data import Counts, Dataset
from litlora.frozen import Dense
from litlora.load import RandomWeights, load_model
from litlora.lora import LoRA, adapt, lora_modules, lora_parameters
from litlora.model import CausalLoss
from litlora.packing import micro_batches
from litlora.train import train

CONFIG = ModelConfig(
    model_type="llama", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope=Rope(10000.0), sliding_windows=(None, 5),
)  # fmt: skip


def ragged_rows() -> Dataset:
    """8 rows of 2 to 31 tokens, trained here and there; row 3 not at all."""
    generator = np.random.default_rng(0)
    lengths = np.array([7, 31, 2, 12, 5, 19, 3, 26])
    offsets = np.concatenate([[0], lengths.cumsum()])
    trained = generator.random(offsets[-1]) < 0.6
    trained[offsets[:-1]] = False
    trained[offsets[3] : offsets[4]] = False
    ids = generator.integers(0, 50, offsets[-1]).astype(np.int32)
    return Dataset(ids, trained, offsets, np.arange(8), Counts(rows=8))


def gradients(rows: list[int], **cut: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = load_model(RandomWeights(CONFIG, torch.float64), Dense(torch.float64), dtype=torch.float64, device="cpu")
    adapt(model, LoRA(dropout=0.0, targets=("q_proj", "o_proj", "up_proj", "lm_head")), torch.float64)
    for module in lora_modules(model).values():
        torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    loss = CausalLoss(model)
    batches = micro_batches(ragged_rows(), rows, **cut)
    denominator = sum(batch.trained_tokens for batch in batches)
    for batch in batches:
        (loss(batch) / denominator).backward()
    return [p.grad for p in lora_parameters(model) if p.grad is not None]


@pytest.mark.parametrize("cut", [{"max_rows": 1}, {"max_rows": 3}, {"max_tokens": 40}], ids=str)
def test_gradients_of_one_batch_equal_those_accumulated(cut: dict[str, int]) -> None:
    whole, parts = gradients(list(range(8))), gradients(list(range(8)), **cut)
    assert len(whole) == len(parts) > 0
    for ours, theirs in zip(parts, whole, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_fully_masked_row_changes_nothing() -> None:
    without = [row for row in range(8) if row != 3]
    for ours, theirs in zip(gradients(list(range(8))), gradients(without), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_run_is_not_held_up_by_what_was_there_before() -> None:
    """Python's search for garbage leaves it out, until the run is over, however it ends."""
    model = load_model(RandomWeights(CONFIG, torch.float32), Dense(torch.float32), dtype=torch.float32, device="cpu")
    adapt(model, LoRA(targets=("q_proj",)))
    fabric = Fabric(accelerator="cpu", devices=1)
    loss, optimizer = fabric.setup(CausalLoss(model), torch.optim.SGD(lora_parameters(model)))
    batches = [(1, micro_batches(ragged_rows(), list(range(8)), max_rows=4))] * 3
    for most in (3, 1):
        before = gc.get_freeze_count()
        steps = train(fabric, loss, optimizer, batches, learning_rate=0.1, schedule=lambda step: 1.0, max_norm=None)
        assert [gc.get_freeze_count() > before + 10_000 for _ in islice(steps, most)] == [True] * most
        steps.close()  # type: ignore[attr-defined]
        assert gc.get_freeze_count() == 0
