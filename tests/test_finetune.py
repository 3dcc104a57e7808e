"""finetune_lora end to end, on the embedded model and data."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from litlora.cli import call
from litlora.commands import finetune_lora, finetune_training
from litlora.peft_format import WEIGHTS

ROOT = Path(__file__).parents[1]
BASE = ROOT / "checkpoints" / "tiny"
DATA = ROOT / "data" / "tiny_test.json"  # the smaller file: these tests look at the run, not at the answers
FAST = {
    "checkpoint_dir": BASE, "data_path": DATA, "precision": "32-true", "accelerator": "cpu", "max_steps": 3,
    "batch_size": 8, "warmup_steps": 0, "learning_rate": 1e-3, "val_split": 16, "eval_interval": 2,
}  # fmt: skip


def finetune(out_dir: Path, **flags: Any) -> int:
    words = [
        word for flag, value in {**FAST, "out_dir": out_dir, **flags}.items() for word in (f"--{flag}", str(value))
    ]
    return call(["finetune_lora", *words])


def metrics(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_a_run_leaves_adapter_settings_metrics_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert finetune(out) == 0
    said = capsys.readouterr().err
    rows = metrics(out)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["val_loss"]) for row in rows] == [False, True, True]
    assert all(float(row["loss"]) > 0 and int(row["tokens"]) > 0 and float(row["seconds"]) > 0 for row in rows)
    assert {float(row["lr"]) for row in rows} == {1e-3}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["val_loss"] == float(rows[-1]["val_loss"])
    assert summary["tokens"] == sum(int(row["tokens"]) for row in rows) == int(rows[-1]["total_tokens"])
    settings = yaml.safe_load((out / "hyperparameters.yaml").read_text())
    assert settings["lora_r"] == 8
    assert settings["data_path"] == str(DATA)
    record = json.loads((out / "litlora.json").read_text())
    assert record["base_name"] == str(BASE)
    assert record["prompt_style"] == "alpaca"
    assert record["quantize"] is None
    assert record["val_loss"] == min(float(row["val_loss"]) for row in rows if row["val_loss"])
    for line in ("Training time: ", "Tokens: ", "Memory used: ", "Trainable parameters: ", "Validation loss: "):
        assert line in said
    assert (out / "last" / WEIGHTS).is_file()
    assert (out / "last" / "hyperparameters.yaml").read_text() == (out / "hyperparameters.yaml").read_text()
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert finetune(tmp_path / name, seed=seed, lora_dropout=0.1) == 0
    a, b, c = ((tmp_path / name / "last" / WEIGHTS).read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_the_loss_does_not_depend_on_how_a_step_is_cut(tmp_path: Path) -> None:
    """One step of 8 rows as one pack, as small packs, and one by one; and validation the same."""
    cuts = {
        "whole": {"micro_batch_tokens": 10_000},
        "packs": {"micro_batch_tokens": 100},
        "ones": {"micro_batch_size": 1},
    }
    for name, cut in cuts.items():
        assert finetune(tmp_path / name, lora_dropout=0, **cut) == 0
    whole, packs, ones = (
        [float(row[key]) for row in metrics(tmp_path / name) for key in ("loss", "val_loss") if row[key]]
        for name in cuts
    )
    assert whole == pytest.approx(packs, rel=1e-5)
    assert whole == pytest.approx(ones, rel=1e-5)


def test_best_and_last_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third validation is worse than the second: out_dir stays at that, last/ goes on."""
    losses = iter([3.0, 2.0, 4.0, 2.5])
    monkeypatch.setattr(finetune_training, "validation_loss", lambda *_: next(losses))
    assert finetune(tmp_path / "run", max_steps=4, eval_interval=1) == 0
    assert [float(row["val_loss"]) for row in metrics(tmp_path / "run")] == [3.0, 2.0, 4.0, 2.5]
    assert json.loads((tmp_path / "run" / "litlora.json").read_text())["step"] == 2
    assert json.loads((tmp_path / "run" / "last" / "litlora.json").read_text())["step"] == 4
    best, last = ((tmp_path / "run" / name / WEIGHTS).read_bytes() for name in (".", "last"))
    assert best != last


def test_without_validation_the_best_is_the_last(tmp_path: Path) -> None:
    assert finetune(tmp_path / "run", val_split=0) == 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "run" / "last" / WEIGHTS).read_bytes()
    assert not any(row["val_loss"] for row in metrics(tmp_path / "run"))


