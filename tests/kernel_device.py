"""Where the tests of Triton kernels run: on a card, or without one through Triton's interpreter (TRITON_INTERPRET=1). A
module that imports this is skipped where there is neither."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
DEVICE = torch.device("cuda" if CUDA else "cpu")
MARKS = [pytest.mark.gpu] if CUDA else []
