"""LoRA over frozen linears: nothing at the start, then only its own parameters; the right gradients and counts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.frozen import Dense, make_quantizer
from litlora.load import RandomWeights, load_model, meta_decoder, parameter_count
from litlora.lora import FLAG_TARGETS, LoRA, LoRALinear, adapt, lora_modules, lora_parameters
from litlora.model import Decoder
from litlora.peft_format import targets_of
from litlora.sequences import Packed

TOGGLES = [dict(zip(FLAG_TARGETS, flags, strict=True)) for flags in itertools.product([False, True], repeat=6)]
ALL = targets_of(dict.fromkeys(FLAG_TARGETS, True))
LLAMA2_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
}  # fmt: skip


def toggle_id(flags: dict[str, bool]) -> str:
    return "+".join(name.removeprefix("lora_") for name, on in flags.items() if on) or "none"


def config(tied: bool = False) -> ModelConfig:
    sizes = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return ModelConfig.from_dict({"model_type": "llama", **sizes, **heads})


def base(quantize: str | None = None, tied: bool = False, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    quantizer = make_quantizer(quantize, dtype, torch.device("cpu"))
    return load_model(RandomWeights(config(tied), dtype), quantizer, dtype=dtype, device="cpu")


IDS, PACKED = torch.arange(14) * 7 % 29, Packed.of_lengths([9, 5])


def logits(model: Decoder) -> Tensor:
    return model.lm_head(model(IDS, PACKED))  # type: ignore[no-any-return]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the base, under the name it has without LoRA."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n.replace(".base_layer", ""): t.detach().clone() for n, t in tensors.items() if "lora_" not in n}


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_small_updates_are_not_rounded_away(device: str, quantize: str | None) -> None:
    """What an adapter adds in its first steps is far below what bf16 tells apart; on average it counts. Added to a
    product that is rounded already, half of this one is lost."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.manual_seed(0)
    weight, x = torch.randn(192, 128).to(device) / 128**0.5, torch.randn(512, 128).to(device).bfloat16()
    frozen = make_quantizer(quantize, torch.bfloat16, torch.device(device)).freeze(weight, None)
    linear = LoRALinear(frozen, 8, 1.0, 0.0, torch.float32)
    with torch.no_grad():
        before = linear(x).float()
        linear.lora_B.weight.normal_(std=6e-4)
        wanted = x.float() @ linear.lora_A.weight.t() @ linear.lora_B.weight.t()
        found = linear(x).float() - before
        naive = (frozen(x) + wanted.bfloat16()).float() - before

    def share(update: Tensor) -> float:
        return float((update * wanted).sum() / wanted.square().sum())

    assert share(found) == pytest.approx(1, abs=0.1)
    assert share(naive) < 0.7


@pytest.mark.parametrize("flags", TOGGLES[1:], ids=toggle_id)
def test_every_toggle_starts_at_the_base_and_trains_only_itself(flags: dict[str, bool]) -> None:
    tied = flags["lora_mlp"]  # both kinds of embedding, over the combinations
    model = base("bnb.nf4" if flags["lora_key"] else None, tied)
    with torch.no_grad():
        plain = logits(model)
    before = snapshot(model)
    names = adapt(model, LoRA(r=3, alpha=5, dropout=0.0, targets=targets_of(flags)))
    leaves = {leaf for name, on in flags.items() if on for leaf in FLAG_TARGETS[name]}
    assert {name.rpartition(".")[2] for name in names} == leaves
    assert names == list(lora_modules(model))
    assert len(names) == 2 * len(leaves - {"lm_head"}) + ("lm_head" in leaves)
    assert torch.equal(logits(model), plain)

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    assert len(lora_parameters(model)) == len(trained)
    start = {name: module.lora_A.weight.detach().clone() for name, module in lora_modules(model).items()}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(logits(model), IDS.roll(-1)).backward()
        optimizer.step()
    for name, module in lora_modules(model).items():
        assert module.lora_B.weight.any(dim=0).all(), f"{name}: a column of B did not move"
        assert not torch.equal(module.lora_A.weight, start[name]), f"{name}: A did not move"
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(logits(model), plain)


def test_the_64th_toggle_is_refused() -> None:
    with pytest.raises(InputError, match="no LoRA target") as caught:
        LoRA(targets=targets_of(TOGGLES[0]))
    assert all(f"--{flag}" in str(caught.value) for flag in FLAG_TARGETS)


