"""Frozen linears, one class a weight format: the base that LoRA stands on.

`mm` and `mm_t` carry no autograd; `forward` does, for the input only, and saves nothing but the packed weights that
are there anyway. The quantizing itself is bitsandbytes'.
Sizes: N tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.errors import InputError

BLOCKSIZE = 64  # weights that share one absmax, bitsandbytes' default
SLICE = 2**20  # weights quantized at a time on the CPU: whole blocks


class FrozenLinear(nn.Module):
    """y = x Wᵀ + bias with a weight that never trains."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def mm(self, x: Tensor) -> Tensor:
        """x (N, I) -> x Wᵀ (N, O), without bias."""
        raise NotImplementedError

    def mm_t(self, gradient: Tensor) -> Tensor:
        """gradient (N, O) -> gradient W (N, I)."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """(O, I), as `mm` uses it."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # a custom Function is not autocast by itself
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = _FrozenMatmul.apply(x, self) if x.requires_grad else self.mm(x)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.mm(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.mm_t(gradients[0]), None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class DenseLinear(FrozenLinear):
    """The weight as it is: fp32, bf16 or fp16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight if isinstance(weight, nn.Parameter) else _frozen(weight)  # a tied head shares a Parameter
        self.bias = None if bias is None else _frozen(bias)

    def mm(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def mm_t(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight

    def dense_weight(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _quantize(weight: Tensor, kind: str, nested: bool) -> tuple[Tensor, Any]:
    """bitsandbytes' packed weight and state.

    On the CPU its arithmetic holds seven times a 16-bit weight, so there a large one goes in slices of whole blocks,
    which gives the same bits.
    """
    import bitsandbytes.functional as bnb

    if weight.is_cuda or weight.numel() <= SLICE:
        return bnb.quantize_4bit(  # type: ignore[no-any-return]
            weight, blocksize=BLOCKSIZE, quant_type=kind, compress_statistics=nested
        )
    # what stays is allocated first: between the slices' temporary tensors it would tear the heap into holes
    packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-weight.numel() // BLOCKSIZE))
    for start in range(0, weight.numel(), SLICE):
        part, state = bnb.quantize_4bit(weight.view(-1)[start : start + SLICE], blocksize=BLOCKSIZE, quant_type=kind)
        packed[start // 2 :][: len(part)].copy_(part)
        absmax[start // BLOCKSIZE :][: len(state.absmax)].copy_(state.absmax)
    state.absmax = absmax
    if nested:  # as quantize_4bit does it
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = bnb.quantize_blockwise(state.absmax - state.offset, blocksize=256)
    return packed, state


class FourBitLinear(FrozenLinear):
    """NF4 or FP4 in blocks of 64, with absmax in fp32, or itself in 8 bit (double quantization).

    Everything is a Parameter(requires_grad=False), so that it moves, is saved and can be sharded like any weight.
    """

    weight: nn.Parameter  # (O * I / 2, 1) uint8
    absmax: nn.Parameter  # (O * I / 64,) fp32, or uint8 when nested

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str, nested: bool, dtype: torch.dtype) -> None:
        """weight (O, I) in the dtype of the file: what is rounded is what was published. `dtype`: of the products."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind, self.dtype = kind, dtype
        packed, state = _quantize(weight.contiguous(), kind, nested)
        self.weight, self.absmax, self.code = _frozen(packed), _frozen(state.absmax), _frozen(state.code)
        self.nested = nested
        if nested:
            self.absmax_absmax, self.absmax_code = _frozen(state.state2.absmax), _frozen(state.state2.code)
            self.offset = _frozen(state.offset)
            self.nested_blocksize = state.state2.blocksize
        self.bias = None if bias is None else _frozen(bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourBitLinear:
        """Moves, never casts: a `.to(bfloat16)` would round the absmax."""
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def state(self) -> Any:
        """bitsandbytes' description of the packed weight."""
        import bitsandbytes.functional as bnb

        common: dict[str, Any] = {"shape": torch.Size((self.out_features, self.in_features)), "code": self.code}
        common |= {"blocksize": BLOCKSIZE, "quant_type": self.kind, "dtype": self.dtype, "absmax": self.absmax}
        if self.nested:
            inner = bnb.QuantState(
                absmax=self.absmax_absmax, code=self.absmax_code, blocksize=self.nested_blocksize, dtype=torch.float32
            )
            common |= {"offset": self.offset, "state2": inner}
        return bnb.QuantState(**common)

    def dense_weight(self) -> Tensor:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(self.weight, self.state())  # type: ignore[no-any-return]

    def mm(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1 and x.is_cuda and not x.requires_grad:
            import bitsandbytes.functional as bnb

            return bnb.gemv_4bit(x, self.weight.t(), state=self.state())  # type: ignore[no-any-return]
        return F.linear(x, self.dense_weight().to(x.dtype))

    def mm_t(self, gradient: Tensor) -> Tensor:
        return gradient @ self.dense_weight().to(gradient.dtype)


class Quantizer(Protocol):
    """Turns a weight as it was read into a frozen linear; one object a format."""

    @property
    def name(self) -> str | None:
        """The flag's value, None for dense weights."""
        ...

    def freeze(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        """weight (O, I) on the device it will live on, in the file's dtype."""
        ...


@dataclass(frozen=True)
class Dense:
    """Weights in `dtype`."""

    dtype: torch.dtype
    name: None = None

    def freeze(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        # .to() of a Parameter that is right already is that Parameter: a tied head stays tied
        return DenseLinear(weight.to(self.dtype), None if bias is None else bias.to(self.dtype))


@dataclass(frozen=True)
class FourBit:
    """bitsandbytes' 4-bit formats; `dtype` is that of the products."""

    name: str  # a key of FOUR_BIT
    dtype: torch.dtype

    def freeze(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        kind, nested = FOUR_BIT[self.name]
        return FourBitLinear(weight, None if bias is None else bias.to(self.dtype), kind, nested, self.dtype)


FOUR_BIT = {
    "bnb.nf4": ("nf4", False),
    "bnb.nf4-dq": ("nf4", True),
    "bnb.fp4": ("fp4", False),
    "bnb.fp4-dq": ("fp4", True),
}


def make_quantizer(name: str | None, dtype: torch.dtype, device: torch.device, flag: str = "--quantize") -> Quantizer:
    """The quantizer of a flag's value, tried once on `device`. Raises InputError where it cannot run."""
    if name is None:
        return Dense(dtype)
    if name not in FOUR_BIT:
        raise InputError(f"unknown {flag}", got=name, wanted=", ".join(FOUR_BIT))
    quantizer = FourBit(name, dtype)
    try:
        trial = torch.ones(BLOCKSIZE, BLOCKSIZE, dtype=dtype, device=device)
        quantizer.freeze(trial, None).dense_weight()
    except Exception as error:  # whatever bitsandbytes raises where its library does not load
        raise InputError(
            "this machine cannot quantize",
            where=f"{flag} {name} on {device}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix=f"install a bitsandbytes that supports this machine, or leave {flag} out",
        ) from error
    return quantizer
