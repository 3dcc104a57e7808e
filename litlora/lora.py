"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) over any frozen linear.

y = base(x) + scale · B A dropout(x), A (r, in) Kaiming-uniform, B (out, r) zero, scale alpha/r or alpha/√r (rsLoRA).
Names and matching rules are PEFT's, so that what is trained here opens there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.errors import InputError
from litlora.frozen import FrozenLinear
from litlora.ops.parts import Parts

Number = TypeVar("Number", int, float)

# The flags of the LoRA articles and the linears that each stands for.
FLAG_TARGETS: dict[str, tuple[str, ...]] = {
    "lora_query": ("q_proj",),
    "lora_key": ("k_proj",),
    "lora_value": ("v_proj",),
    "lora_projection": ("o_proj",),
    "lora_mlp": ("gate_proj", "up_proj", "down_proj"),
    "lora_head": ("lm_head",),
}


@dataclass(frozen=True)
class LoRA:
    """What is adapted and how. `targets` are module names or their last parts; the patterns' keys are regular
    expressions on the end of a module's name, as in PEFT."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def __post_init__(self) -> None:
        """Raises InputError for values that cannot be trained."""
        if not self.targets:
            flags = ", ".join(f"--{flag} true" for flag in FLAG_TARGETS)
            raise InputError("no LoRA target is switched on", wanted=f"at least one of {flags}")
        for rank in (self.r, *self.rank_pattern.values()):
            if rank < 1:
                raise InputError("LoRA rank out of range", where="lora_r", got=rank, wanted="a whole number from 1 up")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not (alpha > 0 and math.isfinite(alpha)):
                raise InputError("LoRA alpha out of range", where="lora_alpha", got=alpha, wanted="above 0")
        if not 0 <= self.dropout < 1:
            raise InputError("LoRA dropout out of range", where="lora_dropout", got=self.dropout, wanted="0 <= p < 1")

    def matches(self, name: str) -> bool:
        return any(name == target or name.endswith("." + target) for target in self.targets)

    def rank(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale(self, name: str) -> float:
        rank, alpha = self.rank(name), _by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


class LoRALinear(nn.Module):
    """A linear and its low-rank update. The adapter may be wider (fp32) than the products (bf16): it is cast in use."""

    def __init__(self, base_layer: nn.Module, r: int, scale: float, dropout: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.r, self.scale, self.dropout = r, scale, dropout
        self.key = 0  # the adapter's number in the model
        device = next(base_layer.parameters()).device
        # drawn on the CPU in fp32, so that a seed means the same adapter on every machine
        meta = device.type == "meta"
        with torch.device("meta" if meta else "cpu"):
            self.lora_A = nn.Linear(self.in_features, r, bias=False, dtype=torch.float32)  # Kaiming-uniform, a=√5
            self.lora_B = nn.Linear(r, self.out_features, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_A.to(device, dtype)
        self.lora_B.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        z = F.dropout(x, self.dropout, self.training) if self.dropout else x
        z = F.linear(F.linear(z, self.lora_A.weight.to(x.dtype)), self.lora_B.weight.to(x.dtype))
        z = self.scale * z
        if isinstance(self.base_layer, FrozenLinear):  # small updates are lost on a sum that is rounded already
            return self.base_layer(x, z)  # type: ignore[no-any-return]
        return self.base_layer(x) + z  # type: ignore[no-any-return]

    def parts(self) -> Parts | None:
        """For the fused operations; None where the base trains itself."""
        base = self.base_layer.parts() if hasattr(self.base_layer, "parts") else None  # type: ignore[operator]
        if base is None:
            return None
        dropout = self.dropout if self.training else 0.0
        return Parts(base.frozen, self.lora_A.weight, self.lora_B.weight, self.scale, dropout, self.key)

    def extra_repr(self) -> str:
        return f"r={self.r}, scale={self.scale:g}, dropout={self.dropout}"


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears of a model that LoRA can adapt, by name: those of the blocks and the head."""
    leaves = {leaf for names in FLAG_TARGETS.values() for leaf in names}
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in leaves}


def adapt(model: nn.Module, lora: LoRA, dtype: torch.dtype = torch.float32) -> list[str]:
    """Puts LoRA over every linear that `lora` targets; freezes all else. Returns the adapted names, in model order.

    Raises InputError when a target, or a pattern's key, matches nothing.
    """
    names = [name for name in linears(model) if lora.matches(name)]
    _require_matches(lora, names)
    model.requires_grad_(False)
    for number, name in enumerate(names):
        wrap(model, name, lora.rank(name), lora.scale(name), lora.dropout, dtype).key = number
    return names


def wrap(model: nn.Module, name: str, r: int, scale: float, dropout: float, dtype: torch.dtype) -> LoRALinear:
    """Puts a fresh LoRALinear over one linear of the model."""
    base_layer = model.get_submodule(name)
    adapted = LoRALinear(base_layer, r, scale, dropout, dtype).train(
        base_layer.training
    )  # no dropout in a model in use
    model.set_submodule(name, adapted)
    return adapted


def _require_matches(lora: LoRA, names: Iterable[str]) -> None:
    names = list(names)
    unmatched = [t for t in lora.targets if not any(n == t or n.endswith("." + t) for n in names)]
    for pattern in (*lora.rank_pattern, *lora.alpha_pattern):
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            unmatched.append(f"{pattern} (of a rank or alpha pattern)")
    if unmatched:
        wanted = ", ".join(leaf for leaves in FLAG_TARGETS.values() for leaf in leaves)
        raise InputError("LoRA targets that match nothing in the model", got=", ".join(unmatched), wanted=wanted)


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted linears by name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    sides = ((module.lora_A, module.lora_B) for module in lora_modules(model).values())
    return [p for pair in sides for side in pair for p in side.parameters()]
