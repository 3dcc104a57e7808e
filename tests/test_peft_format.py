"""PEFT opens our adapters and we open PEFT's, with equal logits; what we cannot compute is refused by name."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILIES,
    make_family,
    make_peft_adapter,
    open_in_peft,
    reference,
    reference_logits,
    sequences_of,
)
from torch import Tensor, nn

from litlora.checkpoint import Checkpoint
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.frozen import Dense
from litlora.load import Directory, load_model
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_modules
from litlora.model import Decoder
from litlora.peft_format import (
    CONFIG,
    RECORD,
    WEIGHTS,
    Adapter,
    Record,
    attach,
    combine,
    save_adapter,
    targeted_modules,
    targets_of,
)
from litlora.sequences import Packed

IDS = sequences_of([13])[0]
TOGGLES = [
    targets_of(dict(zip(FLAG_TARGETS, flags, strict=True))) for flags in itertools.product([False, True], repeat=6)
][1:]
ALL = TOGGLES[-1]


def load(base: Path) -> Decoder:
    return load_model(Directory.open(base), Dense(torch.float32), dtype=torch.float32, device="cpu").eval()


def open_adapter(directory: Path, base: Path) -> Adapter:
    return Adapter.open(directory, ModelConfig.load(base), Checkpoint(base))


def our_logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model.lm_head(model(IDS, Packed.of_lengths([len(IDS)])))  # type: ignore[no-any-return]


def attached_logits(directory: Path, base: Path) -> Tensor:
    model = load(base)
    attach(model, [open_adapter(directory, base)])
    return our_logits(model)


def same_logits(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * max(1.0, right.abs().max().item()))


def record_of(base: Path) -> Record:
    return Record(
        base_name=str(base),
        base_fingerprint=Checkpoint(base).fingerprint,
        quantize="bnb.nf4",
        quantize_head=False,
        precision="32-true",
        prompt_style="alpaca",
        prompt_template=None,
        tokenizer_fingerprint="t0",
        step=7,
        val_loss=1.25,
        litlora_version="0.1.0",
    )


def save_ours(
    directory: Path, base: Path, lora: LoRA, dtype: torch.dtype = torch.float32, record: Record | None = None
) -> Decoder:
    """A model adapted with random A and B, saved; returned as it was in memory."""
    model = load(base)
    adapt(model, lora)
    generator = torch.Generator().manual_seed(3)
    for module in lora_modules(model).values():
        for linear in (module.lora_A, module.lora_B):
            nn.init.normal_(linear.weight, std=0.3, generator=generator)
    directory.mkdir()
    save_adapter(directory, lora_modules(model), lora, record or record_of(base), dtype)
    return model.eval()


# Both ways, equal logits


@pytest.mark.parametrize("targets", TOGGLES, ids="+".join)
def test_every_toggle_opens_in_peft_and_here(targets: tuple[str, ...], bases: Any, tmp_path: Path) -> None:
    base = bases("smollm2" if "k_proj" in targets else "llama-biases")
    plain = our_logits(load(base))

    theirs = make_peft_adapter(tmp_path / "theirs", base, target_modules=list(targets))
    wanted = reference_logits(theirs, [IDS])
    assert (wanted - plain).abs().max() > 0.1, "the adapter changes nothing: nothing was tested"
    same_logits(attached_logits(tmp_path / "theirs", base), wanted)

    ours = save_ours(tmp_path / "ours", base, LoRA(r=3, alpha=5, targets=targets))
    wanted = our_logits(ours)
    same_logits(reference_logits(open_in_peft(tmp_path / "ours", base), [IDS]), wanted)
    assert torch.equal(attached_logits(tmp_path / "ours", base), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_in_peft_and_here(family: str, bases: Any, tmp_path: Path) -> None:
    base = bases(family)
    theirs = make_peft_adapter(tmp_path / "theirs", base, target_modules=list(ALL))
    same_logits(attached_logits(tmp_path / "theirs", base), reference_logits(theirs, [IDS]))
    ours = save_ours(tmp_path / "ours", base, LoRA(r=3, alpha=5, targets=ALL))
    same_logits(reference_logits(open_in_peft(tmp_path / "ours", base), [IDS]), our_logits(ours))


PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 7}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 3, "layers.0.*q_proj": 11}},
    "the first pattern wins": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 5}},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    "a regular expression": {"target_modules": r".*layers\.[12]\.(self_attn\.(q|o)_proj|mlp\.down_proj)"},
    "a regular expression on the head": {"target_modules": r"lm_head|.*q_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear but": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "model.layers.0.mlp.gate_proj"]},
    "one layer": {"layers_to_transform": 1},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "the first layer": {"layers_to_transform": [0]},
    "no layer filter": {"layers_to_transform": []},
    "layers and a head by name": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "excluded by name": {"target_modules": list(ALL), "exclude_modules": ["lm_head", "layers.1.self_attn.q_proj"]},
    "excluded by expression": {"target_modules": list(ALL), "exclude_modules": r".*layers\.0.*|lm_head"},
    "full names": {"target_modules": ["model.layers.2.self_attn.k_proj", "model.layers.0.mlp.up_proj"]},
    "partial names": {"target_modules": ["self_attn.k_proj", "1.mlp.up_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "an odd alpha": {"lora_alpha": 13, "r": 5},
}


@pytest.mark.parametrize("what", PEFT_SETTINGS)
@pytest.mark.parametrize("family", ["qwen2-window", "smollm2"])
def test_whatever_peft_targets_we_target(what: str, family: str, bases: Any, tmp_path: Path) -> None:
    base = bases("qwen2-window") if family == "qwen2-window" else deep_tied_base(bases, tmp_path)
    theirs = make_peft_adapter(tmp_path / "theirs", base, **PEFT_SETTINGS[what])
    wanted = reference_logits(theirs, [IDS])
    adapter = open_adapter(tmp_path / "theirs", base)
    targeted = [n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert sorted(adapter.modules) == sorted(targeted)
    same_logits(attached_logits(tmp_path / "theirs", base), wanted)

    model = load(base)  # what we read we can train on and write again, and it is still the same
    assert adapt(model, adapter.lora) == list(adapter.modules)
    attach_again = load(base)
    attach(attach_again, [adapter])
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", lora_modules(attach_again), adapter.lora, record_of(base), torch.float32)
    same_logits(reference_logits(open_in_peft(tmp_path / "again", base), [IDS]), wanted)
    same_logits(attached_logits(tmp_path / "again", base), wanted)


def deep_tied_base(bases: Any, tmp_path: Path) -> Path:
    return make_family(tmp_path / "tied", "smollm2", num_hidden_layers=3)


NAMES = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
TARGETS = st.lists(st.sampled_from(["q_proj", "lm_head", "1.mlp.up_proj", "model.layers.1.mlp.up_proj", "proj", "x"]))
EXPRESSIONS = st.sampled_from([r".*\.q_proj", r"lm_head", r".*layers\.1.*", r"q_proj", r".*(up|q)_proj", "", "no"])
LAYERS = st.none() | st.integers(0, 11) | st.lists(st.integers(0, 11), max_size=3)


@settings(max_examples=300, deadline=None)
@given(targets=TARGETS | EXPRESSIONS, excluded=st.none() | TARGETS | EXPRESSIONS, layers=LAYERS, pattern=st.booleans())
def test_targets_follow_pefts_own_rule(targets: Any, excluded: Any, layers: Any, pattern: bool) -> None:
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    if isinstance(targets, str):
        layers = None  # PEFT refuses both
    raw = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers}
    raw["layers_pattern"] = ["layers"] if pattern else None
    theirs = SimpleNamespace(**raw, modules_to_save=None, target_parameters=None)
    found = [check_target_module_exists(theirs, name) for name in NAMES]
    wanted = [n for n, hit in zip(NAMES, found, strict=True) if hit and not isinstance(hit, _ExcludedModule)]
    assert targeted_modules(raw, NAMES) == wanted


# PEFT's head adapters carry the head


@pytest.mark.parametrize("family", ["llama", "smollm2"])
def test_a_head_adapter_carries_the_head_and_is_taken_only_if_it_is_the_bases(
    family: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(family)
    theirs = make_peft_adapter(tmp_path / "a", base, target_modules=["lm_head", "q_proj"], r=4)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    copies = [key for key in tensors if key.endswith("base_layer.weight")]
    assert copies == ["base_model.model.lm_head.base_layer.weight"], "PEFT no longer does what this test is about"
    same_logits(attached_logits(tmp_path / "a", base), reference_logits(theirs, [IDS]))

    rounded = {key: t.to(torch.bfloat16) if key in copies else t for key, t in tensors.items()}
    save_file(rounded, tmp_path / "a" / WEIGHTS)  # trained over the base opened in 16 bit
    open_adapter(tmp_path / "a", base)

    changed = dict(tensors)
    changed[copies[0]] = tensors[copies[0]].clone()
    changed[copies[0]][-1, -1] += 1e-3
    save_file(changed, tmp_path / "a" / WEIGHTS)
    with pytest.raises(InputError, match=re.escape(copies[0])):
        open_adapter(tmp_path / "a", base)
    with pytest.raises(InputError, match=re.escape(copies[0])):  # nothing to compare it with
        Adapter.open(tmp_path / "a", ModelConfig.load(base))


# What is refused


def edited(directory: Path, **changes: Any) -> Path:
    raw = json.loads((directory / CONFIG).read_text()) | changes
    (directory / CONFIG).write_text(json.dumps(raw))
    return directory


def refused(directory: Path, base: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        open_adapter(directory, base)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.fixture
def adapter(bases: Any, tmp_path: Path) -> Path:
    """A small adapter of ours on the llama base, without a record (as PEFT's)."""
    save_ours(tmp_path / "adapter", bases("llama"), LoRA(r=3, alpha=5))
    (tmp_path / "adapter" / RECORD).unlink()
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, ["use_dora = True"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save = ['lm_head']"]),
        ({"bias": "all"}, ["bias = 'all'"]),
        ({"bias": "lora_only"}, ["bias = 'lora_only'"]),
        ({"use_dora": True, "bias": "all"}, ["use_dora", "bias"]),
        ({"target_parameters": ["experts.w"]}, ["target_parameters"]),
        ({"trainable_token_indices": [1, 2]}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_peft_writes_and_we_cannot_compute_is_refused(
    settings: dict[str, Any], words: list[str], bases: Any, tmp_path: Path, adapter: Path
) -> None:
    """Written by PEFT itself where it writes it for this model, so that the key names are PEFT's."""
    if set(settings) & {"target_parameters", "layer_replication"}:
        refused(edited(adapter, **settings), bases("llama"), *words)
        return
    make_peft_adapter(tmp_path / "theirs", bases("llama"), **settings)
    refused(tmp_path / "theirs", bases("llama"), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_lora_weights": "pissa"}, ["init_lora_weights = 'pissa'"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["pissa_niter_16"]),
        ({"init_lora_weights": "olora"}, ["olora"]),
        ({"init_lora_weights": "corda"}, ["corda"]),
        ({"init_lora_weights": "loftq"}, ["loftq"]),
        ({"lora_bias": True}, ["lora_bias = True"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out = True"]),
        ({"a_new_key": 3}, ["a_new_key = 3"]),
        ({"peft_type": "IA3"}, ["IA3"]),
        ({"peft_type": None}, ["None"]),
        ({"target_modules": ["c_attn"]}, ["c_attn", "match nothing"]),
        ({"target_modules": None}, ["match nothing"]),
        ({"target_modules": "(unclosed"}, ["target_modules", "(unclosed"]),
        ({"exclude_modules": "(unclosed"}, ["exclude_modules"]),
        ({"target_modules": 3}, ["target_modules"]),
        ({"rank_pattern": {"(unclosed": 3}}, ["(unclosed"]),
        ({"rank_pattern": 3}, ["rank_pattern"]),
        ({"r": 0}, ["rank", "0"]),
        ({"r": 3.0}, ["3.0"]),
        ({"r": None}, ["r = None"]),
        ({"r": True}, ["r = True"]),
        ({"lora_alpha": -1}, ["alpha"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"lora_alpha": 10**400}, ["lora_alpha"]),
        ({"r": "8", "rank_pattern": {"q_proj": 1.5}}, ["r = '8'", "rank_pattern = {'q_proj': 1.5}"]),
        ({"lora_dropout": 1.5}, ["dropout"]),
        ({"layers_to_transform": ["0"]}, ["layers_to_transform"]),
    ],
    ids=str,
)
def test_an_adapter_config_that_means_something_else_is_refused(
    changes: dict[str, Any], words: list[str], bases: Any, adapter: Path
) -> None:
    refused(edited(adapter, **changes), bases("llama"), str(adapter), *words)


def test_an_adapter_config_without_a_rank_is_refused(bases: Any, adapter: Path) -> None:
    raw = json.loads((adapter / CONFIG).read_text())
    del raw["r"]
    (adapter / CONFIG).write_text(json.dumps(raw))
    refused(adapter, bases("llama"), str(adapter / CONFIG), "r")


NAMES_OF_SETTINGS = """r lora_alpha lora_dropout target_modules rank_pattern peft_type alpha_pattern use_rslora bias
exclude_modules layers_to_transform layers_pattern init_lora_weights base_model_name_or_path fan_in_fan_out x"""
CHANGES = st.dictionaries(
    st.sampled_from(NAMES_OF_SETTINGS.split()),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.lists(st.integers() | st.text(max_size=3) | st.none(), max_size=2)
    | st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=2) | st.floats(), max_size=2),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_any_adapter_config_is_read_or_refused(changes: dict[str, Any], bases: Any, adapter: Path) -> None:
    original = (adapter / CONFIG).read_text()
    try:
        with contextlib.suppress(InputError):
            open_adapter(edited(adapter, **changes), bases("llama"))
    finally:
        (adapter / CONFIG).write_text(original)


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)
    return directory


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EXTRA = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FIRST), [f"{FIRST} is missing"]),
        (lambda t: t.update({EXTRA: torch.zeros(3, 32)}), [f"{EXTRA} is not expected"]),
        (lambda t: t.update({FIRST: torch.zeros(4, 32)}), [f"{FIRST} is [4, 32]", "[3, 32]"]),
        (lambda t: t.update({FIRST: torch.zeros(3, 32, dtype=torch.int64)}), [f"{FIRST} is of dtype torch.int64"]),
        (lambda t: (t.pop(FIRST), t.update({EXTRA: torch.zeros(3, 32)})), [f"{FIRST} is missing", f"{EXTRA} is not"]),
        (lambda t: t.update({"base_model.model.lm_head.bias": torch.zeros(67)}), ["lm_head.bias is not expected"]),
    ],
)
def test_keys_that_do_not_fit_are_named(change: Any, words: list[str], bases: Any, adapter: Path) -> None:
    refused(change_tensors(adapter, change), bases("llama"), str(adapter), *words)


