"""What is measured: model shapes, adapters and the named settings, each with what it should reach on one H100 80 GB."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litlora.config import ModelConfig, Rope
from litlora.data import Counts, Dataset
from litlora.lora import LoRA

SIZES = {  # hidden, ffn, layers, heads, kv heads, vocabulary
    "tiny": (128, 256, 2, 4, 2, 512),
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000),
}
BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QV = LoRA(8, 16, 0.05, ("q_proj", "v_proj"))
ALL = LoRA(16, 32, 0.0, BLOCK)
ALL32 = LoRA(32, 64, 0.0, BLOCK)
R256 = LoRA(256, 512, 0.05, (*BLOCK, "lm_head"))  # the LoRA articles' largest: "all layers" has the head
LENGTHS = Path(__file__).parent / "alpaca_lengths.json"


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    quantize: str | None
    lora: LoRA
    checkpointing: str = "none"  # as --activation_checkpointing
    model: str = "llama2-7b"
    length: int | None = None  # tokens of every row, one row a micro-batch; None: Alpaca's lengths, packed
    batch_size: int = 128  # rows an optimizer step
    optimizer: str = "adamw"
    lora_dtype: str = "float32"
    card_gb: float | None = None  # of memory that auto may plan with; None: what is there
    steps: int = 10  # timed
    warmup: int = 3
    goal_speed: float | None = None  # tokens/s at least
    goal_share: tuple[str, float] | None = None  # or this share of another setting's tokens/s
    goal_gb: float | None = None  # peak at most, the optimizer included
    goal_weights_gb: float | None = None  # frozen weights at most
    goal_minutes: float | None = None  # the LoRA articles' run at most


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("bf16-all", None, ALL, goal_speed=19_000),
        Setting("bf16-qv", None, QV, steps=20, goal_speed=20_500, goal_minutes=5.6),
        Setting("nf4-all", "bnb.nf4", ALL, goal_share=("bf16-all", 0.97)),
        Setting("nf4-qv", "bnb.nf4", QV, steps=20, goal_share=("bf16-qv", 0.97), goal_minutes=5.6),
        Setting("nf4dq-all", "bnb.nf4-dq", ALL, goal_share=("bf16-all", 0.97)),
        Setting("nf4dq-qv", "bnb.nf4-dq", QV, goal_share=("bf16-qv", 0.97), goal_minutes=5.6),
        Setting("fp8-all", "fp8", ALL, "auto", goal_speed=30_000, goal_weights_gb=7.4),
        Setting("fp8-qv", "fp8", QV, "auto", steps=20, goal_minutes=3.7),
        Setting("bf16-all-auto", None, ALL, "auto"),
        Setting("nf4dq-all-auto", "bnb.nf4-dq", ALL, "auto"),
        Setting("bf16-all-full", None, ALL, "full", card_gb=18.0, goal_speed=14_500, goal_gb=18.0),
        Setting("nf4dq-all-full", "bnb.nf4-dq", ALL, "full"),
        Setting("bf16-all-selective", None, ALL, "selective"),
        Setting("bf16-all-offload", None, ALL, "offload"),
        Setting("bf16-all-18gb", None, ALL, "auto", card_gb=17.8, goal_speed=14_500, goal_gb=18.0),
        Setting("bf16-all-24gb", None, ALL, "auto", card_gb=24 * 0.95 - 0.6),
        Setting("nf4dq-all-16gb", "bnb.nf4-dq", ALL, "auto", card_gb=16 * 0.95 - 0.6),
        Setting("bf16-qv-1304", None, QV, "full", length=1304, batch_size=16, steps=6, warmup=2, goal_gb=14.2),
        Setting(
            "nf4dq-qv-1304", "bnb.nf4-dq", QV, "full", length=1304, batch_size=16, steps=6, warmup=2,
            goal_speed=9_000, goal_gb=4.7,
        ),
        Setting(
            "nf4dq-r256-2048", "bnb.nf4-dq", R256, "full", length=2048, batch_size=8, optimizer="adamw_8bit",
            lora_dtype="bfloat16", steps=3, warmup=2, goal_gb=9.0,
        ),
        Setting(
            "13b-nf4dq-qv-1304", "bnb.nf4-dq", QV, "full", "llama2-13b", length=1304, batch_size=16, steps=3,
            warmup=2, goal_gb=8.4,
        ),
        Setting(
            "70b-nf4dq-all-2048", "bnb.nf4-dq", ALL, "full", "llama2-70b", length=2048, batch_size=2, steps=3,
            warmup=2, lora_dtype="bfloat16", goal_gb=43.0,
        ),
        Setting("long-131072", "bnb.nf4", ALL32, "offload", "llama3.1-8b", length=131_072, batch_size=1, steps=1,
                warmup=0, lora_dtype="bfloat16"),
        Setting("long-345000", "bnb.nf4", ALL32, "offload", "llama3.1-8b", length=345_000, batch_size=1, steps=1,
                warmup=0, lora_dtype="bfloat16"),
    )
}  # fmt: skip
GROUPS = {
    "speed": [name for name, setting in SETTINGS.items() if setting.length is None] + ["nf4dq-qv-1304"],
    "memory": [name for name, setting in SETTINGS.items() if setting.length and not name.startswith("long")],
    "long": [name for name in SETTINGS if name.startswith("long")],
}


def choose(names: Iterable[str]) -> list[Setting]:
    """Settings by the names of settings and groups, in the order given. Raises KeyError for an unknown one."""
    return [SETTINGS[name] for given in names for name in GROUPS.get(given, [given])]


def config_of(model: str) -> ModelConfig:
    hidden, ffn, layers, heads, kv_heads, vocabulary = SIZES[model]
    return ModelConfig(
        model_type="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=2**19,
        rms_norm_eps=1e-5,
        rope=Rope(10000.0),
        sliding_windows=(None,) * layers,
    )


def _histogram() -> tuple[np.ndarray, np.ndarray]:
    """Alpaca's lengths under Llama 2's tokenizer, and their shares."""
    histogram: dict[str, int] = json.loads(LENGTHS.read_text())["lengths"]
    counts = np.array(list(histogram.values()))
    return np.array([int(length) for length in histogram]), counts / counts.sum()


def mean_length() -> float:
    """Tokens of an average Alpaca row."""
    lengths, shares = _histogram()
    return float((lengths * shares).sum())


def random_rows(rows: int, vocabulary: int, length: int | None, seed: int = 0) -> Dataset:
    """Random ids in rows of Alpaca's lengths (or all of `length`); all trained but each row's first."""
    generator = np.random.default_rng(seed)
    lengths, shares = (np.array([length]), np.ones(1)) if length else _histogram()
    drawn = generator.choice(lengths, size=rows, p=shares)
    offsets = np.concatenate([[0], drawn.cumsum()]).astype(np.int64)
    ids = generator.integers(3, vocabulary, size=int(offsets[-1])).astype(np.int32)
    trained = np.ones(len(ids), dtype=np.bool_)
    trained[offsets[:-1]] = False
    return Dataset(ids, trained, offsets, np.arange(1, rows + 1), Counts(rows=rows))
