"""Frozen linears: 4-bit formats bit for bit bitsandbytes' own, gradients, moves that never round, loading by tensor."""

from __future__ import annotations

import json
import warnings
import weakref
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from litlora import checkpoint, frozen
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.frozen import (
    FOUR_BIT,
    QUANTIZERS,
    Dense,
    FourBit,
    FourBitLinear,
    Fp8,
    Fp8Linear,
    FrozenLinear,
    _joined,
    join,
    make_quantizer,
)
from litlora.load import Directory, RandomWeights, _arriving, expected_shapes, load_model
from litlora.sequences import Packed

CPU = torch.device("cpu")
FORMATS = list(FOUR_BIT)


def theirs(weight: Tensor, bias: Tensor | None, name: str, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """bitsandbytes' own layer over the same weight."""
    kind, nested = FOUR_BIT[name]
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear4bit(in_features, out_features, bias is not None, dtype, nested, kind)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, compress_statistics=nested, quant_type=kind)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer.to("cpu")


def pair(
    name: str, dtype: torch.dtype, file_dtype: torch.dtype = torch.float32
) -> tuple[FrozenLinear, bnb.nn.Linear4bit]:
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 128).to(file_dtype), torch.randn(96)
    weight[3] *= 50  # outliers move their block's absmax
    return FourBit(name, dtype).freeze(weight, bias), theirs(weight, bias, name, dtype)


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_packed_bytes_and_absmax_are_bitsandbytes_own(name: str, file_dtype: torch.dtype) -> None:
    ours, other = pair(name, torch.float32, file_dtype)
    assert isinstance(ours, FourBitLinear)
    state = other.weight.quant_state
    assert torch.equal(ours.weight, other.weight.data)
    assert torch.equal(ours.absmax if ours.nested else ours.absmax.float(), state.absmax)
    assert ours.absmax.dtype == (torch.uint8 if ours.nested else file_dtype)
    assert torch.equal(ours.code, state.code)
    assert ours.nested == state.nested == name.endswith("-dq")
    if ours.nested:
        assert torch.equal(ours.absmax_absmax, state.state2.absmax)
        assert torch.equal(ours.absmax_code, state.state2.code)
        assert torch.equal(ours.offset, state.offset)
        assert ours.nested_blocksize == state.state2.blocksize
    state.dtype = torch.float32  # bitsandbytes dequantizes into the file's dtype and casts, we into the products'
    assert torch.equal(ours.dense_weight(), bnb.functional.dequantize_4bit(other.weight.data, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_and_gradients_are_bitsandbytes_own(name: str, dtype: torch.dtype) -> None:
    ours, other = pair(name, dtype)
    x = torch.randn(7, 128, dtype=dtype, requires_grad=True)
    weight = torch.randn(7, 96, dtype=dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.5}
    torch.testing.assert_close(ours(x), other(x), **tolerance)
    left = torch.autograd.grad((ours(x) * weight).sum(), x)[0]
    right = torch.autograd.grad((other(x) * weight).sum(), x)[0]
    torch.testing.assert_close(left, right, **tolerance)


@pytest.mark.parametrize("name", [None, *QUANTIZERS])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_backward_are_mm_and_mm_t_of_the_dense_weight(name: str | None, bias: bool) -> None:
    torch.manual_seed(0)
    linear = make_quantizer(name, torch.float32, CPU).freeze(torch.randn(96, 128), torch.randn(96) if bias else None)
    x, gradient = torch.randn(5, 128, requires_grad=True), torch.randn(5, 96)
    dense = linear.dense_weight()
    assert dense.shape == (96, 128)
    wanted = x @ dense.T + (linear.bias if linear.bias is not None else 0)
    torch.testing.assert_close(linear(x), wanted)
    torch.testing.assert_close(linear.mm(x), x @ dense.T)
    torch.testing.assert_close(linear.mm_t(gradient), gradient @ dense)
    torch.testing.assert_close(torch.autograd.grad(linear(x), x, gradient)[0], gradient @ dense)
    more = torch.randn(5, 96), torch.randn(5, 128)
    detached = x.detach()
    torch.testing.assert_close(linear.mm(linear.prepare(detached), more[0].clone()), detached @ dense.T + more[0])
    torch.testing.assert_close(linear.mm_t(gradient, more[1].clone()), gradient @ dense + more[1])
    both = linear.sum_mm_t([linear], [gradient, 2 * gradient], None)
    torch.testing.assert_close(both, 3 * gradient @ dense, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    with torch.no_grad():
        assert torch.equal(linear(x), linear(x.detach()))


def test_the_backward_keeps_no_dense_weight_and_no_input() -> None:
    linear = FourBit("bnb.nf4", torch.float32).freeze(torch.randn(64, 64), None)
    saved: list[Tensor] = []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x).sum().backward()
    assert saved == []


@pytest.mark.parametrize("name", ["bnb.nf4", "bnb.fp4-dq"])
def test_gradients_pass_in_another_dtype_than_the_products(name: str) -> None:
    linear = FourBit(name, torch.bfloat16).freeze(torch.randn(64, 64), torch.randn(64))
    x = torch.randn(3, 64, requires_grad=True)
    linear(x).sum().backward()
    assert linear(x).dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("name", [None, *QUANTIZERS])
def test_autocast_computes_in_its_dtype(name: str | None) -> None:
    linear = make_quantizer(name, torch.bfloat16 if name else torch.float32, CPU).freeze(torch.randn(64, 64), None)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.float().sum(), x)[0].dtype == torch.float32


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_cast_moves_but_never_rounds(name: str) -> None:
    linear = make_quantizer(name, torch.float32, CPU).freeze(torch.randn(96, 128), torch.randn(96))
    before, dense = {n: p.clone() for n, p in linear.named_parameters()}, linear.dense_weight()
    for moved in (linear.to(torch.bfloat16), linear.half(), nn.Sequential(linear).double()[0]):
        assert isinstance(moved, FrozenLinear)
        assert all(p.dtype == before[n].dtype and torch.equal(p, before[n]) for n, p in moved.named_parameters())
        assert torch.equal(moved.dense_weight(), dense)
    if isinstance(linear, FourBitLinear):
        assert linear.absmax.dtype == (torch.uint8 if linear.nested else torch.float32)
    meta = linear.to("meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


class Widest(TorchDispatchMode):
    """The most fp32 bytes of any one tensor that an operation gave."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.bytes = max(self.bytes, out.nbytes)
        return out


def test_fp8_never_holds_a_whole_weight_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized head of 128,256 words would take more while it is loaded than the run that follows."""
    weight = torch.randn(300, 64, dtype=torch.bfloat16)
    whole = Fp8Linear(weight, None, torch.bfloat16)
    monkeypatch.setattr(frozen, "FP8_SLICE", 64 * 70)
    with Widest() as widest:
        sliced = Fp8Linear(weight, None, torch.bfloat16)
    assert widest.bytes == 70 * 64 * 4
    assert torch.equal(sliced.weight.view(torch.uint8), whole.weight.view(torch.uint8))
    assert torch.equal(sliced.scales, whole.scales)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_embedding_is_compared_without_reading_either(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw: dict[str, object] = {"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    tensors = {name: torch.randn(shape) for name, shape in expected_shapes(ModelConfig.from_dict(raw)).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += not same
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(checkpoint, "PIECE", 100)
    monkeypatch.setattr(checkpoint.Checkpoint, "read", None)
    if same:
        Directory.open(tmp_path)
    else:
        with pytest.raises(InputError, match="two different tensors"):
            Directory.open(tmp_path)


def test_fp8_rounds_each_row_by_its_own_scale_and_keeps_one_copy() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 128) * torch.logspace(-3, 3, 96)[:, None]
    weight[5] = 0
    linear = make_quantizer("fp8", torch.float32, CPU).freeze(weight, None)
    assert sum(p.numel() * p.element_size() for p in linear.parameters()) == 96 * 128 + 4 * 96
    error = (linear.dense_weight() - weight).abs()
    assert (error <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) / 448 / 512).all()  # three bits, subnormals
    torch.testing.assert_close(linear.dense_weight().abs().amax(1), weight.abs().amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_state_dict_holds_all_that_the_weight_is(name: str) -> None:
    torch.manual_seed(0)
    first, second = (
        make_quantizer(name, torch.float32, CPU).freeze(torch.randn(64, 64), torch.randn(64)) for _ in range(2)
    )
    assert not torch.equal(first.dense_weight(), second.dense_weight())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.dense_weight(), second.dense_weight())


def test_dense_weights_in_their_dtype() -> None:
    weight = torch.randn(4, 3)
    assert Dense(torch.bfloat16).freeze(weight, weight[:, 0]).bias.dtype == torch.bfloat16  # type: ignore[union-attr]
    parameter = nn.Parameter(weight, requires_grad=False)
    assert Dense(torch.float32).freeze(parameter, None).weight is parameter


def test_an_unknown_quantization_and_a_machine_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"bnb\.nf4-dq"):
        make_quantizer("bnb.int8", torch.float32, CPU)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no library\nand a long explanation")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    with pytest.raises(InputError, match="RuntimeError: no library\n") as caught:
        make_quantizer("bnb.nf4", torch.float32, CPU)
    assert "leave --quantize out" in str(caught.value)


# Loading


def config(tied: bool = False, **changes: object) -> ModelConfig:
    raw = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, **changes}
    return ModelConfig.from_dict(
        {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied, **raw}
    )