def test_another_rank_than_the_config_says(bases: Any, adapter: Path) -> None:
    refused(edited(adapter, r=5), bases("llama"), f"{FIRST} is [3, 32]", "[5, 32]", "and 4 more")


def test_a_pattern_that_the_tensors_contradict(bases: Any, adapter: Path) -> None:
    refused(edited(adapter, rank_pattern={"layers.0.self_attn.q_proj": 2}), bases("llama"), f"{FIRST} is [3, 32]")


def test_another_base_of_the_same_shape_is_refused_naming_both(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    for file in other.glob("*.safetensors"):
        save_file({n: t + 0.01 for n, t in load_file(file).items()}, file)
    save_ours(tmp_path / "a", base, LoRA())
    open_adapter(tmp_path / "a", base)
    refused(tmp_path / "a", other, "another base", str(other), str(base), Checkpoint(base).fingerprint[:12])
    save_ours(tmp_path / "named", base, LoRA(), record=replace(record_of(base), base_name="some/name"))
    refused(tmp_path / "named", other, "another base", str(other), "some/name")


def test_another_base_of_another_shape_is_refused(bases: Any, adapter: Path) -> None:
    refused(adapter, bases("smollm2"), "do not fit", str(bases("smollm2")), str(bases("llama")))
    refused(adapter, bases("qwen2-window"), "model.layers.2.self_attn.q_proj.lora_A.weight is missing")


def test_pickled_missing_and_corrupt_weights(bases: Any, adapter: Path) -> None:
    base = bases("llama")
    os_truncate(adapter / WEIGHTS, 50)
    refused(adapter, base, "truncated or corrupt", WEIGHTS)
    (adapter / WEIGHTS).unlink()
    refused(adapter, base, "missing", WEIGHTS)
    torch.save({FIRST: torch.zeros(3, 32)}, adapter / "adapter_model.bin")
    refused(adapter, base, "pickled", "adapter_model.bin", "safe_serialization=True")


def os_truncate(file: Path, size: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(size)


def test_a_directory_that_is_no_adapter(bases: Any, tmp_path: Path, adapter: Path) -> None:
    refused(bases("llama"), bases("llama"), CONFIG, "--lora_path")
    refused(tmp_path / "nowhere", bases("llama"), CONFIG, "--lora_path")
    (adapter / CONFIG).write_text('{"r": 3,\n')
    refused(adapter, bases("llama"), "malformed JSON", "line 2")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"unknown": 1}'])
def test_a_record_that_is_not_ours(content: str, bases: Any, adapter: Path) -> None:
    (adapter / RECORD).write_text(content)
    refused(adapter, bases("llama"), RECORD)


# What is written


def test_equal_saves_give_equal_bytes(bases: Any, tmp_path: Path) -> None:
    lora = LoRA(r=3, alpha=5, targets=ALL, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 1.5}, rslora=True)
    for name in ("a", "b"):
        save_ours(tmp_path / name, bases("llama"), replace(lora, targets=ALL if name == "a" else ALL[::-1]))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted([CONFIG, WEIGHTS, RECORD])
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_what_is_written_is_what_is_read(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    lora = LoRA(r=3, alpha=5.5, dropout=0.1, targets=("o_proj",), rank_pattern={"o_proj": 2}, rslora=True)
    model = save_ours(tmp_path / "a", base, lora)
    adapter = open_adapter(tmp_path / "a", base)
    assert adapter.lora == lora
    assert adapter.record == record_of(base)
    assert adapter.base_name == str(base)
    for name, module in lora_modules(model).items():
        factors = adapter.factors(name)
        assert torch.equal(factors.A, module.lora_A.weight)
        assert torch.equal(factors.B, module.lora_B.weight)
        assert factors.scale == module.scale
        torch.testing.assert_close(factors.delta(), module.scale * module.lora_B.weight @ module.lora_A.weight)


def test_an_adapter_is_saved_in_the_asked_dtype(bases: Any, tmp_path: Path) -> None:
    save_ours(tmp_path / "a", bases("llama"), LoRA(), torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / WEIGHTS).values()} == {torch.bfloat16}
    same = attached_logits(tmp_path / "a", bases("llama"))
    torch.testing.assert_close(same, reference_logits(open_in_peft(tmp_path / "a", bases("llama")), [IDS]))


