"""What a run holds, said beforehand: beside measured peaks, beside what is really loaded, and on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litlora.cli import call
from litlora.commands import finetune_lora
from litlora.config import ModelConfig
from litlora.frozen import QUANTIZERS, make_quantizer
from litlora.load import RandomWeights, load_model
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_parameters
from litlora.memory import MicroBatch, Recipe
from litlora.pace import (
    CPU_TOKENS,
    GPU_TOKENS,
    H100,
    START,
    Card,
    choose_micro_batch,
    seconds_of_run,
    seconds_per_token,
)
from litlora.packing import Batch
from litlora.recompute import Kept
from litlora.train import train

ROOT = Path(__file__).parents[1]
TINY, DATA = ROOT / "checkpoints" / "tiny", ROOT / "data" / "tiny_train.json"
LLAMA_7B = ModelConfig.from_dict(
    {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5}
)  # fmt: skip
QV = LoRA(8, 16, 0.05, ("q_proj", "v_proj"))
ALL = LoRA(16, 32, 0.0, tuple(leaf for flag, leaves in FLAG_TARGETS.items() if flag != "lora_head" for leaf in leaves))


NF4DQ, FULL = "bnb.nf4-dq", ("full", 32)
R256 = LoRA(256, 512, 0.05, tuple(leaf for leaves in FLAG_TARGETS.values() for leaf in leaves))


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int = 32000) -> ModelConfig:
    return ModelConfig.from_dict(
        {"model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner,
         "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "tokens", "way", "measured"),
    # peak allocated GB on an H100, with each run's longest micro-batch: benchmarks/train.py
    [
        (Recipe(LLAMA_7B, ALL), 8794, ("none", 0), 52.13),
        (Recipe(LLAMA_7B, ALL), 17_583, ("selective", 15), 79.59),
        (Recipe(LLAMA_7B, QV), 17_583, ("none", 0), 71.96),
        (Recipe(LLAMA_7B, ALL, NF4DQ), 17_426, ("none", 0), 79.36),
        (Recipe(LLAMA_7B, ALL, NF4DQ), 17_583, ("selective", 1), 79.52),
        (Recipe(LLAMA_7B, ALL, "bnb.nf4"), 17_426, ("none", 0), 79.46),
        (Recipe(LLAMA_7B, QV, NF4DQ), 17_583, ("none", 0), 62.44),
        (Recipe(LLAMA_7B, QV, "bnb.nf4"), 17_583, ("none", 0), 62.54),
        (Recipe(LLAMA_7B, ALL, "fp8"), 17_583, ("selective", 6), 79.68),
        (Recipe(LLAMA_7B, QV, "fp8"), 17_583, ("none", 0), 65.97),
        (Recipe(LLAMA_7B, ALL), 1131, ("selective", 31), 17.90),
        (Recipe(LLAMA_7B, ALL), 8713, ("selective", 0), 41.21),
        (Recipe(LLAMA_7B, ALL), 8794, FULL, 17.73),
        (Recipe(LLAMA_7B, ALL), 17_583, FULL, 20.74),
        (Recipe(LLAMA_7B, ALL, NF4DQ), 17_583, FULL, 11.21),
        (Recipe(LLAMA_7B, ALL), 17_583, ("offload", 32), 16.41),
        (Recipe(LLAMA_7B, QV), 1304, FULL, 14.18),
        (Recipe(LLAMA_7B, QV, NF4DQ), 1304, FULL, 4.65),
        (Recipe(LLAMA_7B, R256, NF4DQ, optimizer="adamw_8bit", lora_dtype=torch.bfloat16), 2048, FULL, 8.87),
        (Recipe(llama(5120, 13824, 40, 40, 40), QV, NF4DQ), 1304, ("full", 40), 8.35),
        (Recipe(llama(8192, 28672, 80, 64, 8), ALL, NF4DQ, lora_dtype=torch.bfloat16), 2048, ("full", 80), 42.15),
        (
            Recipe(llama(4096, 14336, 32, 32, 8, 128_256), replace(ALL, r=32), "bnb.nf4", lora_dtype=torch.bfloat16),
            131_072, ("offload", 32), 20.84,
        ),
    ],
)  # fmt: skip
def test_predicted_peaks_are_within_5_percent_of_measured_ones(
    recipe: Recipe, tokens: int, way: tuple[str, int], measured: float
) -> None:
    assert abs(recipe.footprint(MicroBatch(tokens, *way)).peak / 1e9 / measured - 1) < 0.05


def test_logits_of_an_adapted_head_are_in_fp32_for_a_moment() -> None:
    def logits(lora: LoRA, quantize: str | None = None) -> float:
        return Recipe(LLAMA_7B, lora, quantize, quantize_head=quantize is not None).footprint(MicroBatch(100)).logits

    head = replace(QV, targets=(*QV.targets, "lm_head"))
    assert logits(head) - logits(QV) == 100 * 4 * LLAMA_7B.vocab_size
    assert logits(head, NF4DQ) - logits(QV, NF4DQ) == 100 * 4 * LLAMA_7B.vocab_size
    assert logits(head, "fp8") == logits(QV, "fp8")


@pytest.mark.parametrize(
    ("lora", "quantize", "tokens", "way", "measured"),
    [  # tokens/s on an H100, as above
        (ALL, None, 8067, ("none", 0), 20_154),
        (ALL, None, 16_135, ("selective", 15), 20_669),
        (QV, None, 16_135, ("none", 0), 21_812),
        (ALL, NF4DQ, 16_135, ("none", 0), 20_562),
        (ALL, "bnb.nf4", 16_135, ("none", 0), 20_963),
        (QV, NF4DQ, 16_135, ("none", 0), 22_000),
        (QV, "bnb.nf4", 16_135, ("none", 0), 22_192),
        (ALL, "fp8", 16_135, ("selective", 6), 30_291),
        (QV, "fp8", 16_135, ("none", 0), 32_513),
        (ALL, "fp8", 8170, ("none", 0), 26_868),
        (ALL, None, 8170, ("selective", 0), 18_964),
        (ALL, None, 1063, ("selective", 31), 16_647),
        (ALL, None, 8067, FULL, 14_702),
        (ALL, None, 16_135, FULL, 14_870),
        (ALL, None, 16_135, ("offload", 32), 15_233),
        (ALL, NF4DQ, 16_135, FULL, 14_613),
        (QV, None, 1304, FULL, 12_230),
        (QV, NF4DQ, 1304, FULL, 10_525),
        (R256, NF4DQ, 2048, FULL, 8_077),
    ],
)
def test_predicted_times_are_within_15_percent_of_measured_ones(
    lora: LoRA, quantize: str | None, tokens: int, way: tuple[str, int], measured: float
) -> None:
    dtype = torch.bfloat16 if lora is R256 else torch.float32
    pace = seconds_per_token(Recipe(LLAMA_7B, lora, quantize, lora_dtype=dtype), MicroBatch(tokens, *way))
    assert abs(1 / pace / measured - 1) < 0.15


def test_a_run_takes_what_its_micro_batches_take() -> None:
    recipe, micro = Recipe(LLAMA_7B, ALL), MicroBatch(8000)
    short, long = np.array([100] * 80), np.array([8000])
    one = seconds_of_run(recipe, micro, [short], H100)
    assert one == pytest.approx(8000 * seconds_per_token(recipe, micro), rel=0.02)
    assert seconds_of_run(recipe, micro, [short, short], H100) == pytest.approx(2 * one)
    assert seconds_of_run(recipe, micro, [long], H100) > 1.02 * one, "attention over long rows costs"
    half = seconds_of_run(recipe, micro, [short], Card(H100.matmul / 2, H100.memory / 2))
    assert half == pytest.approx(2 * one - START * 32), "what the host takes does not depend on the card"


@pytest.mark.parametrize("quantize", [None, *QUANTIZERS])
@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("family", ["llama", "tied", "qwen2", "qwen3"])
def test_weights_and_adapters_are_counted_as_they_are_loaded(
    family: str, quantize: str | None, quantize_head: bool
) -> None:
    raw: dict[str, object] = {"model_type": "llama" if family == "tied" else family, "vocab_size": 512}
    raw |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    raw |= {"num_key_value_heads": 2, "tie_word_embeddings": family == "tied", "head_dim": 64}
    config = ModelConfig.from_dict(raw)
    targets = tuple(leaf for leaves in FLAG_TARGETS.values() for leaf in leaves)
    lora = LoRA(4, 8, 0.0, targets, rank_pattern={"layers.1.self_attn.q_proj": 8})
    recipe = Recipe(config, lora, quantize, quantize_head and quantize is not None)
    quantizer = make_quantizer(quantize, torch.bfloat16, torch.device("cpu"))
    weights = RandomWeights(config, torch.bfloat16)
    decoder = load_model(weights, quantizer, dtype=torch.bfloat16, device="cpu", quantize_head=recipe.quantize_head)
    loaded = sum(p.numel() * p.element_size() for p in {id(p): p for p in decoder.parameters()}.values())
    assert recipe.weight_bytes == pytest.approx(loaded, rel=0.03)  # biases, code tables and row scales are left out
    adapt(decoder, lora)
    assert recipe.adapter_parameters == sum(p.numel() for p in lora_parameters(decoder))


def test_the_articles_counts() -> None:
    assert Recipe(LLAMA_7B, QV).adapter_parameters == 4_194_304
    everything = LoRA(8, 16, 0.0, tuple(leaf for leaves in FLAG_TARGETS.values() for leaf in leaves))
    assert Recipe(LLAMA_7B, everything).adapter_parameters == 20_277_248


@given(
    memory=st.floats(1e9, 3e11),
    quantize=st.sampled_from([None, *QUANTIZERS]),
    way=st.sampled_from([("none", 0), ("selective", 0), ("selective", 9), ("full", 7), ("full", 32), ("offload", 32)]),
    lora=st.sampled_from([QV, ALL]),
    optimizer=st.sampled_from(["adamw", "adamw_8bit", "sgd"]),
)
def test_the_room_is_the_last_micro_batch_that_fits(
    memory: float, quantize: str | None, way: tuple[str, int], lora: LoRA, optimizer: str
) -> None:
    recipe = Recipe(LLAMA_7B, lora, quantize, optimizer=optimizer)
    room = recipe.room(memory, *way)
    assert recipe.footprint(MicroBatch(room + 1, *way)).peak > memory
    assert room == 0 or recipe.footprint(MicroBatch(room, *way)).peak <= memory


def test_more_memory_is_never_used_worse() -> None:
    recipe, seen = Recipe(LLAMA_7B, ALL), []
    for gigabytes in (15, 16, 18, 20, 24, 30, 40, 50, 80):
        micro = choose_micro_batch(recipe, 500, gigabytes * 1e9)
        assert recipe.footprint(micro).peak <= gigabytes * 1e9
        seen.append((seconds_per_token(recipe, micro), micro))
    assert seen == sorted(seen, key=lambda pair: -pair[0])
    assert {"none", "selective"} < {micro.policy for _, micro in seen}
    assert seen[-1][1].policy == "none"
    assert choose_micro_batch(recipe, 500, 300e9) == MicroBatch(GPU_TOKENS)
    assert choose_micro_batch(recipe, 500, 14e9) == MicroBatch(500, "offload", 32), "a row must go in"
    assert choose_micro_batch(recipe, 9000, None) == MicroBatch(9000)
    assert choose_micro_batch(recipe, 10, None, Kept("full", 32)) == MicroBatch(CPU_TOKENS, "full", 32)
    for kept in (Kept(), Kept("selective"), Kept("full", 20), Kept("offload", 32)):
        assert choose_micro_batch(recipe, 500, 80e9, kept).kept == kept
    assert choose_micro_batch(recipe, 500, 80e9, tokens=2000) == MicroBatch(2000)
    assert choose_micro_batch(recipe, 500, 18e9, tokens=2000).policy == "full", "these tokens do not fit otherwise"


def test_a_step_that_fits_in_one_pack_is_not_cut_in_two_so_that_everything_is_kept() -> None:
    """Norms and SwiGLU are worked out again in less time than a second pack takes."""
    recipe, room = Recipe(LLAMA_7B, ALL), Recipe(LLAMA_7B, ALL).room(80e9, "none")
    steps = [15_000, 16_300, room + 500, room + 900, room + 700]
    assert room < GPU_TOKENS
    assert choose_micro_batch(recipe, 500, 80e9, steps=[room - 500] * 3) == MicroBatch(room, "none")
    chosen = choose_micro_batch(recipe, 500, 80e9, steps=steps)
    assert chosen.policy == "selective"
    assert 0 < chosen.blocks < 32, "no more of it than needed"
    assert max(steps) <= chosen.tokens <= GPU_TOKENS
    assert choose_micro_batch(recipe, 500, 80e9, steps=[2 * room - 900] * 3) == MicroBatch(room, "none"), "two anyhow"
    for quantize in (None, NF4DQ, "fp8"):  # as measured on an H100
        recipe = Recipe(LLAMA_7B, ALL, quantize)
        one, two = MicroBatch(16_135, "selective"), MicroBatch(8_070)
        assert seconds_per_token(recipe, one) < seconds_per_token(recipe, two)


def test_short_packs_are_better_than_whole_blocks_twice() -> None:
    """On a card that lends 18 GB, as measured: 16,647 tokens/s against 14,525."""
    chosen = choose_micro_batch(Recipe(LLAMA_7B, ALL), 700, 18e9, steps=[16_300, 15_700, 17_100])
    assert chosen.recomputed <= 2
    assert 1100 < chosen.tokens < 1300


def test_a_long_row_goes_to_the_host_before_the_run_is_given_up() -> None:
    recipe = Recipe(LLAMA_7B, QV, "bnb.nf4-dq", lora_dtype=torch.bfloat16)
    ways = [choose_micro_batch(recipe, tokens, 22e9).policy for tokens in (2000, 6000, 30_000, 60_000)]
    assert ways == ["selective", "full", "full", "offload"]


def plan(*flags: str) -> int:
    return call(["plan", "--checkpoint_dir", str(TINY), "--data_path", str(DATA), *flags])


def test_a_plan_needs_no_weights_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY, base, ignore=shutil.ignore_patterns("*.safetensors*"))
    before = sorted(tmp_path.rglob("*"))
    assert plan("--checkpoint_dir", str(base), "--out_dir", str(tmp_path / "out"), "--gpu", "1GB") == 0
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert "frozen weights" in out
    assert "fits into the 0.35 GB that a run may use there" in out


def test_json_holds_what_the_run_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--batch_size", "16", "--max_steps", "7", "--lora_mlp", "true", "--quantize", "bnb.nf4", "--gpu", "24GB")
    assert plan(*flags, "--json", "true") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 7
    assert found["trainable_parameters"] == 138_240
    assert found["fits"] is True
    parts = found["parts"]
    held = sum(size for name, size in parts.items() if name not in ("block", "logits"))
    assert found["peak"] == held + max(parts["block"], parts["logits"])


def test_what_does_not_fit_gets_the_flags_that_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = tmp_path / "7b"
    shutil.copytree(TINY, base, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((base / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    (base / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 32, "head_dim": 128}))
    big = ("--checkpoint_dir", str(base))
    assert plan(*big, "--gpu", "16GB", "--activation_checkpointing", "none", "--micro_batch_tokens", "8000") == 1
    out = capsys.readouterr().out
    assert "does not fit into the 14.60 GB" in out
    assert "this fits: --activation_checkpointing auto --micro_batch_tokens auto: peak" in out
    assert plan(*big, "--gpu", "16GB", "--activation_checkpointing", "none", "--micro_batch_size", "100") == 1
    assert "this fits: --activation_checkpointing auto without --micro_batch_size: peak" in capsys.readouterr().out
    assert plan(*big, "--gpu", "80GB", "--activation_checkpointing", "offload", "--micro_batch_tokens", "10000") == 0
    assert "2.62  of the host's memory" in capsys.readouterr().out, "32 blocks, 10,000 tokens of 4,096, 2 bytes each"
    assert plan(*big, "--gpu", "3GB") == 1
    assert "nothing that can be switched makes it fit" in capsys.readouterr().out

    dq, r256 = {"--quantize": "bnb.nf4-dq"}, ("--lora_r", "256", "--lora_alpha", "512", "--lora_mlp", "true")
    mixed = {"--quantize": "bnb.nf4-dq", "--lora_dtype": "bfloat16"}
    for flags, gpu, wanted in (
        ((), "12GB", dq),
        (("--precision", "32-true"), "24GB", {"--precision": "bf16-true"}),
        (("--precision", "32-true"), "6GB", dq),
        ((*r256, "--optimizer", "sgd"), "8GB", mixed),
        ((*r256, "--lora_head", "true"), "6GB", dq | {"--lora_r": 64, "--lora_alpha": 128.0}),
        (("--max_seq_length", "90"), "5.2GB", {}),
    ):
        assert plan(*big, *flags, "--gpu", gpu, "--json", "true") == 1, (flags, gpu)
        found = json.loads(capsys.readouterr().out)
        assert found["fits"] is False
        assert wanted.items() <= found["proposal"]["flags"].items(), (flags, gpu, found["proposal"])
        assert found["proposal"]["peak"] <= found["gpu"] < found["peak"]
        pasted = [part for flag in found["proposal"]["flags"].items() for part in map(str, flag)]
        assert plan(*big, *flags, *pasted, "--gpu", gpu, "--json", "true") == 0, pasted
        again = json.loads(capsys.readouterr().out)
        assert again["peak"] <= found["gpu"]
        if "--max_seq_length" not in found["proposal"]["flags"]:
            said = ("peak", "micro_batch_tokens", "kept")
            assert {name: again[name] for name in said} == {name: found["proposal"][name] for name in said}
        for name in found["proposal"]["flags"]:  # nothing is given up that need not be
            if name not in ("--lora_alpha", "--on_overlong"):
                place = pasted.index(name)
                fewer = pasted[:place] + pasted[place + 2 :]
                assert plan(*big, *flags, *fewer, "--gpu", gpu, "--json", "true") == 1, (name, pasted)
                capsys.readouterr()


@pytest.mark.parametrize("size", ["lots", "0GB", "24TB", ""])
def test_a_bad_size_is_one_message(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--gpu", size) == 2
    error = capsys.readouterr().err
    assert "not a size of memory" in error
    assert "24GB" in error


def test_the_largest_micro_batch_of_the_whole_run_is_tried_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def spy(fabric: Any, model: Any, optimizer: Any, batches: Any, *, largest: Batch, **settings: Any) -> Iterator[Any]:
        every = [len(batch.input_ids) for _, step in batches for batch in step]
        seen.append((len(largest.input_ids), max(every)))
        return train(fabric, model, optimizer, iter(()), **settings)

    monkeypatch.setattr(finetune_lora, "train", spy)
    for cut in ("--micro_batch_size", "--micro_batch_tokens"):
        flags = ["--checkpoint_dir", str(TINY), "--data_path", str(DATA), "--out_dir", str(tmp_path / cut)]
        call(["finetune_lora", *flags, "--batch_size", "24", "--max_steps", "9", cut, "7" if "size" in cut else "300"])
    assert len(seen) == 2
    assert all(found == wanted for found, wanted in seen)
