"""How many tokens a micro-batch may hold, and what to say when it was too many."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.ops.reference import LOGITS_BYTES

CPU_TOKENS = 2048  # enough for the products' speed, small enough for the caches
GPU_TOKENS = 9216  # from here on longer packs are no faster; 128 rows of Alpaca are two such, of 8,170 on average
SHARE = 0.85  # of the free memory that a plan may count on: the allocator's gaps, workspaces


def activation_bytes(config: ModelConfig, itemsize: int, *, checkpointed: bool) -> int:
    """Bytes a token that the backward pass keeps; checkpointed, each block's input and one block.

    Per block two norms, q, k, v and attention's output, the MLP's gate, up and product, the adapters' inputs. On
    Llama-2-7B's shapes 3.8 MB a token were seen under query and value, 4.2 under all linears: this says 5.2.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    block = itemsize * (9 * hidden + 4 * inner)
    layers = config.num_hidden_layers
    return block + layers * itemsize * hidden if checkpointed else layers * block


@dataclass(frozen=True)
class MicroBatch:
    """How a step is cut: at most `tokens` a micro-batch (a longer row goes alone), blocks recomputed or not."""

    tokens: int
    checkpointed: bool


def choose_micro_batch(
    config: ModelConfig, itemsize: int, longest: int, device: torch.device, checkpointing: str
) -> MicroBatch:
    """The largest pack, to a few thousand tokens, that the free memory holds. `checkpointing`: auto | none | full."""
    if device.type != "cuda":
        return MicroBatch(max(CPU_TOKENS, longest), checkpointing == "full")
    free = SHARE * (torch.cuda.mem_get_info(device)[0] - 3 * LOGITS_BYTES)
    for checkpointed in {"auto": (False, True), "none": (False,), "full": (True,)}[checkpointing]:
        room = int(free / activation_bytes(config, itemsize, checkpointed=checkpointed))
        if room >= longest:
            break
    return MicroBatch(max(longest, min(GPU_TOKENS, room)), checkpointed)


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
