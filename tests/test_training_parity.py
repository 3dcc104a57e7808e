"""Proof of training: litlora finetune_lora, as a user runs it, has the loss of transformers + PEFT at every step.

Equal initial A and B (an adapter that PEFT saved untrained), equal rows in the file's order, dropout 0, fp32. The
reference tokenizes, pads, masks and averages on its own: nothing of litlora is in it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from parity import Run, choose_rows, open_tokenizer, save_untrained_adapter, train_ours, train_reference

ALL_BLOCKS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NF4 = "bnb.nf4"


def hold_side_by_side(run: Run, targets: list[str], tmp_path: Path, within: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, PEFT and bitsandbytes among themselves
        save_untrained_adapter(run, tmp_path / "start", targets)
        theirs, model = train_reference(run, tmp_path / "start", *open_tokenizer(run.base))
    ours, _ = train_ours(run, tmp_path / "ours", lora_path=tmp_path / "start")
    assert len(ours) == len(theirs) == run.steps
    apart = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    print(f"\nloss {theirs[0]:.6f} -> {theirs[-1]:.6f}, furthest apart {max(apart):.2e} (relative)")
    assert max(apart) < within, f"step {apart.index(max(apart)) + 1}: {max(apart):.2e} relative"
    assert sum(theirs[-5:]) < 0.97 * sum(theirs[:5]), "nothing was learnt: nothing was tested"
    saved, trained = load_file(tmp_path / "ours" / "adapter_model.safetensors"), dict(model.named_parameters())
    for key, tensor in saved.items():
        wanted = trained[key.replace(".weight", ".default.weight")]
        assert (tensor - wanted).norm() < 30 * within * wanted.norm(), f"{key} ended elsewhere"


@pytest.mark.parametrize(
    ("targets", "mask_prompt", "quantize", "within"),
    [
        (["q_proj", "v_proj"], False, None, 1e-4),
        ([*ALL_BLOCKS, "lm_head"], True, None, 1e-4),
        (ALL_BLOCKS, False, NF4, 1e-3),
    ],
    ids=["fp32, query and value", "fp32, all and masked prompts", "nf4, blocks"],
)
def test_50_steps_on_stories260k(
    targets: list[str],
    mask_prompt: bool,
    quantize: str | None,
    within: float,
    material: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base, rows = material("stories260K-hf"), json.loads(material("alpaca/alpaca_5000.json").read_text())
    chosen = choose_rows(rows, open_tokenizer(base)[0], 200, 160)
    run = Run(base, chosen, steps=50, batch_size=4, longest=160, mask_prompt=mask_prompt, quantize=quantize)
    hold_side_by_side(run, targets, tmp_path, within)


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "within"), [(None, 1e-4), (NF4, 1e-3)], ids=["fp32", "nf4"])
def test_10_steps_on_smollm2(
    quantize: str | None, within: float, smollm2: Path, material: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = json.loads(material("alpaca/alpaca_5000.json").read_text())
    chosen = choose_rows(rows[:200], open_tokenizer(smollm2)[0], 40, 128)
    run = Run(smollm2, chosen, 10, 4, 128, False, quantize, learning_rate=1e-3, warmup=2)
    hold_side_by_side(run, ["q_proj", "v_proj"], tmp_path, within)
