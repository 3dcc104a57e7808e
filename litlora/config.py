"""A model's shape and maths from its config.json, in Hugging Face's field names.

Every key of the file is either used, known to change nothing here, or refused by name: a key that is silently ignored
is a model that computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.checkpoint import read_json, require_directory
from litlora.errors import InputError


@dataclass(frozen=True)
class Rope:
    """Rotary positions. `factor` divides all frequencies (linear), or the low ones (llama3, with its three bounds)."""

    theta: float
    kind: str = "default"  # default | linear | llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> Tensor:
        """(D/2,) fp32: radians per position. llama3 as in Meta's llama-models (apply_scaling)."""
        inverse = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim)
        if self.kind == "default":
            return inverse
        if self.kind == "linear":
            return inverse / self.factor
        wavelength = 2 * math.pi / inverse
        turns = self.original_max_position_embeddings / wavelength
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = smooth.clamp(0.0, 1.0)  # 0: long waves, slowed by `factor`; 1: short waves, as they were
        return (1 - smooth) * inverse / self.factor + smooth * inverse


@dataclass(frozen=True)
class ModelConfig:
    """What the Decoder needs to know: neutral numbers, no family flags."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()  # one a layer; a token sees itself and the window - 1 before it

    @classmethod
    def load(cls, directory: Path) -> ModelConfig:
        """Reads `directory`/config.json. Raises InputError for what is not supported."""
        require_directory(directory)
        file = directory / "config.json"
        if not file.is_file():
            if (directory / "adapter_config.json").is_file():
                fix = "its base as --checkpoint_dir, and the adapter as --lora_path"
                raise InputError("this is an adapter, not a model", where=directory, fix=fix)
            raise InputError(
                "no config.json in the checkpoint directory",
                where=directory,
                wanted="a Hugging Face checkpoint directory",
                fix="litlora download REPO_ID, or litlora convert for Meta's original files",
            )
        return cls.from_dict(read_json(file), file)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: object = "config.json") -> ModelConfig:
        family = raw.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise InputError(
                "this model family is not supported",
                where=where,
                got=f"model_type {family!r}",
                wanted=", ".join(sorted(FAMILIES)),
            )
        reader = _Reader(raw, where)
        config = FAMILIES[family](reader)
        reader.finish()
        return config

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the linears of one block by Hugging Face's names, and of lm_head."""
        c, d, f = self.hidden_size, self.head_dim, self.intermediate_size
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        return {
            "self_attn.q_proj": (q, c),
            "self_attn.k_proj": (kv, c),
            "self_attn.v_proj": (kv, c),
            "self_attn.o_proj": (c, q),
            "mlp.gate_proj": (f, c),
            "mlp.up_proj": (f, c),
            "mlp.down_proj": (c, f),
            "lm_head": (self.vocab_size, c),
        }


# Keys that change nothing in training, generating or merging. Whatever is in none of the lists is refused.
HARMLESS = frozenset(
    """architectures auto_map bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    torch_dtype dtype transformers_version _name_or_path name_or_path use_cache initializer_range pretraining_tp
    return_dict return_dict_in_generate output_hidden_states output_attentions output_scores output_past torchscript
    use_bfloat16 tf_legacy_loss pruned_heads tie_encoder_decoder chunk_size_feed_forward cross_attention_hidden_size
    finetuning_task id2label label2id num_labels problem_type task_specific_params tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens is_llama_config _attn_implementation
    _attn_implementation_autoset attn_implementation max_window_layers unsloth_version unsloth_fixed
    transformers.js_config model_max_length""".split()
)
# Keys that are fine at these values and change the maths at any other.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0, None),
    "hidden_dropout": (0, 0.0, None),
    "resid_pdrop": (0, 0.0, None),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "use_mrope": (False, None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_qk_norm": (False, None),
    "quantization_config": (None,),
    "embedding_multiplier": (1, 1.0, None),
    "logits_scaling": (1, 1.0, None),
    "residual_multiplier": (1, 1.0, None),
}


# Sizes that things are made of before the weights can contradict them; others only have to be below 2**31.
LIMITS = {"num_hidden_layers": 1000, "head_dim": 2**16, "num_attention_heads": 2**16}


