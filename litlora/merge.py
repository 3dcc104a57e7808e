"""Adapters merged into the base's weights, tensor by tensor, one block of rows at a time: no model, no GPU.

merged = round(W + Σ weight · scale · B A): summed in fp32, rounded once. Names, order, shapes, dtypes, metadata and
shards stay the base's. `merge_write` makes a directory of it, `merge_verify` reads one back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from litlora.checkpoint import DTYPE_NAMES, Shard, TensorInfo
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.frozen import Quantizer, make_quantizer
from litlora.load import Directory
from litlora.peft_format import Adapter, combine, linear_names

HEAD, EMBEDDING = "lm_head", "model.embed_tokens.weight"
BLOCK = 2**20  # elements of a tensor that are worked on at a time: 4 MB in fp32
ONE_THREAD = 64  # up to this rank one thread computes faster than a disk writes


class VerifyError(RuntimeError):
    """What was written is not what should have been: names the tensor."""


@lru_cache
def _quantizer(name: str, dtype: torch.dtype) -> Quantizer:
    return make_quantizer(name, dtype, _rounding_device(), flag="--base_rounding")


def _rounding_device() -> torch.device:
    """A GPU where there is one: it is quick, and bitsandbytes' two devices do not draw FP4's borders alike."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def few_threads(rank: int) -> Iterator[None]:
    """One thread while products of this rank are computed; more only wait for each other (three times as long on a
    machine that has other work). The same number each time also means the same sums, bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if rank <= ONE_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def row_blocks(info: TensorInfo) -> Iterator[TensorInfo]:
    """A tensor cut along its first dimension, each part about BLOCK elements and readable by itself."""
    elements = prod(info.shape)
    if elements <= BLOCK:
        yield info
        return
    rows, row_bytes = info.shape[0], info.nbytes // info.shape[0]
    step = max(1, BLOCK * rows // elements)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        shape, offset = (count, *info.shape[1:]), info.offset + start * row_bytes
        yield replace(info, shape=shape, offset=offset, nbytes=count * row_bytes)


@dataclass(frozen=True)
class Merge:
    """A base, the adapters with their weights, and how to round; every tensor of the result follows from it.

    `base_rounding`: a quantizer's name; the linears that it held in training are rounded through it first. `dtype`:
    of all floating tensors of the result, None for the base's own. It is also a `load.Weights`: the merge in memory.
    """

    base: Directory
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    base_rounding: str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Raises InputError where the base's format or this machine cannot be merged or rounded."""
        seen: set[str] = set()
        for shard in self.base.checkpoint.shards:
            doubled = seen & {info.name for info in shard.tensors}
            if doubled:
                raise InputError("a tensor lies in two shards", where=shard.file, got=sorted(doubled)[0])
            seen |= {info.name for info in shard.tensors}
        for name in sorted(self.adapted | self.rounded):
            info = self.source(f"{name}.weight")
            if not info.dtype.is_floating_point:
                raise InputError(
                    "a weight that is no floating-point tensor", where=f"{info.file}: {name}", got=info.dtype
                )
        if self.base_rounding:
            _quantizer(self.base_rounding, torch.float32)

    @cached_property
    def adapted(self) -> frozenset[str]:
        """The linears that an adapter changes."""
        return frozenset(name for adapter in self.adapters for name in adapter.modules)

    @cached_property
    def rounded(self) -> frozenset[str]:
        """The linears that were quantized in training: all of the blocks, and the head where a record says so."""
        if not self.base_rounding:
            return frozenset()
        head = any(adapter.record and adapter.record.quantize_head for adapter in self.adapters)
        return frozenset(name for name in linear_names(self.base.config) if name != HEAD or head)

    @cached_property
    def config(self) -> ModelConfig:
        """Of the result. A head that is no longer the embedding is untied: changing both would change the inputs."""
        if HEAD in self.adapted | self.rounded:
            return replace(self.base.config, tie_word_embeddings=False)
        return self.base.config

    @property
    def rank(self) -> int:
        """At most, on one linear, the adapters side by side."""
        return sum(max(map(adapter.lora.rank, adapter.modules)) for adapter in self.adapters)

    @property
    def unties(self) -> bool:
        return self.base.config.tie_word_embeddings and not self.config.tie_word_embeddings

    def source(self, name: str) -> TensorInfo:
        """The base's tensor behind one of the result; a tied head's is the embedding."""
        tensors = self.base.checkpoint.tensors
        return tensors[EMBEDDING] if name == f"{HEAD}.weight" and name not in tensors else tensors[name]

    def out_dtype(self, info: TensorInfo) -> torch.dtype:
        return self.dtype if self.dtype and info.dtype.is_floating_point else info.dtype

    def touched(self, name: str) -> bool:
        """Whether the tensor's bytes may differ from the base's."""
        module, info = name.removesuffix(".weight"), self.source(name)
        return module in self.adapted or module in self.rounded or self.out_dtype(info) != info.dtype

    def base_blocks(self, name: str) -> Iterator[Tensor]:
        """W in blocks of rows, in the base's dtype: what the adapters are added to."""
        info = self.source(name)
        if name.removesuffix(".weight") in self.rounded:
            # whole: doubly quantized scales hang together across the tensor
            quantizer, device = _quantizer(str(self.base_rounding), info.dtype), _rounding_device()
            # in one expression: the weight is let go of before the rounded one is made
            dense = quantizer.freeze(info.read().to(device), None).dense_weight().cpu()
            # copies: a view that is still in somebody's hands would keep the whole tensor
            yield from (part.clone() for part in torch.split(dense, [block.shape[0] for block in row_blocks(info)]))
        else:
            yield from (block.read() for block in row_blocks(info))

    def sums(self, name: str) -> Iterator[Tensor]:
        """W + ΔW in blocks of rows, fp32; W as it is where nothing is added. Raises InputError for an adapter that
        holds no numbers."""
        factors = combine(self.adapters, self.weights, name.removesuffix(".weight"))
        if factors is None:
            yield from self.base_blocks(name)
            return
        a, b = factors.A.float(), factors.B.float()
        if not (a.isfinite().all() and b.isfinite().all()):
            where = ", ".join(str(adapter.directory) for adapter in self.adapters)
            raise InputError("the adapter holds values that are not finite", where=where, got=name)
        start = 0
        for block in self.base_blocks(name):
            wide = block.to(torch.promote_types(block.dtype, torch.float32))
            stop = start + len(wide)
            with few_threads(len(a)):
                wide.addmm_(b[start:stop].to(wide.dtype), a.to(wide.dtype), alpha=factors.scale)
            yield wide
            start = stop

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The result's tensor in blocks of rows. Raises InputError where its dtype cannot hold a value."""
        dtype = self.out_dtype(self.source(name))
        narrow = dtype == torch.float16 and self.touched(name)  # the one dtype that weights may not fit into
        for block in self.sums(name):
            if narrow and block.numel() and not max(map(abs, torch.aminmax(block))) < 65520:  # rounds to infinity
                got = f"a value of magnitude {block.abs().max().item():.4g}"
                raise InputError(f"the merged weights do not fit {dtype}", where=name, got=got, fix="a wider --dtype")
            yield block.to(dtype)

    def read(self, name: str) -> Tensor:
        """One tensor of the result, whole."""
        return torch.cat(list(self.blocks(name))) if self.source(name).shape else next(self.blocks(name))

    def names(self, shard: Shard) -> list[str]:
        """The tensors of a shard of the result, in the file's order: an untied head comes behind the embedding's."""
        names = [info.name for info in shard.tensors]
        added = self.unties and f"{HEAD}.weight" not in self.base.checkpoint.tensors and EMBEDDING in names
        return [*names, f"{HEAD}.weight"] if added else names

    def header(self, shard: Shard) -> bytes:
        """A shard's header: the base's own bytes where they are still true."""
        names = self.names(shard)
        if len(names) == len(shard.tensors) and all(self.out_dtype(info) == info.dtype for info in shard.tensors):
            return shard.header
        entries: dict[str, dict[str, Any]] = {}
        position = 0
        for name in names:
            info = self.source(name)
            dtype = self.out_dtype(info)
            stop = position + prod(info.shape) * dtype.itemsize
            entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(info.shape), "data_offsets": [position, stop]}
            position = stop
        header = json.loads(shard.header)  # its order and its metadata stay
        text = json.dumps({**header, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
        return text + b" " * (-len(text) % 8)

    def nbytes(self, name: str) -> int:
        info = self.source(name)
        return prod(info.shape) * self.out_dtype(info).itemsize

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(self.nbytes(name) for shard in self.base.checkpoint.shards for name in self.names(shard))

    def notes(self) -> list[str]:
        """What the user should know about the quantization seen in training, one line each."""
        notes = []
        for adapter in self.adapters:
            seen = adapter.record.quantize if adapter.record else None
            if seen == self.base_rounding or adapter.record is None:
                continue
            if self.base_rounding is None:
                notes.append(
                    f"note: {adapter.directory} was trained over {seen} weights and is merged onto the unrounded ones; "
                    f"--base_rounding {seen} merges onto those it saw (see --help)"
                )
            else:
                notes.append(
                    f"warning: {adapter.directory} was trained over {seen or 'unrounded'} weights, "
                    f"not over {self.base_rounding}"
                )
        return notes