class Spy:
    """Weights that know which of the tensors they gave away are still held."""

    def __init__(self, inner: RandomWeights) -> None:
        self.config, self.inner = inner.config, inner
        self.alive: dict[str, weakref.ref[Tensor]] = {}
        self.reads: list[str] = []

    def read(self, name: str) -> Tensor:
        own = name.replace(".bias", ".weight")  # may wait for its bias
        alive = [other for other, ref in self.alive.items() if ref() is not None and other != own]
        assert not alive, f"{name} is read while {alive} are held"
        tensor = self.inner.read(name)
        self.alive[name] = weakref.ref(tensor)
        self.reads.append(name)
        return tensor


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize_head", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_load_model_holds_one_tensor_at_a_time(tied: bool, quantize_head: bool, bias: bool) -> None:
    """dtype differs from the file's, so whatever of a read tensor is still alive is a second one."""
    weights = RandomWeights(config(tied, attention_bias=bias), torch.float32)
    spy = Spy(weights)
    model = load_model(
        spy, FourBit("bnb.nf4", torch.bfloat16), dtype=torch.bfloat16, device="cpu", quantize_head=quantize_head
    )
    wanted = sorted(expected_shapes(weights.config))
    extra = ["model.embed_tokens.weight"] if tied and quantize_head else []
    assert sorted(spy.reads) in (wanted, sorted(wanted + extra)), "each tensor is read once"
    assert isinstance(model.model.layers[0].self_attn.q_proj, FourBitLinear)


