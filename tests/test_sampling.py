"""The kernel that chooses the next token beside the tensor operations that say what it should choose. On a card in
16 bit, too; without one in fp32 through Triton's interpreter, where Triton is installed (TRITON_INTERPRET=1)."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_device import CUDA, DEVICE, MARKS
from torch import Tensor

from litlora import sampling as plain
from litlora.ops import sampling_kernels
from litlora.sampling import NOT_FINITE, Sampling, uniform

pytestmark = MARKS
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if CUDA else [torch.float32]
SLACK = 1e-6  # of the total: as near to a boundary two sums in floating point may fall on either side


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Sampling.choose` takes the kernel without a card, too."""
    monkeypatch.setattr(plain, "_kernel", lambda device: sampling_kernels.choose)


def numbers(rows: int) -> tuple[Tensor, Tensor]:
    """Streams and steps."""
    row = torch.arange(rows, device=DEVICE)
    return row * (2**33 + 1), row % 7


def random(rows: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.3, 3.0, 12.0, 3.0])[torch.arange(rows) % 4, None]  # from flat to all on one
    return (torch.randn(rows, size, generator=generator) * scale + 2).to(DEVICE, dtype)


def held(sampling: Sampling, logits: Tensor, seen: Tensor | None = None) -> Tensor:
    """The kernel's tokens, which are the tensor operations' but for draws on the boundary of two tokens."""
    streams, steps = numbers(len(logits))
    found = sampling.choose(logits, seen, streams, steps)
    wanted = sampling.choose_by_torch(logits, seen, streams, steps)
    other = found != wanted
    if sampling.temperature == 0 or not other.any():
        assert not other.any(), (found[other], wanted[other])
        return found
    assert other.sum() <= max(1, len(logits) // 20), "too many to be luck"
    kept = sampling.filtered(sampling.penalized(logits.float(), seen))[other]
    weights = (kept.double() - kept.double().amax(-1, keepdim=True)).exp()
    ends = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    target = uniform(sampling.seed, streams, steps)[other, None]
    token = found[other, None]
    weight = weights.gather(1, token) / weights.sum(-1, keepdim=True)
    end = ends.gather(1, token)
    assert (weight > 0).all()
    assert ((end - weight - SLACK <= target) & (target <= end + SLACK)).all()
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 50, 40_000, None], ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 0.8, 2.0])
def test_tokens_are_those_of_the_tensor_operations(temperature: float, top_k: int | None, dtype: torch.dtype) -> None:
    sampling, rows = Sampling(temperature, top_k, seed=7), 600 if CUDA else 12
    for size in (5, 300, 32_000) if CUDA else (5, 300):
        tokens = held(sampling, random(rows, size, dtype))
        assert ((tokens >= 0) & (tokens < size)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 50), Sampling(1.5)], ids=str)
def test_large_vocabularies_and_strided_rows(sampling: Sampling, dtype: torch.dtype) -> None:
    for size, padding in ((32_000, 64), (70_001, 7)) if not CUDA else ((32_000, 64), (128_256, 0), (262_001, 7)):
        logits = random(64 if CUDA else 4, size + padding, dtype)
        logits[:, size:] = 1e4  # what stands behind a row is not looked at
        held(sampling, logits[:, :size])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_equals_is_greedy_and_all_equals_of_the_kth_stay(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_kernels, "BLOCK", 64)
    logits = random(200 if CUDA else 8, 500, dtype).round()
    held(Sampling(), logits)
    held(Sampling(), logits.t().contiguous().t())  # columns apart
    for top_k in (1, 3, 64, 65, 499):
        held(Sampling(1.0, top_k), logits)
    equal = torch.zeros(4, 500, device=DEVICE, dtype=dtype)
    assert held(Sampling(), equal).tolist() == [0] * 4
    assert len(set(held(Sampling(1.0, 3), equal).tolist())) == 4  # all 500 stay


def test_what_scaling_makes_equal_to_the_kth_stays() -> None:
    """Scores that differ before the best one is taken from them, and not afterwards: the 5th and those beside it."""
    rows = 2000 if CUDA else 60
    logits = (1e-3 * (1 + torch.arange(20) / 256)).expand(rows, -1).clone().to(DEVICE)
    logits[:, 13] = 1024.0
    sampling = Sampling(1024.0, top_k=5)
    kept = sampling.filtered(logits[:1]).isfinite().sum()
    assert kept > 10
    assert 5 < len(set(held(sampling, logits).tolist())) <= kept  # in so many draws
    # and the other way round: neighbours after scaling, between which half of all bounds become the lower one
    logits = torch.full((16, 12), 2.0**-6, device=DEVICE)
    logits[:, :8] *= torch.linspace(0.1, 0.99, 16, device=DEVICE)[:, None]  # from where the search begins
    logits[:, 8] += 2.0**-14
    logits[:, 9] = 1024.0
    assert set(held(Sampling(1024.0, top_k=2), logits).tolist()) == {8, 9}


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1.0])
def test_rows_that_are_not_finite(temperature: float) -> None:
    inf, nan = math.inf, math.nan
    rows = [[0, 900, -900], [-inf, -inf, 1], [nan, 0, 1], [1, 0, nan], [inf, 0, 0], [-inf] * 3, [0, -inf, 1]]
    logits = torch.tensor(rows, device=DEVICE)
    for top_k in (None, 2):
        tokens = held(Sampling(temperature, top_k), logits).tolist()
        assert tokens[:6] == [1, 2, NOT_FINITE, NOT_FINITE, NOT_FINITE, NOT_FINITE]
        assert tokens[6] in (0, 2)


def test_repetition_penalty_and_top_p() -> None:
    logits = random(40, 300)
    seen = torch.rand(40, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.3
    for sampling in (Sampling(0.0, None, None, 1.3), Sampling(0.9, 20, None, 0.7), Sampling(0.9, 20, 0.8, 1.3)):
        held(sampling, logits, seen)


def test_draws_are_counted_and_follow_the_distribution() -> None:
    """Each row's draw is that of its own seed, stream and step; shares are the softmax's."""
    count = 20_000 if CUDA else 90
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE).expand(count, -1)
    streams, steps = torch.arange(count, device=DEVICE) % 40 - 3, torch.arange(count, device=DEVICE) // 40 + 2**40
    for seed in (11, 2**63 - 1):
        sampling = Sampling(1.0, top_k=6, seed=seed)
        drawn = sampling.choose(logits, None, streams, steps)
        assert torch.equal(drawn, sampling.choose_by_torch(logits, None, streams, steps))
        wanted = sampling.filtered(logits[:1]).softmax(-1)[0]
        share = torch.bincount(drawn, minlength=12) / count
        assert (share[wanted == 0] == 0).all()
        assert (share - wanted).abs().max() < 4 * 0.5 / math.sqrt(count)  # four standard deviations


@pytest.mark.skipif(not CUDA, reason="needs a card")
def test_a_captured_graph_chooses_the_same() -> None:
    logits, (streams, steps) = random(16, 32_000, torch.bfloat16), numbers(16)
    for sampling in (Sampling(), Sampling(0.8, 50)):
        wanted = sampling.choose(logits, None, streams, steps)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = sampling.choose(logits, None, streams, steps)
        graph.replay()
        assert torch.equal(found, wanted)
        alone = [sampling.choose(logits[i : i + 1], None, streams[i : i + 1], steps[i : i + 1]) for i in range(16)]
        assert torch.equal(torch.cat(alone), wanted)
