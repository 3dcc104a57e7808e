"""The reference operations against torch's own: loss, attention of ragged sequences, recomputation."""

from __future__ import annotations

import itertools
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora import frozen, recompute
from litlora.config import ModelConfig
from litlora.frozen import QUANTIZERS, make_quantizer
from litlora.load import RandomWeights, load_model
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_parameters
from litlora.model import CausalLoss
from litlora.ops import Masks, reference
from litlora.ops.attention import Ragged
from litlora.packing import IGNORED, Batch
from litlora.recompute import Kept, Runner
from litlora.sequences import Packed

V, C = 37, 16


@pytest.fixture(params=[1, 5, 10**6], ids=["row by row", "chunks of 5", "one chunk"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many positions' logits may be held at a time."""
    monkeypatch.setattr(reference, "LOGITS_BYTES", request.param * 4 * V)
    return int(request.param)


def head_and_stream(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head, x = nn.Linear(C, V, dtype=dtype), torch.randn(15, C, dtype=dtype, requires_grad=True)
    return head, x, torch.randint(0, V, (15,))


def test_linear_cross_entropy_is_cross_entropy(rows: int) -> None:
    head, x, labels = head_and_stream(torch.float32)
    wanted = F.cross_entropy(head(x), labels, reduction="sum")
    gradients = torch.autograd.grad(wanted, [x, head.weight, head.bias])
    loss = reference.linear_cross_entropy(x, head, labels)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, [x, head.weight, head.bias]), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_linear_cross_entropy_holds_no_more_logits_than_it_says(rows: int) -> None:
    head, x, labels = head_and_stream()
    seen: list[int] = []
    head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    reference.linear_cross_entropy(x, head, labels)
    assert max(seen) <= rows
    assert sum(seen) == 15


def test_linear_cross_entropy_is_fp32_whatever_the_head(rows: int) -> None:
    head, x, labels = head_and_stream(torch.bfloat16)
    loss = reference.linear_cross_entropy(x, head, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(head(x).float(), labels, reduction="sum"))


def test_linear_cross_entropy_without_a_label_is_zero_and_finite(rows: int) -> None:
    head, x, labels = head_and_stream(torch.float32)
    loss = reference.linear_cross_entropy(x[:0], head, labels[:0])
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, [x, head.weight])
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_a_dropout_before_the_head_is_the_same_when_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LOGITS_BYTES", 5 * 4 * V)

    class Dropped(nn.Linear):
        masks: list[Tensor] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            dropped = F.dropout(x, 0.5)
            self.masks.append(dropped.detach() != 0)
            return super().forward(dropped)

    _, x, labels = head_and_stream(torch.float32)
    head = Dropped(C, V)
    reference.linear_cross_entropy(x, head, labels).backward()
    chunks = len(head.masks) // 2
    assert chunks == 3
    first, second = head.masks[:chunks], head.masks[chunks:][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def alone(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence (L, heads, D), the dense formula with the mask written out."""
    length, group = len(q), q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = (j <= i) if window is None else (j <= i) & (j > i - window)
    mask = torch.zeros(length, length, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5 + mask
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("lengths", [[7], [1], [1, 1, 1], [3, 8, 1, 16, 5, 2, 9], [4, 0, 5, 0, 0]], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_ragged_attention_is_each_sequence_alone(lengths: list[int], window: int | None, kv_heads: int) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    q = torch.randn(total, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(total, kv_heads, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    out = Ragged(bounds).attend(q, k, v, window)
    parts = [
        alone(a, b, c, window)
        for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        if len(a)
    ]
    wanted = torch.cat(parts)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), [q, k, v])
    theirs = torch.autograd.grad((wanted * weight).sum(), [q, k, v])
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_packed_of_lengths_is_its_docstring() -> None:
    packed = Packed.of_lengths([3, 2])
    assert packed.positions.tolist() == [0, 1, 2, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 3


def test_a_neighbour_that_is_not_a_number_stays_its_own_affair() -> None:
    """A padded row repeats a token of another sequence: its NaN must not leak, forward or backward."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(8, 2, 4).requires_grad_() for _ in range(3))
    poison = torch.zeros(8, 2, 4)
    poison[:3] = torch.nan
    out = Ragged(torch.tensor([0, 3, 8])).attend(q + poison, k + poison, v + poison, None)
    assert out[3:].isfinite().all()
    gradients = torch.autograd.grad(out[3:].sum(), [q, k, v])
    assert all(gradient[3:].isfinite().all() for gradient in gradients)


def small_config(**changes: object) -> ModelConfig:
    raw: dict[str, object] = {"model_type": "llama", "vocab_size": V, "hidden_size": C, "intermediate_size": 24}
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    return ModelConfig.from_dict(raw)


def batch_of(lengths: list[int], vocab: int = V) -> Batch:
    packed = Packed.of_lengths(lengths)
    ids = torch.randint(0, vocab, (sum(lengths),))
    labels = torch.randint(0, vocab, (sum(lengths),))
    labels[::3] = IGNORED
    rows = tuple(range(len(lengths)))
    kept = (labels != IGNORED).nonzero().squeeze(1)
    return Batch(ids, labels, kept, packed.positions, packed.cu_seqlens, packed.max_seqlen, rows)


EVERYTHING = tuple(leaf for leaves in FLAG_TARGETS.values() for leaf in leaves)
LESS = [Kept("selective"), Kept("selective", 1), Kept("full", 1), Kept("full", 2), Kept("offload", 2)]


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        (Kept(), ["all", "all", "all"]),
        (Kept("selective"), ["lean", "lean", "lean"]),
        (Kept("selective", 2), ["lean", "lean", "all"]),
        (Kept("full", 1), ["input", "lean", "lean"]),
        (Kept("offload", 3), ["input", "input", "input"]),
    ],
)
def test_what_each_block_keeps(kept: Kept, wanted: list[str]) -> None:
    assert Kept.parse(kept.text(3), 3) in (kept, replace(kept, blocks=3))
    seen = []

    def block(x: Tensor, keep: str = "all") -> Tensor:
        seen.append(keep)
        return x * 2

    masks = SimpleNamespace(recompute=nullcontext)  # of operations that do most of it themselves
    run, x = Runner(kept, cast(Masks, masks)), torch.ones(1, requires_grad=True)
    for _ in wanted:
        x = run(cast(nn.Module, block), x)
    assert seen == wanted


@pytest.mark.parametrize("size", [1, 24, 25, 48, 70])
def test_an_input_is_put_together_from_the_pieces_it_left_in(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "PIECE", 48)
    x, back = torch.randn(size, 2, dtype=torch.bfloat16), torch.empty(size, 2, dtype=torch.bfloat16)
    pieces = [torch.zeros(48, dtype=torch.uint8) for _ in range(-(-4 * size // 48))]
    for piece, part in recompute._paired(pieces, x):
        piece.copy_(part)
    for piece, part in recompute._paired(pieces, back):
        part.copy_(piece)
    assert torch.equal(back, x)


def hold_to_plain(
    kept: Kept, config: ModelConfig, quantize: str | None, targets: tuple[str, ...], *, quantize_head: bool = False
) -> None:
    """The same bits of loss and gradients as where everything is kept, under dropout."""
    torch.manual_seed(0)
    quantizer = make_quantizer(quantize, torch.float32, torch.device("cpu"))
    weights = RandomWeights(config, torch.float32)
    decoder = load_model(weights, quantizer, dtype=torch.float32, device="cpu", quantize_head=quantize_head)
    adapt(decoder, LoRA(r=4, dropout=0.3, targets=targets))
    for parameter in lora_parameters(decoder):
        nn.init.normal_(parameter, std=0.2)
    loss, batch = CausalLoss(decoder.train()), batch_of([5, 9, 2])

    def run(kept: Kept, seed: int) -> tuple[Tensor, list[Tensor]]:
        decoder.kept = kept
        torch.manual_seed(seed)
        value = loss(batch)
        return value, list(torch.autograd.grad(value, lora_parameters(decoder)))

    (plain, gradients), (again, recomputed) = run(Kept(), 1), run(kept, 1)
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    assert not torch.equal(plain, run(kept, 2)[0]), "dropout was off: nothing was tested"


@pytest.mark.parametrize("logits_rows", [4, 10**6])
@pytest.mark.parametrize("kept", LESS)
def test_whatever_is_kept_gives_the_same_loss_and_gradients_under_dropout(
    monkeypatch: pytest.MonkeyPatch, logits_rows: int, kept: Kept
) -> None:
    monkeypatch.setattr(reference, "LOGITS_BYTES", logits_rows * 4 * V)
    hold_to_plain(kept, small_config(), None, EVERYTHING)


@pytest.mark.parametrize("kept", LESS)
def test_whatever_is_kept_where_an_adapter_is_added_to_a_product_in_fp32(
    monkeypatch: pytest.MonkeyPatch, kept: Kept
) -> None:
    """As on a card."""
    seen, product = [], frozen.fp32_mm
    monkeypatch.setattr(frozen, "rounds_first", lambda x: True)
    monkeypatch.setattr(frozen, "fp32_mm", lambda a, b: seen.append(b.shape) or product(a, b))
    hold_to_plain(kept, small_config(), None, EVERYTHING)
    assert len(seen) > 3 * 8


@pytest.mark.parametrize("kept", LESS)
@pytest.mark.parametrize("flag", FLAG_TARGETS)
def test_whatever_is_kept_for_each_target_alone(flag: str, kept: Kept) -> None:
    hold_to_plain(kept, small_config(), None, FLAG_TARGETS[flag])


@pytest.mark.parametrize("kept", LESS)
@pytest.mark.parametrize(
    ("quantize", "quantize_head"), [(None, False), *itertools.product(QUANTIZERS, (False, True))], ids=str
)
@pytest.mark.parametrize(
    "family",
    [
        {},
        {"tie_word_embeddings": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"model_type": "mistral", "sliding_window": 4},
    ],
    ids=str,
)
def test_whatever_is_kept_in_every_family_and_format(
    family: dict[str, object], quantize: str | None, quantize_head: bool, kept: Kept
) -> None:
    hold_to_plain(kept, small_config(**family), quantize, EVERYTHING, quantize_head=quantize_head)


def test_rms_norm_and_rope_keep_the_dtype_of_x() -> None:
    x = torch.randn(3, 2, 8, dtype=torch.bfloat16)
    assert reference.rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-6).dtype == torch.bfloat16
    angle = torch.rand(3, 1, 4)
    rotated = reference.rotate(x, angle.cos(), angle.sin())
    assert rotated.dtype == torch.bfloat16
    wide = reference.rotate(x.float(), angle.cos(), angle.sin())
    torch.testing.assert_close(wide.norm(dim=-1), x.float().norm(dim=-1))  # a rotation keeps lengths


def test_torchs_flash_attention_takes_what_varlen_gives_it() -> None:
    """The operation is torch's own business: another torch may have it otherwise."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    given = [(argument.name, argument.kwarg_only) for argument in schema.arguments]
    assert [name for name, by_name in given if not by_name] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ]  # fmt: skip
    assert {"window_size_left", "window_size_right"} <= {name for name, by_name in given if by_name}
    assert [found.name for found in schema.returns][:2] == ["output", "softmax_logsumexp"]


def test_attention_on_a_cpu_does_not_import_torchs_compiler() -> None:
    """It takes a second and 80 MB, in the middle of the first answer."""
    code = (
        "import sys, torch; from litlora.ops.attention import can_varlen; "
        "assert not can_varlen(torch.zeros(1, 1, 8)); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
