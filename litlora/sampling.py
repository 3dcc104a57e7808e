"""Which token comes next: greedy, temperature, top-k, top-p and repetition penalty as transformers defines them.

A row's draw depends on (seed, its stream, its step) only, never on the rows beside it: the random numbers are counted,
not drawn from a state, and made on the device, so that choosing needs no host and fits into a captured graph. On a CUDA
card one kernel chooses, but for top-p; tensor operations say what it is held to.
Sizes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from litlora.errors import InputError

NOT_FINITE = -1  # what `choose` gives for a row whose logits are not finite

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_UNIFORM_BITS = 52  # one less than a float64 holds, so that u * total < total after rounding, too


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy, and then top_k, top_p and seed do nothing.

    top_k None or 0, top_p None or 1, repetition_penalty 1: off.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        """Raises InputError for values out of range."""
        ranges = (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 0, "a whole number from 1 up (0: off)"),
            ("top_p", self.top_p, self.top_p is None or 0 <= self.top_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0 (1: off)"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
        )
        for name, value, fine, wanted in ranges:
            if not fine:
                raise InputError(f"--{name} is out of range", got=value, wanted=wanted)

    def choose(
        self, logits: Tensor, seen: Tensor | None, streams: Tensor, steps: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """logits (B, V), seen (B, V) bool (needed for a repetition penalty), streams and steps (B,) int64 -> (B,) ids.

        NOT_FINITE for a row whose best logit is not a number or infinite. Written into `out` where that is given.
        """
        out = torch.empty_like(steps) if out is None else out
        kernel = _kernel(logits.device)
        if kernel is None or (self.temperature > 0 and self.top_p is not None and self.top_p < 1):
            return out.copy_(self.choose_by_torch(logits, seen, streams, steps))
        if seen is not None and self.repetition_penalty != 1.0:
            logits = self.penalized(logits.float(), seen)
        mixed_seed = _signed(_mixed_int(self.seed))
        kernel(logits, streams, steps, out, temperature=self.temperature, top_k=self.top_k, mixed_seed=mixed_seed)
        return out

    def choose_by_torch(self, logits: Tensor, seen: Tensor | None, streams: Tensor, steps: Tensor) -> Tensor:
        """What `choose` gives, by tensor operations alone."""
        scores = self.penalized(logits.float(), seen)
        best, tokens = scores.max(-1)
        if self.temperature > 0:
            cumulative = self.filtered(scores).softmax(-1).cumsum(-1, dtype=torch.float64)
            target = uniform(self.seed, streams, steps)[:, None] * cumulative[:, -1:]
            # the first id whose sum is above the target: its own probability cannot be 0
            tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
        return torch.where(best.isfinite(), tokens, NOT_FINITE)

    def penalized(self, scores: Tensor, seen: Tensor | None) -> Tensor:
        """Tokens of the prompt and the answer so far made less likely (Keskar et al. 2019, arXiv 1909.05858)."""
        if self.repetition_penalty == 1.0 or seen is None:
            return scores
        lowered = torch.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
        return torch.where(seen, lowered, scores)

    def filtered(self, scores: Tensor) -> Tensor:
        """Scores over temperature, -inf where top-k or top-p leave a token out: the softmax is the distribution."""
        scores = (scores - scores.amax(-1, keepdim=True)) / self.temperature  # from 0 down: no overflow at 1e-30
        if self.top_k:
            kth = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -math.inf)  # equals of the k-th stay, as in transformers
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(descending=True, stable=True)
            probabilities = ordered.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities  # what the more likely ones hold together
            outside = before >= self.top_p
            outside[:, 0] = False
            scores = scores.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -math.inf)
        return scores


@cache
def _kernel(device: torch.device) -> Callable[..., None] | None:
    """What chooses in one kernel, where that runs."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from litlora.ops.sampling_kernels import choose
    except ImportError:  # no Triton: Windows, or a torch built without it
        return None
    return choose


def uniform(seed: int, streams: Tensor, steps: Tensor) -> Tensor:
    """(B,) float64 in [0, 1): splitmix64 (Steele, Lea, Flood 2014) of (seed, stream, step)."""
    mixed = _mixed(streams * _signed(_GOLDEN) + _signed(_mixed_int(seed)))
    mixed = _mixed(mixed + steps * _signed(_GOLDEN))
    return (mixed >> (64 - _UNIFORM_BITS) & (1 << _UNIFORM_BITS) - 1).double() * 2.0**-_UNIFORM_BITS


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finalizer on int64, whose products wrap around like those of unsigned numbers."""
    for shift, factor in _MIX:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return x >> bits & (1 << (64 - bits)) - 1  # a logical shift: torch's own repeats the sign


def _mixed_int(x: int) -> int:
    x = (x + _GOLDEN) & _MASK64
    for shift, factor in _MIX:
        x = (x ^ x >> shift) * factor & _MASK64
    return x ^ x >> 31


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
