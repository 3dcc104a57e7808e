"""What needs the card: the same numbers there as on the CPU, and whole runs. Run with: scripts/test.sh -m gpu"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litlora import recompute
from litlora.cli import call
from litlora.config import ModelConfig, Rope
from litlora.frozen import FOUR_BIT, Dense, make_quantizer
from litlora.load import RandomWeights, load_model
from litlora.lora import LoRA, adapt, lora_modules
from litlora.model import CausalLoss
from litlora.ops.attention import Bounds, Ragged, can_varlen, varlen
from litlora.packing import Batch
from litlora.recompute import Kept
from litlora.sequences import Packed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
ROOT = Path(__file__).parents[1]
SHAPE = ModelConfig(
    model_type="llama", vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, rms_norm_eps=1e-5,
    rope=Rope(10000.0), sliding_windows=(None, None),
)  # fmt: skip


@pytest.mark.parametrize("name", FOUR_BIT)
def test_quantized_bytes_are_bitsandbytes_own_and_all_but_those_of_the_cpu(name: str) -> None:
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    weight = torch.randn(256, 192, dtype=torch.bfloat16)
    sides = []
    for device in ("cpu", "cuda"):
        quantizer = make_quantizer(name, torch.float32, torch.device(device))
        sides.append(quantizer.freeze(weight.to(device), None))
    on_cpu, on_gpu = sides
    kind, nested = FOUR_BIT[name]
    packed, state = bnb.quantize_4bit(weight.cuda(), blocksize=64, quant_type=kind, compress_statistics=nested)
    assert torch.equal(on_gpu.weight, packed)
    assert torch.equal(on_gpu.absmax.to(state.absmax.dtype), state.absmax)
    assert on_gpu.absmax.dtype == (torch.uint8 if nested else torch.bfloat16)
    # bitsandbytes' two devices do not draw FP4's borders between codes alike: 1.3 % of bytes differ
    same = (on_cpu.weight == on_gpu.weight.cpu()).float().mean()
    assert same > (0.98 if kind == "fp4" else 0.999)
    error = (on_cpu.dense_weight() - on_gpu.dense_weight().cpu()).abs().max()
    assert error <= 0.3 * weight.float().abs().max()
    torch.testing.assert_close(on_cpu.absmax.float(), on_gpu.absmax.cpu().float(), rtol=1e-5, atol=1.01)


def test_a_first_answer_does_not_import_torchs_compiler() -> None:
    """It takes seconds, while somebody waits for the first token."""
    command = ["generate", "--checkpoint_dir", str(ROOT / "checkpoints" / "tiny"), "--precision", "bf16-true"]
    command += ["--prompt", "What is 2 + 2?", "--max_new_tokens", "3"]
    code = (
        f"import sys; from litlora.cli import call; sys.exit(call({command}) + 10 * ('torch._dynamo' in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_varlen_attention_is_the_reference(window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    lengths = [100, 1, 37, 64, 250]
    packed = Packed.of_lengths(lengths, "cuda")
    q, k, v = (torch.randn(sum(lengths), h, 64, device="cuda", requires_grad=True) for h in (8, kv_heads, kv_heads))
    gradient = torch.randn(sum(lengths), 8, 64, device="cuda")
    expected = Ragged(packed.cu_seqlens).attend(q, k, v, window)
    expected_gradients = torch.autograd.grad(expected, (q, k, v), gradient)
    q16, k16, v16 = (t.detach().bfloat16().requires_grad_() for t in (q, k, v))
    assert can_varlen(q16)
    got, _ = varlen(q16, k16, v16, Bounds(packed.cu_seqlens, packed.max_seqlen, len(q16)), window)
    plain = Ragged(packed.cu_seqlens).attend(q16, k16, v16, window)
    gradients = torch.autograd.grad(got, (q16, k16, v16), gradient.bfloat16())
    plain_gradients = torch.autograd.grad(plain, (q16, k16, v16), gradient.bfloat16())
    for ours, torchs, truth in zip(
        (got, *gradients), (plain, *plain_gradients), (expected, *expected_gradients), strict=True
    ):
        error, allowed = (ours.float() - truth).norm(), (torchs.float() - truth).norm()
        assert error <= 1.2 * allowed + 1e-3 * truth.norm()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = [40, 3, 25, 60]
    ids = torch.randint(0, 300, (sum(lengths),), generator=generator)
    labels = torch.cat([torch.cat([part[1:], torch.tensor([-100])]) for part in ids.split(lengths)])
    packed = Packed.of_lengths(lengths)
    kept = (labels != -100).nonzero().squeeze(1)
    return Batch(ids, labels, kept, packed.positions, packed.cu_seqlens, packed.max_seqlen, (0, 1, 2, 3))


@pytest.mark.parametrize("quantize", [None, "bnb.nf4", "bnb.fp4-dq"])
def test_loss_and_gradients_are_those_of_the_cpu(quantize: str | None) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        quantizer = make_quantizer(quantize, torch.float32, torch.device(device))
        model = load_model(RandomWeights(SHAPE, torch.float32), quantizer, dtype=torch.float32, device=device)
        adapt(model, LoRA(dropout=0.0, targets=("q_proj", "down_proj", "lm_head")))
        with torch.no_grad():
            for module in lora_modules(model).values():
                module.lora_B.weight.copy_(torch.randn(module.lora_B.weight.shape) * 0.05)
        loss = CausalLoss(model)(batch().to(device))
        loss.backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach().cpu(), gradients))
    (cpu_loss, cpu_gradients), (gpu_loss, gpu_gradients) = results
    # the two devices quantize some bytes differently: see above
    loss_error, gradient_error = (1e-3, 2e-2) if quantize else (1e-5, 1e-3)
    torch.testing.assert_close(cpu_loss, gpu_loss, rtol=loss_error, atol=0)
    for ours, theirs in zip(gpu_gradients, cpu_gradients, strict=True):
        assert (ours - theirs).norm() <= gradient_error * theirs.norm()


def test_bf16_weights_are_freed_tensor_by_tensor() -> None:
    """The load's peak is the model plus little more than one tensor."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(RandomWeights(SHAPE), Dense(torch.bfloat16), dtype=torch.bfloat16, device="cuda")
    held = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
    assert torch.cuda.max_memory_allocated() - before < held + 2 * 300 * 128 * 4 + 2**20