def test_several_adapters_add_up_exactly(bases: Any, tmp_path: Path) -> None:
    """Different ranks, targets and scales, weighted: the logits of W + Σ w ΔW."""
    base, weights = bases("smollm2"), [0.7, -0.4]
    make_peft_adapter(tmp_path / "a", base, target_modules=["q_proj", "up_proj", "lm_head"], r=2, use_rslora=True)
    make_peft_adapter(tmp_path / "b", base, target_modules=["q_proj", "o_proj"], r=5, lora_alpha=3, seed=1)
    adapters = [open_adapter(tmp_path / name, base) for name in "ab"]
    model = load(base)
    attach(model, adapters, weights)
    merged = load_model(Directory.open(base), Dense(torch.float32), dtype=torch.float32, device="cpu")
    merged.lm_head.weight = nn.Parameter(merged.lm_head.weight.clone())
    touched = {name for adapter in adapters for name in adapter.modules}
    assert touched == set(lora_modules(model))
    with torch.no_grad():
        for adapter, weight in zip(adapters, weights, strict=True):
            for name in adapter.modules:
                merged.get_submodule(name).weight.add_(weight * adapter.factors(name).delta())  # type: ignore[operator]
    same_logits(our_logits(model.eval()), our_logits(merged.eval()))
    assert combine(adapters, weights, "model.layers.0.self_attn.k_proj") is None


def test_reference_and_loaded_base_agree(bases: Any) -> None:
    """What every comparison above stands on."""
    for family in ("llama", "smollm2", "llama-biases", "qwen2-window"):
        same_logits(our_logits(load(bases(family))), reference_logits(reference(bases(family)), [IDS]))
