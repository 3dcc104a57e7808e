"""benchmarks/quality.py on the tiny real model: every run has its figures, and the limits are held to them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality.py"
sys.path.append(str(SCRIPT.parent))

import quality  # noqa: E402

from litlora.commands import finetune_lora  # noqa: E402
from litlora.ops import Ops, fastest  # noqa: E402

Row = dict[str, Any]


def test_every_run_on_the_tiny_real_model(material: Callable[[str], Path], tmp_path: Path) -> None:
    flags = ["--base", material("stories260K-hf"), "--data", material("alpaca/alpaca_5000.json"), "--out", tmp_path]
    sizes = ["--steps", 3, "--batch_size", 2, "--validation_rows", 4, "--longest", 180, "--learning_rate", 1e-2]
    words = [sys.executable, SCRIPT, *flags, *sizes, "--parts", "fused", "peers"]
    words += ["--precision", "32-true", "--at_once", 2]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    _, *rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    runs = {row["run"]: row for row in rows if "run" in row}
    assert runs.keys() == {*quality.PARTS["fused"], *quality.PARTS["peers"]}
    assert not [row for row in rows if "error" in row], done.stderr
    assert all(row["losses"][-1] < row["losses"][0] for row in runs.values())
    found = {(row["check"], row["beside"]): row for row in rows if "check" in row}
    assert len(found) == 9
    assert all(row["holds"] or row["limit"] is None for row in found.values())
    for name in ("bnb.nf4", "bnb.fp4"):
        assert runs[f"PEFT {name}"]["equal_bytes"] == 1
        assert abs(found[name, f"PEFT {name}"]["apart"]) < 1e-3
        assert runs[name]["losses"][0] == pytest.approx(runs[f"PEFT {name}"]["losses"][0], rel=1e-4)
        assert runs[name]["losses"][0] > 1.01 * runs["plain"]["losses"][0], "4 bits cost something"
    assert "| bnb.fp4 beside PEFT bnb.fp4 | validation loss |" in done.stdout


def test_only_plain_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []

    def train(*_: object, **__: object) -> tuple[list[float], Row]:
        chosen.append(finetune_lora.fastest)
        return [], {"val_loss": None}

    monkeypatch.setattr(quality, "train_ours", train)
    for name in ("plain", "fused"):
        quality.ours(quality.Run(Path(), [], 1, 1, 8, False), quality.WORK[name], Path())
    assert chosen[0](torch.device("cuda")) == (Ops(), None)
    assert chosen[1] is fastest


def row(run: str, losses: list[float], val_loss: float | None = None) -> Row:
    about = {"run": run, "steps": len(losses), "batch_size": 2, "seconds": 1.0}
    return {**about, "losses": losses, "val_loss": val_loss}


def test_limits_and_what_has_no_figures() -> None:
    nan = float("nan")
    rows = [
        row("fp32", [2.0, 1.0]), row("plain", [2.0, 1.0]), row("fused", [2.0, 1.011]),
        row("fused, full", [2.01, 1.005]),
        row("fused, selective", [2.0, nan]), row("bf16", [2.0], 2.0), row("fp8", [2.0], 1.97),
        row("bnb.nf4", [2.0], 2.1), row("PEFT bnb.nf4", [2.0], 2.09), row("bnb.fp4", [2.0], None),
        {"run": "PEFT bnb.fp4", "error": "exit code 1"},
    ]  # fmt: skip
    holds = {(check["check"], check["beside"]): check["holds"] for check in quality.checks(rows)}
    assert holds == {
        ("fused", "plain"): False, ("fused, full", "plain"): True, ("fused, selective", "plain"): False,
        ("fused", "fp32"): None, ("plain", "fp32"): None,
        ("fused, selective", "fused"): False, ("fused, full", "fused"): True, ("fp8", "bf16"): False,
        ("bnb.nf4", "bf16"): None, ("bnb.fp4", "bf16"): None, ("bnb.nf4", "PEFT bnb.nf4"): True,
    }  # fmt: skip
    text = quality.report(rows)
    assert "| fused beside plain | furthest step | 1.10e-02 | ≤ 1% ✗ |" in text
    assert "| fp8 beside bf16 | validation loss | -1.50% | ≤ 1% ✗ |" in text
    assert "- PEFT bnb.fp4: exit code 1" in text
