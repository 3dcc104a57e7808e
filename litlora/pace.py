"""How long a token takes, and by that the fastest way to cut a run into micro-batches that fits the memory.

A model of the card in three figures: the rate of its products, that of its memory, and how many tokens its products
need to be efficient. The constants were fitted to an H100's steps (benchmarks/RESULTS.md says how far off it is).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from litlora.flops import attention_flop, matmul_rate
from litlora.memory import QUANTIZED, MicroBatch, Recipe
from litlora.recompute import Kept

CPU_TOKENS = 2048  # enough for the products' speed, small enough for the caches
GPU_TOKENS = 18432  # 128 rows of Alpaca, 16,340 tokens on average, are one such pack, or two in a step of twenty
START = 4e-4  # seconds a block and micro-batch: launches that the card waits for, sums that are made once
HALF = 250  # tokens at which products reach half of their rate
PASSES = 8.5  # of what blocks keep through the memory: everything but products, forward and backward
ATTENTION = 0.5  # of the rate of products, over long rows; what short ones take is in PASSES
FP8 = 1.71  # times the 16-bit rate of products, rounding included
ADAPTER = 20  # FLOP a parameter, as if at the rate of large products: 6 of them, thin ones
LARGE_RANK = 12  # bytes an output and forward pass: its product in fp32, and an adapter that is added apart


@dataclass(frozen=True)
class Card:
    """What a GPU sustains."""

    matmul: float  # FLOP/s in 16 bit
    memory: float  # bytes/s

    @classmethod
    def measured(cls, device: torch.device) -> Card | None:
        """Of this machine's GPU, in a fraction of a second; None for a CPU."""
        rate = matmul_rate(device, torch.bfloat16)
        return None if rate is None else cls(rate, _copy_rate(device))


H100 = Card(7.8e14, 2.98e12)  # as it was measured


def seconds_per_token(recipe: Recipe, micro: MicroBatch, card: Card = H100) -> float:
    """Of whole micro-batches, forward and backward; attention, which depends on the rows' lengths, is left out."""
    config, tokens = recipe.config, micro.tokens
    shapes = dict(config.linear_shapes)
    head_out, head_in = shapes.pop("lm_head")
    block = sum(out * inn for out, inn in shapes.values())
    layers = config.num_hidden_layers
    weights, head, again = block * layers, head_out * head_in, micro.recomputed / layers
    share = 1 - config.hidden_size * config.intermediate_size / block  # of a block: its last product is left out
    fp8 = FP8 if recipe.quantize == "fp8" else 1.0
    flop = (4 + 2 * again * share) * weights / fp8 + 4 * head + ADAPTER * recipe.adapter_parameters
    widths, item = recipe.widths, recipe.compute.itemsize
    moved = PASSES * (1 + again / 2) * widths.all
    moved += 2 * (widths.all - widths.lean) * (micro.lean(layers) + micro.recomputed) / layers
    apart = LARGE_RANK * (1 + again) * recipe.outputs_apart
    per_token = flop / card.matmul * (1 + HALF / tokens) + (item * layers * moved + apart) / card.memory
    if recipe.quantize:  # made wide, or turned round, once a pass through the weights
        per_token += _unpacking(recipe, micro) * weights / card.memory / tokens
    if micro.policy == "offload":
        per_token *= 1.02  # the host's memory is taken where that gains
    return per_token + START * layers / tokens


def _unpacking(recipe: Recipe, micro: MicroBatch) -> float:
    """Bytes a weight and micro-batch."""
    again = micro.recomputed / recipe.config.num_hidden_layers
    assert recipe.quantize is not None
    if recipe.quantize == "fp8":
        return 2.0  # read and written, for the backward pass alone
    return (2 + again) * (QUANTIZED[recipe.quantize] + recipe.compute.itemsize)


def choose_micro_batch(
    recipe: Recipe,
    longest: int,
    memory: float | None,
    kept: Kept | None = None,
    tokens: int | None = None,
    steps: Sequence[int] = (),
) -> MicroBatch:
    """The fastest that `memory` bytes of a GPU hold, as far as known beforehand; None for a CPU. `kept` and `tokens`
    may be given; `longest` is the longest row. Where nothing fits, what holds least. `steps`: the tokens of a few
    optimizer steps, which are cut into packs of like size."""
    layers = recipe.config.num_hidden_layers
    if memory is None:
        kept = kept or Kept()
        return MicroBatch(max(tokens or CPU_TOKENS, longest), kept.policy, kept.blocks)
    some = range(1, layers + 1)
    ways = [("none", 0), *itertools.product(("selective", "full"), some), ("offload", layers)]
    if kept is not None:
        ways = [(kept.policy, kept.blocks)]
    found = list(_fitting(recipe, longest, memory, ways, tokens))
    if found:
        return min(found, key=lambda micro: _seconds_of_steps(recipe, micro, steps or [micro.tokens]))
    return MicroBatch(max(tokens or longest, longest), *ways[-1])


def _seconds_of_steps(recipe: Recipe, micro: MicroBatch, steps: Sequence[int]) -> float:
    """A token, of steps of so many tokens."""
    packs = [-(-tokens // micro.tokens) for tokens in steps]
    sizes = [max(1, tokens // count) for tokens, count in zip(steps, packs, strict=True)]
    paces = [seconds_per_token(recipe, replace(micro, tokens=size)) for size in sizes]
    return sum(tokens * pace for tokens, pace in zip(steps, paces, strict=True)) / sum(steps)


def _fitting(
    recipe: Recipe, longest: int, memory: float, ways: list[tuple[str, int]], tokens: int | None
) -> Iterator[MicroBatch]:
    """Of each way to keep, the largest micro-batch, up to GPU_TOKENS or the longest row; or the one of `tokens`."""
    for policy, blocks in ways:
        room = recipe.room(memory, policy, blocks)
        if room >= max(longest, tokens or 0):
            yield MicroBatch(max(longest, tokens or min(GPU_TOKENS, room)), policy, blocks)


def seconds_of_run(recipe: Recipe, micro: MicroBatch, packs: Sequence[npt.NDArray[np.int64]], card: Card) -> float:
    """Of micro-batches whose rows have the lengths of `packs`, optimizer steps not included."""
    total = 0.0
    for lengths in packs:
        tokens = int(lengths.sum())
        total += tokens * seconds_per_token(recipe, replace(micro, tokens=tokens), card)
        total += attention_flop(recipe.config, lengths, micro.recomputed) / (ATTENTION * card.matmul)
    return total


def _copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of a large copy."""
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    end.synchronize()
    return 10 * 2 * source.numel() / (float(start.elapsed_time(end)) / 1e3)