@pytest.mark.parametrize(
    "flags",
    [
        {"quantize": "bnb.nf4"},
        {"quantize": "bnb.fp4-dq", "quantize_head": "true", "lora_head": "true"},
        {"precision": "bf16-true"},
        {"precision": "bf16-mixed", "quantize": "bnb.nf4-dq"},
        {"optimizer": "adamw_8bit", "max_norm": 1.0},
        {"optimizer": "sgd", "lr_schedule": "cosine"},
        {"lora_dtype": "bfloat16", "precision": "bf16-true"},
        {"save_dtype": "float16", "lora_mlp": "true", "lora_key": "true", "lora_projection": "true"},
        {"warmup_steps": 3},
        {"warmup_steps": 10, "lr_schedule": "linear"},
        {"max_steps": 40, "batch_size": 64, "epochs": 1},  # a last step that is not full
        {"activation_checkpointing": "full", "lora_rslora": "true"},
        {"mask_prompt": "true", "shuffle": "false"},
    ],
    ids=lambda flags: " ".join(f"{key}={value}" for key, value in flags.items()),
)
def test_every_setting_trains(flags: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert finetune(out, learning_rate=5e-3, **flags) == 0
    before = 0 if "warmup_steps" not in flags else None
    moved = [tensor for key, tensor in load_file(out / "last" / WEIGHTS).items() if "lora_B" in key]
    assert moved
    assert all(tensor.any() for tensor in moved)
    assert all(torch.isfinite(tensor).all() for tensor in moved)
    if before is not None:
        assert float(metrics(out)[-1]["val_loss"]) < 20


def test_checkpointing_gives_the_same_run_with_dropout(tmp_path: Path) -> None:
    ways = ("none", "selective:2", "selective", "full:3", "full", "offload")
    for name in ways:
        assert finetune(tmp_path / name, activation_checkpointing=name, lora_dropout=0.2) == 0
        kept = yaml.safe_load((tmp_path / name / "hyperparameters.yaml").read_text())["activation_checkpointing"]
        assert kept == name
    first, *others = ([float(row["loss"]) for row in metrics(tmp_path / name)] for name in ways)
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-6)


def test_starting_from_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "first"
    assert finetune(first, lora_r=4, lora_alpha=6, lora_mlp="true", lora_query="false", lora_value="false") == 0
    capsys.readouterr()
    second = tmp_path / "second"
    assert finetune(second, lora_path=first / "last", max_steps=1) == 0
    config = json.loads((second / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]
    assert yaml.safe_load((second / "hyperparameters.yaml").read_text())["lora_mlp"] is True
    # it goes on from there: its first loss is that of the first run's last weights, on other rows, not the base's
    capsys.readouterr()
    assert finetune(tmp_path / "third", lora_path=first, lora_r=8) == 2
    message = capsys.readouterr().err
    assert "--lora_r 8" in message
    assert "lora_r 4" in message


def test_a_used_out_dir_is_refused_and_overwritten_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert finetune(out) == 0
    before = (out / WEIGHTS).read_bytes()
    capsys.readouterr()
    assert finetune(out, seed=3) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert (out / WEIGHTS).read_bytes() == before
    assert finetune(out, seed=3, overwrite="true") == 0
    assert (out / WEIGHTS).read_bytes() != before


def test_a_loss_that_is_no_number_stops_the_run_with_the_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "run", learning_rate=1e30, optimizer="sgd", max_steps=20) == 1
    message = capsys.readouterr().err
    assert "the step was not taken" in message
    assert "rows [" in message
    assert "Traceback" not in message


def test_the_settings_of_a_run_are_a_config_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert finetune(first, lora_key="true", lora_alpha=12) == 0
    settings = str(first / "hyperparameters.yaml")
    assert call(["finetune_lora", "--config", settings, "--out_dir", str(second)]) == 0
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_steps_without_any_trained_token_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An instruction as long as the context leaves no room for its answer: nothing of the row is trained."""
    rows = [{"instruction": "What is 2 plus 2?", "output": "4"}] * 4 + [
        {"instruction": "a b " * 400, "output": "c"}
    ] * 4
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    flags = {"batch_size": 4, "val_split": 0, "mask_prompt": "true", "shuffle": "false", "max_steps": 5, "epochs": 2}
    assert finetune(tmp_path / "run", data_path=data, **flags) == 0
    said = capsys.readouterr().err
    assert "4 without any trained token" in said
    assert "2 steps hold no trained token at all" in said
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["1", "2"]
    assert (tmp_path / "run" / WEIGHTS).is_file()


def test_an_interrupted_run_keeps_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after the second step, before any validation."""
    train = finetune_lora.train

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for step in train(*args, **kwargs):
            if step.number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield step

    monkeypatch.setattr(finetune_lora, "train", interrupted)
    assert finetune(tmp_path / "run", eval_interval=100, max_steps=10) == 130
    assert "stopped by SIGINT after step 2 of 10" in capsys.readouterr().err
    for directory in (tmp_path / "run", tmp_path / "run" / "last"):
        assert json.loads((directory / "litlora.json").read_text())["step"] == 2
        assert (directory / WEIGHTS).is_file()
    assert len(metrics(tmp_path / "run")) == 2
