"""Frozen linears, one class a weight format: the base that LoRA stands on.

`mm` and `mm_t` carry no autograd; `forward` does, for the input only, and saves nothing but the packed weights that
are there anyway. The quantizing itself is bitsandbytes'.
Sizes: N tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.errors import InputError
from litlora.ops.parts import Parts
from litlora.ops.reference import fp32_mm

BLOCKSIZE = 64  # weights that share one absmax, bitsandbytes' default
SLICE = 2**20  # weights quantized at a time on the CPU: whole blocks
FP8_SLICE = 2**24  # weights rounded to fp8 at a time: in fp32 a whole head would be the widest moment of a run


class FrozenLinear(nn.Module):
    """y = x Wᵀ + bias with a weight that never trains."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    rounds = False  # `prepare` rounds rows to fp8
    joins: tuple[str, ...] = ()  # the tensors, a row an output, that `join` puts next to another linear's

    def mm(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x (N, I) -> x Wᵀ (N, O), without bias; into `add`, added to what it holds, where given."""
        raise NotImplementedError

    def mm_t(self, gradient: Tensor, add: Tensor | None = None) -> Tensor:
        """gradient (N, O) -> gradient W (N, I), as `mm`."""
        raise NotImplementedError

    def mm_fp32(self, x: Tensor) -> Tensor:
        """x (N, I) -> x Wᵀ (N, O) in fp32, for what is added before it is rounded; not of linears that round x."""
        return fp32_mm(x, self.dense_weight().to(x.dtype).t())

    def prepare(self, x: Tensor) -> Any:
        """What `mm` takes for x, so that linears of one format that read the same x round it once."""
        return x

    def mm_each(self, others: Sequence[FrozenLinear], x: Any) -> list[Tensor]:
        """`mm` of this linear and `others` of its format, x as prepared; rows (N, O_j) may be strided."""
        linears = (self, *others)
        whole = [_joined([getattr(linear, name) for linear in linears]) for name in self.joins]
        y = self.times(x, *whole) if whole and all(part is not None for part in whole) else None
        if y is None:
            return [linear.mm(x) for linear in linears]
        return list(y.split([linear.out_features for linear in linears], dim=1))

    def times(self, x: Any, *joined: Any) -> Tensor | None:
        """`mm` with these tensors for its own `joins`; None where that is no single product."""
        return None

    def sum_mm_t(self, others: Sequence[FrozenLinear], gradients: Sequence[Tensor], add: Tensor | None) -> Tensor:
        """The gradient (N, I) of what this linear and `others` read: the sum of each `mm_t`."""
        for linear, gradient in zip((self, *others), gradients, strict=True):
            add = linear.mm_t(gradient, add)
        assert add is not None
        return add

    def dense_weight(self) -> Tensor:
        """(O, I), as `mm` uses it."""
        raise NotImplementedError

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """x Wᵀ + bias; `add` (N, O) counts before the product is rounded, where that can be had."""
        if torch.is_autocast_enabled(x.device.type):  # a custom Function is not autocast by itself
            x = x.to(torch.get_autocast_dtype(x.device.type))
        recorded = x.requires_grad or (add is not None and add.requires_grad)
        y: Tensor = _FrozenMatmul.apply(x, self, add) if recorded else _sum(self, x, add)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def parts(self) -> Parts:
        """For the fused operations."""
        return Parts(self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def _product(x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
    """x (N, I) weight (I, O)."""
    return x @ weight if add is None else torch.addmm(add, x, weight, out=add)


def _sum(linear: FrozenLinear, x: Tensor, add: Tensor | None) -> Tensor:
    """x Wᵀ + add, which stays as it is."""
    if add is None:
        return linear.mm(x)
    if linear.rounds or len(x) == 1:  # mm may have a kernel for one row
        return linear.mm(x) + add
    if rounds_first(x):
        return (linear.mm_fp32(x) + add).to(add.dtype)  # not in place: `selective` keeps products
    return torch.addmm(add, x, linear.dense_weight().to(x.dtype).t())


def rounds_first(x: Tensor) -> bool:
    """Whether addmm over x rounds the product before it adds, as cuBLAS does."""
    return x.is_cuda and x.element_size() < 4


class _FrozenMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear, add: Tensor | None) -> Tensor:
        ctx.linear = linear
        return _sum(linear, x, add)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        dx = ctx.linear.mm_t(gradients[0]) if ctx.needs_input_grad[0] else None
        return dx, None, gradients[0] if ctx.needs_input_grad[2] else None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class DenseLinear(FrozenLinear):
    """The weight as it is: fp32, bf16 or fp16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight if isinstance(weight, nn.Parameter) else _frozen(weight)  # a tied head shares a Parameter
        self.bias = None if bias is None else _frozen(bias)

    joins = ("weight",)

    def mm(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return _product(x, self.weight.to(x.dtype).t(), add)

    def times(self, x: Any, *joined: Any) -> Tensor | None:
        (weight,) = joined
        return _product(x, weight.to(x.dtype).t(), None)

    def mm_t(self, gradient: Tensor, add: Tensor | None = None) -> Tensor:
        return _product(gradient, self.weight.to(gradient.dtype), add)

    def dense_weight(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias) if add is None else super().forward(x, add)


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
    """NF4 or FP4 in blocks of 64, with absmax in the file's dtype, which holds it, or in 8 bit (double quantization).

    Everything is a Parameter(requires_grad=False), so that it moves, is saved and can be sharded like any weight.
    """

    weight: nn.Parameter  # (O * I / 2, 1) uint8
    absmax: nn.Parameter  # (O * I / 64,), or uint8 when nested

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str, nested: bool, dtype: torch.dtype) -> None:
        """weight (O, I) in the dtype of the file: what is rounded is what was published. `dtype`: of the products."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind, self.dtype = kind, dtype
        packed, state = _quantize(weight.contiguous(), kind, nested)
        absmax = state.absmax
        # bitsandbytes' is in fp32, but each is one of the weights: half the bytes say the same of a file in 16 bit
        if not nested and torch.equal(absmax.to(weight.dtype).float(), absmax):
            absmax = absmax.to(weight.dtype)
        self.weight, self.absmax, self.code = _frozen(packed), _frozen(absmax), _frozen(state.code)
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
        common |= {"blocksize": BLOCKSIZE, "quant_type": self.kind, "dtype": self.dtype}
        common["absmax"] = self.absmax if self.nested else self.absmax.float()
        if self.nested:
            inner = bnb.QuantState(
                absmax=self.absmax_absmax, code=self.absmax_code, blocksize=self.nested_blocksize, dtype=torch.float32
            )
            common |= {"offset": self.offset, "state2": inner}
        return bnb.QuantState(**common)

    def dense_weight(self) -> Tensor:
        if self.weight.is_cuda and _has_triton():  # one kernel where bitsandbytes has two, at the memory's speed
            from litlora.ops import narrow

            nested = (self.absmax_absmax, self.absmax_code, self.offset) if self.nested else None
            shape = (self.out_features, self.in_features)
            return narrow.dequantize(self.weight, self.absmax, self.code, nested, shape, self.dtype)
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(self.weight, self.state())  # type: ignore[no-any-return]

    def mm(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if x.shape[0] == 1 and x.is_cuda and not x.requires_grad and add is None:
            import bitsandbytes.functional as bnb

            return bnb.gemv_4bit(x, self.weight.t(), state=self.state())  # type: ignore[no-any-return]
        return _product(x, self.dense_weight().to(x.dtype).t(), add)

    def mm_t(self, gradient: Tensor, add: Tensor | None = None) -> Tensor:
        return _product(gradient, self.dense_weight().to(gradient.dtype), add)


class Fp8Linear(FrozenLinear):
    """The weight in 8-bit floats (e4m3) with a scale a row, read in both directions from one copy.

    On a card with fp8 products (Ada, Hopper) x is rounded row by row too; elsewhere the weight is widened. The backward
    product runs over the weight's rows, so their scales are folded into the gradient before it is rounded; the card
    takes one layout only, so the bytes are transposed for the moment.
    """

    joins = ("weight", "scales")
    weight: nn.Parameter  # (O, I) float8_e4m3fn
    scales: nn.Parameter  # (O,) fp32

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        rounded = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        scales = torch.empty(self.out_features, device=weight.device)
        rows = max(1, FP8_SLICE // self.in_features)
        for part, out, scale in zip(weight.split(rows), rounded.split(rows), scales.split(rows), strict=True):
            wide = part.float()
            scale.copy_(wide.abs().amax(1).clamp(min=1e-12) / FP8_MAX)
            out.copy_(wide / scale[:, None])
        self.weight, self.scales = _frozen(rounded), _frozen(scales)
        self.bias = None if bias is None else _frozen(bias)
        shaped = self.in_features % 16 == 0 and self.out_features % 16 == 0
        self.rounds = weight.is_cuda and shaped and has_fp8(weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Moves, never casts."""
        super()._apply(lambda t: t.to(fn(t).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def dense_weight(self) -> Tensor:
        return (self.weight.float() * self.scales[:, None]).to(self.dtype)

    def prepare(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(x in fp8, the scales of its rows), where the card multiplies those."""
        if not self.rounds:
            return x
        from litlora.ops import narrow

        return narrow.quantize_rows([x])

    def mm(self, x: Tensor | tuple[Tensor, Tensor], add: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor):
            if not self.rounds:
                return _product(x, self.dense_weight().to(x.dtype).t(), add)
            x = self.prepare(x)
        rounded, rows = x
        return _fp8_product(rounded, rows, self.weight.t(), self.scales[None], self.dtype, add)

    def times(self, x: Any, *joined: Any) -> Tensor | None:
        if not self.rounds:
            return None
        (rounded, rows), (weight, scales) = x, joined
        return _fp8_product(rounded, rows, weight.t(), scales[None], self.dtype, None)

    def mm_t(self, gradient: Tensor, add: Tensor | None = None) -> Tensor:
        return self.sum_mm_t((), (gradient,), add)

    def sum_mm_t(self, others: Sequence[FrozenLinear], gradients: Sequence[Tensor], add: Tensor | None) -> Tensor:
        linears = [self, *(other for other in others if isinstance(other, Fp8Linear))]
        if len(linears) <= len(others) or not self.rounds:  # another format is among them, or none is multiplied
            for linear, gradient in zip((self, *others), gradients, strict=True):
                if isinstance(linear, Fp8Linear) and not linear.rounds:
                    add = _product(gradient, linear.dense_weight().to(gradient.dtype), add)
                else:
                    add = linear.mm_t(gradient, add)
            assert add is not None
            return add
        from litlora.ops import narrow

        rounded, rows = narrow.quantize_rows(gradients, [linear.scales for linear in linears])
        turned = narrow.transpose_bytes([linear.weight for linear in linears]).t()
        ones = torch.ones(1, self.in_features, device=gradients[0].device)
        return _fp8_product(rounded, rows, turned, ones, gradients[0].dtype, add)


FP8_MAX = 448.0  # the largest float8_e4m3fn


def join(linears: Sequence[nn.Module]) -> None:
    """Puts the weights of linears that read the same x next to each other in memory, so that `mm_each` is one product,
    which is faster than three small ones. Formats that cannot stay as they are."""
    first = linears[0]
    if not isinstance(first, FrozenLinear) or any(type(linear) is not type(first) for linear in linears):
        return
    for name in first.joins:
        old = [getattr(linear, name) for linear in linears]
        whole = old[0].new_empty(sum(map(len, old)), *old[0].shape[1:])
        for linear, part, values in zip(linears, whole.split([*map(len, old)]), old, strict=True):
            setattr(linear, name, _frozen(part.copy_(values)))


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie next to each other in one memory, as one; None where they do not."""
    first, place = parts[0], parts[0].storage_offset()
    memory = first.untyped_storage().data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != memory or part.storage_offset() != place:
            return None
        place += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def _fp8_product(
    x: Tensor, rows: Tensor, weight: Tensor, columns: Tensor, dtype: torch.dtype, add: Tensor | None
) -> Tensor:
    """x (N, I) and weight (I, O), column-major, in fp8, with scales (N, 1) and (1, O). The sums are the tensor cores'
    own (fast accumulation): what that costs is measured on whole runs."""
    wide = torch.bfloat16 if dtype == torch.float32 else dtype
    y = torch._scaled_mm(x, weight, rows, columns, out_dtype=wide, use_fast_accum=True).to(dtype)
    return y if add is None else add.add_(y)


def has_fp8(device: torch.device) -> bool:
    """Whether this card multiplies in fp8 with a scale a row, and Triton is there to round for it."""
    return torch.cuda.get_device_capability(device) >= (8, 9) and _has_triton()


@lru_cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


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


@dataclass(frozen=True)
class Fp8:
    """8-bit floats; `dtype` is that of what goes in and out."""

    dtype: torch.dtype
    name: str = "fp8"

    def freeze(self, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
        return Fp8Linear(weight, None if bias is None else bias.to(self.dtype), self.dtype)


FOUR_BIT = {
    "bnb.nf4": ("nf4", False),
    "bnb.nf4-dq": ("nf4", True),
    "bnb.fp4": ("fp4", False),
    "bnb.fp4-dq": ("fp4", True),
}
QUANTIZERS = (*FOUR_BIT, "fp8")


def make_quantizer(name: str | None, dtype: torch.dtype, device: torch.device, flag: str = "--quantize") -> Quantizer:
    """The quantizer of a flag's value, tried once on `device`. Raises InputError where it cannot run."""
    if name is None:
        return Dense(dtype)
    if name not in QUANTIZERS:
        raise InputError(f"unknown {flag}", got=name, wanted=", ".join(QUANTIZERS))
    quantizer: Quantizer = Fp8(dtype) if name == "fp8" else FourBit(name, dtype)
    try:
        trial = torch.ones(BLOCKSIZE, BLOCKSIZE, dtype=dtype, device=device)
        quantizer.freeze(trial, None).mm(trial)
    except Exception as error:  # whatever bitsandbytes raises where its library does not load
        raise InputError(
            "this machine cannot quantize",
            where=f"{flag} {name} on {device}",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            fix=f"install a bitsandbytes that supports this machine, or leave {flag} out",
        ) from error
    return quantizer
