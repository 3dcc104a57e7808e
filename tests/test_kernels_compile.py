"""The decode and sampling kernels compiled for cards that need not be here, from launches on tensors without memory:
what a compiler refuses, spills or takes too much shared memory is seen without a GPU. Needs Triton, not interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from litlora.ops import decode_attention, decode_linear, low_rank, narrow, sampling_kernels  # noqa: E402
from litlora.ops.decode_kernels import ADD, GATED, STORE  # noqa: E402
from litlora.ops.decode_linear import Factors, Linear, Weight  # noqa: E402
from litlora.ops.decode_products import DENSE, FOUR_BIT, FP8  # noqa: E402

NAMES = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8", torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
SHARED = {80: 166_912, 90: 232_448, 120: 101_376}  # bytes that a program may take


class Compiled:
    """Stands for a kernel: compiles what it is called with."""

    def __init__(self, kernel: Any, capability: int, made: list[Any]) -> None:
        self.kernel, self.capability, self.made = kernel, capability, made

    def __getitem__(self, grid: object) -> Any:
        return self.compile

    def compile(self, *arguments: Any, **settings: Any) -> None:
        kernel, names = self.kernel, self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in settings.items() if k in names}
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        signature, attributes, constants = {}, {}, {}
        for index, name in enumerate(names):
            value = values[name]
            if name in constant:
                signature[name], constants[(index,)] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = NAMES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        options = {name: value for name, value in settings.items() if name not in names}
        source = ASTSource(kernel, signature, constants, attributes)
        self.made.append(triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(form: int, rows: int, size: int, nested: bool) -> Weight:
    fp32 = {"dtype": torch.float32}
    if form == DENSE:
        return Weight(form, meta(rows, size), rows, size)
    if form == FP8:
        return Weight(form, meta(rows, size, dtype=torch.float8_e4m3fn), rows, size, meta(rows, **fp32))
    words, blocks, table = meta(rows * size // 8, dtype=torch.int32), rows * size // 64, meta(24, dtype=torch.int32)
    if not nested:
        return Weight(form, words, rows, size, meta(blocks), None, table)
    inner = meta(blocks // 256, **fp32), meta(256, **fp32), meta(1, **fp32)
    return Weight(form, words, rows, size, meta(blocks, dtype=torch.uint8), inner, table)


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_linears(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    made: list[Any] = []
    for name in ("_linear", "_down", "_embed"):
        monkeypatch.setattr(decode_linear, name, Compiled(getattr(decode_linear, name), capability, made))
    pdl, c, f = capability >= 90, 4096, 11008
    shapes = {STORE: [(c, c), (1024, c), (1024, c)], GATED: [(f, c), (f, c)], ADD: [(c, f)]}
    for form, mode, rows, rank in (
        (DENSE, STORE, 1, 8), (DENSE, GATED, 16, 0), (DENSE, ADD, 2, 0), (FOUR_BIT, STORE, 4, 0),
        (FOUR_BIT, GATED, 1, 8), (FOUR_BIT, ADD, 1, 0), (FP8, GATED, 1, 0), (FP8, ADD, 8, 0),
    ):  # fmt: skip
        if form == FP8 and capability < 89:
            continue
        weights = [weight(form, *shape, mode != STORE) for shape in shapes[mode]]
        size, outputs = shapes[mode][0][1], sum(rows for rows, _ in shapes[mode])
        fp32 = {"dtype": torch.float32}
        factors = [
            Factors(meta(rank, size, **fp32), meta(w.rows, rank, **fp32), 2.0) if rank else None for w in weights
        ]
        launch = Linear(
            weights, factors, mode, rows, torch.bfloat16, words=form == FOUR_BIT, pdl=pdl, ahead=mode == ADD
        )
        residual = (meta(rows, c), meta(c), meta(rows * launch.blocks, **fp32)) if mode == ADD else None
        norm = None if mode == ADD else (meta(rows * 128, **fp32), 128, 1e-5)
        launch.launch(meta(rows, size), meta(rows, outputs), norm=norm, residual=residual)
    decode_linear.embed(
        meta(4, dtype=torch.int64), meta(32000, c), meta(c), meta(4, c), meta(4, c), meta(4, dtype=torch.float32),
        words=True, pdl=pdl,
    )  # fmt: skip
    assert len(made) >= 9
    assert max(kernel.metadata.shared for kernel in made) <= SHARED[capability]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_attention(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    made: list[Any] = []
    compiled = Compiled(decode_attention._attend, capability, made)
    monkeypatch.setattr(decode_attention, "_attend", compiled)
    for rows, heads, kv_heads, size, inside in (
        (1, 32, 8, 128, True), (64, 4, 4, 80, False), (2, 8, 1, 256, True), (1, 32, 32, 128, True),
    ):  # fmt: skip
        fp32, integers = {"dtype": torch.float32}, {"dtype": torch.int64}
        shape = (rows, heads, 8)
        arrived = meta(rows, kv_heads, dtype=torch.int32)
        workspace = decode_attention.Workspace(8, meta(*shape, size, **fp32), meta(*shape, 2, **fp32), arrived)
        q, k, v = meta(rows, heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], 1)
        cache = meta(4096, kv_heads, size), meta(4096, kv_heads, size)
        decode_attention.attend(
            q, k, v, *cache, meta(rows, **integers), meta(rows, 7, dtype=torch.int32), 64, workspace,
            8 if inside else None, meta(rows, heads * size),
            rotation=(meta(4096, size // 2), meta(4096, size // 2)) if inside else None,
            norms=(meta(size), meta(size), 1e-6) if inside else None, pdl=capability >= 90 and inside,
        )  # fmt: skip
    assert len(made) == 4
    assert max(kernel.metadata.shared for kernel in made) <= SHARED[capability]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_copies(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    made: list[Any] = []
    monkeypatch.setattr(low_rank, "_scaled_copies", Compiled(low_rank._scaled_copies, capability, made))
    monkeypatch.setattr(narrow, "_transpose", Compiled(narrow._transpose, capability, made))
    low_rank.scaled_copies(
        [meta(8, 4096, dtype=torch.float32), meta(11008, 8, dtype=torch.float32)], [meta(8, 4096), meta(11008, 8)],
        [1.0, 2.0],
    )  # fmt: skip
    narrow.transpose_bytes([meta(64, 4096, dtype=torch.uint8), meta(16, 4096, dtype=torch.uint8)])
    assert len(made) == 3
    assert max(kernel.metadata.shared for kernel in made) <= SHARED[capability]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_sampling(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    made: list[Any] = []
    monkeypatch.setattr(sampling_kernels, "_choose", Compiled(sampling_kernels._choose, capability, made))
    numbers = meta(4, dtype=torch.int64)
    for size, dtype, temperature, top_k in (
        (128_256, torch.bfloat16, 0.0, None), (32_000, torch.bfloat16, 0.8, 50), (70_001, torch.float32, 0.8, 50),
        (5, torch.bfloat16, 0.8, None),
    ):  # fmt: skip
        logits = meta(4, size + 64, dtype=dtype)[:, :size]
        sampling_kernels.choose(
            logits, numbers, numbers, numbers, temperature=temperature, top_k=top_k, mixed_seed=-(2**62)
        )
    assert len(made) == 4
    assert max(kernel.metadata.shared for kernel in made) <= SHARED[capability]
