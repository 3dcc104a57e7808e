"""Training speed and memory on a model's exact shapes with random weights (neither depends on the values).

Rows have the lengths of Alpaca under Llama 2's tokenizer (alpaca_lengths.json beside this file), `batch_size` of them
per optimizer step; tokens/s count real tokens of whole optimizer steps after the warm-up.

    python benchmarks/train.py --quantize none bnb.nf4 --targets qv all --steps 6
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from litlora.config import ModelConfig, Rope  # noqa: E402
from litlora.data import Counts, Dataset  # noqa: E402
from litlora.load import RandomWeights, load_model, parameter_count  # noqa: E402
from litlora.lora import LoRA, adapt, lora_parameters  # noqa: E402
from litlora.memory import choose_micro_batch  # noqa: E402
from litlora.metrics import peak_memory, reset_peak_memory  # noqa: E402
from litlora.model import CausalLoss  # noqa: E402
from litlora.optimizers import make_optimizer, make_schedule  # noqa: E402
from litlora.packing import micro_batches  # noqa: E402
from litlora.precision import RunPrecision, pick_device  # noqa: E402
from litlora.train import FabricPrecision, train  # noqa: E402

SIZES = {  # hidden, ffn, layers, heads, kv heads, vocabulary
    "tiny": (128, 256, 2, 4, 2, 512),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000),
}
TARGETS = {
    "qv": LoRA(8, 16, 0.05, ("q_proj", "v_proj")),
    "all": LoRA(16, 32, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}


def config_of(name: str) -> ModelConfig:
    hidden, ffn, layers, heads, kv_heads, vocabulary = SIZES[name]
    return ModelConfig(
        model_type="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope=Rope(10000.0),
        sliding_windows=(None,) * layers,
    )


def alpaca_like(rows: int, vocabulary: int, seed: int = 0) -> Dataset:
    """Random ids in rows of Alpaca's lengths; all trained but each row's first."""
    histogram = json.loads((Path(__file__).parent / "alpaca_lengths.json").read_text())["lengths"]
    generator = np.random.default_rng(seed)
    lengths, counts = np.array(list(map(int, histogram))), np.array(list(histogram.values()))
    drawn = generator.choice(lengths, size=rows, p=counts / counts.sum())
    offsets = np.concatenate([[0], drawn.cumsum()]).astype(np.int64)
    ids = generator.integers(3, vocabulary, size=int(offsets[-1])).astype(np.int32)
    trained = np.ones(len(ids), dtype=np.bool_)
    trained[offsets[:-1]] = False
    return Dataset(ids, trained, offsets, np.arange(1, rows + 1), Counts(rows=rows))


def measure(args: argparse.Namespace, quantize: str | None, targets: str, checkpointing: str) -> dict[str, object]:
    """One setting's row of the table."""
    device = pick_device("auto")
    config = config_of(args.model)
    precision = "bf16-true" if device.type == "cuda" else "32-true"
    run = RunPrecision(precision, quantize, device)
    fabric = Fabric(accelerator=device.type, devices=1, plugins=[FabricPrecision(run)])
    torch.manual_seed(0)
    started = time.perf_counter()
    weights = RandomWeights(config, torch.bfloat16, device)
    decoder = load_model(weights, run.quantizer, dtype=run.dtype, device=device)
    adapt(decoder, TARGETS[targets])
    optimizer = make_optimizer("adamw", lora_parameters(decoder), 3e-4, 0.01)
    model, optimizer = fabric.setup(CausalLoss(decoder), optimizer)
    load_seconds = time.perf_counter() - started
    data = alpaca_like(args.batch_size * (args.warmup + args.steps), config.vocab_size)
    longest = int(data.lengths.max())
    micro = choose_micro_batch(config, run.compute.itemsize, longest, device, checkpointing)
    tokens = args.micro_batch_tokens or micro.tokens
    decoder.checkpoint_blocks = micro.checkpointed
    order = np.arange(len(data)).reshape(-1, args.batch_size).tolist()
    batches = [(1, micro_batches(data, rows, max_tokens=tokens, max_rows=None)) for rows in order]
    reset_peak_memory(device)
    steps = list(
        train(
            fabric,
            model,
            optimizer,
            batches,
            learning_rate=3e-4,
            schedule=make_schedule("constant", 0, 1),
            max_norm=None,
        )
    )
    timed = steps[args.warmup :]
    return {
        "model": args.model,
        "parameters": parameter_count(config),
        "quantize": quantize or "none",
        "targets": targets,
        "trainable": sum(p.numel() for p in lora_parameters(decoder)),
        "checkpointing": micro.checkpointed,
        "micro_batch_tokens": tokens,
        "tokens_per_second": sum(s.tokens for s in timed) / sum(s.seconds for s in timed),
        "peak_gb": peak_memory(device),
        "load_seconds": load_seconds,
        "tokens_per_step": sum(s.tokens for s in timed) / len(timed),
        "loss": steps[-1].loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="llama2-7b")
    parser.add_argument("--quantize", nargs="+", default=["none", "bnb.nf4", "bnb.nf4-dq"])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["qv"])
    parser.add_argument("--checkpointing", nargs="+", choices=["auto", "none", "full"], default=["auto"])
    parser.add_argument("--micro_batch_tokens", type=int)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append rows as JSON lines")
    args = parser.parse_args()
    device = pick_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
    for targets in args.targets:
        for quantize in args.quantize:
            for checkpointing in args.checkpointing:
                try:
                    row = measure(args, None if quantize == "none" else quantize, targets, checkpointing)
                except torch.cuda.OutOfMemoryError:
                    row = {
                        "quantize": quantize,
                        "targets": targets,
                        "checkpointing": checkpointing,
                        "error": "out of memory",
                    }
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
                if args.out:
                    with args.out.open("a") as stream:
                        stream.write(json.dumps({"device": name, "torch": torch.__version__, **row}) + "\n")


if __name__ == "__main__":
    main()
