"""What a run holds on a GPU, worked out beforehand, and what to say when it was too much.

The figures follow the fused operations (litlora.ops.fused): what each saves for its backward pass, what a block's
backward pass holds at its widest, and the chunk of logits. Beside what was measured: tests/test_plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from litlora.config import ModelConfig
from litlora.lora import LoRA
from litlora.ops.parts import LARGEST_RANK
from litlora.ops.reference import LOGITS_BYTES, TILE, logit_bytes
from litlora.optimizers import moment_bytes
from litlora.recompute import POLICIES, Kept

SPARE = 0.05  # of a card's memory that a run leaves free: the allocator's gaps
WORKSPACE = 2 * 32 * 2**20  # cuBLAS', on two streams
PACKED = {"bnb.nf4": 0.5, "bnb.fp4": 0.5, "bnb.nf4-dq": 0.5, "bnb.fp4-dq": 0.5, "fp8": 1.0}  # bytes a weight
CONSTANTS = {  # and beside it: for blocks of 64, and for 256 of those where they are quantized too; fp8's are a row's
    "bnb.nf4": 2 / 64,  # of a file in 16 bit
    "bnb.fp4": 2 / 64,
    "bnb.nf4-dq": 1 / 64 + 4 / (64 * 256),
    "bnb.fp4-dq": 1 / 64 + 4 / (64 * 256),
    "fp8": 0.0,
}
QUANTIZED = {name: PACKED[name] + CONSTANTS[name] for name in PACKED}


@dataclass(frozen=True)
class MicroBatch:
    """How a step is cut, at most `tokens` a micro-batch (a longer row goes alone), and what its blocks keep."""

    tokens: int
    policy: str = "none"  # as in litlora.recompute.Kept
    blocks: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES or self.tokens < 1 or self.blocks < 0:
            raise ValueError(f"not a micro-batch: {self}")

    @property
    def kept(self) -> Kept:
        return Kept(self.policy, self.blocks)

    @property
    def recomputed(self) -> int:
        """Blocks of which only the input is kept."""
        return self.blocks if self.policy in ("full", "offload") else 0

    def lean(self, layers: int) -> int:
        """Blocks that keep all but norms and SwiGLU, of so many."""
        return {"none": 0, "selective": self.blocks or layers}.get(self.policy, layers - self.blocks)

    def describe(self, layers: int) -> str:
        """What is kept, for people."""
        if self.policy == "none":
            return "everything kept"
        if self.policy == "selective":
            some = f" of {self.blocks} of {layers} blocks" if 0 < self.blocks < layers else ""
            return f"norms and SwiGLU{some} recomputed"
        inputs = ", their inputs in the host's memory" if self.policy == "offload" else ""
        if self.blocks == layers:
            return f"all blocks recomputed{inputs}"
        return f"{self.blocks} of {layers} blocks recomputed{inputs}, of the others norms and SwiGLU"


@dataclass(frozen=True)
class Footprint:
    """Bytes on the GPU while a run trains."""

    weights: float  # of the base
    constants: float  # of their quantization
    adapter: float  # with its copies in the products' dtype
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass, all blocks
    block: float  # what the widest moment of a block's backward pass holds besides
    logits: float  # a chunk of them
    workspace: float  # cuBLAS', and one weight in the products' dtype where it is quantized

    @property
    def peak(self) -> float:
        """Logits are gone when the first block's backward pass begins."""
        held = self.weights + self.constants + self.adapter + self.gradients + self.optimizer
        held += self.activations + self.workspace
        return held + max(self.block, self.logits)

    def parts(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Widths:
    """Elements a token and block."""

    all: int  # kept where everything is
    lean: int  # without what `selective` works out again
    wide: int  # what the MLP's backward pass, the widest moment, holds beside them
    wide_lean: int
    attention: int  # a recomputed block outside of its MLP
    tile: int  # and inside, which goes tile by tile
    flash: int  # or while flash attention goes back, the wider of the two for long rows


@dataclass(frozen=True)
class Recipe:
    """What a run's memory depends on, but for its micro-batches."""

    config: ModelConfig
    lora: LoRA
    quantize: str | None = None
    quantize_head: bool = False
    dtype: torch.dtype = torch.bfloat16  # of weights that are not quantized
    compute: torch.dtype = torch.bfloat16  # of products
    lora_dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"

    def footprint(self, micro: MicroBatch) -> Footprint:
        adapter, item = self.adapter_parameters, self.compute.itemsize
        own = self.lora_dtype.itemsize
        widths, hidden = self.widths, item * self.config.hidden_size
        layers, lean = self.config.num_hidden_layers, micro.lean(self.config.num_hidden_layers)
        whole = layers - micro.recomputed  # blocks that keep what their backward pass reads
        copies = 0 if self.lora_dtype == self.compute else item * whole / layers
        kept = lean * widths.lean + (whole - lean) * widths.all
        on_card = min(micro.blocks, 3) if micro.policy == "offload" else micro.recomputed  # 3: in use, and under way
        per_token = on_card * hidden + item * kept + 3 * hidden
        wide = widths.wide_lean if lean == whole else widths.wide  # of the last block, the first to go back
        block = float(item * wide * micro.tokens if whole else 0)
        if micro.recomputed:  # when the first of these goes through its backward pass, what the others kept is gone
            tile = micro.tokens / math.ceil(micro.tokens / TILE)
            recomputed = max(widths.attention * micro.tokens + widths.tile * tile, widths.flash * micro.tokens)
            block = max(block, item * (recomputed - kept * micro.tokens))
        rounds = self.quantize_head and self.quantize == "fp8"
        logit = logit_bytes(item, self.lora.matches("lm_head") and not rounds)
        logits = min(LOGITS_BYTES, micro.tokens * logit * self.config.vocab_size)
        return Footprint(
            weights=self.weight_bytes - self.constant_bytes,
            constants=self.constant_bytes,
            adapter=adapter * (own + copies),
            gradients=adapter * own,
            optimizer=adapter * moment_bytes(self.optimizer, own),
            activations=micro.tokens * per_token,
            block=block,
            logits=logits + 2 * micro.tokens * hidden + self._dequantized_head(),
            workspace=WORKSPACE + self._dequantized(),
        )

    def host_bytes(self, micro: MicroBatch) -> int:
        """Of the host's memory, pinned: the inputs of the blocks that wait there."""
        blocks = micro.blocks if micro.policy == "offload" else 0
        return blocks * micro.tokens * self.config.hidden_size * self.compute.itemsize

    def room(self, memory: float, policy: str, blocks: int = 0) -> int:
        """Tokens of the largest micro-batch whose run peaks within so many bytes; 0 where none does."""
        if self.footprint(MicroBatch(1, policy, blocks)).peak > memory:
            return 0
        fits, not_fits = 1, 2**26
        while not_fits - fits > 1:
            middle = (fits + not_fits) // 2
            if self.footprint(MicroBatch(middle, policy, blocks)).peak <= memory:
                fits = middle
            else:
                not_fits = middle
        return fits

    @cached_property
    def weight_bytes(self) -> float:
        """On the GPU: embedding, norms, biases and, unless asked, the head stay in `dtype`."""
        config, item = self.config, self.dtype.itemsize
        linears, head = self._weights
        rate = QUANTIZED[self.quantize] if self.quantize else item
        tied = config.tie_word_embeddings and not self.quantize_head
        dense = head + config.hidden_size * (2 * config.num_hidden_layers + 1)  # the embedding, the norms
        return linears * rate + dense * item + (0 if tied else head * (rate if self.quantize_head else item))

    @cached_property
    def constant_bytes(self) -> float:
        """Of `weight_bytes` what the quantization needs beside the weights."""
        linears, head = self._weights
        return (linears + head * self.quantize_head) * CONSTANTS[self.quantize] if self.quantize else 0.0

    @cached_property
    def _weights(self) -> tuple[int, int]:
        """Of the blocks' linears, and of the head."""
        shapes = {name: o * i for name, (o, i) in self.config.linear_shapes.items()}
        head = shapes.pop("lm_head")
        return self.config.num_hidden_layers * sum(shapes.values()), head

    @cached_property
    def adapter_parameters(self) -> int:
        return sum(rank * (outputs + inputs) for _, outputs, inputs, rank in self._adapted())

    @cached_property
    def outputs_apart(self) -> int:
        """A token's, of the blocks' linears whose product is in fp32 until torch has added an adapter of large rank."""
        if self.quantize == "fp8" or self.compute.itemsize >= 4:
            return 0
        return sum(out for name, out, _, rank in self._adapted() if rank > LARGEST_RANK and name != "lm_head")

    def _adapted(self) -> Iterator[tuple[str, int, int, int]]:
        """Name, outputs, inputs and rank of each adapted linear."""
        for name, (outputs, inputs) in self.config.linear_shapes.items():
            blocks = range(self.config.num_hidden_layers)
            names = [name] if name == "lm_head" else [f"model.layers.{block}.{name}" for block in blocks]
            yield from ((n, outputs, inputs, self.lora.rank(n)) for n in names if self.lora.matches(n))

    @cached_property
    def widths(self) -> Widths:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        adapted = {target.rpartition(".")[2] for target in self.lora.targets}
        norms = hidden * (not adapted.isdisjoint({"q_proj", "k_proj", "v_proj"}))  # what adapted linears read
        norms += hidden * (not adapted.isdisjoint({"gate_proj", "up_proj"}))
        product = inner * ("down_proj" in adapted)
        attention = 2 * queries + 2 * keys + (queries + keys) * config.qk_norm  # what it reads and gives
        lean = 2 * hidden + attention + 2 * inner  # and the norms' inputs, gate and up
        return Widths(
            all=lean + norms + product,
            lean=lean,
            wide=2 * inner + 3 * hidden,
            wide_lean=2 * inner + product + 4 * hidden,
            attention=attention + hidden,
            tile=3 * inner + 3 * hidden,
            # q, k, v, what attention gave, and all their gradients, that of q in fp32 too; those of k and v are made
            # for each query head and then added up; of the stream only the block's input and its gradient are left
            flash=6 * queries + 4 * keys + 2 * queries * (keys < queries) - 2 * hidden,
        )

    def _dequantized(self) -> float:
        shapes = [o * i for name, (o, i) in self.config.linear_shapes.items() if name != "lm_head"]
        return 2 * max(shapes) * self._wide if self.quantize else 0.0

    @property
    def _wide(self) -> int:
        """Bytes of a weight while it is multiplied: widened, or in fp8 turned round."""
        return 1 if self.quantize == "fp8" else self.compute.itemsize

    def _dequantized_head(self) -> float:
        """What it takes beyond a block's weight, which is not there at the same time."""
        if self.quantize is None or not self.quantize_head:
            return 0.0
        return max(0.0, self._weights[1] * self._wide - self._dequantized())


def usable_memory(device: torch.device) -> float | None:
    """Bytes that this process may have on a GPU, what it holds already included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - SPARE * total
