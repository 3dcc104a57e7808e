"""Tiny random checkpoints, made by transformers, of every family that is supported; and PEFT adapters on them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What makes a family itself, at sizes that a test can afford.
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # a sequence of more tokens lies beyond the boundary; of head_dim 16's
    # wavelengths 6.3, 32, 167… one is short, one between the bounds 16 and 64, the others are long
}


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama3": {"model_type": "llama", "head_dim": 16, "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5},
    "codellama": {"model_type": "llama", "num_key_value_heads": 4, "rope_parameters": _theta(1e6)},
    "tinyllama": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5},
    "smollm2": {
        "model_type": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24,
        "tie_word_embeddings": True, "rope_parameters": _theta(1e5),
    },
    "llama-linear-rope": {
        "model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 8, "head_dim": 12},
    "mistral-no-window": {"model_type": "mistral", "sliding_window": None, "rope_parameters": _theta(1e6)},
    "qwen2": {"model_type": "qwen2", "rope_parameters": _theta(1e6)},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": _theta(1e6)},
    "qwen2-window": {
        "model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "rope_parameters": _theta(1e6)},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
}  # fmt: skip


def make_family(
    directory: Path, family: str, *, shards: str = "20KB", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random checkpoint of a key of FAMILIES in an empty `directory`, in shards of at most `shards`. `changes` are
    config keys. The weights are far larger than an initialization's, so that every part of the maths shows in the
    logits; biases and norms are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SIZES, **FAMILIES[family], **changes}
    # a copy: transformers completes the rope's settings in place
    config = AutoConfig.for_model(settings.pop("model_type"), **json.loads(json.dumps(settings)))
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if parameter.dim() == 1 else 0.2))
    model.to(dtype).save_pretrained(directory, max_shard_size=shards)
    return directory


def reference(directory: Path, **settings: Any) -> Any:
    """transformers' own model, in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings).eval()


def reference_logits(model: Any, sequences: list[Tensor]) -> Tensor:
    """(N, V): each sequence by itself, one after the other."""
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits[0] for ids in sequences])


def sequences_of(lengths: list[int], vocab_size: int = SIZES["vocab_size"]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]


def edit_config(directory: Path, **changes: Any) -> Path:
    """Sets keys of config.json; None takes a key out, "null" sets it to null."""
    file = directory / "config.json"
    raw = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            raw.pop(key, None)
        else:
            raw[key] = None if value == "null" else value
    file.write_text(json.dumps(raw))
    return directory


def as_transformers_4(directory: Path) -> Path:
    """Rewrites config.json as transformers 4 wrote it: rope_theta and rope_scaling, torch_dtype, no layer_types."""
    raw = json.loads((directory / "config.json").read_text())
    rope = dict(raw.pop("rope_parameters"))
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    raw["torch_dtype"] = raw.pop("dtype")
    raw.pop("layer_types", None)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def make_peft_adapter(directory: Path, base: Path, *, seed: int = 0, **settings: Any) -> Any:
    """A PEFT adapter with random A and B over `base`, saved by PEFT in `directory`; returns the PEFT model.
    `settings` are those of peft.LoraConfig."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of targets on tied embeddings
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings}
        model = get_peft_model(reference(base), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(directory)
    return model


def open_in_peft(directory: Path, base: Path) -> Any:
    """The adapter of `directory` over transformers' model of `base`. A key that PEFT misses or does not know fails."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        return PeftModel.from_pretrained(reference(base), directory).eval()
