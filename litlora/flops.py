"""How much of the card's matmul rate a step reaches.

The usual count, in FLOP (a multiplication and an addition are two) a weight and token: a frozen linear 2 forward and 2
backward, which has no gradient for the weight; a trained one 2 and 4; recomputing a block in the backward pass adds its
forward once more. The head sees trained tokens only. Attention: 4 · H · D forward for every pair of a position and one
that it sees, twice that backward. Norms, rotations, softmax and the optimizer are not counted.
The rate is not the data sheet's, which no product reaches, but what one large product takes on this card in this run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from litlora.config import ModelConfig
from litlora.lora import LoRALinear

SIZE = 4096  # of the measured product: large enough for the full rate, 100 MB in bf16


@dataclass(frozen=True)
class StepFlops:
    """What an optimizer step costs, by its rows' lengths."""

    per_token: float  # FLOP in the blocks' linears
    per_trained_token: float  # in the head
    per_pair: float  # in one layer's attention
    windows: Sequence[int | None]  # how far each layer's positions see

    @classmethod
    def of(cls, config: ModelConfig, modules: Mapping[str, LoRALinear], *, recomputed: int) -> StepFlops:
        """`modules`: the adapted linears by name; `recomputed`: blocks that are computed again in the backward pass."""
        shapes = config.linear_shapes
        head_out, head_in = shapes["lm_head"]
        block = sum(out_features * in_features for name, (out_features, in_features) in shapes.items())
        block = (block - head_out * head_in) * config.num_hidden_layers
        adapter, head_adapter = 0, 0
        for name, module in modules.items():
            size = module.lora_A.weight.numel() + module.lora_B.weight.numel()
            adapter, head_adapter = (adapter, size) if name == "lm_head" else (adapter + size, head_adapter)
        again = 2 * recomputed / config.num_hidden_layers
        return cls(
            per_token=(4 + again) * block + (6 + again) * adapter,
            per_trained_token=4 * head_out * head_in + 6 * head_adapter,
            per_pair=_per_pair(config, recomputed),
            windows=_windows(config),
        )

    def count(self, lengths: npt.NDArray[np.int64], trained_tokens: int) -> float:
        """FLOP of a step over rows of these lengths, of which so many tokens are trained."""
        pairs = sum(_pairs(lengths, window) for window in self.windows)
        return self.per_token * int(lengths.sum()) + self.per_trained_token * trained_tokens + self.per_pair * pairs


def attention_flop(config: ModelConfig, lengths: npt.NDArray[np.int64], recomputed: int) -> float:
    """Of a step over rows of these lengths, in all layers, of which so many are computed again."""
    return _per_pair(config, recomputed) * sum(_pairs(lengths, window) for window in _windows(config))


def _per_pair(config: ModelConfig, recomputed: int) -> float:
    return (12 + 4 * recomputed / config.num_hidden_layers) * config.num_attention_heads * config.head_dim


def _windows(config: ModelConfig) -> Sequence[int | None]:
    return config.sliding_windows or (None,) * config.num_hidden_layers


def _pairs(lengths: npt.NDArray[np.int64], window: int | None) -> int:
    """Pairs of a position and one that it sees: itself and those before it, `window` at most."""
    inside = lengths if window is None else np.minimum(lengths, window)
    return int((inside * (inside + 1) // 2 + (lengths - inside) * inside).sum())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a product of SIZE × SIZE matrices in `dtype`, a fraction of a second's work; None on a CPU, where it
    depends on what else runs. Leaves torch's random numbers as they are."""
    if device.type != "cuda":
        return None
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=generator, device=device).to(dtype) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = 20
    for _ in range(3):
        c = a @ b
    start.record()
    for _ in range(repeats):
        torch.mm(a, b, out=c)
    end.record()
    end.synchronize()
    del a, b, c
    torch.cuda.empty_cache()  # the run's peak memory is not to hold it
    seconds = float(start.elapsed_time(end)) / 1e3  # it says milliseconds
    return repeats * 2 * SIZE**3 / seconds