def test_a_loaded_fp8_model_holds_q_k_and_v_side_by_side_and_once() -> None:
    weights = RandomWeights(config(attention_bias=True), torch.float32)
    model = load_model(weights, Fp8(torch.float32), dtype=torch.float32, device="cpu")
    for number, block in enumerate(model.model.layers):
        three, loose = block.self_attn.projections, []
        for name, linear in zip("qkv", three, strict=True):
            assert isinstance(linear, Fp8Linear)
            weight = weights.read(f"model.layers.{number}.self_attn.{name}_proj.weight")
            loose.append(Fp8(torch.float32).freeze(weight, None))
            assert linear.weight.is_contiguous()
            assert isinstance(linear.weight, nn.Parameter)
        for kind in ("weight", "scales"):
            ours, separate = ([getattr(linear, kind).data for linear in linears] for linears in (three, loose))
            memory = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in ours}
            assert [*memory.values()] == [sum(part.numel() * part.element_size() for part in ours)]
            whole = _joined(ours)
            assert whole is not None
            assert torch.equal(whole.float(), torch.cat([part.float() for part in separate]))
            assert _joined(separate) is None
            assert _joined(ours[::-1]) is None
            assert _joined([ours[0], ours[2]]) is None
    x = torch.randn(3, 64)
    before = three[1](x)
    assert torch.equal(before, loose[1](x) + three[1].bias)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.to("cpu").half()  # as elsewhere: moved, never cast
    again = load_model(weights, Fp8(torch.float32), dtype=torch.float32, device="cpu")
    again.load_state_dict(state)
    assert torch.equal(again.model.layers[-1].self_attn.k_proj(x), before)
    assert model.model.layers[-1].self_attn.k_proj.weight.dtype == torch.float8_e4m3fn


