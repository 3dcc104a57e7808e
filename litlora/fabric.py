"""Lightning's Fabric: a run's device, precision and seed.

Imported when a run begins, not before: its import takes seconds, for which nobody should wait who mistyped a flag.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import Precision
from torch import nn

from litlora.precision import RunPrecision

# it advises tf32 products at every start: the precision here is the user's flag
logging.getLogger("lightning_fabric").setLevel(logging.WARNING)


def open_fabric(device: torch.device, precision: RunPrecision) -> Fabric:
    """One device's."""
    return Fabric(accelerator=device.type, devices=1, plugins=[FabricPrecision(precision)])


class FabricPrecision(Precision):  # type: ignore[misc]  # Fabric has no types here
    """A RunPrecision, which names quantizer and dtypes, as Fabric's plugin.

    Fabric's own BitsandbytesPrecision swaps every Linear after loading and goes through fp16; with ours the model was
    loaded right, tensor by tensor, and a cast would round the quantizers' constants.
    """

    def __init__(self, run: RunPrecision) -> None:
        self.precision = run.precision
        self.run = run

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def forward_context(self) -> AbstractContextManager[Any]:
        return self.run.forward_context()
