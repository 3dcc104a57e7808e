"""The peers' programs, run in the same command on the same machine: their rows land in the same results.jsonl.

The programs are not part of the project: a directory with `drive.py` (runs jobs one after another, each in a process
of its own and within its seconds) and an archive of the peers' unpacked wheels.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Each peer in its best settings, the strongest first, and the most seconds it may take; `&` runs beside the next one.
# Expected: ready 25 s, torchtune bf16 110 (two compilations), HF 35, torchtune NF4 90, HF NF4 55, LitGPT 45,
# Unsloth 80, LitGPT NF4 55, Unsloth bf16 80: the last may fall off the end.
JOBS = (
    "train:torchtune-bf16@150",
    "train:hf-bf16:packed@80",
    "&train:write@250",  # the random checkpoint that the next ones load; torchtune is building its model meanwhile
    "train:torchtune-nf4:checkpointing off@140",
    "train:hf-nf4:packed@100",
    "train:litgpt-bf16:qv@80",
    "train:unsloth-nf4:packed@120",
    "train:litgpt-nf4:qv@90",
    "train:unsloth-bf16:packed@120",
    "train:torchtune-nf4:checkpointing on@120",
)


def run(programs: Path, site: Path, out: Path, seconds: float, jobs: Sequence[str] = JOBS) -> int:
    """The driver's exit code. No job starts after `seconds`, and those under way end with them."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "bench" / "site"  # where the driver looks
        place.mkdir(parents=True)
        subprocess.run(["tar", "xzf", str(site), "-C", str(place)], check=True)
        environment = os.environ | {"OUT": str(out.resolve()), "BENCH_TMP": scratch, "BENCH_VARLEN_SHIM": "1"}
        environment.pop("PYTHONPATH", None)  # the peers bring their own versions
        command = [sys.executable, str(programs.resolve() / "drive.py"), f"{seconds:.0f}", *jobs]
        return subprocess.run(command, env=environment, check=False).returncode
