"""The decoder of the Llama family over a packed stream of tokens (N, C); never padded, module path = Hugging Face key.

It knows neither LoRA nor quantization: a linear is whatever `linear(in, out, bias)` makes, or is put in its place.
Sizes: N tokens, C hidden, H heads, K key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.ops import Ops
from litlora.ops.reference import Keep
from litlora.recompute import Kept, Runner
from litlora.sequences import Packed, Sequences, View

if TYPE_CHECKING:
    from litlora.packing import Batch

MakeLinear = Callable[[int, int, bool], nn.Module]


def trainable_linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
    return nn.Linear(in_features, out_features, bias)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, linear: MakeLinear, ops: Ops) -> None:
        super().__init__()
        hidden, self.head_dim, self.ops = config.hidden_size, config.head_dim, ops
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = linear(hidden, q_size, config.qkv_bias)
        self.k_proj = linear(hidden, kv_size, config.qkv_bias)
        self.v_proj = linear(hidden, kv_size, config.qkv_bias)
        self.o_proj = linear(q_size, hidden, config.o_bias)
        self.norms = config.qk_norm
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, ops) if self.norms else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, ops) if self.norms else nn.Identity()

    @property
    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The linears that read one norm."""
        return self.q_proj, self.k_proj, self.v_proj

    def forward(self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, view: View, keep: Keep) -> Tensor:
        """x (N, C) + attention over its norm."""
        norms = (self.q_norm, self.k_norm) if self.norms else None
        x, attended = self.ops.norm_attend(x, norm.weight, norm.eps, self.projections, norms, cos, sin, view, keep)
        return self.ops.linear_add(x, attended.flatten(1), self.o_proj)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, linear: MakeLinear, ops: Ops) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = linear(hidden, inner, bias)
        self.up_proj = linear(hidden, inner, bias)
        self.down_proj = linear(inner, hidden, bias)
        self.ops = ops

    def forward(self, x: Tensor, norm: RMSNorm, keep: Keep) -> Tensor:
        """x (N, C) + the MLP of its norm."""
        return self.ops.norm_mlp(x, norm.weight, norm.eps, (self.gate_proj, self.up_proj, self.down_proj), keep)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, linear: MakeLinear, ops: Ops) -> None:
        super().__init__()
        self.self_attn = Attention(config, linear, ops)
        self.mlp = MLP(config, linear, ops)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, view: View, keep: Keep = "all") -> Tensor:
        x = self.self_attn(x, self.input_layernorm, cos, sin, view, keep)
        return self.mlp(x, self.post_attention_layernorm, keep)  # type: ignore[no-any-return]


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing on the meta device: `normal_` there imports torch._dynamo, 80 MB and a second of every command."""
        if not self.weight.is_meta:
            super().reset_parameters()


class _Body(nn.Module):
    """What Hugging Face's keys call `model.`"""

    def __init__(self, config: ModelConfig, linear: MakeLinear, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, linear, ops) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)


class Decoder(nn.Module):
    """`model.forward(ids, sequences)` gives the normalized hidden states; `model.lm_head(hidden)` the logits."""

    inverse_frequencies: Tensor

    def __init__(self, config: ModelConfig, ops: Ops | None = None, linear: MakeLinear = trainable_linear) -> None:
        super().__init__()
        ops = ops or Ops()
        self.config, self.ops = config, ops
        self.model = _Body(config, linear, ops)
        self.lm_head = linear(config.hidden_size, config.vocab_size, False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        inverse = config.rope.inverse_frequencies(config.head_dim)
        self.register_buffer("inverse_frequencies", inverse, persistent=False)
        self.kept = Kept()

    def forward(self, ids: Tensor, sequences: Sequences) -> Tensor:
        """ids (N,) int64 -> (N, C)."""
        masks = self.ops.masks
        if masks is not None and self.training:
            masks.begin()
        x = self.model.embed_tokens(ids)
        angles = sequences.positions[:, None].float() * self.inverse_frequencies  # (N, D/2), fp32: positions reach 1e5
        cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
        views = sequences.views(self.config.sliding_windows)
        run = Runner(self.kept if self.training else Kept(), masks)
        for block, view in zip(self.model.layers, views, strict=True):
            x = run(block, x, cos, sin, view)
        return self.model.norm(x)  # type: ignore[no-any-return]


class CausalLoss(nn.Module):
    """The one forward that training wraps: blocks, norm, head and loss. Only the scalar leaves it."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: Batch) -> Tensor:
        """The sum, not the mean, of the trained tokens' cross-entropies: the step divides, over all micro-batches."""
        packed = Packed(batch.positions, batch.cu_seqlens, batch.max_seqlen)
        hidden = self.decoder(batch.input_ids, packed).index_select(0, batch.kept)
        return self.decoder.ops.linear_cross_entropy(
            hidden, self.decoder.lm_head, batch.labels.index_select(0, batch.kept)
        )


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean cross-entropy over all trained tokens, in eval mode: it does not depend on how rows are batched."""
    training = model.training
    model.eval()
    total, trained = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        if batch.trained_tokens:
            total += model(batch.to(device)).double()
            trained += batch.trained_tokens
    model.train(training)
    return total.item() / trained if trained else float("nan")