@pytest.mark.parametrize(
    "flags",
    [{}, {"quantize": "bnb.nf4"}, {"quantize": "bnb.fp4-dq", "optimizer": "adamw_8bit"}, {"precision": "bf16-mixed"}],
    ids=str,
)
def test_a_whole_run(flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = ROOT / "checkpoints" / "tiny", ROOT / "data" / "tiny_train.json"
    settings = {
        "checkpoint_dir": base, "data_path": data, "out_dir": tmp_path / "run", "max_steps": 40, "batch_size": 32,
        "learning_rate": 2e-3, "warmup_steps": 0, "eval_interval": 20, "mask_prompt": "true", "lora_mlp": "true",
        "lora_projection": "true", **flags,
    }  # fmt: skip
    words = [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]
    assert call(["finetune_lora", *words]) == 0
    capsys.readouterr()
    with (tmp_path / "run" / "metrics.csv").open() as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    model = ["--checkpoint_dir", str(base), "--lora_path", str(tmp_path / "run")]
    assert call(["validate", *model]) == 0  # in the run's formats, on its rows
    val_loss = json.loads(capsys.readouterr().out)["val_loss"]
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best_val_loss"]
    assert val_loss == pytest.approx(best, rel=0, abs=1e-5)
    model += ["--quantize", flags["quantize"]] if "quantize" in flags else []
    line = ["generate", *model, "--prompt", "What is 59 minus 38?", "--temperature", "0", "--max_new_tokens", "8"]
    assert call(line) == 0
    assert capsys.readouterr().out.strip()


def test_inputs_in_the_hosts_memory_take_the_same_pieces_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of other lengths need no more than the longest, and no pack reads what another wrote."""
    monkeypatch.setattr(recompute, "PIECE", 1000)
    monkeypatch.setattr(recompute._Side, "devices", {})
    torch.manual_seed(0)
    decoder = load_model(RandomWeights(SHAPE), Dense(torch.float32), dtype=torch.float32, device="cuda")
    adapt(decoder, LoRA(r=4, dropout=0.0, targets=("q_proj", "down_proj")))
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    model = CausalLoss(decoder.train())

    def run(kept: Kept, tokens: int) -> list[Tensor]:
        decoder.kept = kept
        ids = torch.arange(tokens, device="cuda") % 300
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        everything = torch.arange(tokens, device="cuda")
        batch = Batch(ids, ids.roll(-1), everything, everything, bounds, tokens, (0,))
        loss = model(batch)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    wanted = {tokens: run(Kept("full", 2), tokens) for tokens in (5, 90, 40)}
    for tokens in (40, 90, 5, 90):
        for mine, theirs in zip(run(Kept("offload", 2), tokens), wanted[tokens], strict=True):
            assert torch.equal(mine, theirs)
    (side,) = recompute._Side.devices.values()
    assert len(side.free) == 2 * -(-90 * 128 * 4 // 1000)
