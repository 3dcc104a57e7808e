"""How a packed stream is cut into tiles, and that the kernels which go through them compile for cards that need not be
here. Their results are held to the plain ones in test_fused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from litlora.ops.attention import TILE, Tiles


@pytest.mark.parametrize(
    "lengths", [[1], [TILE], [TILE + 1], [3, 0, TILE - 1, TILE, 0], [5 * TILE, 1, 1, 200, 0, 0, 0]], ids=str
)
def test_each_token_is_in_one_tile_of_its_sequence(lengths: Sequence[int]) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    tiles = Tiles.of(bounds, sum(lengths))
    assert len(tiles.starts) == sum(lengths) // TILE + len(lengths)  # of the shape only
    assert {t.dtype for t in (tiles.starts, tiles.firsts, tiles.ends)} == {torch.int32}
    seen: list[int] = []
    for start, first, end in zip(*(t.tolist() for t in (tiles.starts, tiles.firsts, tiles.ends)), strict=True):
        tokens = range(start, min(start + TILE, end))
        assert not tokens or (start - first) % TILE == 0
        assert not tokens or (first, end) in zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
        seen += tokens
    assert sorted(seen) == list(range(sum(lengths)))


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_attention_of_short_sequences_compiles(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    from test_kernels_compile import SHARED, Compiled, meta

    from litlora.ops import attention_kernels

    made: list[Any] = []
    for name in ("_attention_forward", "_attention_backward_q", "_attention_backward_kv"):
        monkeypatch.setattr(attention_kernels, name, Compiled(getattr(attention_kernels, name), capability, made))
    for heads, kv_heads, size, window in ((32, 32, 128, None), (9, 3, 64, None), (4, 2, 32, 20)):
        q, k, angle = meta(500, heads, size), meta(500, kv_heads, size), meta(500, 1, size // 2)
        logsums, tiles = meta(heads, 500, dtype=torch.float32), Tiles(*(meta(20, dtype=torch.int32) for _ in range(3)))
        attention_kernels.forward(q, k, k, tiles, window)
        attention_kernels.backward((q, k, k, angle, angle, q, logsums), q, tiles, window)
    assert len(made) == 9
    assert max(kernel.metadata.shared for kernel in made) <= SHARED[capability]


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_what_is_put_on_top_of_q_k_and_v_compiles(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    from test_kernels_compile import SHARED, Compiled, meta

    from litlora.ops import kernels

    made: list[Any] = []
    monkeypatch.setattr(kernels, "_low_rope", Compiled(kernels._low_rope, capability, made))
    for heads, kv_heads, size, ranks in ((32, 8, 128, (64, 64, 64)), (9, 3, 64, (8, 0, 3)), (1, 1, 32, (0, 0, 0))):
        outs, angle = [heads * size, kv_heads * size, kv_heads * size], meta(500, 1, size // 2)
        zs = meta(500, sum(ranks)).split(ranks, dim=1)
        lows = [(z, meta(out, rank)) if rank else None for z, out, rank in zip(zs, outs, ranks, strict=True)]
        kernels.low_rope(meta(500, sum(outs)).split(outs, dim=1), lows, angle, angle)
    assert len(made) == 3
    assert max(kernel.metadata.shared for kernel in made) <= SHARED[capability]
