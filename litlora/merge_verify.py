"""A merged directory read back: every tensor against W + ΔW, its logits against the same rounding done in memory, and
what that rounding cost.

Sizes: N tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from litlora.checkpoint import Checkpoint
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.frozen import Dense
from litlora.load import Directory, Weights, load_model, parameter_count
from litlora.merge import Merge, VerifyError, row_blocks
from litlora.model import Decoder
from litlora.peft_format import Adapter, Factors, attach
from litlora.sequences import Packed

PACK = 2048  # tokens that go through a model at a time
LOGITS = 2**23  # logits that are compared at a time: 64 MB in fp64
SAME = 1e-5  # of the largest logit: what two runs over equal weights may differ by


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of `dtype` at each of `values` (fp64): the distance of the numbers it has there."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.tiny))  # |x| = m · 2^e, 1/2 <= m < 1
    return info.eps * torch.ldexp(torch.ones_like(values), exponent - 1)


@dataclass(frozen=True)
class Swallowed:
    """‖(merged − W) − ΔW‖ / ‖ΔW‖, over all adapted tensors and of the worst: what the output dtype did not take up."""

    overall: float
    worst: float
    worst_tensor: str


@dataclass(frozen=True)
class Cost:
    """base + adapters unmerged against merged, next-token distributions at every position of real prompts."""

    kl_mean: float  # nats a token
    kl_max: float
    agreement: float  # share of positions with the same likeliest token
    positions: int
    prompts: int
    logits_difference: float  # reloaded against the rounding in memory, the largest
    computed_in: str


def check_tensors(merge: Merge, directory: Path, advance: Callable[[int], object] = lambda nbytes: None) -> Swallowed:
    """Reads a merged `directory` back, one block of rows at a time; `advance` is told the bytes read.

    Raises VerifyError naming the first tensor that is more than half a unit in the last place from the fp32 sum
    W + ΔW, or from the same computed in fp64 (by more than what fp32 sums may err), or, where nothing was added or
    converted, not byte for byte the base's.
    """
    found = _open(directory)
    shares: dict[str, tuple[float, float]] = {}
    for ours, theirs in zip(merge.base.checkpoint.shards, found.shards, strict=True):
        _check_header(merge, merge.names(ours), ours.file.name, merge.header(ours), found, theirs.header)
        for name in merge.names(ours):
            if merge.touched(name):
                shares[name] = _check_touched(merge, name, found)
            else:
                _check_untouched(merge, name, found)
            advance(found.tensors[name].nbytes)
    lost, total = (math.fsum(pair[i] for pair in shares.values()) for i in (0, 1))
    worst, tensor = max(((pair[0] / pair[1], name) for name, pair in shares.items() if pair[1]), default=(0.0, "none"))
    return Swallowed(math.sqrt(lost / total) if total else 0.0, math.sqrt(worst), tensor)


def _open(directory: Path) -> Checkpoint:
    try:
        found = Checkpoint(directory)
    except InputError as error:
        raise VerifyError(f"the merged directory does not open: {error}") from error
    for shard in found.shards:
        if hasattr(os, "posix_fadvise"):  # so that the disk answers, not the memory that was just written from
            with shard.file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return found


def _check_header(merge: Merge, names: list[str], file: str, wanted: bytes, found: Checkpoint, header: bytes) -> None:
    missing = [name for name in names if name not in found.tensors or found.tensors[name].file.name != file]
    if missing or header != wanted:
        raise VerifyError(
            f"the merged shard's header is not as written\n  where:  {file}\n  tensor: {(missing or names)[0]}"
        )


def _check_untouched(merge: Merge, name: str, found: Checkpoint) -> None:
    if not merge.source(name).same(found.tensors[name]):
        raise VerifyError(f"a tensor that no adapter touches is not byte for byte the base's\n  tensor: {name}")


def _check_touched(merge: Merge, name: str, found: Checkpoint) -> tuple[float, float]:
    """(‖(merged − W) − ΔW‖², ‖ΔW‖²) of one tensor, in fp64."""
    module, info = name.removesuffix(".weight"), found.tensors[name]
    parts = [_scaled(a, w, module) for a, w in zip(merge.adapters, merge.weights, strict=True) if module in a.modules]
    rank = sum(len(factors.A) for factors in parts)
    lost = total = 0.0
    start = 0
    blocks = zip(merge.base_blocks(name), merge.sums(name), row_blocks(info), strict=True)
    for base, fp32, piece in blocks:
        merged, exact = piece.read().double(), base.double()
        room = exact.abs()  # grows to |W| + |ΔW|'s bound: what fp32's errors are relative to
        delta = torch.zeros_like(exact)
        for factors in parts:
            rows = factors.B[start : start + len(base)]
            delta.addmm_(rows, factors.A, alpha=factors.scale)
            room.addr_(rows.norm(dim=1), factors.A.norm(dim=0), alpha=abs(factors.scale))  # Cauchy-Schwarz
        exact += delta
        _require_close(name, start, merged, fp32.double(), ulp(fp32.double(), info.dtype) / 2, "the fp32 sum")
        room *= (rank + 4) * 2.0**-24 if parts else 0.0
        _require_close(name, start, merged, exact, ulp(exact, info.dtype) / 2 + room, "the fp64 sum")
        lost += (merged - exact).square().sum().item()
        total += delta.square().sum().item()
        start += len(base)
    return (lost, total) if parts else (0.0, 0.0)


def _scaled(adapter: Adapter, weight: float, module: str) -> Factors:
    factors = adapter.factors(module)
    return Factors(factors.A.double(), factors.B.double(), factors.scale * weight)


def _require_close(name: str, start: int, merged: Tensor, wanted: Tensor, bound: Tensor, what: str) -> None:
    wrong = ~((merged - wanted).abs() <= bound)  # so that a NaN is wrong too
    if wrong.any():
        row, *rest = wrong.nonzero()[0].tolist() or [0]
        at = tuple(wrong.nonzero()[0].tolist())
        raise VerifyError(
            "a merged tensor is more than half a unit in the last place from W + ΔW\n"
            f"  tensor: {name} at {[start + row, *rest]}, {int(wrong.sum())} values of this block\n"
            f"  got:    {merged[at].item():.9g}\n  wanted: {wanted[at].item():.9g} ± {bound[at].item():.3g} ({what})"
        )


@dataclass(frozen=True)
class _Unmerged:
    """The weights that the adapters were put over."""

    merge: Merge

    @property
    def config(self) -> ModelConfig:
        return self.merge.config

    def read(self, name: str) -> Tensor:
        return torch.cat(list(self.merge.base_blocks(name)))


@dataclass(frozen=True)
class _Outcome:
    """What is kept of a model that is gone: its last hidden states and its head."""

    hidden: Tensor  # (N, C)
    head: nn.Module

    def logits(self) -> Iterator[Tensor]:
        """(rows, V) fp64, a part at a time."""
        rows = max(1, LOGITS // int(self.head.out_features))  # type: ignore[arg-type]
        for part in torch.split(self.hidden, rows):
            yield self.head(part).double()


@torch.no_grad()
def compare_models(merge: Merge, directory: Path, prompts: Sequence[Sequence[int]]) -> Cost:
    """Runs `prompts` (token ids) through base + adapters, the merge in memory and the merged directory, one model
    after the other, on the GPU where there is one.

    Raises VerifyError when the last two differ.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _compute_dtype(merge, device)
    unmerged = _run(_Unmerged(merge), prompts, dtype, device, merge)
    memory = _run(merge, prompts, dtype, device)
    reloaded = _run(Directory.open(directory), prompts, dtype, device)
    _require_same(memory, reloaded)
    divergences, same, difference = [], 0, 0.0
    for p, q, again in zip(unmerged.logits(), memory.logits(), reloaded.logits(), strict=True):
        difference = max(difference, (q - again).abs().max().item())
        log_p, log_q = p.log_softmax(-1), again.log_softmax(-1)
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same += int((p.argmax(-1) == again.argmax(-1)).sum())
    kl = torch.cat(divergences).clamp(min=0)
    return Cost(
        kl_mean=kl.mean().item(),
        kl_max=kl.max().item(),
        agreement=same / len(kl),
        positions=len(kl),
        prompts=len(prompts),
        logits_difference=difference,
        computed_in=f"{str(dtype).removeprefix('torch.')} on {device.type}",
    )


