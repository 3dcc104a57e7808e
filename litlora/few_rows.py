"""A decode step of up to 16 rows as few kernels, each of which reads its weights once: five a layer, one more for each
group of linears that has an adapter. It stands for `Decoder.forward` and the head where every weight is of a format
that the kernels know.
Sizes: R rows, C hidden, V vocabulary, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litlora.frozen import DenseLinear, FourBitLinear, Fp8Linear
from litlora.kv_cache import PAGE, KVCache
from litlora.model import Block, Decoder, RMSNorm
from litlora.ops.decode_attention import Workspace, attend
from litlora.ops.decode_four_bit import BLOCK, byte_planes
from litlora.ops.decode_kernels import ADD, AT_END, AT_ONCE, GATED, HALFWAY, STORE
from litlora.ops.decode_linear import Factors, Linear, Weight, embed, layout_of
from litlora.ops.decode_products import DENSE, FOUR_BIT, FP8
from litlora.ops.parts import parts_of

LARGEST_RANK = 256

Group = tuple[list[Weight], list[Factors | None]]


class Unsupported(Exception):
    """A model that the kernels cannot run."""


def group_of(modules: Sequence[nn.Module], dtype: torch.dtype) -> Group:
    """What the kernels read of linears over the same x. Raises Unsupported."""
    parts = parts_of(modules)
    if parts is None:
        raise Unsupported("a weight that trains itself")
    weights = [weight_of(p.frozen, dtype) for p in parts]
    factors = [
        None if p.A is None or p.B is None else Factors(p.A.detach(), p.B.detach(), float(p.scale)) for p in parts
    ]
    if len({(weight.form, weight.scales is not None and weight.scales.dtype) for weight in weights}) > 1:
        raise Unsupported("several formats over one x")
    if any(factor is not None and len(factor.A) > LARGEST_RANK for factor in factors):
        raise Unsupported("a large rank")
    return weights, factors


def weight_of(frozen: object, dtype: torch.dtype) -> Weight:
    """Raises Unsupported."""
    if isinstance(frozen, DenseLinear) and frozen.weight.dtype == dtype and frozen.weight.is_contiguous():
        return Weight(DENSE, frozen.weight.detach(), frozen.out_features, frozen.in_features, bias=frozen.bias)
    if isinstance(frozen, Fp8Linear) and has_fp8(frozen.weight.device):
        scales = frozen.scales.detach()
        return Weight(FP8, frozen.weight.detach(), frozen.out_features, frozen.in_features, scales, bias=frozen.bias)
    if isinstance(frozen, FourBitLinear) and frozen.in_features % BLOCK == 0:
        words, nested = frozen.weight.detach().view(-1).view(torch.int32), None
        if frozen.nested:
            nested = (frozen.absmax_absmax.detach(), frozen.absmax_code.detach(), frozen.offset.detach())
        ptx = words.is_cuda and dtype.itemsize == 2
        code = frozen.code.detach().float()
        table = torch.cat([byte_planes(code, dtype), code.view(torch.int32)]) if ptx else code
        scales, shape = frozen.absmax.detach(), (frozen.out_features, frozen.in_features)
        return Weight(FOUR_BIT, words, *shape, scales, nested, table, frozen.bias)
    raise Unsupported(f"{type(frozen).__name__}")


def has_fp8(device: torch.device) -> bool:
    """Whether Triton reads 8-bit floats here."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


