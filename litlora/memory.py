"""What a run holds on a GPU, worked out beforehand; how many tokens a micro-batch may hold; what to say when it was too
many.

The figures follow the fused operations (litlora.ops.fused): what each saves for its backward pass, what a block's
backward pass holds at its widest, and the chunk of logits. Beside what was measured: tests/test_plan.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.lora import LoRA
from litlora.ops.reference import LOGITS_BYTES

CPU_TOKENS = 2048  # enough for the products' speed, small enough for the caches
GPU_TOKENS = 9216  # from here on longer packs are no faster; 128 rows of Alpaca are two such, of 8,170 on average
SPARE = 0.05  # of a card's memory that a run leaves free: the allocator's gaps
ENOUGH = 1024  # tokens of a micro-batch, from which on recomputing blocks to have more is the slower way
WORKSPACE = 2 * 32 * 2**20  # cuBLAS', on two streams
QUANTIZED = {  # bytes a weight, with the constants: blocks of 64, and 256 of those where they are quantized too
    "bnb.nf4": 0.5 + 4 / 64,
    "bnb.fp4": 0.5 + 4 / 64,
    "bnb.nf4-dq": 0.5 + 1 / 64 + 4 / (64 * 256),
    "bnb.fp4-dq": 0.5 + 1 / 64 + 4 / (64 * 256),
    "fp8": 1.0,
}
STATES = {"adamw": 2.0, "adamw_8bit": 2.0, "sgd": 0.0}  # moments a parameter: of its dtype, or one byte each in 8 bit


@dataclass(frozen=True)
class MicroBatch:
    """How a step is cut: at most `tokens` a micro-batch (a longer row goes alone), blocks recomputed or not."""

    tokens: int
    checkpointed: bool


@dataclass(frozen=True)
class Footprint:
    """Bytes on the GPU while a run trains."""

    weights: float  # of the base, quantization constants included
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
        held = self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.workspace
        return held + max(self.block, self.logits)

    def parts(self) -> dict[str, float]:
        return asdict(self)


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
        adapter, item = self.adapter_parameters(), self.compute.itemsize
        own, moment = self.lora_dtype.itemsize, 1 if self.optimizer == "adamw_8bit" else self.lora_dtype.itemsize
        copies = 0 if self.lora_dtype == self.compute or micro.checkpointed else item
        kept, wide = self._block_bytes()
        hidden, layers = item * self.config.hidden_size, self.config.num_hidden_layers
        per_token = layers * (hidden if micro.checkpointed else kept) + 3 * hidden
        block = wide + (kept if micro.checkpointed else 0)
        logits = min(LOGITS_BYTES, micro.tokens * item * self.config.vocab_size)
        return Footprint(
            weights=self.weight_bytes(),
            adapter=adapter * (own + copies),
            gradients=adapter * own,
            optimizer=adapter * STATES[self.optimizer] * moment,
            activations=micro.tokens * per_token,
            block=micro.tokens * block,
            logits=logits + 2 * micro.tokens * hidden,
            workspace=WORKSPACE + self._dequantized(),
        )

    def room(self, memory: float, *, checkpointed: bool) -> int:
        """Tokens of the largest micro-batch whose run peaks within so many bytes; 0 where none does."""
        if self.footprint(MicroBatch(1, checkpointed)).peak > memory:
            return 0
        fits, not_fits = 1, 2**26
        while not_fits - fits > 1:
            middle = (fits + not_fits) // 2
            if self.footprint(MicroBatch(middle, checkpointed)).peak <= memory:
                fits = middle
            else:
                not_fits = middle
        return fits

    def weight_bytes(self) -> float:
        """On the GPU: embedding, norms, biases and, unless asked, the head stay in `dtype`."""
        config, item = self.config, self.dtype.itemsize
        shapes = dict(config.linear_shapes)
        head_out, head_in = shapes.pop("lm_head")
        linears = config.num_hidden_layers * sum(o * i for o, i in shapes.values())
        head = head_out * head_in
        rate = QUANTIZED[self.quantize] if self.quantize else item
        tied = config.tie_word_embeddings and not self.quantize_head
        dense = head + config.hidden_size * (2 * config.num_hidden_layers + 1)  # the embedding, the norms
        return linears * rate + dense * item + (0 if tied else head * (rate if self.quantize_head else item))

    def adapter_parameters(self) -> int:
        total = 0
        for name, (out_features, in_features) in self.config.linear_shapes.items():
            blocks = range(self.config.num_hidden_layers)
            names = [name] if name == "lm_head" else [f"model.layers.{block}.{name}" for block in blocks]
            total += sum(self.lora.rank(n) * (out_features + in_features) for n in names if self.lora.matches(n))
        return total

    def _block_bytes(self) -> tuple[int, int]:
        """A token and block: what is kept, and what the MLP's backward pass holds beside it."""
        config, item = self.config, self.compute.itemsize
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        adapted = {target.rpartition(".")[2] for target in self.lora.targets}
        kept = (
            2 * hidden + 2 * queries + 2 * keys + 2 * inner
        )  # the norms' inputs; attention's and its output; gate, up
        kept += hidden * (not adapted.isdisjoint({"q_proj", "k_proj", "v_proj"}))  # what adapted linears read
        kept += hidden * (not adapted.isdisjoint({"gate_proj", "up_proj"})) + inner * ("down_proj" in adapted)
        if config.qk_norm:
            kept += queries + keys
        return item * kept, item * (2 * inner + 3 * hidden)

    def _dequantized(self) -> float:
        shapes = [o * i for name, (o, i) in self.config.linear_shapes.items() if name != "lm_head"]
        if self.quantize is None:
            return 0.0
        return 2 * max(shapes) * (1 if self.quantize == "fp8" else self.compute.itemsize)