@pytest.mark.parametrize("quantize", ["bnb.nf4-dq", "bnb.fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_formats_and_16_bit_start_at_the_base_too(quantize: str, dtype: torch.dtype) -> None:
    model = base(quantize, dtype=dtype)
    with torch.no_grad():
        plain = logits(model)
    adapt(model, LoRA(targets=ALL))
    assert torch.equal(logits(model.eval()), plain)
    assert plain.dtype == dtype


def test_parameter_counts_of_llama_2_7b() -> None:
    llama = ModelConfig.from_dict(LLAMA2_7B)
    assert parameter_count(llama) == 6_738_415_616
    for targets, count in ((("q_proj", "v_proj"), 4_194_304), (ALL, 20_277_248)):
        model = meta_decoder(llama)
        adapt(model, LoRA(r=8, targets=targets))
        assert sum(p.numel() for p in lora_parameters(model)) == count
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_gradients_are_those_of_the_dense_formula(quantize: str | None) -> None:
    torch.manual_seed(0)
    dtype = torch.float64 if quantize is None else torch.float32  # bitsandbytes has no fp64
    frozen = make_quantizer(quantize, dtype, torch.device("cpu"))
    linear = frozen.freeze(torch.randn(10, 64, dtype=dtype), torch.randn(10, dtype=dtype))
    lora = LoRALinear(linear, r=3, scale=0.7, dropout=0.0, dtype=dtype)
    nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(6, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 10, dtype=dtype)
    ours = torch.autograd.grad((lora(x) * weight).sum(), [x, lora.lora_A.weight, lora.lora_B.weight])

    a, b, wide = (t.detach().double().requires_grad_() for t in (lora.lora_A.weight, lora.lora_B.weight, x))
    dense = linear.dense_weight().double() + 0.7 * b @ a
    y = wide @ dense.T + linear.bias.double()  # type: ignore[union-attr]
    theirs = torch.autograd.grad((y * weight.double()).sum(), [wide, a, b])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(lora(x).double(), y, rtol=tolerance, atol=tolerance)
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lora, x)


def test_dropout_is_inverted_and_on_the_adapters_path_only() -> None:
    torch.manual_seed(0)
    linear = Dense(torch.float64).freeze(torch.randn(400, 400, dtype=torch.float64), None)
    lora = LoRALinear(linear, r=400, scale=2.0, dropout=0.25, dtype=torch.float64)
    with torch.no_grad():  # B A = 1, so that y - base(x) is 2 dropout(x)
        lora.lora_A.weight.copy_(torch.eye(400))
        lora.lora_B.weight.copy_(torch.eye(400))
    x = torch.randn(50, 400, dtype=torch.float64)
    ratio = (lora.train()(x) - linear(x)) / x
    kept = ratio.abs() > 1e-6
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 2 / 0.75), rtol=1e-6, atol=0)
    share = kept.double().mean().item()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / x.numel())
    torch.testing.assert_close(lora.eval()(x), linear(x) + 2 * x)


@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_put_over_a_model_in_eval_mode_drops_nothing(training: bool) -> None:
    model = base().train(training)
    adapt(model, LoRA(dropout=0.5))
    assert all(module.training == training for module in lora_modules(model).values())


def test_a_is_kaiming_uniform_and_b_zero() -> None:
    torch.manual_seed(0)
    lora = LoRALinear(Dense(torch.float32).freeze(torch.zeros(8, 4096), None), 64, 1.0, 0.0, torch.float32)
    bound = 1 / math.sqrt(4096)  # kaiming_uniform_(a=√5), as PEFT draws it
    assert bound * 0.999 < lora.lora_A.weight.abs().max() <= bound
    assert abs(lora.lora_A.weight.std() / (bound / math.sqrt(3)) - 1) < 0.01
    assert lora.lora_B.weight.eq(0).all()


def test_a_seed_means_the_same_adapter_whatever_the_base() -> None:
    drawn = []
    for quantize in (None, "bnb.nf4"):
        model = base(quantize)
        torch.manual_seed(3)
        adapt(model, LoRA(targets=ALL))
        drawn.append([p.detach().clone() for p in lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_the_adapter_may_be_wider_than_the_products() -> None:
    model = base(dtype=torch.bfloat16)
    adapt(model, LoRA(dropout=0.0, targets=ALL), dtype=torch.float32)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    loss = F.cross_entropy(logits(model).float(), IDS)
    loss.backward()
    assert logits(model).dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lora_parameters(model))


def test_patterns_and_rslora_give_each_module_its_rank_and_scale() -> None:
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 5}, "alpha_pattern": {"layers.0.*": 7.0}}
    lora = LoRA(r=4, alpha=6, targets=ALL, **patterns)  # type: ignore[arg-type]
    model = base()
    adapt(model, lora)
    found = {name: (module.r, module.scale) for name, module in lora_modules(model).items()}
    assert found["model.layers.1.self_attn.q_proj"] == (2, 3.0)
    assert found["model.layers.0.self_attn.q_proj"] == (4, 7 / 4)
    assert found["model.layers.0.mlp.down_proj"] == (5, 7 / 5)
    assert found["model.layers.1.mlp.down_proj"] == (5, 6 / 5)
    assert found["lm_head"] == (4, 1.5)
    assert LoRA(r=16, alpha=6, rslora=True).scale("x") == 6 / 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "lora_r"),
        ({"r": -3}, "lora_r"),
        ({"rank_pattern": {"q_proj": 0}}, "lora_r"),
        ({"alpha": 0}, "lora_alpha"),
        ({"alpha": -1.0}, "lora_alpha"),
        ({"alpha": math.nan}, "lora_alpha"),
        ({"alpha": math.inf}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 0.0}}, "lora_alpha"),
        ({"dropout": -0.1}, "lora_dropout"),
        ({"dropout": 1.0}, "lora_dropout"),
        ({"dropout": math.nan}, "lora_dropout"),
        ({"targets": ()}, "no LoRA target"),
    ],
    ids=str,
)
def test_values_that_cannot_be_trained_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRA(**settings)  # type: ignore[arg-type]


def test_targets_and_patterns_that_match_nothing_are_named_together() -> None:
    lora = LoRA(
        targets=("q_proj", "c_attn"), rank_pattern={"k_proj": 4, "layers.7.q_proj": 2}, alpha_pattern={"w": 1.0}
    )
    with pytest.raises(InputError) as caught:
        adapt(base(), lora)
    for word in ("c_attn", "k_proj", "layers.7.q_proj", "w (of"):
        assert word in str(caught.value)
    assert "q_proj," not in str(caught.value).splitlines()[1]


def test_a_refused_adaptation_leaves_the_model_as_it_was() -> None:
    model = base()
    with pytest.raises(InputError):
        adapt(model, LoRA(targets=("q_proj", "c_attn")))
    assert not lora_modules(model)
