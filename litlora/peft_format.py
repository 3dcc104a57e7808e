"""Adapters in PEFT's format: adapter_config.json + adapter_model.safetensors, and litlora.json on what made them.

A key is `base_model.model.` + the module's Hugging Face name + `.lora_A.weight` / `.lora_B.weight`. Whatever PEFT can
write and we cannot compute is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litlora.checkpoint import (
    Checkpoint,
    Shard,
    TensorInfo,
    make_header,
    read_json,
    refuse_links,
    write_json,
    write_shard,
)
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.expressions import require_quick
from litlora.lora import FLAG_TARGETS, LoRA, LoRALinear, wrap

PREFIX = "base_model.model."
LAYERS = r"(?:^|.*?\.){}\.(\d+)\."  # a module's number of its layer, by a name from layers_pattern
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "litlora.json"

USED = frozenset(
    """r lora_alpha lora_dropout target_modules exclude_modules rank_pattern alpha_pattern use_rslora
    layers_to_transform layers_pattern base_model_name_or_path init_lora_weights""".split()
)
HARMLESS = frozenset(
    """peft_type task_type peft_version auto_mapping revision inference_mode qalora_group_size runtime_config
    eva_config corda_config lora_ga_config ensure_weight_tying megatron_core""".split()
)
# At any other value the adapter computes something else; a key in none of the lists must be empty.
NEUTRAL: dict[str, tuple[Any, ...]] = {"bias": ("none",), "fan_in_fan_out": (False, None)}
# These start from the base as it is; PiSSA, OLoRA, CorDA and LoftQ change the base under the adapter.
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Record:
    """What made an adapter, kept beside it as litlora.json."""

    base_name: str
    base_fingerprint: str
    quantize: str | None
    quantize_head: bool
    precision: str
    prompt_style: str
    prompt_template: str | None  # the text of a template file
    tokenizer_fingerprint: str
    step: int
    val_loss: float | None
    litlora_version: str


@dataclass(frozen=True)
class Factors:
    """One linear's update: ΔW = scale · B A. A (r, in), B (out, r)."""

    A: Tensor
    B: Tensor
    scale: float

    def delta(self) -> Tensor:
        """(out, in) fp32."""
        return self.scale * (self.B.float() @ self.A.float())


@dataclass(frozen=True)
class Adapter:
    """An adapter directory, its header read and checked against a base; tensors are read one at a time."""

    directory: Path
    lora: LoRA
    record: Record | None  # None: not made by litlora
    base_name: str | None
    tensors: Mapping[str, TensorInfo]
    modules: tuple[str, ...]  # adapted linears, Hugging Face names

    @classmethod
    def open(cls, directory: Path, config: ModelConfig, base: Checkpoint | None = None) -> Adapter:
        """Raises InputError for what is missing, corrupt, not supported or made for another base. With `base` also
        the record's fingerprint, and weights that PEFT copied from the base, are compared."""
        raw = _read_config(directory)
        shard = Shard.open(directory / WEIGHTS)
        record = _read_record(directory)
        base_name = raw.get("base_model_name_or_path")
        if record and base and record.base_fingerprint != base.fingerprint:
            raise InputError(
                "this adapter was trained on another base model",
                where=directory,
                got=f"{base.directory} (fingerprint {base.fingerprint[:12]})",
                wanted=f"{record.base_name} (fingerprint {record.base_fingerprint[:12]})",
                fix="--checkpoint_dir with the base it was trained on; if that is the same model in another dtype, "
                f"delete {RECORD} in the adapter directory",
            )
        lora = _lora(raw, config, directory / CONFIG)
        tensors = {info.name: info for info in shard.tensors}
        modules = _check_tensors(lora, tensors, config, base, directory, base_name)
        return cls(directory, lora, record, base_name, tensors, modules)

    def factors(self, module: str) -> Factors:
        a, b = (self.tensors[f"{PREFIX}{module}.lora_{side}.weight"].read() for side in "AB")
        return Factors(a, b, self.lora.scale(module))


RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "bool": (bool,),
    "int": (int,),
    "float | None": (float, int, type(None)),
}


def _read_config(directory: Path) -> dict[str, Any]:
    if directory.is_dir():
        refuse_links(directory)
    if not (directory / CONFIG).is_file():
        fix = "check --lora_path"
        if directory.is_file():
            fix = "the directory that the file lies in"
        elif (directory / "config.json").is_file():
            fix = "this is a model, not an adapter: --checkpoint_dir, or generate and validate it without --lora_path"
        raise InputError(
            f"no {CONFIG} in the adapter directory",
            where=directory,
            wanted="a directory written by litlora finetune_lora or by PEFT's save_pretrained",
            fix=fix,
        )
    if not (directory / WEIGHTS).is_file() and (directory / "adapter_model.bin").is_file():
        fix = "open it in PEFT once and save it with save_pretrained (safe_serialization=True)"
        raise InputError("pickled adapter weights are not read", where=directory / "adapter_model.bin", fix=fix)
    raw = read_json(directory / CONFIG)
    if raw.get("peft_type") != "LORA":
        raise InputError("not a LoRA adapter", where=directory / CONFIG, got=f"peft_type {raw.get('peft_type')!r}")
    problems = [f"{k} = {raw[k]!r}" for k, fine in NEUTRAL.items() if k in raw and raw[k] not in fine]
    init = raw.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        problems.append(f"init_lora_weights = {init!r}")
    for key, value in raw.items():
        if key not in USED and key not in HARMLESS and key not in NEUTRAL and value:
            problems.append(f"{key} = {value!r}")
    if problems:
        raise InputError("adapter settings that are not supported", where=directory / CONFIG, got="; ".join(problems))
    return raw


def _read_record(directory: Path) -> Record | None:
    file = directory / RECORD
    if not file.is_file():
        return None
    try:
        record = Record(**read_json(file))
    except TypeError as error:
        raise InputError("a record that litlora did not write", where=file, got=str(error)) from None
    found = [(field.name, getattr(record, field.name), RECORD_TYPES[str(field.type)]) for field in fields(Record)]
    wrong = [f"{name} = {value!r}" for name, value, types in found if not isinstance(value, types)]
    if wrong:
        raise InputError("a record that litlora did not write", where=file, got="; ".join(wrong))
    return record


def _lora(raw: Mapping[str, Any], config: ModelConfig, where: Path) -> LoRA:
    """The adapter's settings, its targets resolved to leaf names where that says it all, else to full names."""
    problems = [f"{key} = {raw.get(key)!r}" for key, fits in WELL_FORMED.items() if not fits(raw.get(key))]
    if problems:
        raise InputError("adapter settings of the wrong kind", where=where, got="; ".join(problems))
    try:
        lora = LoRA(
            r=raw["r"],
            alpha=float(raw["lora_alpha"]),
            dropout=float(raw.get("lora_dropout") or 0.0),
            targets=("unresolved",),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern={key: float(value) for key, value in (raw.get("alpha_pattern") or {}).items()},
            rslora=bool(raw.get("use_rslora")),
        )
        require_quick(_expressions(raw), linear_names(config), where)
        modules = targeted_modules(raw, linear_names(config))
    except InputError as error:
        raise InputError(f"{error}\n  file:   {where}") from None
    if not modules:
        got = f"target_modules {raw.get('target_modules')!r}"
        raise InputError("the adapter's targets match nothing in this model", where=where, got=got)
    leaves = tuple(sorted({name.rpartition(".")[2] for name in modules}))
    by_leaf = replace(lora, targets=leaves)
    complete = [name for name in linear_names(config) if by_leaf.matches(name)] == modules
    return by_leaf if complete else replace(lora, targets=tuple(modules))