class Layer:
    """The launches of one block."""

    def __init__(self, block: Block, rows: int, dtype: torch.dtype, pdl: bool, following: bool) -> None:
        """`following`: whether 4-bit linears read what the block writes."""
        attention, mlp = block.self_attn, block.mlp
        inputs = group_of([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        output = group_of([attention.o_proj], dtype)
        inner, outer = group_of([mlp.gate_proj, mlp.up_proj], dtype), group_of([mlp.down_proj], dtype)
        self.reads_words = words(inputs)
        self.attention_layout = layout_of(words(output), rows)
        self.qkv = Linear(*inputs, STORE, rows, dtype, pdl=early(inputs, rows, pdl), starts=AT_ONCE if pdl else AT_END)
        # attention reads little, so that the memory has time for the weights of what follows it
        self.output = Linear(*output, ADD, rows, dtype, words=words(inner), pdl=pdl, ahead=True)
        # of so many rows the last programs are few: the next kernel's fill up the card
        late = HALFWAY if pdl else AT_END
        self.inner = Linear(*inner, GATED, rows, dtype, words=words(outer), pdl=early(inner, rows, pdl), starts=late)
        # with absmax that are quantized, too, a program has more registers, and more of them than two no room
        crowded = rows == 1 and words(outer) and outer[0][0].nested is None
        self.outer = Linear(*outer, ADD, rows, dtype, words=following, pdl=pdl and not crowded)
        self.norm = block.post_attention_layernorm.weight.detach()
        self.head_norms: tuple[Tensor, Tensor, float] | None = None
        if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
            weights = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
            self.head_norms = (*weights, attention.q_norm.eps)


def words(group: Group) -> bool:
    return group[0][0].form == FOUR_BIT


def early(group: Group, rows: int, pdl: bool) -> bool:
    """Whether a kernel begins when the one in front of it has only begun. Unpacking 4 bits for one row keeps the
    multiprocessors busy, over which programs that begin early are spread unevenly."""
    return pdl and not (words(group) and rows == 1)


class FewRows:
    """The step for R rows of a cache; all its tensors stay where they are."""

    def __init__(self, model: Decoder, cache: KVCache, rows: int, length: int, *, pdl: bool) -> None:
        """`length`: positions that rows may reach. Raises Unsupported."""
        config, embedding = model.config, model.model.embed_tokens.weight
        self.config, self.cache, self.rows, self.pdl = config, cache, rows, pdl
        self.embedding, dtype, device = embedding.detach(), embedding.dtype, embedding.device
        head = group_of([model.lm_head], dtype)
        blocks: list[Block] = list(model.model.layers)  # type: ignore[arg-type]
        self.layers: list[Layer] = []
        following = words(head)
        for block in reversed(blocks):
            self.layers.insert(0, Layer(block, rows, dtype, pdl, following))
            following = self.layers[0].reads_words
        self.head = Linear(*head, STORE, rows, dtype, pdl=early(head, rows, pdl))
        # of the norms that follow the embedding and each block
        inputs = [block.input_layernorm.weight.detach() for block in blocks]
        self.norms: list[Tensor] = [*inputs, model.model.norm.weight.detach()]
        angles = torch.arange(length, device=device)[:, None].float() * model.inverse_frequencies
        self.rotation = angles.cos().to(dtype), angles.sin().to(dtype)  # (length, D/2)

        def empty(size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(rows, size, dtype=kind, device=device)

        hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
        self.stream, self.x, self.attended = empty(hidden), empty(hidden), empty(heads)
        self.qkv, self.hidden = empty(self.layers[0].qkv.outputs), empty(config.intermediate_size)
        self.logits = empty(config.vocab_size)
        most = max(linear.blocks for layer in self.layers for linear in (layer.output, layer.outer))
        self.sums = torch.empty(rows * most, dtype=torch.float32, device=device)
        shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.workspace = Workspace.of(rows, *shape, device)

    def __call__(self, tokens: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        """The newest token (R,) of each row, for `positions` (R,); the rows' pages are in `table` (R or more, P).
        -> logits (R, V), which the next call overwrites."""
        eps, blocks = self.config.rms_norm_eps, 1
        first = self.layers[0].reads_words
        embed(tokens, self.embedding, self.norms[0], self.stream, self.x, self.sums, words=first, pdl=self.pdl)
        for number, layer in enumerate(self.layers):
            layer.qkv.launch(self.x, self.qkv, norm=(self.sums, blocks, eps))
            self._attend(number, layer, positions, table)
            layer.output.launch(self.attended, self.x, residual=(self.stream, layer.norm, self.sums))
            layer.inner.launch(self.x, self.hidden, norm=(self.sums, layer.output.blocks, eps))
            layer.outer.launch(self.hidden, self.x, residual=(self.stream, self.norms[number + 1], self.sums))
            blocks = layer.outer.blocks
        self.head.launch(self.x, self.logits, norm=(self.sums, blocks, eps))
        return self.logits

    def _attend(self, number: int, layer: Layer, positions: Tensor, table: Tensor) -> None:
        config = self.config
        kv_heads, size = config.num_key_value_heads, config.head_dim
        q, k, v = self.qkv.view(self.rows, -1, size).split([config.num_attention_heads, kv_heads, kv_heads], dim=1)
        attend(
            q,
            k,
            v,
            self.cache.keys[number],
            self.cache.values[number],
            positions,
            table,
            PAGE,
            self.workspace,
            config.sliding_windows[number],
            self.attended,
            rotation=self.rotation,
            norms=layer.head_norms,
            layout=layer.attention_layout,
            pdl=self.pdl,
        )
