"""Every family's logits are transformers' own; what would be another model is refused by name."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, as_transformers_4, edit_config, make_family, reference, reference_logits, sequences_of
from torch import Tensor

from litlora.checkpoint import INDEX, SINGLE
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.frozen import Dense
from litlora.load import Directory, check_tensors, expected_shapes, load_model
from litlora.model import Decoder
from litlora.sequences import Packed

LENGTHS = [90, 1, 17, 40]  # beyond LLAMA3_ROPE's boundary of 64, and all kinds of windows of 8


def copy_of(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def load(directory: Path) -> Decoder:
    return load_model(Directory.open(directory), Dense(torch.float32), dtype=torch.float32, device="cpu").eval()


def packed_logits(model: Decoder, sequences: list[Tensor]) -> Tensor:
    with torch.no_grad():
        hidden = model(torch.cat(sequences), Packed.of_lengths([len(ids) for ids in sequences]))
        return model.lm_head(hidden)  # type: ignore[no-any-return]


def furthest(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


@pytest.mark.parametrize("style", [5, 4], ids=["transformers 5", "transformers 4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, style: int, bases: Any, tmp_path: Path) -> None:
    directory = bases(family)
    if style == 4:
        directory = as_transformers_4(copy_of(directory, tmp_path))
    assert (directory / INDEX).exists()
    assert "rope_parameters" in json.loads((directory / "config.json").read_text()) or style == 4
    sequences = sequences_of(LENGTHS)
    wanted = reference_logits(reference(directory), sequences)
    assert wanted.std() > 0.5, "logits too small to tell anything"
    assert furthest(packed_logits(load(directory), sequences), wanted) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_untied(family: str, tmp_path: Path) -> None:
    tied = not FAMILIES[family].get("tie_word_embeddings", False)
    directory = make_family(tmp_path / "base", family, tie_word_embeddings=tied)
    model, sequences = load(directory), sequences_of([70, 5])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert furthest(packed_logits(model, sequences), reference_logits(reference(directory), sequences)) < 1e-4


KEYS_OF_ALL = """rope_theta rms_norm_eps num_key_value_heads tie_word_embeddings hidden_act use_sliding_window head_dim
sliding_window max_window_layers attention_bias mlp_bias rope_scaling"""
ABSENT = [(family, key) for family in ("llama", "mistral", "qwen2", "qwen3") for key in KEYS_OF_ALL.split()]
ABSENT += [
    ("mistral-no-window", "head_dim"),
    ("mistral-no-window", "sliding_window"),
    ("qwen2-window", "sliding_window"),
]
NULL = [("llama", "num_key_value_heads"), ("qwen2", "num_key_value_heads"), ("qwen3", "num_key_value_heads")]
NULL += [
    ("llama", "head_dim"),
    ("mistral", "head_dim"),
    ("mistral", "sliding_window"),
    ("qwen2-window", "sliding_window"),
]


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [*((*pair, None) for pair in ABSENT), *((*pair, "null") for pair in NULL)],
    ids=lambda value: value or "absent",
)
def test_an_absent_key_means_what_it_means_in_transformers(
    family: str, key: str, value: str | None, bases: Any, tmp_path: Path
) -> None:
    """The defaults that config.json leaves out are the family's, not Llama's."""
    from transformers import AutoConfig

    directory = edit_config(as_transformers_4(copy_of(bases(family), tmp_path)), **{key: value})
    theirs = AutoConfig.from_pretrained(directory)
    try:
        ours = ModelConfig.load(directory)
    except InputError as error:
        assert "attention sizes" in str(error), "only heads that do not divide may be refused"  # noqa: PT017
        assert theirs.num_attention_heads % theirs.num_key_value_heads
        return
    window = getattr(theirs, "sliding_window", None)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_windows == tuple(window if kind == "sliding_attention" else None for kind in types)
    assert ours.qkv_bias == getattr(theirs, "attention_bias", ours.model_type == "qwen2")


def test_both_config_styles_are_one_config(bases: Any, tmp_path: Path) -> None:
    for family in FAMILIES:
        directory = copy_of(bases(family), tmp_path / family)
        new = ModelConfig.load(directory)
        assert ModelConfig.load(as_transformers_4(directory)) == new


def test_llama3_rope_has_short_middle_and_long_waves(bases: Any) -> None:
    """Else the logits would not show how the middle is blended."""
    config = ModelConfig.load(bases("llama3"))
    plain = replace(config.rope, kind="default").inverse_frequencies(config.head_dim)
    ratio = plain / config.rope.inverse_frequencies(config.head_dim)
    assert (ratio == 1).any()
    assert ((ratio > 1.1) & (ratio < 7.9)).any()
    assert torch.isclose(ratio, torch.tensor(8.0)).any()
    assert max(LENGTHS) > config.rope.original_max_position_embeddings


def test_an_old_type_key_names_the_rope(bases: Any, tmp_path: Path) -> None:
    directory = as_transformers_4(copy_of(bases("llama-linear-rope"), tmp_path))
    edit_config(directory, rope_scaling={"type": "linear", "factor": 4.0})
    assert ModelConfig.load(directory) == ModelConfig.load(bases("llama-linear-rope"))


def test_sharded_is_unsharded(bases: Any, tmp_path: Path) -> None:
    directory = copy_of(bases("llama3"), tmp_path)
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 2
    sharded = packed_logits(load(directory), sequences_of(LENGTHS))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for file in (*shards, directory / INDEX):
        file.unlink()
    save_file(tensors, directory / SINGLE)
    assert torch.equal(packed_logits(load(directory), sequences_of(LENGTHS)), sharded)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one_and_neighbours_change_nothing(family: str, bases: Any) -> None:
    model, sequences = load(bases(family)), sequences_of([33, 5, 64, 1, 12])
    packed = packed_logits(model, sequences).split([len(ids) for ids in sequences])
    for ids, logits in zip(sequences, packed, strict=True):
        assert furthest(packed_logits(model, [ids]), logits) < 1e-5
    order = [3, 0, 4, 2, 1]
    permuted = packed_logits(model, [sequences[i] for i in order]).split([len(sequences[i]) for i in order])
    for place, logits in zip(order, permuted, strict=True):
        assert furthest(logits, packed[place]) < 1e-5


def test_later_tokens_change_nothing(bases: Any) -> None:
    model, (ids,) = load(bases("qwen3")), sequences_of([40])
    changed = ids.clone()
    changed[25:] = (changed[25:] + 1) % 67
    before, after = packed_logits(model, [ids]), packed_logits(model, [changed])
    assert furthest(before[:25], after[:25]) < 1e-6
    assert furthest(before[25:], after[25:]) > 0.1


def test_positions_are_exact_in_16_bit(bases: Any) -> None:
    """bf16 has 8 bits: angles must be worked out in fp32, or every position beyond 256 is another one."""
    model = load_model(Directory.open(bases("llama3")), Dense(torch.bfloat16), dtype=torch.bfloat16, device="cpu")
    assert model.inverse_frequencies.dtype == torch.float32


# What is refused, by name


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig.load(directory)
    assert all(word in str(caught.value) for word in (*words, str(directory))), str(caught.value)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type 'gpt2'", "mistral"]),
        ({"model_type": None}, ["model_type None"]),
        ({"model_type": ["llama"]}, ["model_type ['llama']"]),
        ({"rope_parameters": {**YARN, "rope_theta": 1e4}}, ["yarn", "llama3"]),
        ({"rope_scaling": YARN}, ["yarn"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, ["longrope"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor", "nothing"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ["factor"]),
        ({"rope_scaling": {**tiny_models.LLAMA3_ROPE, "low_freq_factor": 4.0}}, ["low 4.0"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, ["mscale"]),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor = 0.5"]),
        ({"rope_scaling": "linear"}, ["rope"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "silu"]),
        ({"attention_dropout": 0.1}, ["attention_dropout = 0.1"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping = 30.0"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"sliding_window": 8}, ["sliding_window = 8"]),
        ({"hidden_act": "gelu", "attention_dropout": 0.1, "new": 1}, ["hidden_act", "attention_dropout", "new = 1"]),
        ({"hidden_size": None}, ["hidden_size", "nothing"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
        ({"hidden_size": 32.0}, ["hidden_size"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
        ({"num_attention_heads": True}, ["num_attention_heads"]),
        ({"num_key_value_heads": 3}, ["3 key/value heads"]),
        ({"head_dim": 7}, ["head_dim 7"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, ["rope_theta"]),
        ({"hidden_size": 10**30}, ["hidden_size"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_llama_that_would_be_another_model_is_refused(
    changes: dict[str, Any], words: list[str], bases: Any, tmp_path: Path
) -> None:
    if "rope_scaling" in changes:
        changes = {**changes, "rope_parameters": None}
    refused(edit_config(copy_of(bases("llama"), tmp_path), **changes), *words)


def test_two_rope_settings_that_contradict_each_other_are_refused(bases: Any, tmp_path: Path) -> None:
    """Someone added rope_scaling, as old guides say, to a file that transformers 5 wrote."""
    directory = copy_of(bases("llama"), tmp_path)
    refused(edit_config(directory, rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling and rope_parameters")
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    agreed = ModelConfig.load(edit_config(directory, rope_parameters=new))
    assert agreed.rope.factor == 2.0


@pytest.mark.parametrize("types", [["full_attention"], ["chunked_attention"] * 3, "full", [["x"]] * 3], ids=str)
def test_qwens_odd_layer_types_are_refused(types: object, bases: Any, tmp_path: Path) -> None:
    refused(edit_config(copy_of(bases("qwen2-window"), tmp_path), layer_types=types), "layer_types")


def test_harmless_keys_are_taken(bases: Any, tmp_path: Path) -> None:
    directory = copy_of(bases("llama"), tmp_path)
    wanted = ModelConfig.load(directory)
    edit_config(directory, pretraining_tp=2, torch_dtype="bfloat16", attention_dropout=0, new_key="null")
    assert ModelConfig.load(directory) == wanted


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "llama"', "null"])
def test_a_config_that_is_no_json_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, "JSON")


def test_no_config(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    refused(tmp_path, "config.json")


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(["x", [1]])
GOOD = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
NAMES = """model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings sliding_window use_sliding_window layer_types
hidden_act max_window_layers attention_bias max_position_embeddings anything"""
KEYS = st.sampled_from(NAMES.split())
ROPES = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor"]),
    VALUES | st.sampled_from(["default", "linear", "llama3"]),
)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    changes=st.dictionaries(KEYS, VALUES | ROPES, max_size=3),
)
def test_any_config_is_read_or_refused(family: str, changes: dict[str, Any]) -> None:
    with contextlib.suppress(InputError):
        config = ModelConfig.from_dict({**GOOD, "num_attention_heads": 2, "model_type": family, **changes})
        assert len(config.sliding_windows) == config.num_hidden_layers


# Tensors that do not fit


def test_all_mismatches_are_in_one_error(bases: Any, tmp_path: Path) -> None:
    found = dict(expected_shapes(ModelConfig.load(bases("qwen2"))))
    del found["model.layers.0.self_attn.q_proj.bias"], found["lm_head.weight"]
    found["model.layers.1.mlp.up_proj.weight"] = (3, 4)
    found["model.layers.1.self_attn.q_norm.weight"] = (8,)
    found["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    with pytest.raises(InputError) as caught:
        check_tensors(ModelConfig.load(bases("qwen2")), found, tmp_path)
    message = str(caught.value)
    assert "model.layers.0.self_attn.q_proj.bias is missing" in message
    assert "lm_head.weight is missing" in message
    assert "model.layers.1.mlp.up_proj.weight is [3, 4], config.json says [48, 32]" in message
    assert "model.layers.1.self_attn.q_norm.weight is not a tensor of a qwen2 model" in message
    assert "rotary" not in message
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 68}, ["embed_tokens.weight is [67, 32]", "[68, 32]", "lm_head.weight"]),
        ({"num_hidden_layers": 3}, ["model.layers.2.self_attn.q_proj.weight is missing", "more"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.", "not a tensor of"]),
        ({"intermediate_size": 50}, ["mlp.up_proj.weight is [48, 32]"]),
        ({"num_key_value_heads": 2}, ["k_proj.weight is [32, 32], config.json says [16, 32]"]),
        ({"attention_bias": True}, ["q_proj.bias is missing"]),
        ({"model_type": "qwen3"}, ["q_norm.weight is missing"]),
    ],
    ids=str,
)
def test_a_config_of_another_shape(changes: dict[str, Any], words: list[str], bases: Any, tmp_path: Path) -> None:
    directory = edit_config(copy_of(bases("llama"), tmp_path), **changes)
    with pytest.raises(InputError) as caught:
        Directory.open(directory)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_checkpoint_that_carries_a_head(equal: bool, bases: Any, tmp_path: Path) -> None:
    directory = copy_of(bases("smollm2"), tmp_path)
    shards = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for file in (*shards, directory / INDEX):
        file.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, directory / SINGLE)
    if equal:
        load(directory)
    else:
        with pytest.raises(InputError, match="tie_word_embeddings"):
            Directory.open(directory)


def test_every_bias_and_norm_of_a_tiny_checkpoint_is_random(bases: Any) -> None:
    """Else a forgotten bias would pass every test above."""
    directory = bases("llama-biases")
    tensors = {n: t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}
    biases = [t for n, t in tensors.items() if n.endswith(".bias")]
    assert len(biases) == 2 * 7
    assert all(t.std() > 0.1 for t in tensors.values())