def test_dense_q_k_and_v_are_one_product() -> None:
    torch.manual_seed(0)
    linears = [Dense(torch.float32).freeze(torch.randn(size, 32), None) for size in (48, 16, 16)]
    x = torch.randn(5, 32)
    apart = linears[0].mm_each(linears[1:], x)
    join(linears)
    together = linears[0].mm_each(linears[1:], x)
    assert len({y.untyped_storage().data_ptr() for y in apart}) == 3
    assert len({y.untyped_storage().data_ptr() for y in together}) == 1
    for y, one, linear in zip(together, apart, linears, strict=True):
        torch.testing.assert_close(y, one)
        torch.testing.assert_close(y, linear(x))


def test_weights_of_other_formats_are_not_joined() -> None:
    weight = torch.randn(16, 16)
    linears: list[FrozenLinear] = [make(torch.float32).freeze(weight, None) for make in (Fp8, Dense)]
    before = [linear.weight for linear in linears]
    join(linears)
    assert all(linear.weight is weight for linear, weight in zip(linears, before, strict=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize_head", [False, True])
def test_heads_and_embeddings_stay_dense_unless_asked(tied: bool, quantize_head: bool) -> None:
    torch.manual_seed(0)
    model = load_model(
        RandomWeights(config(tied), torch.bfloat16),
        FourBit("bnb.nf4", torch.bfloat16),
        dtype=torch.bfloat16,
        device="cpu",
        quantize_head=quantize_head,
    )
    embedding, head = model.model.embed_tokens.weight, model.lm_head
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert embedding.dtype == torch.bfloat16
    assert isinstance(head, FourBitLinear) == quantize_head
    assert (head.weight is embedding) == (tied and not quantize_head)
    if tied and quantize_head:
        again = FourBit("bnb.nf4", torch.bfloat16).freeze(embedding.detach(), None)
        assert torch.equal(head.weight, again.weight)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    packed = Packed.of_lengths([5])
    assert model.lm_head(model(torch.arange(5), packed)).isfinite().all()


def test_a_card_reads_one_tensor_ahead() -> None:
    """In order, never two ahead; what cannot be read is said when its turn comes."""
    read: list[str] = []

    class Given:
        def __init__(self, name: str) -> None:
            self.name = name

        def to(self, device: torch.device) -> str:
            return self.name

    class Source:
        def read(self, name: str) -> Any:
            read.append(name)
            if name == "bad":
                raise OSError("the disk is gone")
            return Given(name)

    names = ["a", "b", "c", "bad", "d"]
    arriving = _arriving(cast(Any, Source()), names, torch.device("cuda"))
    for number, name in enumerate(names[:3]):
        assert cast(Any, next(arriving)) == name
        assert len(read) <= number + 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(arriving)


def test_what_is_quantized_is_what_the_file_holds(tmp_path: Path) -> None:
    """Not what is left of it in the products' dtype."""
    torch.manual_seed(0)
    weights = RandomWeights(config(), torch.float32)
    read: dict[str, Tensor] = {}

    class Recorded:
        config = weights.config

        def read(self, name: str) -> Tensor:
            return read.setdefault(name, weights.read(name))

    model = load_model(
        Recorded(), FourBit("bnb.nf4", torch.bfloat16), dtype=torch.bfloat16, device="cpu", quantize_head=True
    )
    for name in ("model.layers.0.mlp.up_proj", "lm_head"):
        wanted, _ = bnb.functional.quantize_4bit(read[f"{name}.weight"], blocksize=64, quant_type="nf4")
        assert torch.equal(model.get_submodule(name).weight, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_quantized_model_is_transformers_bitsandbytes_model(tmp_path: Path, name: str, family: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind, nested = FOUR_BIT[name]
    directory = tiny_models.make_family(tmp_path, family, hidden_size=64, intermediate_size=128, head_dim=16)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=settings, dtype=torch.float32, device_map="cpu"
        )
    model = load_model(Directory.open(directory), FourBit(name, torch.float32), dtype=torch.float32, device="cpu")
    ids = torch.arange(12)
    with torch.no_grad():
        wanted = other(ids[None]).logits[0]
        found = model.lm_head(model(ids, Packed.of_lengths([12])))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    layer = other.model.layers[1].mlp.down_proj
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, layer.weight.data)