class _Reader:
    """Takes keys out of a config.json one by one and remembers which were asked for."""

    def __init__(self, raw: Mapping[str, Any], where: object) -> None:
        self.raw, self.where, self.used = raw, where, {"model_type"}

    def get(self, key: str, default: Any, kinds: tuple[type, ...]) -> Any:
        self.used.add(key)
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None or (kinds == (int,) and isinstance(value, bool)) or not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            got = "nothing" if self.raw.get(key) is None else repr(value)
            raise InputError("a config key of the wrong kind", where=f"{self.where}: {key}", got=got, wanted=wanted)
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value: int = self.get(key, default, (int,))
        limit = LIMITS.get(key, 2**31)
        if not 1 <= value < limit:
            wanted = f"at least 1, below {limit}"
            raise InputError("a config key out of range", where=f"{self.where}: {key}", got=value, wanted=wanted)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default, (int, float))
        if not 0 < value < 1e300:  # NaN fails both
            raise InputError("a config key out of range", where=f"{self.where}: {key}", got=value, wanted="above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.get(key, default, (bool,)))

    def finish(self) -> None:
        """Raises InputError naming every key that changes the maths, or may, and is not supported."""
        problems = []
        for key, value in self.raw.items():
            if key in self.used or key in HARMLESS:
                continue
            if key in NEUTRAL:
                if value not in NEUTRAL[key]:
                    problems.append(f"{key} = {value!r} (supported: {', '.join(map(repr, NEUTRAL[key]))})")
            elif value is not None:
                problems.append(f"{key} = {value!r}")
        if problems:
            raise InputError(
                "config keys that may change the model's maths and are not supported",
                where=self.where,
                got="; ".join(problems),
                fix="a model without them; a key that changes nothing can be taken out of config.json",
            )


def _rope(reader: _Reader, default_theta: float = 10000.0) -> Rope:
    """From rope_theta + rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    old = reader.raw.get("rope_scaling") or {}
    new = reader.raw.get("rope_parameters") or {}
    reader.used |= {"rope_scaling", "rope_parameters"}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise InputError("rope settings that are no object", where=reader.where, got=f"{old!r}, {new!r}")
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in (old, new)]
    if old and new and (kinds[0] != kinds[1] or any(new.get(key, value) != value for key, value in old.items())):
        raise InputError(
            "rope_scaling and rope_parameters contradict each other",
            where=reader.where,
            got=f"{old!r}, {new!r}",
            fix="keep one of them: rope_parameters is transformers 5's name for rope_theta and rope_scaling",
        )
    inner = _Reader({**old, **new}, f"{reader.where}: rope_scaling")
    theta = inner.number("rope_theta", reader.number("rope_theta", default_theta))
    kind = inner.get("rope_type", inner.raw.get("type", "default"), (str,))
    inner.used.add("type")
    rope = Rope(theta)
    if kind == "linear":
        rope = Rope(theta, kind, inner.number("factor"))
    elif kind == "llama3":
        limit = reader.size("max_position_embeddings", 2048)
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if low >= high:
            raise InputError("rope scaling out of range", where=inner.where, got=f"low {low}, high {high}")
        original = inner.size("original_max_position_embeddings", limit)
        rope = Rope(theta, kind, inner.number("factor"), low, high, original)
    elif kind != "default":
        raise InputError(
            "this rope scaling is not supported", where=inner.where, got=kind, wanted="default, linear or llama3"
        )
    inner.used |= {"factor"} if kind == "default" and inner.raw.get("factor") in (1, 1.0) else set()
    inner.finish()
    return rope


def _common(reader: _Reader, **family: Any) -> ModelConfig:
    """What all families share. `family` overrides or adds fields."""
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    layers = reader.size("num_hidden_layers")
    default_kv = family.pop("default_kv_heads", heads)  # of an absent key; null means one for each head
    kv_heads = reader.size("num_key_value_heads", heads if "num_key_value_heads" in reader.raw else default_kv)
    head_dim = reader.size("head_dim", family.pop("default_head_dim", hidden // heads))
    if heads % kv_heads or head_dim % 2:
        raise InputError(
            "attention sizes that do not fit each other",
            where=reader.where,
            got=f"{heads} heads, {kv_heads} key/value heads, head_dim {head_dim}",
            wanted="heads a multiple of key/value heads, an even head_dim",
        )
    windows = family.pop("windows", None) or (None,) * layers
    return ModelConfig(
        model_type=reader.raw["model_type"],
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reader.size("max_position_embeddings", 2048),
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=_rope(reader),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        sliding_windows=windows,
        **family,
    )


def _llama(reader: _Reader) -> ModelConfig:
    """Llama 1-3.3, CodeLlama, TinyLlama, SmolLM2. attention_bias is on all four projections."""
    bias = reader.flag("attention_bias", False)
    return _common(reader, qkv_bias=bias, o_bias=bias, mlp_bias=reader.flag("mlp_bias", False))


def _mistral(reader: _Reader) -> ModelConfig:
    """Mistral: one window for all layers; an absent key means transformers' default of 4096, null means none."""
    reader.used.add("sliding_window")
    layers = reader.size("num_hidden_layers")
    window = None
    if reader.raw.get("sliding_window", 4096) is not None:
        window = reader.size("sliding_window", 4096)
    return _common(reader, windows=(window,) * layers, default_kv_heads=8)


def _qwen_windows(reader: _Reader) -> tuple[int | None, ...]:
    """Qwen slides only where use_sliding_window says so, from layer max_window_layers up or as layer_types says."""
    reader.used |= {"sliding_window", "max_window_layers"}
    layers = reader.size("num_hidden_layers")
    slides = reader.flag("use_sliding_window", False) and reader.raw.get("sliding_window", 4096) is not None
    window = reader.size("sliding_window", 4096) if slides else None
    first = reader.get("max_window_layers", 28, (int,))
    types = reader.raw.get("layer_types")
    reader.used.add("layer_types")
    if types is None:
        types = ["sliding_attention" if slides and layer >= first else "full_attention" for layer in range(layers)]
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in kinds for kind in types):
        wanted = f"{layers} of full_attention / sliding_attention"
        raise InputError("layer_types not supported", where=reader.where, got=types, wanted=wanted)
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _qwen2(reader: _Reader) -> ModelConfig:
    """Qwen2 and 2.5: a bias on q, k and v, none on o."""
    return _common(reader, qkv_bias=True, windows=_qwen_windows(reader), default_kv_heads=32)


def _qwen3(reader: _Reader) -> ModelConfig:
    """Qwen3: an RMSNorm over each head of q and k, head_dim of its own."""
    bias = reader.flag("attention_bias", False)
    windows = _qwen_windows(reader)
    return _common(
        reader, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=windows, default_kv_heads=32, default_head_dim=128
    )


FAMILIES: dict[str, Callable[[_Reader], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
