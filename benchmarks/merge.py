"""Times merge_lora against cp of the same files, and measures its peak memory.

A random bf16 checkpoint of Llama-2's layer shapes with --layers layers (7B: 2.1 GB at 4, 13.5 at 32) and a LoRA over
--targets are written to --dir, and removed again. Both sides end with the bytes on disk: the merge fsyncs each file,
cp is followed by fsync of the copies. The page cache may hold the base for both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from litlora.checkpoint import make_header, write_checkpoint, write_shard
from litlora.config import ModelConfig
from litlora.load import expected_shapes
from litlora.peft_format import PREFIX, linear_names, linear_shape

# VmHWM, not ru_maxrss: that begins at the peak of the process that started this one.
CHILD = """
import sys, time
from pathlib import Path
started = time.perf_counter()
from litlora.commands.merge_lora import Args, run
imported = time.perf_counter() - started
run(Args(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), base_rounding=sys.argv[4] or None))
seconds = time.perf_counter() - started - imported
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
print(imported, seconds, peak)
"""


SHAPES = {"7b": (4096, 11008, 32, 32), "70b": (8192, 28672, 64, 8)}  # hidden, ffn, heads, kv heads


def make_base(directory: Path, shape: str, layers: int) -> ModelConfig:
    """Writes the checkpoint and returns its config."""
    directory.mkdir()
    hidden, ffn, heads, kv_heads = SHAPES[shape]
    settings = {"model_type": "llama", "vocab_size": 32000, "hidden_size": hidden, "intermediate_size": ffn}
    settings |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    settings |= {"max_position_embeddings": 4096}
    (directory / "config.json").write_text(json.dumps(settings))
    config = ModelConfig.load(directory)
    shapes = expected_shapes(config)
    # once: drawing is slower than the disk
    noise = torch.empty(max(32000, ffn) * hidden, dtype=torch.bfloat16).normal_(std=0.02)

    def read(name: str) -> Tensor:
        return noise[: torch.Size(shapes[name]).numel()].view(shapes[name])

    write_checkpoint(directory, [(name, torch.bfloat16, shape) for name, shape in shapes.items()], read)
    return config


def make_adapter(directory: Path, config: ModelConfig, rank: int, targets: Sequence[str]) -> int:
    """Writes a PEFT adapter over the linears of these names and returns its bytes."""
    directory.mkdir()
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name in (name for name in linear_names(config) if name.rpartition(".")[2] in targets):
        out_features, in_features = linear_shape(config, name)
        entries.append((f"{PREFIX}{name}.lora_A.weight", torch.float32, (rank, in_features)))
        entries.append((f"{PREFIX}{name}.lora_B.weight", torch.float32, (out_features, rank)))
    file = directory / "adapter_model.safetensors"
    write_shard(file, make_header(entries, {"format": "pt"}), (torch.randn(shape) * 0.01 for _, _, shape in entries))
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return file.stat().st_size


def time_cp(source: Path, target: Path) -> float:
    """Seconds until the copies are on disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def time_merge(base: Path, adapter: Path, out: Path, rounding: str) -> tuple[float, float, float]:
    """(seconds, peak bytes, seconds of imports) of a merge in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(base), str(adapter), str(out), rounding]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    imported, seconds, peak = map(float, done.stdout.split()[-3:])
    shutil.rmtree(out)
    return seconds, peak, imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="7B: 405 MB each, embedding and head 524 MB")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--repeats", type=int, default=3, help="the fastest is reported")
    parser.add_argument("--base_rounding", default="", help="bnb.nf4, …: time this too")
    parser.add_argument("--dir", type=Path, default=None, help="where the files go; default: the temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        base, adapter, out = (Path(name) / part for part in ("base", "adapter", "out"))
        config = make_base(base, args.shape, args.layers)
        adapter_bytes = make_adapter(adapter, config, args.rank, args.targets)
        size = sum(file.stat().st_size for file in base.iterdir())
        print(
            f"{size / 1e9:.2f} GB, {args.layers} layers of {args.shape}, {' '.join(args.targets)} r={args.rank}, "
            f"{torch.get_num_threads()} threads"
        )
        print(f"{'':<24}{'seconds':>9}{'GB/s':>7}{'peak MB':>9}{'imports s':>11}")
        roundings = list(dict.fromkeys(["", args.base_rounding]))
        copies: list[float] = []
        merges: dict[str, list[tuple[float, float, float]]] = {rounding: [] for rounding in roundings}
        for _ in range(args.repeats):  # by turns: a disk has its moods
            copies.append(time_cp(base, out))
            for rounding in roundings:
                merges[rounding].append(time_merge(base, adapter, out, rounding))
        print("cp:", *(f"{s:.2f}" for s in copies), "| merge:", *(f"{s:.2f}" for s, _, _ in merges[""]))
        seconds = min(copies)
        print(f"{'cp + fsync':<24}{seconds:>9.2f}{size / 1e9 / seconds:>7.2f}")
        for rounding in roundings:
            seconds, peak, imports = min(merges[rounding])
            label = f"merge_lora {rounding}"
            print(f"{label:<24}{seconds:>9.2f}{size / 1e9 / seconds:>7.2f}{peak / 1e6:>9.0f}{imports:>11.2f}")
        largest = max(torch.Size(shape).numel() for shape in expected_shapes(config).values()) * 2
        print(f"{'promised at most':<24}{'':>16}{(4 * largest + adapter_bytes + 300e6) / 1e6:>9.0f}")


if __name__ == "__main__":
    main()
