"""Seconds from the command to its first token: `litlora generate` from a checkpoint that is in the page cache."""

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

import torch
from settings import config_of

from litlora.checkpoint import make_header, write_shard
from litlora.config import ModelConfig
from litlora.load import RandomWeights, expected_shapes
from litlora.precision import pick_device

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
LAYERS_A_SHARD = 8


def run(size: str, add: Callable[[Row], None]) -> None:
    """Twice: kernels may be compiled in the first."""
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        config = config_of(size)
        write(Path(scratch), replace(config, vocab_size=max(config.vocab_size, 2048)))  # the tokenizer's are 1024
        written = time.perf_counter() - started
        command = [
            sys.executable,
            "-m",
            "litlora",
            "generate",
            "--checkpoint_dir",
            scratch,
            "--prompt",
            "What is 2 + 2?",
        ]
        command += ["--prompt_style", "none", "--max_new_tokens", "16"]
        for attempt in ("first", "second"):
            started = time.perf_counter()
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - started
            _, errors = process.communicate()
            row: Row = {"measure": "first token", "run": attempt, "seconds": seconds, "goal_seconds": 15.0}
            row |= {"written_seconds": written, "said": errors.decode(errors="replace")[-300:]}
            add(row if process.returncode == 0 else row | {"error": f"exit code {process.returncode}"})


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
