"""Kills finetuning runs with SIGKILL at seeded random moments, starts the same command again, and compares with the run
that was not interrupted: losses, the bytes of every adapter file, and the state (adapter, optimizer, random generators)
that the last checkpoint holds.

A run is killed from outside at any moment of its time, or from inside: at a random call that writes to the disk (of a
save, of the start, of the resuming), in the forward pass of a random micro-batch, or of a validation batch. Every other
run is killed a second time while it resumes.

    python benchmarks/kill.py --settings fp32 --runs 50
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FLAGS: dict[str, object] = {
    "checkpoint_dir": ROOT / "checkpoints" / "tiny", "data": "json", "data_path": ROOT / "data" / "tiny_test.json",
    "accelerator": "cpu", "max_steps": 12, "batch_size": 6, "micro_batch_size": 2, "val_split": 6, "eval_interval": 4,
    "save_interval": 3, "learning_rate": 5e-2, "warmup_steps": 12, "max_norm": 1.0,  # the best is not the last
    "lora_dropout": 0.1, "lora_mlp": "true", "resume": "auto",
}  # fmt: skip
SETTINGS: dict[str, dict[str, object]] = {
    "fp32": {"precision": "32-true"},
    "bf16": {"precision": "bf16-true"},
    "nf4": {"precision": "32-true", "quantize": "bnb.nf4"},
    "nf4-bf16": {"precision": "bf16-true", "quantize": "bnb.nf4-dq"},
    "adamw_8bit": {"precision": "32-true", "optimizer": "adamw_8bit"},
    "cuda": {"accelerator": "cuda", "deterministic": "true", "precision": "bf16-true"},
    "cuda-nf4": {"accelerator": "cuda", "deterministic": "true", "precision": "bf16-true", "quantize": "bnb.nf4-dq"},
}
MOMENTS = ("any moment", "a write", "a micro-batch", "a validation batch")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "litlora.json")
SAME = ("step", "epoch", "loss", "val_loss", "lr", "grad_norm", "clipped", "tokens", "trained_tokens", "total_tokens")


@dataclass(frozen=True)
class Kill:
    """When: after `at` seconds of a run, or inside it at the `at`th call of a kind, from 1."""

    moment: str
    at: float


@dataclass
class Figures:
    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    resumed_at: Counter[int] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)


def command(out_dir: Path, setting: str) -> list[str]:
    flags = FLAGS | SETTINGS[setting] | {"out_dir": out_dir}
    return ["finetune_lora", *(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))]


def count_calls(kill: Kill | None) -> Counter[str]:
    """Counts, in this process, what may be killed; kills it where `kill` says."""
    from litlora.model import CausalLoss

    counts: Counter[str] = Counter()

    def reached(moment: str) -> None:
        counts[moment] += 1
        if kill is not None and kill.moment == moment and counts[moment] == kill.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reached("a write")
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "link", "mkdir", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    forward = CausalLoss.forward

    def counted(self: CausalLoss, batch: Any) -> Any:
        reached("a micro-batch" if self.training else "a validation batch")
        return forward(self, batch)

    CausalLoss.forward = counted  # type: ignore[method-assign]
    return counts


def child(out_dir: Path, setting: str, kill: Kill | None, counts_file: Path | None) -> int:
    """The command itself, in this process."""
    from litlora.cli import call

    counts = count_calls(kill)
    code = call(command(out_dir, setting))
    if counts_file:
        counts_file.write_text(json.dumps(counts))
    return code


class Runner:
    """Starts runs, each in a process of its own: a fresh interpreter, or (`fork`) one that has torch loaded already."""

    def __init__(self, folder: Path, setting: str, *, fork: bool) -> None:
        self.folder, self.setting, self.fork = folder, setting, fork
        self.log = folder / "log.txt"
        if fork:
            import litlora.commands.finetune_lora  # noqa: F401

    def run(self, out_dir: Path, kill: Kill | None = None, counts_file: Path | None = None) -> int:
        """The exit code; -9 of a run that was killed."""
        start = self._fork if self.fork else self._spawn
        pid = start(out_dir, kill, counts_file)
        if kill is not None and kill.moment == MOMENTS[0]:
            end = time.monotonic() + kill.at
            while time.monotonic() < end:
                time.sleep(0.002)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:  # it was faster this time
                    return os.waitstatus_to_exitcode(status)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _fork(self, out_dir: Path, kill: Kill | None, counts_file: Path | None) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                for stream in (1, 2):
                    os.dup2(log, stream)
                code = child(out_dir, self.setting, kill, counts_file)
            finally:
                os._exit(code)
        return pid

    def _spawn(self, out_dir: Path, kill: Kill | None, counts_file: Path | None) -> int:
        inside = kill is not None and kill.moment != MOMENTS[0]
        if inside or counts_file:
            words = [__file__, "--child", json.dumps([str(out_dir), self.setting, kill and [kill.moment, kill.at]])]
            words += [str(counts_file)] if counts_file else []
        else:
            words = ["-m", "litlora", *command(out_dir, self.setting)]
        with self.log.open("a") as log:
            return subprocess.Popen([sys.executable, *words], stdout=log, stderr=log, cwd=ROOT).pid


def differences(reference: Path, out_dir: Path) -> list[str]:
    """What of a run is not, bit for bit, as in the one that was not interrupted."""
    files = [Path(name) for name in ADAPTER] + [Path("last") / name for name in ADAPTER]
    checkpoints = sorted(path.name for path in (reference / "checkpoints").iterdir())
    files += [Path("checkpoints") / name / "state.safetensors" for name in checkpoints]
    wrong = [
        str(file)
        for file in files
        if not (out_dir / file).is_file() or (out_dir / file).read_bytes() != (reference / file).read_bytes()
    ]
    if rows(reference) != rows(out_dir):
        wrong.append("metrics.csv")
    names = {str(path.relative_to(reference)) for path in reference.rglob("*")}
    wrong += sorted(names ^ {str(path.relative_to(out_dir)) for path in out_dir.rglob("*")})
    return wrong


def rows(out_dir: Path) -> list[tuple[str, ...]]:
    """metrics.csv without times and memory."""
    with (out_dir / "metrics.csv").open() as stream:
        return [tuple(row[column] for column in SAME) for row in csv.DictReader(stream)]


def choose(dice: random.Random, number: int, counts: dict[str, int], seconds: float) -> list[Kill]:
    """One kill, or two in every other run; all moments in turn."""
    kills = []
    for moment in (MOMENTS[number % len(MOMENTS)], *(dice.choices(MOMENTS) if number % 2 else ())):
        at = dice.uniform(0, seconds) if moment == MOMENTS[0] else dice.randint(1, counts[moment])
        kills.append(Kill(moment, at))
    return kills


def campaign(setting: str, runs: int, seed: int, folder: Path, *, fork: bool = False) -> Figures:
    """Kills `runs` runs of a setting and starts each again until it ends."""
    runner, figures, dice = Runner(folder, setting, fork=fork), Figures(), random.Random(seed)
    reference, counts_file = folder / "reference", folder / "counts.json"
    started = time.monotonic()
    assert runner.run(reference, counts_file=counts_file) == 0, runner.log.read_text()
    seconds = time.monotonic() - started
    counts = json.loads(counts_file.read_text())
    for number in range(runs):
        out_dir = folder / f"run{number}"
        kills = choose(dice, number, counts, seconds)
        name = f"run {number}: " + ", ".join(f"{kill.moment} {kill.at:g}" for kill in kills)
        code = -signal.SIGKILL
        for kill in kills:
            code = runner.run(out_dir, kill)
            if code != -signal.SIGKILL:
                break  # it ended before its moment came: the second of two, with less left to do
            figures.kills[kill.moment] += 1
            saved = sorted((out_dir / "checkpoints").glob("step-*"))
            figures.resumed_at[int(saved[-1].name[5:]) if saved else 0] += 1
        if code == -signal.SIGKILL:
            code = runner.run(out_dir)
        figures.runs += 1
        if code != 0:
            figures.lost.append(f"{name}: exit code {code}")
        elif wrong := differences(reference, out_dir):
            figures.differing.append(f"{name}: {', '.join(wrong)}")
        if code == 0 and not wrong:
            shutil.rmtree(out_dir)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["fp32"])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="fork from a process that has torch loaded: faster")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        out_dir, setting, kill = json.loads(args.child[0])
        counts_file = Path(args.child[1]) if args.child[1:] else None
        sys.exit(child(Path(out_dir), setting, Kill(*kill) if kill else None, counts_file))
    import torch

    print(f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}")
    failed = False
    for setting in args.settings:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LITLORA_CACHE"] = str(Path(folder) / "cache")
            started = time.monotonic()
            figures = campaign(setting, args.runs, args.seed, Path(folder), fork=args.fork)
            took = time.monotonic() - started
            kills = ", ".join(f"{count} at {moment}" for moment, count in sorted(figures.kills.items()))
            print(f"{setting}: {figures.runs} runs, {figures.kills.total()} kills ({kills}) in {took:.0f} s")
            print(f"  resumed after step: {dict(sorted(figures.resumed_at.items()))}")
            print(f"  lost {len(figures.lost)}, differing {len(figures.differing)}", flush=True)
            for line in figures.lost + figures.differing:
                print(f"    {line}")
            if figures.lost or figures.differing:
                failed = True
                print((Path(folder) / "log.txt").read_text()[-5000:])
    sys.exit(failed)


if __name__ == "__main__":
    main()
