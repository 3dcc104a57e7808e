"""Every file in configs/ parses, and runs dry on the real data where that is at hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from litlora.cli import call, parse
from litlora.commands import finetune_lora
from litlora.commands.finetune_flags import check_flags

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
LLAMA_2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "rope_scaling": None,
    "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1,
}  # fmt: skip
TRAINABLE = {
    "llama2-7b-alpaca-lora": 4_194_304,
    "llama2-7b-alpaca-qlora-nf4": 4_194_304,
    "llama2-7b-alpaca-qlora-fp4": 4_194_304,
    "llama2-7b-alpaca-sgd-cosine": 4_194_304,
    "llama2-7b-alpaca-all-layers-r256": 20_277_248 * 32,
    "llama2-7b-lima-r256": 20_277_248 * 32,
}


def test_the_articles_runs_are_there() -> None:
    assert {path.stem for path in CONFIGS} == {*TRAINABLE, "quickstart"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_parses(config: Path) -> None:
    args, given = parse("finetune_lora", finetune_lora, ["--config", str(config)])
    assert {"checkpoint_dir", "out_dir", "data", "learning_rate"} <= given
    check_flags(args)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.stem in TRAINABLE], ids=lambda path: path.stem)
def test_dry_runs_with_config_tokenizer_and_data_only(
    config: Path, material: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "Llama-2-7b-hf"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(LLAMA_2_7B))
    shutil.copy(material("tokenizer-llama2/tokenizer.model"), base)
    data = material("lima/lima.jsonl" if "lima" in config.stem else "alpaca/alpaca_5000.json")
    flags = {"checkpoint_dir": base, "data_path": data, "out_dir": tmp_path / "out", "precision": "32-true"}
    line = ["finetune_lora", "--config", str(config), "--dry_run", "true"]
    code = call(line + [word for flag, value in flags.items() for word in (f"--{flag}", str(value))])
    said = capsys.readouterr().err
    assert code == 0, said
    assert "6,738,415,616 parameters" in said
    assert f"{TRAINABLE[config.stem]:,} trainable parameters" in said
    rows, steps = (978, "62 steps") if "lima" in config.stem else (4750, "38 steps")
    assert f"training: {rows:,} rows" in said
    assert steps in said
    assert not (tmp_path / "out").exists()
