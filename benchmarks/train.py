"""Training speed and memory on exact model shapes with random weights (neither depends on the values), peers beside it.

Rows have the lengths of Alpaca under Llama 2's tokenizer (alpaca_lengths.json), 128 an optimizer step; tokens/s count
real tokens of whole optimizer steps after the warm-up. Every setting runs in a process of its own, forked after the
imports, so that one that fails, hangs or breaks the card's context leaves the others; its row is on disk at once.

    python benchmarks/train.py --settings speed memory --card 2 --profile bf16-all --out DIR
    python benchmarks/train.py --settings --peers DIR_OF_PROGRAMS --peers_site SITE.tgz --out DIR
    python benchmarks/tables.py DIR/results.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the command line does
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to look for a card must not start CUDA before the forks
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import card  # noqa: E402
import from_command  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402
from runs import measure  # noqa: E402
from settings import GROUPS, SETTINGS, SIZES, Setting, choose, config_of, random_rows  # noqa: E402

from litlora.errors import InputError  # noqa: E402
from litlora.packing import micro_batches  # noqa: E402
from litlora.precision import pick_device  # noqa: E402

Row = dict[str, Any]
FORKING = threading.Lock()  # libraries that look after forks refuse two at once
GOALS = ("goal_speed", "goal_share", "goal_gb", "goal_weights_gb", "goal_minutes")


class Results:
    """results.jsonl: a line a figure, there as soon as it is known. The lines after a `machine` line are of it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.file, self.kernels = directory / "results.jsonl", directory / "kernels.txt"

    def add(self, row: Row) -> None:
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        print(line if len(line) < 900 else line[:900] + "…", flush=True)
        with self.file.open("a") as stream:
            stream.write(line + "\n")


def in_child(work: Callable[[], None], limit: float) -> str | None:
    """Runs `work` in a forked process; says how it ended, if not well. After `limit` seconds it is ended with all that
    it started."""
    sys.stdout.flush()
    with FORKING:
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"not done after {limit:.0f} s"


def figures(setting: Setting, args: argparse.Namespace, results: Results, import_seconds: float) -> None:
    """Adds the setting's row, or one that says why there are no figures."""
    before, about = compiled_files(), labels(setting)
    listing = results.kernels if {setting.name, "all"} & set(args.profile) else None
    try:
        row = measure(setting, args.ops, args.rows, listing)
        row["first_step_seconds"] += import_seconds
        row["kernels_compiled"] = compiled_files() - before
    except InputError as error:
        row = {"skipped": str(error).replace("\n", " ")[:200]}
    except torch.cuda.OutOfMemoryError as error:
        row = {"error": f"out of memory: {str(error)[:150]}"}
    except Exception as error:
        traceback.print_exc()
        row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    results.add({**about, "ops": args.ops, **row})


def compiled_files() -> int:
    """Files in the caches of compiled kernels: none added is a warm start."""
    triton = os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    return sum(len(files) for home in (triton, inductor) if home for _, _, files in os.walk(home))


def labels(setting: Setting) -> Row:
    """What a row is about, and its goals."""
    return {
        "setting": setting.name,
        "model": setting.model,
        "quantize": setting.quantize or "none",
        "adapter": f"{'+'.join(name.removesuffix('_proj') for name in setting.lora.targets)} r={setting.lora.r}",
        "dropout": setting.lora.dropout,
        "checkpointing": setting.checkpointing,
        "rows": str(setting.length or "alpaca"),
        "batch_size": setting.batch_size,
        "optimizer": setting.optimizer,
        "lora_dtype": setting.lora_dtype,
        "warmup": setting.warmup,
        **{name: getattr(setting, name) for name in GOALS},
    }


def card_figures(settings: list[Setting], results: Results, seconds: float) -> None:
    """What the card sustains at the micro-batches of the settings' first model."""
    model = settings[0].model if settings else "llama2-7b"
    cases: dict[str, tuple[int, int | None]] = {"alpaca": (128, None)}
    cases |= {str(s.length): (1, s.length) for s in settings if s.length and s.model == model}
    config, lengths = config_of(model), {}
    for name, (rows, length) in cases.items():
        data = random_rows(rows, config.vocab_size, length)
        first = micro_batches(data, range(rows), max_tokens=length or 8192)[0]
        lengths[name] = first.cu_seqlens.diff().tolist()
    for row in card.measure(config, lengths, pick_device("auto"), seconds):
        results.add({"model": model, **row})


def machine() -> Row:
    """Conditions; `id` tells whether two files are of one start of one machine. Starts no CUDA."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "id": boot.read_text()[:8] if boot.exists() else "",
        "gpu": output_of(query) if torch.cuda.is_available() else "none (CPU)",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("COMMIT") or output_of(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["benchmarks/train.py", *sys.argv[1:]]),
    }


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def process_age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*GROUPS, *SETTINGS]
    parser.add_argument("--settings", nargs="*", choices=known, default=["speed"], help="names or groups; empty: none")
    parser.add_argument("--ops", choices=["auto", "reference"], default="auto")
    parser.add_argument("--steps", type=int, help="timed optimizer steps, instead of each setting's own")
    parser.add_argument("--warmup", type=int, help="steps before them")
    parser.add_argument("--rows", type=int, help="train once on so many rows; 50000 is the articles' whole run")
    parser.add_argument("--model", choices=SIZES, help="instead of each setting's own; tiny to try the script")
    parser.add_argument("--profile", nargs="*", default=[], help="settings (or all) whose kernels are listed by kind")
    parser.add_argument("--card", type=float, default=0, help="seconds for each figure of what the card sustains")
    parser.add_argument("--first_step", action="store_true", help="the command itself, from a checkpoint on disk")
    parser.add_argument("--peers", type=Path, help="directory with the peers' drive.py; run after the settings")
    parser.add_argument("--peers_site", type=Path, help="archive of the peers' packages")
    parser.add_argument("--peers_jobs", nargs="+", default=peers.JOBS)
    parser.add_argument("--peers_seconds", type=float, default=470)
    parser.add_argument("--seconds", type=float, default=570, help="no setting starts after so many")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one setting")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "out")))
    args = parser.parse_args(argv)
    if args.peers and not args.peers_site:
        parser.error("--peers needs --peers_site")
    return args


def main(argv: list[str] | None = None) -> None:
    args, import_seconds = arguments(argv), process_age()
    results = Results(args.out)
    results.add({"machine": machine() | {"import_seconds": round(import_seconds, 2)}})
    override = {name: getattr(args, name) for name in ("steps", "warmup", "model") if getattr(args, name) is not None}
    settings = [replace(setting, **override) for setting in choose(args.settings)]
    if args.card:
        ended = in_child(partial(card_figures, settings, results, args.card), args.limit)
        if ended:
            results.add({"card": "all", "error": ended})
    for setting in settings:
        left = args.seconds - process_age()
        if left <= 0:
            results.add({**labels(setting), "skipped": f"no time left within {args.seconds:.0f} s"})
            continue
        ended = in_child(partial(figures, setting, args, results, import_seconds), min(args.limit, left))
        if ended:
            results.add({**labels(setting), "error": ended})
    if args.first_step:
        ended = in_child(partial(from_command.first_step, args.model or "llama2-7b", results.add), args.limit)
        if ended:
            results.add({"measure": "first step", "error": ended})
    if args.peers:
        peers.run(args.peers, args.peers_site, args.out, args.peers_seconds, args.peers_jobs)


if __name__ == "__main__":
    main()