def _expressions(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `targeted_modules` and LoRA's patterns will match names with, and how."""
    whole = [text for key in ("target_modules", "exclude_modules") if isinstance(text := raw.get(key), str)]
    layers = raw.get("layers_pattern") or []
    patterns = [*(raw.get("rank_pattern") or ()), *(raw.get("alpha_pattern") or ())]
    return [
        *(("fullmatch", text) for text in whole),
        *(("match", LAYERS.format(text)) for text in ([layers] if isinstance(layers, str) else layers)),
        *(("match", rf"(.*\.)?({text})$") for text in patterns),
    ]


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_expression(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


def _are_names(value: Any) -> bool:
    return value is None or _is_expression(value) or _is_list(value, lambda name: isinstance(name, str))


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(_is_expression(k) and fits(v) for k, v in value.items()))


WELL_FORMED: dict[str, Callable[[Any], bool]] = {
    "r": _is_whole,
    "lora_alpha": _is_number,
    "lora_dropout": lambda value: value is None or _is_number(value),
    "target_modules": _are_names,
    "exclude_modules": _are_names,
    "rank_pattern": lambda value: _is_table(value, _is_whole),
    "alpha_pattern": lambda value: _is_table(value, _is_number),
    "use_rslora": lambda value: value is None or isinstance(value, bool),
    "layers_to_transform": lambda value: value is None or _is_whole(value) or _is_list(value, _is_whole),
    "layers_pattern": lambda value: value is None or _is_expression(value) or _is_list(value, _is_expression),
}


def linear_names(config: ModelConfig) -> list[str]:
    """The names of all linears in model order."""
    names = [name for name in config.linear_shapes if name != "lm_head"]
    return [f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in names] + ["lm_head"]


def linear_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    """(out, in) of a linear by its full name."""
    return config.linear_shapes[".".join(name.split(".")[-2:])]


def targeted_modules(raw: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """PEFT's rules: target_modules is a regular expression on the whole name, "all-linear", or a list of endings."""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    layers, layer_names = raw.get("layers_to_transform"), raw.get("layers_pattern") or ["layers"]
    layers = [layers] if isinstance(layers, int) else layers
    layer_names = [layer_names] if isinstance(layer_names, str) else layer_names

    def in_layers(name: str) -> bool:
        if not layers or isinstance(targets, str) or name in (targets or ()):  # a full name holds in any layer
            return True
        found = [m for pattern in layer_names if (m := re.match(LAYERS.format(pattern), name))]
        return bool(found) and int(found[0].group(1)) in layers

    if targets == "all-linear":  # PEFT leaves the output head out
        return [name for name in names if name != "lm_head" and not (excluded and _listed(excluded, name))]
    return [
        name
        for name in names
        if _listed(targets or [], name) and not (excluded and _listed(excluded, name)) and in_layers(name)
    ]


def _listed(targets: str | Sequence[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _check_tensors(
    lora: LoRA,
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    base: Checkpoint | None,
    directory: Path,
    base_name: str | None,
) -> tuple[str, ...]:
    """The adapted modules. Raises InputError naming every key that is missing, extra or of another shape."""
    modules = [name for name in linear_names(config) if lora.matches(name)]
    wanted: dict[str, tuple[int, int]] = {}
    for name in modules:
        out_features, in_features = linear_shape(config, name)
        rank = lora.rank(name)
        wanted[f"{PREFIX}{name}.lora_A.weight"] = (rank, in_features)
        wanted[f"{PREFIX}{name}.lora_B.weight"] = (out_features, rank)
    problems = [f"{key} is missing" for key in wanted if key not in tensors]
    for key, info in tensors.items():
        if key not in wanted:
            problems += [] if _is_copy_of_base(key, info, base) else [f"{key} is not expected"]
        elif info.shape != wanted[key]:
            problems.append(f"{key} is {list(info.shape)}, its config and the base say {list(wanted[key])}")
        elif not info.dtype.is_floating_point:
            problems.append(f"{key} is of dtype {info.dtype}")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InputError(
            "the adapter's tensors do not fit its config and this base model",
            where=directory / WEIGHTS,
            got="; ".join(problems[:4]) + more,
            wanted=f"an adapter of {base.directory if base else 'this base'} (this one names {base_name or 'no base'})",
        )
    return tuple(modules)


def _is_copy_of_base(key: str, info: TensorInfo, base: Checkpoint | None) -> bool:
    """PEFT saves a targeted head's (and a resized embedding's) own weight too: fine when it is the base's."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if name not in ("lm_head.weight", "model.embed_tokens.weight") or base is None:
        return False
    if name == "lm_head.weight" and name not in base.tensors:
        name = "model.embed_tokens.weight"  # tied
    original = base.tensors.get(name)
    if original is None or original.shape != info.shape:
        return False
    # a base opened in 16 bit leaves a rounded copy
    return torch.equal(info.read().float(), original.read().to(info.dtype).float())


def combine(adapters: Sequence[Adapter], weights: Sequence[float], module: str) -> Factors | None:
    """The weighted sum of several adapters on one linear, exactly: their ranks side by side. None: none adapts it."""
    found = [(a.factors(module), w) for a, w in zip(adapters, weights, strict=True) if module in a.modules]
    if not found:
        return None
    if len(found) == 1:
        factors, weight = found[0]
        return replace(factors, scale=factors.scale * weight)
    a = torch.cat([factors.A.float() for factors, _ in found])
    b = torch.cat([factors.B.float() * (factors.scale * weight) for factors, weight in found], dim=1)
    return Factors(a, b, 1.0)


def attach(
    model: nn.Module,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Puts trained adapters over a loaded model, unmerged. `dtype` of the factors: the first adapter's own without."""
    for name in linear_names(model.config):  # type: ignore[arg-type]
        factors = combine(adapters, weights or [1.0] * len(adapters), name)
        if factors is not None:
            dropout = adapters[0].lora.dropout
            module = wrap(model, name, len(factors.A), factors.scale, dropout, dtype or factors.A.dtype)
            load_factors(module, factors)


def load_factors(module: LoRALinear, factors: Factors) -> None:
    """Copies trained A and B into an adapted linear."""
    with torch.no_grad():
        module.lora_A.weight.copy_(factors.A)
        module.lora_B.weight.copy_(factors.B)


def save_adapter(
    directory: Path, modules: Mapping[str, LoRALinear], lora: LoRA, record: Record, dtype: torch.dtype
) -> None:
    """Writes the three files into an existing `directory`, each atomically; `modules` by Hugging Face name."""
    entries: list[tuple[str, Tensor]] = []
    for name, module in modules.items():
        entries.append((f"{PREFIX}{name}.lora_A.weight", module.lora_A.weight.detach()))
        entries.append((f"{PREFIX}{name}.lora_B.weight", module.lora_B.weight.detach()))
    header = make_header([(key, dtype, tuple(t.shape)) for key, t in entries], {"format": "pt"})
    write_shard(directory / WEIGHTS, header, (t.to(dtype) for _, t in entries))
    write_json(directory / CONFIG, peft_config(lora, record.base_name))
    write_json(directory / RECORD, asdict(record))


def peft_config(lora: LoRA, base_name: str) -> dict[str, Any]:
    """adapter_config.json as PEFT, transformers and vLLM read it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.r,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": sorted(lora.targets),
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": {key: _plain(value) for key, value in lora.alpha_pattern.items()},
        "use_rslora": lora.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def targets_of(flags: Mapping[str, bool]) -> tuple[str, ...]:
    """The targets of the articles' lora_* flags."""
    return tuple(leaf for flag, leaves in FLAG_TARGETS.items() if flags[flag] for leaf in leaves)
