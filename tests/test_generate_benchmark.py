"""benchmarks/generate.py, dry, on a tiny shape: every measure gives its figures, and what fails leaves the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "generate.py"


def test_a_dry_run_of_every_measure(tmp_path: Path) -> None:
    flags = ["--size", "tiny", "--models", "bf16-qv", "nf4dq", "--measure", "decode", "steps", "prefill", "ragged"]
    command = [sys.executable, str(SCRIPT), *flags, "--new", "5", "--slots", "3", "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    machine, *rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert machine["machine"]["command"].startswith("benchmarks/generate.py --size tiny")
    assert not [row for row in rows if "error" in row]
    for model in ("bf16-qv", "nf4dq"):
        found = {row["measure"]: row for row in rows if row["model"] == model}
        assert found.keys() == {"decode", "steps", "prefill", "ragged"}
        assert all(row["tokens_per_second"] > 0 for row in found.values())
        decode = found["decode"]
        assert decode["share"] == round(decode["tokens_per_second"] / decode["limit"], 4) or decode["share"] < 1e-3
        assert found["ragged"]["new_tokens"] > 12
