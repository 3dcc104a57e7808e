"""Padding to a graph's shape changes nothing; captured micro-batches are the eager ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litlora import graphs, train
from litlora.config import ModelConfig
from litlora.frozen import make_quantizer
from litlora.graphs import Captured, Eager, Shape
from litlora.load import RandomWeights, load_model
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_modules, lora_parameters
from litlora.model import CausalLoss
from litlora.ops import Ops, fastest
from litlora.packing import IGNORED, Batch, pad
from litlora.recompute import Kept
from litlora.sequences import Packed

CONFIG = ModelConfig.from_dict(
    {"model_type": "llama", "vocab_size": 300, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
)  # fmt: skip


class Plain:
    """What is used of Fabric."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


def batch_of(lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    packed, total = Packed.of_lengths(lengths), sum(lengths)
    ids = torch.randint(0, 300, (total,), generator=generator)
    labels = torch.randint(0, 300, (total,), generator=generator)
    labels[packed.cu_seqlens[1:].long() - 1] = IGNORED
    labels[torch.rand(total, generator=generator) < 0.3] = IGNORED
    kept = (labels != IGNORED).nonzero().squeeze(1)
    return Batch(ids, labels, kept, packed.positions, packed.cu_seqlens, packed.max_seqlen, tuple(range(len(lengths))))


def model_of(
    device: str, dtype: torch.dtype, ops: Ops, dropout: float = 0.0, quantize: str | None = None
) -> CausalLoss:
    quantizer = make_quantizer(quantize, dtype, torch.device(device))
    decoder = load_model(RandomWeights(CONFIG, dtype), quantizer, dtype=dtype, device=device, ops=ops)
    torch.manual_seed(1)
    adapt(decoder, LoRA(8, 16, dropout, tuple(leaf for leaves in FLAG_TARGETS.values() for leaf in leaves)))
    with torch.no_grad():
        for module in lora_modules(decoder).values():
            module.lora_B.weight.normal_(std=0.05)
    return CausalLoss(decoder).train()


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=9), more=st.integers(0, 40), empty=st.integers(1, 5))
def test_padding_adds_what_nobody_sees(lengths: list[int], more: int, empty: int) -> None:
    batch = batch_of(lengths)
    tokens, kept, sequences = len(batch.input_ids) + more, len(batch.kept) + more, len(lengths) + empty
    padded = pad(batch, tokens, kept, sequences)
    assert [len(padded.input_ids), len(padded.kept), len(padded.cu_seqlens)] == [tokens, kept, sequences + 1]
    assert torch.equal(padded.input_ids[: len(batch.input_ids)], batch.input_ids)
    assert (padded.labels[padded.kept[len(batch.kept) :]] == IGNORED).all()
    assert (padded.cu_seqlens.diff() >= 0).all()
    assert padded.cu_seqlens[-1] == tokens
    assert padded.max_seqlen == padded.cu_seqlens.diff().max()
    shape = Shape.of(batch)
    assert shape.tokens >= len(batch.input_ids)
    assert shape.tokens - len(batch.input_ids) <= max(31, len(batch.input_ids) // 32)
    assert Shape.of(shape.pad(batch)) == shape, "a padded batch is of another shape"
    assert shape.max_seqlen >= max(batch.max_seqlen, shape.tokens - len(batch.input_ids))


@pytest.mark.parametrize("lengths", [[5], [3, 30, 1], [64, 64]])
def test_a_padded_batch_has_the_same_loss_and_gradients(lengths: list[int]) -> None:
    model, batch = model_of("cpu", torch.float64, Ops()), batch_of(lengths)
    found = []
    for one in (batch, pad(batch, len(batch.input_ids) + 17, len(batch.kept) + 9, len(lengths) + 3)):
        loss = model(one)
        found.append([loss.detach(), *torch.autograd.grad(loss, lora_parameters(model))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    batch = batch_of([4, 4])
    for tokens, kept, sequences in ((7, 9, 3), (8, 0, 3), (9, 9, 2)):
        with pytest.raises(ValueError, match="does not fit"):
            pad(batch, tokens, kept, sequences)


def test_small_micro_batches_are_captured_and_large_ones_not() -> None:
    fabric: Any = Plain("cpu")
    for quantize, share in ((None, 1.0), ("bnb.nf4", 1.0), ("fp8", 0.5)):
        model = model_of("cpu", torch.float32, Ops(), quantize=quantize)
        weights = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 192
        assert graphs._block_work(model.decoder) == share * weights
        assert isinstance(graphs.fastest_micro_step(fabric, model, [], 10), Eager), "there is nothing to capture"
        if torch.cuda.is_available():
            model.decoder.ops = fastest(torch.device("cuda"))[0]
            most = int(graphs.LAUNCH_BOUND / (share * weights))
            kinds = [type(graphs.fastest_micro_step(fabric, model, [], tokens)) for tokens in (most, most + 1)]
            assert kinds == [Captured, Eager]


def test_what_goes_to_the_host_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Captured", lambda *_: "captured")
    model = model_of("cpu", torch.float32, Ops())
    model.decoder.ops = replace(Ops(), masks=cast(Any, object()))
    fabric: Any = Plain("cpu")
    for kept, wanted in ((Kept("full", 2), False), (Kept("offload", 2), True)):
        model.decoder.kept = kept
        assert isinstance(graphs.fastest_micro_step(fabric, model, [], 10), Eager) is wanted


def test_a_rehearsal_leaves_nothing_behind() -> None:
    """The largest micro-batch is tried before the first step: no gradient stays, no random number is gone."""
    fabric: Any = Plain("cpu")
    model = model_of("cpu", torch.float32, Ops(), dropout=0.1)
    parameters, seen = lora_parameters(model), []
    model.register_forward_hook(lambda *_: seen.append(1))
    state = torch.get_rng_state()
    train._rehearse(Eager(fabric, model), batch_of([9, 4]), torch.optim.SGD(parameters, lr=1.0), fabric.device)
    assert seen
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in parameters)


class Poisoned(Eager):
    """Leaves a gradient that is no number in the steps of `bad`."""

    def __init__(self, fabric: Any, model: CausalLoss, bad: set[int]) -> None:
        super().__init__(fabric, model)
        self.bad, self.steps = bad, 0

    def __call__(self, batch: Batch, trained: int) -> Tensor:
        loss = super().__call__(batch, trained)
        self.steps += 1
        if self.steps in self.bad:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            gradients[-1].view(-1)[0] = float("nan")
        return loss


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_might_as_well_not_have_been(
    monkeypatch: pytest.MonkeyPatch, fused: bool, max_norm: float | None, device: str
) -> None:
    """A fused optimizer looks by itself: it is launched before the host knows."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    results, fabric = [], cast(Any, Plain(device))
    for seeds, bad in ((range(4), {1, 3}), (range(1, 4, 2), set())):
        model = model_of(device, torch.float32, Ops()).to(device)
        micro_step = Poisoned(fabric, model, bad)
        monkeypatch.setattr(train, "fastest_micro_step", lambda *_, it=micro_step: it)
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, fused=fused)
        steps = train.train(
            fabric, model, optimizer, [(1, [batch_of([9, 4], seed)]) for seed in seeds],
            learning_rate=1e-2, schedule=lambda _: 1.0, max_norm=max_norm,
        )  # fmt: skip
        assert [step.number for step in steps if step.bad_rows] == sorted(bad)
        assert not hasattr(optimizer, "found_inf")
        assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
        results.append([p.detach() for p in lora_parameters(model)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("largest", "forwards"), [([9, 4], 2), ([20, 20], 3)])
def test_the_largest_micro_batch_is_tried_once(largest: list[int], forwards: int) -> None:
    """By the first step itself where it is in it."""
    fabric: Any = Plain("cuda")
    model = model_of("cuda", torch.float32, Ops()).cuda()
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    steps = train.train(
        fabric, model, torch.optim.AdamW(lora_parameters(model)), [(1, [batch_of([9, 4])]), (1, [batch_of([5, 6])])],
        learning_rate=1e-3, schedule=lambda _: 1.0, max_norm=None, largest=batch_of(largest),
    )  # fmt: skip
    assert len([step.loss for step in steps]) == 2
    assert len(seen) == forwards


def run(step: Any, model: CausalLoss, batches: list[Batch], seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    losses = [step(step.prepare(batch), 50) for batch in batches]
    parameters = lora_parameters(model)
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    for p in parameters:
        p.grad = torch.zeros_like(p) if step.keeps_gradients and p.grad is None else p.grad
        if p.grad is not None:
            p.grad.zero_()
    return [*losses, *gradients]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_what_waits_for_the_host_is_not_captured() -> None:
    """In fp32 attention asks the host for the sequences' lengths."""
    fabric: Any = Plain("cuda")
    ops = fastest(fabric.device)[0]
    assert ops.masks is not None
    model, batches = model_of("cuda", torch.float32, ops), [batch_of([40, 30]), batch_of([50, 20, 7])]
    captured = Captured(fabric, model, ops.masks, lora_parameters(model))
    found = run(captured, model, batches, 5)
    assert not captured.graphs
    wanted = run(Eager(fabric, model), model, batches, 5)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kept", [Kept(), Kept("selective"), Kept("full", 2)])
@pytest.mark.parametrize("quantize", [None, "bnb.nf4-dq", "fp8"])
def test_captured_micro_batches_are_the_eager_ones(quantize: str | None, kept: Kept) -> None:
    fabric: Any = Plain("cuda")
    ops, why = fastest(fabric.device)
    assert why is None
    assert ops.masks is not None
    model = model_of("cuda", torch.bfloat16, ops, 0.1, quantize)
    model.decoder.kept = kept
    captured = Captured(fabric, model, ops.masks, lora_parameters(model))
    eager = Eager(fabric, model)
    batches = [batch_of([40, 30, 60, 62]), batch_of([3, 9]), batch_of([50, 77], 3), batch_of([30, 40, 62, 60], 4)]
    padded = [Shape.of(batch).pad(batch) for batch in batches]
    wanted = run(eager, model, padded, 5)
    for _ in range(2):  # captured, then replayed
        found = run(captured, model, batches, 5)
        assert len(captured.graphs) == 3
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    other = run(captured, model, batches, 6)
    assert not torch.equal(other[0], wanted[0]), "the masks of the graph stand still"
    assert len(captured.graphs) == 3
    before = copy.deepcopy(wanted)
    with torch.no_grad():  # the weights may move between replays
        for module in lora_modules(model).values():
            module.lora_B.weight.mul_(2)
    moved = run(captured, model, batches, 5)
    for mine, theirs in zip(moved, run(eager, model, padded, 5), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(moved[0], before[0])
