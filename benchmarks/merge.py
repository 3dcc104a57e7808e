"""Times merge_lora against cp of the same files, and measures its peak memory.

A random bf16 checkpoint of Llama-2-7B's layer shapes with --layers layers (2.1 GB at 4) and a LoRA over all its linears
are written to --dir, and removed again. Both sides end with the bytes on disk: the merge fsyncs each file, cp is
followed by fsync of the copies. The page cache may hold the base for both.
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


def make_base(directory: Path, layers: int) -> ModelConfig:
    """Writes the checkpoint and returns its config."""
    directory.mkdir()
    settings = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    settings |= {"num_hidden_layers": layers, "num_attention_heads": 32, "max_position_embeddings": 4096}
    (directory / "config.json").write_text(json.dumps(settings))
    config = ModelConfig.load(directory)
    shapes = expected_shapes(config)
    noise = torch.empty(32000 * 4096, dtype=torch.bfloat16).normal_(std=0.02)  # once: drawing is slower than the disk

    def read(name: str) -> Tensor:
        return noise[: torch.Size(shapes[name]).numel()].view(shapes[name])

    write_checkpoint(directory, [(name, torch.bfloat16, shape) for name, shape in shapes.items()], read)
    return config


def make_adapter(directory: Path, config: ModelConfig, rank: int) -> int:
    """Writes a PEFT adapter over all linears and returns its bytes."""
    directory.mkdir()
    entries: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name in linear_names(config):
        out_features, in_features = linear_shape(config, name)
        entries.append((f"{PREFIX}{name}.lora_A.weight", torch.float32, (rank, in_features)))
        entries.append((f"{PREFIX}{name}.lora_B.weight", torch.float32, (out_features, rank)))
    file = directory / "adapter_model.safetensors"
    write_shard(file, make_header(entries, {"format": "pt"}), (torch.randn(shape) * 0.01 for _, _, shape in entries))
    targets = sorted({name.rpartition(".")[2] for name in linear_names(config)})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
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
    parser.add_argument("--layers", type=int, default=4, help="of 405 MB each; embedding and head are 524 MB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="the fastest is reported")
    parser.add_argument("--base_rounding", default="", help="bnb.nf4, …: time this too")
    parser.add_argument("--dir", type=Path, default=None, help="where the files go; default: the temporary directory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        base, adapter, out = (Path(name) / part for part in ("base", "adapter", "out"))
        config = make_base(base, args.layers)
        adapter_bytes = make_adapter(adapter, config, args.rank)
        size = sum(file.stat().st_size for file in base.iterdir())
        print(
            f"{size / 1e9:.2f} GB, {args.layers} layers, all linears r={args.rank}, {torch.get_num_threads()} threads"
        )
        print(f"{'':<24}{'seconds':>9}{'GB/s':>7}{'peak MB':>9}{'imports s':>11}")
        seconds = min(time_cp(base, out) for _ in range(args.repeats))
        print(f"{'cp + fsync':<24}{seconds:>9.2f}{size / 1e9 / seconds:>7.2f}")
        for rounding in dict.fromkeys(["", args.base_rounding]):
            seconds, peak, imports = min(time_merge(base, adapter, out, rounding) for _ in range(args.repeats))
            label = f"merge_lora {rounding}"
            print(f"{label:<24}{seconds:>9.2f}{size / 1e9 / seconds:>7.2f}{peak / 1e6:>9.0f}{imports:>11.2f}")
        largest = max(torch.Size(shape).numel() for shape in expected_shapes(config).values()) * 2
        print(f"{'promised at most':<24}{'':>16}{(4 * largest + adapter_bytes + 300e6) / 1e6:>9.0f}")


if __name__ == "__main__":
    main()
