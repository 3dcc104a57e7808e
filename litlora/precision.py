"""How weights are held and in what products run: one object that training gives to Fabric and generation uses as it is
(without importing Lightning, which takes seconds)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from litlora.errors import InputError
from litlora.frozen import Quantizer, make_quantizer

PRECISIONS = ("bf16-true", "bf16-mixed", "32-true")


class RunPrecision:
    """`dtype` is that of the weights that are not quantized, `compute` that of the products."""

    def __init__(self, precision: str, quantize: str | None, device: torch.device) -> None:
        """Raises InputError when the device has no bf16 or cannot quantize."""
        if precision not in PRECISIONS:
            raise InputError("unknown --precision", got=precision, wanted=", ".join(PRECISIONS))
        if precision.startswith("bf16") and not has_bf16(device):
            raise InputError(
                "this GPU has no bf16",
                where=f"--precision {precision}",
                got=torch.cuda.get_device_name(device),
                wanted="an Ampere card (RTX 30xx, A100) or later",
                fix="--precision 32-true",
            )
        self.precision = precision
        self.device = device
        self.dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        self.compute = torch.float32 if precision == "32-true" else torch.bfloat16
        self.quantizer: Quantizer = make_quantizer(quantize, self.compute if quantize else self.dtype, device)

    def forward_context(self) -> AbstractContextManager[Any]:
        if self.precision == "bf16-mixed":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def has_bf16(device: torch.device) -> bool:
    """In hardware, on a GPU; torch has it in software on every CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def default_precision(device: torch.device) -> Literal["bf16-true", "32-true"]:
    return "bf16-true" if device.type == "cuda" and has_bf16(device) else "32-true"


def pick_device(accelerator: str) -> torch.device:
    """auto | cpu | cuda. Raises InputError for a GPU that is not there."""
    if accelerator not in ("auto", "cpu", "cuda"):
        raise InputError("unknown --accelerator", got=accelerator, wanted="auto, cpu, cuda")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "no CUDA GPU is usable", where="--accelerator cuda", fix="--accelerator cpu, or check the driver"
        )
    return torch.device("cuda", 0) if accelerator != "cpu" and torch.cuda.is_available() else torch.device("cpu")
