"""How far an adapter has moved its model: ‖ΔW‖ / ‖W‖, in Frobenius norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from litlora.lora import FLAG_TARGETS, LoRALinear


class Deltas:
    """‖scale · B A‖ / ‖W‖ of the adapted linears. ‖W‖ is taken once, one module's dense weight at a time."""

    def __init__(self, modules: Mapping[str, LoRALinear]) -> None:
        """`modules` by full name."""
        self.modules = modules
        self._norms: Tensor | None = None  # (modules,)

    @torch.no_grad()
    def by_target(self) -> dict[str, float]:
        """The mean over the layers of each target, such as q_proj, in the order of the model."""
        if self._norms is None:
            self._norms = torch.stack([_norm(module) for module in self.modules.values()])
        deltas = torch.stack([_delta_norm(module) for module in self.modules.values()])
        ratios = (deltas / self._norms).tolist()  # the only wait for the card
        values: dict[str, list[float]] = {target: [] for target in targets(self.modules)}
        for name, ratio in zip(self.modules, ratios, strict=True):
            values[name.rpartition(".")[2]].append(ratio)
        return {target: sum(found) / len(found) for target, found in values.items()}


def targets(modules: Mapping[str, LoRALinear]) -> list[str]:
    """The last parts of the adapted linears' names, in the order of the model."""
    found = {name.rpartition(".")[2] for name in modules}
    return [leaf for leaves in FLAG_TARGETS.values() for leaf in leaves if leaf in found]


def _norm(module: LoRALinear) -> Tensor:
    weight: Tensor = module.base_layer.dense_weight()  # type: ignore[operator]
    norm: Tensor = torch.linalg.vector_norm(weight, dtype=torch.float32)
    return norm


def _delta_norm(module: LoRALinear) -> Tensor:
    """‖B A‖² = Σ (BᵀB) ∘ (A Aᵀ): two r × r matrices, never the (out, in) product."""
    a, b = module.lora_A.weight.float(), module.lora_B.weight.float()
    squared = ((b.T @ b) * (a @ a.T)).sum()
    return module.scale * squared.clamp(min=0).sqrt()
