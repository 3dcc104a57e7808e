"""The quickstart's claim: a base that cannot follow instructions can after finetuning, and so can the merged model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def questions(name: str) -> set[str]:
    rows = json.loads((ROOT / "data" / name).read_text())
    return {" ".join(f"{row['instruction']} {row['input']}".lower().split()) for row in rows}


def test_held_out_questions_are_in_no_training_row() -> None:
    assert len(questions("tiny_test.json")) > 300
    assert not questions("tiny_test.json") & questions("tiny_train.json")


def test_the_embedded_model_is_small() -> None:
    files = [path for path in (ROOT / "checkpoints" / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_quickstart(tmp_path: Path) -> None:
    """Base at most 10 %, finetuned and merged at least 90 % exact match; a second run takes up what is there."""
    command = [sys.executable, "scripts/quickstart.py", "--out_dir", str(tmp_path / "quickstart")]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads((tmp_path / "quickstart" / "quickstart.json").read_text())
    assert found["base"]["exact_match"] <= 0.1
    assert found["finetuned"]["exact_match"] >= 0.9
    assert found["merged"]["exact_match"] >= 0.9
    assert found["finetuned"]["val_loss"] < 0.1 < found["base"]["val_loss"]
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert second.returncode == 0
    assert "finetuned already" in second.stdout
    assert "litlora finetune_lora" not in second.stdout
    again = json.loads((tmp_path / "quickstart" / "quickstart.json").read_text())
    assert again == found
