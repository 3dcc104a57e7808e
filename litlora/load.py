"""A Decoder from a Hugging Face directory, or with random weights: each tensor is read, quantized and moved, one at a
time, so that the host never holds more than one."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from litlora.checkpoint import Checkpoint
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.frozen import Dense, Quantizer, join
from litlora.model import Attention, Decoder
from litlora.ops import Ops


class Weights(Protocol):
    """Where a model's tensors come from."""

    @property
    def config(self) -> ModelConfig: ...

    def read(self, name: str) -> Tensor:
        """One tensor by its Hugging Face name."""
        ...


@dataclass(frozen=True)
class Directory:
    """The weights of a Hugging Face directory, checked against its config before anything is read to `device`."""

    config: ModelConfig
    checkpoint: Checkpoint
    device: torch.device | str = "cpu"

    @classmethod
    def open(cls, path: Path) -> Directory:
        """Raises InputError for a bad directory, an unsupported config, and for missing, extra or misshapen tensors
        (all named at once)."""
        config, checkpoint = ModelConfig.load(path), Checkpoint(path)
        check_tensors(config, {name: info.shape for name, info in checkpoint.tensors.items()}, path)
        directory = cls(config, checkpoint)
        head = checkpoint.tensors.get("lm_head.weight") if config.tie_word_embeddings else None
        if head is not None and not head.same(checkpoint.tensors["model.embed_tokens.weight"]):
            raise InputError(
                "the config ties the head to the embedding, but the checkpoint holds two different tensors",
                where=path,
                fix='set "tie_word_embeddings": false in config.json if the head is its own',
            )
        return directory

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name, self.device)


@dataclass(frozen=True)
class RandomWeights:
    """Weights of the right shapes, drawn on `device` (a 70B never touches the disk): speed and memory do not depend on
    the values. A name gives the same values each time it is read."""

    config: ModelConfig
    dtype: torch.dtype = torch.bfloat16
    device: torch.device | str = "cpu"

    def read(self, name: str) -> Tensor:
        shape = expected_shapes(self.config)[name]
        if len(shape) == 1:
            filler = torch.zeros if name.endswith(".bias") else torch.ones
            return filler(shape, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(std=0.02, generator=generator)


def meta_decoder(config: ModelConfig, ops: Ops | None = None) -> Decoder:
    """The model without storage: for shapes, counts and dry runs."""
    with torch.device("meta"):
        return Decoder(config, ops)


@lru_cache(maxsize=8)
def expected_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The tensors a checkpoint of this config holds; a tied head is not among them. Worked out once a config: random
    weights ask for every tensor."""
    shapes = {name: tuple(p.shape) for name, p in meta_decoder(config).named_parameters()}
    tied = config.tie_word_embeddings
    return MappingProxyType({name: shape for name, shape in shapes.items() if not (tied and name.startswith("lm_"))})


def parameter_count(config: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in expected_shapes(config).values())


def check_tensors(config: ModelConfig, found: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Raises InputError unless `found` are just the tensors of the config (rotary tables of old files aside)."""
    wanted = expected_shapes(config)
    problems = [f"{name} is missing" for name in wanted if name not in found]
    for name, shape in found.items():
        if name not in wanted:
            known = name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)
            problems += [] if known else [f"{name} is not a tensor of a {config.model_type} model"]
        elif shape != wanted[name]:
            problems.append(f"{name} is {list(shape)}, config.json says {list(wanted[name])}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError("the weights do not fit config.json", where=where, got="; ".join(problems[:5]) + more)


def load_model(
    weights: Weights,
    quantizer: Quantizer,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    ops: Ops | None = None,
    quantize_head: bool = False,
) -> Decoder:
    """The frozen model on `device`. `dtype` is that of everything that is not quantized: embedding, norms, head."""
    config, dense = weights.config, Dense(dtype)
    if isinstance(weights, Directory):
        weights = replace(weights, device=device)
    decoder = meta_decoder(config, ops)
    decoder.inverse_frequencies = decoder.inverse_frequencies.to(device)
    linears = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    others = [(name, module) for name, module in decoder.named_modules() if name not in linears]
    leaves = [
        (f"{name}.{leaf}", module, leaf) for name, module in others for leaf, _ in module.named_parameters("", False)
    ]
    sources = {name: f"{name}.weight" for name in linears}
    if config.tie_word_embeddings:
        sources["lm_head"] = "model.embed_tokens.weight"
        if not quantize_head:  # a tied head that stays dense shares the embedding's Parameter, not a copy
            del sources["lm_head"]
    wanted = [name for name, _, _ in leaves]  # first what is no linear: the tied head needs the embedding
    for name, module in linears.items():
        wanted += [sources[name]] if name in sources else []
        wanted += [f"{name}.bias"] if module.bias is not None else []
    arriving = _arriving(weights, wanted, torch.device(device))
    for _, module, leaf in leaves:
        setattr(module, leaf, nn.Parameter(next(arriving).to(dtype), requires_grad=False))
    for name, module in linears.items():
        weight: Tensor = next(arriving) if name in sources else decoder.model.embed_tokens.weight
        bias = None if module.bias is None else next(arriving)
        chosen = quantizer if name != "lm_head" or quantize_head else dense
        decoder.set_submodule(name, chosen.freeze(weight, bias))
        del weight, bias  # else they are held while the next are read
        if name.endswith(".v_proj"):  # the last of three
            attention = decoder.get_submodule(name.rpartition(".")[0])
            assert isinstance(attention, Attention)
            join(attention.projections)
    return decoder


def _arriving(weights: Weights, names: Sequence[str], device: torch.device) -> Iterator[Tensor]:
    """The tensors on `device`, in this order. A card's next one is read while one is put to use."""
    if device.type != "cuda":
        for name in names:
            yield weights.read(name).to(device)
        return
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(weights.read, names[0])
        for later in (*names[1:], None):
            arrived = following
            if later:
                following = reader.submit(weights.read, later)
            yield arrived.result().to(device)
