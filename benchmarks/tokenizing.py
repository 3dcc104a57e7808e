"""How long 52,000 Alpaca-like rows take from the file to ids and masks, and from the cache.

The 5,000 real rows of the material are repeated with small edits (the row's number in the question), so that no two
are alike. Usage: python benchmarks/tokenizing.py MATERIAL_DIR [--tokenizer DIR …]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from litlora.data import PromptStyle, load_rows, prepare
from litlora.tokenizer import Tokenizer


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write `count` rows in Alpaca's shape, made of the real ones."""
    real = json.loads(source.read_text(encoding="utf-8"))
    rows = []
    for number in range(count):
        row = dict(real[number % len(real)])
        if number >= len(real):
            row["instruction"] += f" ({number})"
        rows.append(row)
    target.write_text(json.dumps(rows), encoding="utf-8")


def measure(directory: Path, data_path: Path, cache_dir: Path) -> dict[str, object]:
    """Seconds with an empty cache and from the cache, reading the file included."""
    seconds, cpu = [], []
    for _ in range(2):
        start, before = time.perf_counter(), time.process_time()
        tokenizer = Tokenizer.load(directory)
        rows = load_rows("alpaca", data_path)
        style = PromptStyle.load("alpaca", tokenizer)
        dataset = prepare(rows, tokenizer, style, mask_prompt=True, max_seq_length=2048, cache_dir=cache_dir)
        seconds.append(round(time.perf_counter() - start, 2))
        cpu.append(round(time.process_time() - before, 2))
    return {
        "tokenizer": tokenizer.path.name,
        "directory": directory.name,
        "rows": len(dataset),
        "tokens": dataset.counts.tokens,
        "straddling": dataset.counts.straddling,
        "seconds": seconds[0],
        "seconds_cached": seconds[1],
        "cpu_seconds": cpu[0],  # over all cores: what a busy machine does not change
        "cpu_seconds_cached": cpu[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("material", type=Path, help="the directory with alpaca/alpaca_5000.json")
    parser.add_argument("--tokenizer", type=Path, action="append", default=[], help="a further model directory")
    parser.add_argument("--rows", type=int, default=52_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data_path = Path(folder) / "alpaca.json"
        write_rows(arguments.material / "alpaca" / "alpaca_5000.json", data_path, arguments.rows)
        directories = [arguments.material / "tokenizer-llama2", *arguments.tokenizer]
        results = [measure(directory, data_path, Path(folder) / "cache") for directory in directories]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{'tokenizer':<18}{'rows':>8}{'tokens':>12}{'seconds':>10}{'cached':>9}{'cpu s':>8}   ({cores} cores)")
    for result in results:
        print(
            f"{result['tokenizer']:<18}{result['rows']:>8,}{result['tokens']:>12,}"
            f"{result['seconds']:>10.2f}{result['seconds_cached']:>9.2f}{result['cpu_seconds']:>8.2f}"
        )
    print(json.dumps({"cores": cores, "results": results}))


if __name__ == "__main__":
    main()