def choose_micro_batch(recipe: Recipe, longest: int, memory: float | None, checkpointing: str) -> MicroBatch:
    """The largest pack, to a few thousand tokens, that `memory` bytes of a GPU hold; None for a CPU. `checkpointing`:
    auto | none | full."""
    if memory is None:
        return MicroBatch(max(CPU_TOKENS, longest), checkpointing == "full")
    for checkpointed in {"auto": (False, True), "none": (False,), "full": (True,)}[checkpointing]:
        room = recipe.room(memory, checkpointed=checkpointed)
        if room >= max(longest, ENOUGH):
            break
    return MicroBatch(max(longest, min(GPU_TOKENS, room)), checkpointed)


def usable_memory(device: torch.device) -> float | None:
    """Bytes that this process may have on a GPU, what it holds already included; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - SPARE * total


def out_of_memory(
    *,
    weights: int,
    adapter: int,
    micro: MicroBatch,
    micro_batch_size: int | None,
    longest: int,
    quantize: str | None,
    device: torch.device,
) -> InputError:
    """What filled the GPU, in GB, and the cheapest flag that takes less. `weights` and `adapter` in bytes, the latter
    with gradients and optimizer; `micro_batch_size` where rows were counted instead of tokens."""
    total = torch.cuda.get_device_properties(device).total_memory
    parts = f"base weights {weights / 1e9:.2f} GB, adapter with gradients and optimizer {adapter / 1e9:.2f} GB, "
    held = f"{micro_batch_size} rows of up to {longest}" if micro_batch_size else f"{max(micro.tokens, longest)}"
    parts += f"the rest activations of {held} tokens"
    if micro_batch_size and micro_batch_size > 1:
        fix = f"--micro_batch_size {micro_batch_size // 2}"
    elif micro.tokens > longest and not micro_batch_size:
        fix = f"--micro_batch_tokens {max(longest, micro.tokens // 2)}"
    elif not micro.checkpointed:
        fix = "--activation_checkpointing full"
    elif quantize is None:
        fix = "--quantize bnb.nf4-dq"
    else:
        fix = f"--max_seq_length {longest // 2}"
    return InputError("out of memory on the GPU", where=f"a card of {total / 1e9:.1f} GB", got=parts, fix=fix)
