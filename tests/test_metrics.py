"""What a run says of itself: FLOP, weight changes, the live line, the loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from litlora.config import ModelConfig
from litlora.deltas import Deltas
from litlora.flops import SIZE, StepFlops, matmul_rate
from litlora.load import Directory, load_model
from litlora.lora import LoRA, adapt, lora_modules
from litlora.metrics import Progress
from litlora.model import CausalLoss, Decoder
from litlora.packing import Batch
from litlora.precision import RunPrecision
from litlora.recompute import Kept

CPU = torch.device("cpu")
BASE = Path(__file__).parents[1] / "checkpoints" / "tiny"


def adapted(lora: LoRA, quantize: str | None = None) -> Decoder:
    """The embedded model in fp32 under an adapter with random A and B."""
    precision = RunPrecision("32-true", quantize, CPU)
    decoder = load_model(Directory.open(BASE), precision.quantizer, dtype=torch.float32, device=CPU)
    adapt(decoder, lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in lora_modules(decoder).values():
            module.lora_B.weight.copy_(torch.randn(module.lora_B.weight.shape, generator=generator))
    return decoder


def batch_of(lengths: list[int], trained: int) -> Batch:
    """Rows of these lengths, of which the first `trained` positions have labels."""
    n = sum(lengths)
    labels = torch.full((n,), -100)
    labels[:trained] = 5
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    rows = tuple(range(len(lengths)))
    return Batch(torch.full((n,), 3), labels, torch.arange(trained), positions, bounds, max(lengths), rows)


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_the_linears_flop_are_those_that_torch_counts(recomputed: int) -> None:
    """Forward and backward of a real step, less what torch spares: the gradient of the first block's input, and the
    last product of a block that is computed again."""
    decoder = adapted(LoRA(r=4, dropout=0, targets=("q_proj", "v_proj", "lm_head"))).train()
    decoder.kept = Kept("full", recomputed)
    config, lengths, trained = decoder.config, [7, 5], 6
    with FlopCounterMode(display=False) as counter:
        CausalLoss(decoder)(batch_of(lengths, trained)).backward()
    counted = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
    linear = sum(flop for op, flop in counted.items() if op in ("aten.mm", "aten.addmm"))

    modules, shapes = lora_modules(decoder), config.linear_shapes
    flops = StepFlops.of(config, modules, recomputed=recomputed)
    ours = flops.per_token * sum(lengths) + flops.per_trained_token * trained
    first = {name: module for name, module in modules.items() if ".layers.0." in name}
    spared = sum(out * inn for name, (out, inn) in shapes.items() if name[-6:] in ("q_proj", "k_proj", "v_proj"))
    spared += sum(module.lora_A.weight.numel() for module in first.values())
    spared += recomputed * config.hidden_size * config.intermediate_size
    assert linear == ours - 2 * spared * sum(lengths)


def test_attentions_flop_are_those_of_the_pairs_that_see_each_other() -> None:
    config = ModelConfig.load(BASE)
    lengths = np.array([1, 3, 10])
    for window in (None, 4):
        pairs = sum(min(i + 1, window or i + 1) for length in lengths for i in range(length))
        one = StepFlops(per_token=0, per_trained_token=0, per_pair=1, windows=(window,))
        assert one.count(lengths, 0) == pairs
    full = StepFlops.of(config, {}, recomputed=False)
    assert full.per_pair == 3 * 4 * config.num_attention_heads * config.head_dim


def test_a_cpu_has_no_matmul_rate() -> None:
    assert matmul_rate(CPU, torch.float32) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_the_matmul_rate_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOP of what is timed over its seconds, without a trace in memory and random numbers."""
    device, product, timed = torch.device("cuda", 0), torch.mm, []

    def counted(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
        timed.append(a.shape == b.shape == (SIZE, SIZE))
        return product(a, b, **options)

    monkeypatch.setattr(torch, "mm", counted)
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda start, end: 250.0)
    state, held = torch.cuda.get_rng_state(device), torch.cuda.memory_reserved(device)
    assert matmul_rate(device, torch.bfloat16) == len(timed) * 2 * SIZE**3 / 0.25
    assert all(timed)
    assert len(timed) >= 10
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert torch.cuda.memory_reserved(device) <= held + 256 * 2**20  # cuBLAS keeps a workspace, the allocator a segment


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_weight_changes_are_those_of_the_dense_product(quantize: str | None) -> None:
    lora = LoRA(r=4, alpha=6, dropout=0, targets=("v_proj", "down_proj", "lm_head"), rslora=True)
    decoder = adapted(lora, quantize)
    modules = lora_modules(decoder)
    found: dict[str, list[float]] = {}
    for name, module in modules.items():
        delta = module.scale * (module.lora_B.weight.double() @ module.lora_A.weight.double())
        weight = module.base_layer.dense_weight().double()
        found.setdefault(name.rpartition(".")[2], []).append((delta.norm() / weight.norm()).item())
    deltas = Deltas(modules)
    wanted = {target: sum(ratios) / len(ratios) for target, ratios in found.items()}
    assert deltas.by_target() == pytest.approx(wanted, rel=1e-5)
    assert list(deltas.by_target()) == ["v_proj", "down_proj", "lm_head"]
    with torch.no_grad():
        for module in modules.values():
            module.lora_B.weight.zero_()
    assert set(deltas.by_target().values()) == {0.0}


def test_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(25, 10) as progress:
        for number in range(1, 26):
            progress.step(number, {"loss": f"{number}"}, remaining=61)
        progress.note("a note")
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "training step 10/25 | loss 10 | 1:01 left"
    assert [line.split(" |")[0].split()[-1] for line in lines[:-1]] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[-1] == "a note"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, 1, quiet=True) as progress:
        progress.step(1, {"loss": "1"})
        progress.note("a note")
    assert capsys.readouterr().err == ""


def test_the_time_left_counts_what_this_process_did(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run resumed at step 90 of 100 that took 4 s for two steps has 8 more to go: 16 s."""
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("litlora.metrics.time.perf_counter", lambda: next(clock))
    with Progress(100, 1) as progress:
        progress.step(91, {})
        progress.step(92, {})
    assert capsys.readouterr().err.splitlines()[-1] == "training step 92/100 | 16.0 s left"
