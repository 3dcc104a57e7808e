"""Seconds from the command to its first token, or to its first optimizer step: the commands themselves, over a
checkpoint of random weights that is in the page cache. Each twice: the first compiles kernels and tokenizes rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from settings import config_of, random_rows

from litlora.checkpoint import make_header, write_shard
from litlora.config import ModelConfig
from litlora.load import RandomWeights, expected_shapes
from litlora.precision import pick_device

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
LAYERS_A_SHARD = 8
ROWS = 52_000  # Alpaca's
FORMATS = ("none", "bnb.nf4", "fp8")


def first_token(size: str, add: Callable[[Row], None]) -> None:
    command = ["generate", "--prompt", "What is 2 + 2?", "--prompt_style", "none", "--max_new_tokens", "16"]
    with tempfile.TemporaryDirectory() as scratch:
        made = base(Path(scratch), size)
        for attempt in ("first", "second"):
            row = {"measure": "first token", "run": attempt, "goal_seconds": 15.0, "written_seconds": made}
            add(row | timed(scratch, [*command, "--checkpoint_dir", scratch], until=b""))


def first_step(size: str, add: Callable[[Row], None]) -> None:
    """The articles' run up to its first step: 52,000 rows of Alpaca's lengths, query and value."""
    with tempfile.TemporaryDirectory() as scratch:
        made, data = base(Path(scratch), size), Path(scratch) / "rows.json"
        write_rows(data, ROWS if size != "tiny" else 200)
        for name in FORMATS:
            for attempt, goal in (("cold", 60.0), ("warm", 25.0)):
                command = ["finetune_lora", "--checkpoint_dir", scratch, "--data", "json", "--data_path", str(data)]
                command += ["--prompt_style", "none", "--out_dir", f"{scratch}/{name}-{attempt}", "--max_steps", "9"]
                command += [] if name == "none" else ["--quantize", name]
                row = {"measure": "first step", "quantize": name, "run": attempt, "goal_seconds": goal}
                add(row | {"written_seconds": made} | timed(scratch, command, until=b"training step 1/"))


def timed(scratch: str, command: list[str], until: bytes) -> Row:
    """Seconds until the command says `until` on stderr, which ends it, or anything on stdout where that is empty, and
    when each line before was said. Kernels and rows of earlier commands over `scratch` are found again."""
    started = time.perf_counter()
    caches = {"TRITON_CACHE_DIR": f"{scratch}/triton", "LITLORA_CACHE": f"{scratch}/cache"}
    environment = os.environ | caches | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    whole = [sys.executable, "-m", "litlora", *command]
    process = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    said, lines = b"", []
    if not until:
        process.stdout.read(1)
    while until and until not in said and (line := process.stderr.readline()):
        said += line
        lines.append([round(time.perf_counter() - started, 2), line.decode(errors="replace")[:40]])
    seconds = time.perf_counter() - started
    if until:
        process.kill()
    said += process.communicate()[1]
    row: Row = {"seconds": seconds, "lines": lines, "said": said.decode(errors="replace")[-300:]}
    good = until in said if until else process.returncode == 0
    return row if good else row | {"error": f"exit code {process.returncode}"}


def write_rows(file: Path, rows: int) -> None:
    """Words of one token each, as many as Alpaca's rows have tokens."""
    lengths = np.diff(random_rows(rows, 1000, None).offsets)
    written = [{"instruction": " the" * (n // 3), "output": " a" * int(n - n // 3)} for n in map(int, lengths)]
    file.write_text(json.dumps(written))


def base(directory: Path, size: str) -> float:
    """Seconds that it took to write it."""
    started, config = time.perf_counter(), config_of(size)
    write(directory, replace(config, vocab_size=max(config.vocab_size, 2048)))  # the tokenizer's are 1024
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return time.perf_counter() - started


def write(directory: Path, config: ModelConfig) -> None:
    """A checkpoint of random weights, with the tokenizer of the embedded model."""
    weights = RandomWeights(config, torch.bfloat16, pick_device("auto"))
    shards: dict[str, list[str]] = {}
    for name in expected_shapes(config):
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        shards.setdefault(f"model-{(layer + LAYERS_A_SHARD) // LAYERS_A_SHARD}.safetensors", []).append(name)
    for file, names in shards.items():
        header = make_header(
            [(name, torch.bfloat16, expected_shapes(config)[name]) for name in names], {"format": "pt"}
        )
        write_shard(directory / file, header, (weights.read(name).cpu() for name in names))
    index = {name: file for file, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for tokenizer in (ROOT / "checkpoints" / "tiny").glob("tokenizer*"):
        shutil.copy(tokenizer, directory)
    settings = {
        "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings, "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(settings))