def _require_same(memory: _Outcome, reloaded: _Outcome) -> None:
    for ours, theirs in zip(memory.logits(), reloaded.logits(), strict=True):
        difference, size = (ours - theirs).abs().max().item(), ours.abs().max().item()
        if not difference <= SAME * size:
            raise VerifyError(
                "the merged directory gives other logits than the same rounding in memory\n"
                f"  got:    a difference of {difference:.3g}\n  wanted: at most {SAME * size:.3g}"
            )


def _run(
    weights: Weights,
    prompts: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    merge: Merge | None = None,
) -> _Outcome:
    """Loads a model (with `merge`'s adapters over it), runs the prompts, and frees all of it but the head."""
    model = load_model(weights, Dense(dtype), dtype=dtype, device=device)
    if merge:
        attach(model, merge.adapters, merge.weights)
    model.eval()
    hidden = torch.cat([_hidden(model, pack, device) for pack in _packs(prompts)])
    head = model.lm_head
    del model
    gc.collect()
    return _Outcome(hidden, head)


def _hidden(model: Decoder, pack: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    ids = torch.tensor([token for prompt in pack for token in prompt], device=device)
    hidden: Tensor = model(ids, Packed.of_lengths([len(prompt) for prompt in pack], device))
    return hidden


def _packs(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    pack: list[Sequence[int]] = []
    for prompt in prompts:
        if pack and sum(map(len, pack)) + len(prompt) > PACK:
            yield pack
            pack = []
        pack.append(prompt)
    yield pack


def _compute_dtype(merge: Merge, device: torch.device) -> torch.dtype:
    """fp32, in which only the rounding of the weights shows, where the memory holds it; else the result's own dtype."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    if 1.3 * 4 * parameter_count(merge.config) < free:
        return torch.float32
    return merge.out_dtype(merge.source("model.norm.weight"))


def _available_memory() -> int:
    """Bytes of host memory that can be had, the page cache counted in; half of all where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
