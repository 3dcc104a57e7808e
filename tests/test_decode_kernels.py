"""The kernels of a decode step beside the plain model, and generation on them. On a card in 16 bit and captured;
without one in fp32 through Triton's interpreter, where Triton is installed (TRITON_INTERPRET=1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from kernel_device import CUDA, DEVICE, MARKS
from tiny_models import make_family
from torch import Tensor

from litlora import decode, decode_graph, frozen
from litlora.config import ModelConfig, Rope
from litlora.decode_graph import Captured, has_pdl
from litlora.few_rows import FewRows, Unsupported, group_of
from litlora.frozen import Dense, make_quantizer
from litlora.kv_cache import PAGE, Decode, KVCache, Pages, Prefill
from litlora.load import Directory, RandomWeights, load_model
from litlora.lora import FLAG_TARGETS, LoRA, adapt, lora_modules
from litlora.model import Decoder
from litlora.ops import decode_attention, decode_four_bit
from litlora.ops import decode_kernels as kernels
from litlora.ops import decode_linear as linears
from litlora.ops import decode_products as products
from litlora.ops.decode_attention import Workspace, attend
from litlora.sampling import Sampling
from litlora.sequences import Packed

pytestmark = MARKS
DTYPES = [torch.bfloat16, torch.float32] if CUDA else [torch.float32]
SHAPE: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 150, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope": Rope(10000.0), "sliding_windows": (None, None),
}  # fmt: skip
ALL = tuple(name for names in FLAG_TARGETS.values() for name in names)


class Weights(RandomWeights):
    """Large enough that every part of the maths shows in the logits; norms that are not 1."""

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        if tensor.dim() > 1:
            return tensor * 4
        return tensor + 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))


def build(dtype: torch.dtype, quantize: str | None, lora: LoRA | None, **shape: Any) -> Decoder:
    """The same numbers in every dtype. NF4's are of a file in 16 bit, and its absmax, too."""
    torch.manual_seed(0)
    quantizer = make_quantizer(quantize, dtype, DEVICE)
    file_dtype = torch.bfloat16 if quantize == "bnb.nf4" else torch.float32
    weights = Weights(ModelConfig(**{**SHAPE, **shape}), file_dtype)
    model = load_model(weights, quantizer, dtype=dtype, device=DEVICE, quantize_head=quantize is not None)
    if lora:
        adapt(model, lora)
        for module in lora_modules(model).values():
            with torch.no_grad():
                module.lora_A.weight.copy_(torch.randn(module.lora_A.weight.shape) * 0.1)
                module.lora_B.weight.copy_(torch.randn(module.lora_B.weight.shape) * 0.1)
    return model.eval()


@torch.inference_mode()
def logits(model: Decoder, rows: int, few: bool) -> Tensor:
    """Of two steps after prompts of unequal length, and all keys, in fp32 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    lengths, spacing, pages = [(7 * i * i + 5) % 90 + 1 for i in range(rows)], 2 * PAGE, Pages(2 * rows + 1)
    table = torch.zeros(rows, 2, dtype=torch.int32)
    for row in reversed(range(rows)):
        assert pages.hold(row, spacing)
        table[row] = torch.tensor(pages.of[row])
    places = [pages.places(i, 0, n) if few else i * spacing + torch.arange(n) for i, n in enumerate(lengths)]
    cache = KVCache(model.config, (2 * rows + 1) * PAGE, model.model.embed_tokens.weight.dtype, DEVICE)
    prompt = torch.randint(0, 150, (sum(lengths),), generator=generator).to(DEVICE)
    model(prompt, Prefill(cache, places, DEVICE))
    positions, where = torch.tensor(lengths, device=DEVICE), table.to(DEVICE)
    step = FewRows(model, cache, rows, 128, pdl=has_pdl(DEVICE)) if few else None
    found = []
    for _ in range(2):
        tokens = torch.randint(0, 150, (rows,), generator=generator).to(DEVICE)
        if step is not None:
            found.append(step(tokens, positions, where).clone())
        else:
            hidden = model(tokens, Decode(cache, positions, positions.tolist(), spacing))
            found.append(model.lm_head(hidden))
        positions = positions + 1
    return torch.cat(found).float().cpu()


def held(run: Callable[[torch.dtype, bool], Tensor], dtype: torch.dtype) -> None:
    """`run(dtype, ours)`: what is ours errs no more than what is plain does in the same dtype."""
    truth = run(torch.float32, False)
    ours, plain = run(dtype, True), run(dtype, False)
    error, allowed = (ours - truth).norm(), (plain - truth).norm()
    slack = 1e-5 if dtype == torch.float32 else 1e-3
    assert error <= 1.2 * allowed + slack * truth.norm(), (float(error / truth.norm()), float(allowed / truth.norm()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("quantize", "rows", "rank", "shape"),
    [
        (None, 1, 0, {}),
        (None, 8, 0, {"sliding_windows": (8, None)}),
        (None, 2, 20, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        (None, 16, 0, {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 24, "qk_norm": True}),
        ("bnb.nf4", 1, 20, {}),
        ("bnb.nf4-dq", 2, 0, {"hidden_size": 192}),
        ("bnb.fp4", 16, 0, {"intermediate_size": 320}),
        ("bnb.fp4-dq", 4, 3, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ("fp8", 2, 0, {"o_bias": True}),
    ],
    ids=str,
)
def test_a_step_is_the_models(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    quantize: str | None,
    rows: int,
    rank: int,
    shape: dict[str, Any],
) -> None:
    if quantize == "fp8" and CUDA and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    lora = LoRA(rank, 16, 0.0, ALL) if rank else None
    # in fp32 the weights are those that 16 bit rounds to: what the formats do to them is not asked here, nor what
    # products in fp8 do to x, which a prompt's go through on a card
    monkeypatch.setattr(frozen, "has_fp8", lambda device: False)
    held(lambda kind, few: logits(build(kind, quantize, lora, **shape), rows, few), dtype)


def product(weights: list[linears.Weight], dense: list[Tensor], rows: int, mode: int, dtype: torch.dtype) -> None:
    """A launch of all that are given beside the plain formula."""
    torch.manual_seed(3)
    size, outputs = weights[0].size, sum(weight.rows for weight in weights)
    x = torch.randn(rows, size).to(DEVICE, dtype)
    four_bit = weights[0].form == products.FOUR_BIT
    order, given = torch.tensor(decode_four_bit.ORDER, device=DEVICE), x
    if four_bit:
        eights = x.view(rows, -1, 8)
        given = (eights.transpose(1, 2) if rows == 1 else eights[:, :, order]).reshape(rows, size)
    launch = linears.Linear(weights, [None] * len(weights), mode, rows, dtype, pdl=has_pdl(DEVICE))
    y = torch.empty(rows, outputs if mode == kernels.STORE else weights[0].rows, dtype=dtype, device=DEVICE)
    exact = [x.double() @ weight.double().t() for weight in dense]
    if mode == kernels.ADD:
        stream, norm = torch.randn(rows, outputs).to(DEVICE, dtype), torch.randn(outputs).to(DEVICE, dtype)
        sums = torch.zeros(rows, launch.blocks, device=DEVICE)
        wanted = stream.double() + exact[0]
        launch.launch(given.contiguous(), y, residual=(stream, norm, sums))
        close(stream, wanted)
        close(y, wanted * norm.double())
        torch.testing.assert_close(sums.sum(1).double(), stream.double().square().sum(1), rtol=1e-4, atol=1e-4)
        return
    launch.launch(given.contiguous(), y)
    wanted = torch.cat(exact, 1) if mode == kernels.STORE else torch.nn.functional.silu(exact[0]) * exact[1]
    close(y, wanted)


def close(found: Tensor, wanted: Tensor) -> None:
    limit = 1e-5 if found.dtype == torch.float32 else 8e-3
    assert (found.double() - wanted).norm() <= limit * wanted.norm()


TILE = linears.Tile
TILES = {  # rows and tiles of 16 bit, which the interpreter would not see
    products.DENSE: [
        (1, TILE(8, 1024, 4, 4, flat=True, lead=2)),
        (1, TILE(8, 256, 2, 4, flat=True)),
        (4, TILE(16, 256, 2, 4)),
        (16, TILE(32, 256, 4, 4)),
    ],
    products.FOUR_BIT: [
        (1, TILE(16, 1024, 8)),
        (1, TILE(32, 512, 4)),
        (4, TILE(16, 256, 4, splits=4)),
        (8, TILE(32, 128, 8, splits=2)),
        (16, TILE(32, 128, 8, splits=2)),
    ],
}


@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
@pytest.mark.parametrize("mode", [kernels.STORE, kernels.ADD, kernels.GATED])
@pytest.mark.parametrize("quantize", [None, "bnb.nf4", "bnb.nf4-dq"])
@pytest.mark.parametrize("size", [64, 448, 1344])
def test_every_tile_gives_the_product(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mode: int, quantize: str | None, size: int
) -> None:
    """Also where neither rows nor columns fill the tiles."""
    torch.manual_seed(4)
    outputs = {kernels.STORE: (40, 24, 70), kernels.ADD: (72,), kernels.GATED: (56, 56)}[mode]
    quantizer = make_quantizer(quantize, dtype, DEVICE)
    linear = [quantizer.freeze((torch.randn(rows, size) * 0.1).to(DEVICE, dtype), None) for rows in outputs]
    weights, _ = group_of(linear, dtype)
    for rows, tile in TILES[weights[0].form]:
        monkeypatch.setattr(linears, "tile_of", lambda *_, tile=tile: tile)
        product(weights, [each.dense_weight() for each in linear], rows, mode, dtype)


def plain_attention(q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """q (H, D) of the last of keys and values (T, K, D)."""
    seen = keys[-window:] if window else keys, values[-window:] if window else values
    k, v = (x.double().repeat_interleave(len(q) // x.shape[1], 1) for x in seen)
    weights = (torch.einsum("hd,thd->ht", q.double(), k) / q.shape[1] ** 0.5).softmax(-1)
    return torch.einsum("ht,thd->hd", weights, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (6, 2, 20), (3, 1, 128)])
def test_attention_over_the_cache(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, size: int
) -> None:
    """Rows of every length, in parts and in one; twice, so that what the parts count begins at 0 again."""
    torch.manual_seed(5)
    monkeypatch.setattr(decode_attention, "LEAST", 1)
    monkeypatch.setattr(decode_attention, "LEAST_ALONE", 1)
    lengths, page = [0, 1, 31, 32, 33, 200, 130], 32  # before the new token
    table = torch.randperm(len(lengths) * 7).view(len(lengths), 7).int()
    random = lambda *shape: torch.randn(shape).to(DEVICE, dtype)  # noqa: E731
    keys, values = random(table.numel() * page, kv_heads, size), random(table.numel() * page, kv_heads, size)
    positions = torch.tensor(lengths, device=DEVICE)
    for parts in (1, 4):
        made = Workspace.of(len(lengths), heads, kv_heads, size, DEVICE)
        shape = (len(lengths), heads, parts)
        sums, bounds = torch.empty(*shape, size, device=DEVICE), torch.empty(*shape, 2, device=DEVICE)
        workspace = Workspace(parts, sums, bounds, made.arrived)
        for _ in range(2):
            q, k, v = random(len(lengths), heads, size), *random(2, len(lengths), kv_heads, size)
            out = torch.empty_like(q)
            attend(q, k, v, keys, values, positions, table.to(DEVICE), page, workspace, window, out)
            assert not workspace.arrived.any()
            for row, length in enumerate(lengths):
                token = torch.arange(length + 1)
                span = (table[row][token // page] * page + token % page).to(DEVICE)
                assert torch.equal(keys[span][-1], k[row])
                assert torch.equal(values[span][-1], v[row])
                wanted = plain_attention(q[row], keys[span], values[span], window)
                limit = 1e-5 if dtype == torch.float32 else 1e-2
                assert (out[row].double() - wanted).norm() <= limit * wanted.norm()


def run_ptx(text: str, operands: dict[str, int], lanes: Sequence[int]) -> dict[str, int]:
    """The operands after a block of PTX, in Python, for a thread of a warp whose lanes hold these numbers."""

    def prmt(a: int, b: int, which: int) -> int:
        octets = (b << 32 | a).to_bytes(8, "little")
        return int.from_bytes([octets[which >> 4 * i & 7] for i in range(4)], "little")

    state = dict(operands)
    for line in text.split("\n")[1:-1]:
        operation, rest = line.rstrip(";").split(" ", 1)
        target, *arguments = rest.rsplit(", ", 1) if operation == "mov.b32" else rest.split(", ")
        values = [state[argument] if argument in state else int(argument, 0) for argument in arguments]
        if operation == "prmt.b32":
            state[target] = prmt(*values)
        elif operation == "and.b32":
            state[target] = values[0] & values[1]
        elif operation == "shr.b32":
            state[target] = values[0] >> values[1]
        elif operation == "shl.b32":
            state[target] = values[0] << values[1] & 0xFFFFFFFF
        elif operation == "lop3.b32":
            assert values[3] == 0xEA
            state[target] = values[0] & values[1] | values[2]
        elif operation == "shfl.sync.idx.b32":
            assert values[2:] == [0x100F, 0xFFFFFFFF]
            state[target] = lanes[values[1] & 15]
        elif target.startswith("{"):
            low, high = target.strip("{}").split(", ")
            state[low], state[high] = values[0] & 0xFFFF, values[0] >> 16
        else:
            state[target] = values[0]
    return state


WORDS = (0x01234567, 0x89ABCDEF, 0xF0E1D2C3, 0x5A5A7E81)


def numbers(word: int) -> list[int]:
    """The eight of a word, in their weights' order."""
    return [nibble for octet in word.to_bytes(4, "little") for nibble in (octet >> 4, octet & 15)]


def table_in_bytes(code: Tensor, dtype: torch.dtype) -> list[int]:
    return [value & 0xFFFFFFFF for value in decode_four_bit.byte_planes(code, dtype).tolist()]


def test_words_unpacked_by_selections() -> None:
    code = torch.linspace(-1, 1, 16) ** 3
    table = {f"${9 + i}": value for i, value in enumerate(table_in_bytes(code, torch.bfloat16))}
    for word in WORDS:
        state = run_ptx(decode_four_bit.UNPACKING, {**table, "$8": word}, [])
        found = torch.tensor([state[f"${i}"] for i in range(8)], dtype=torch.int32).to(torch.int16)
        wanted = code[[numbers(word)[i] for i in decode_four_bit.ORDER]].bfloat16()
        assert torch.equal(found.view(torch.bfloat16), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_words_unpacked_by_exchanges(dtype: torch.dtype) -> None:
    code = torch.linspace(-1, 1, 16) ** 3
    lanes = [value & 0xFFFFFFFF for value in code.view(torch.int32).tolist()]
    table = {f"${20 + 2 * i}": value for i, value in enumerate(table_in_bytes(code, dtype))}
    for first in WORDS:
        for second in WORDS:
            given = {**table, "$16": first, "$17": second, "$18": 0, "$19": 0}
            state = run_ptx(decode_four_bit.ASKING[dtype], given, lanes)
            found = torch.tensor([state[f"${i}"] for i in range(16)], dtype=torch.int64).to(torch.int32)
            found = found.view(torch.float32).view(8, 2).t()  # by word
            wanted = code[torch.tensor([numbers(first), numbers(second)])]
            if dtype == torch.bfloat16:
                wanted[0, :4] = wanted[0, :4].bfloat16().float()
            assert torch.equal(found, wanted)


def test_what_the_kernels_do_not_know_is_refused() -> None:
    quantizer = make_quantizer("bnb.nf4", torch.float32, DEVICE)
    narrow = quantizer.freeze(torch.ones(64, 96, device=DEVICE), None)
    dense = Dense(torch.float32).freeze(torch.ones(64, 128, device=DEVICE), None)
    packed = quantizer.freeze(torch.ones(64, 128, device=DEVICE), None)
    for modules in ([narrow], [dense, packed], [torch.nn.Linear(8, 8)]):
        with pytest.raises(Unsupported):
            group_of(modules, torch.float32)


# --- generation ---


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes `generate` run on the card's engine, here too; lists those that were made."""
    made: list[Any] = []

    def make(*arguments: Any) -> Captured:
        made.append(Captured(*arguments))
        return made[-1]

    monkeypatch.setattr(decode, "make_engine", make)
    monkeypatch.setattr(decode, "_late", lambda device, rows: 3)
    monkeypatch.setattr(decode_graph, "few_rows_wanted", lambda model: True)
    return made


def texts(model: Decoder, prompts: list[list[int]], sampling: Sampling, count: int, **settings: Any) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    for row, token in decode.generate(model, prompts, sampling, max_new_tokens=count, **{"stop_ids": (), **settings}):
        found[row].append(token)
    return found


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 67, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("few", [True, False], ids=["few rows", "the model"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, 20, 0.9, 1.2, seed=7)], ids=["greedy", "sampled"])
def test_rows_that_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[Any], sampling: Sampling, few: bool
) -> None:
    """fp32: the plain engine's text; rows end in the middle, others take their places, one fills the context."""
    monkeypatch.setattr(decode_graph, "few_rows_wanted", lambda model: few)
    base = make_family(tmp_path, "mistral", max_position_embeddings=64)
    model = load_model(Directory.open(base), Dense(torch.float32), dtype=torch.float32, device=DEVICE).eval()
    prompts, settings = prompts_of(3, 60, 1, 12, 20), {"stop_ids": range(3, 9), "vocab_size": 60}
    found = texts(model, prompts, sampling, 8, side_by_side=3, **settings)
    assert len(engines) == 1
    assert engines[0].cache.keys[0].any(), "it was used"
    assert sorted(engines[0].pages.free) == list(range(1, len(engines[0].cache.keys[0]) // PAGE)), "all is given back"
    monkeypatch.undo()
    plain = load_model(Directory.open(base), Dense(torch.float32), dtype=torch.float32, device="cpu").eval()
    assert found == texts(plain, prompts, sampling, 8, **settings)
    assert len({len(row) for row in found}) > 1


def test_rows_wait_for_room_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: list[Any]) -> None:
    """Four rows of two pages each at their end, and five pages: one comes later, one has to go and comes again."""
    base = make_family(tmp_path, "llama", num_hidden_layers=1)
    model = load_model(Directory.open(base), Dense(torch.float32), dtype=torch.float32, device=DEVICE).eval()
    prompts = prompts_of(61, 30, 62, 63)
    monkeypatch.setattr(decode_graph, "pool", lambda model, capacities, device: 5)
    left: list[int] = []
    put_back = decode._Rows.put_back
    monkeypatch.setattr(decode._Rows, "put_back", lambda rows: (left.append(max(rows.live)), put_back(rows))[1])
    admit = Captured.admit
    monkeypatch.setattr(Captured, "admit", lambda self, row, tokens, live: admit(self, row, tokens, 0))
    found = texts(model, prompts, Sampling(), 6)
    assert len(engines[0].cache.keys[0]) == 6 * PAGE
    assert left
    monkeypatch.undo()
    assert found == texts(model, prompts, Sampling(), 6)


@pytest.mark.parametrize("few", [True, False], ids=["few rows", "the model"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 50, 0.9, 1.1, seed=3)], ids=["greedy", "sampled"])
def test_generated_text_fed_back_has_the_same_probabilities(
    monkeypatch: pytest.MonkeyPatch, engines: list[Any], sampling: Sampling, few: bool
) -> None:
    """Token by token, rows leaving at the context's end and by a stop id, beyond the window: what one pass over the
    whole text computes in the same dtype, both held to fp32."""
    monkeypatch.setattr(decode_graph, "few_rows_wanted", lambda model: few)
    monkeypatch.setattr(decode_graph, "PATIENCE_FEW", 0)
    shape: dict[str, Any] = {"sliding_windows": (16, None), "max_position_embeddings": 128}
    models = {dtype: build(dtype, None, None, **shape) for dtype in {DTYPES[0], torch.float32}}
    last: list[Tensor] = []
    kept: dict[int, list[Tensor]] = {}
    choose, step = Sampling.choose, Captured.step

    def spy(self: Sampling, logits: Tensor, *rest: Any) -> Tensor:
        last[:] = [logits]  # of a captured step, the tensor that every replay fills
        return choose(self, logits, *rest)

    def after(self: Captured, state: Any, lengths: list[int]) -> None:
        size = decode_graph.padded(len(lengths))
        last.clear()
        step(self, state, lengths)
        outputs[size] = last[0] if last else outputs[size]
        for slot, row in enumerate(self.rows):
            kept.setdefault(row, []).append(outputs[size][slot].float().log_softmax(-1).cpu())

    outputs: dict[int, Tensor] = {}
    monkeypatch.setattr(Sampling, "choose", spy)
    monkeypatch.setattr(Captured, "step", after)
    prompts = prompts_of(124, 5, 14, 61)[: 4 if CUDA else 2]  # the first ends at the context: another takes its slot
    answers = texts(models[DTYPES[0]], prompts, sampling, 40 if CUDA else 6, stop_ids=(11, 12))
    assert len(answers[0]) <= 4
    assert max(map(len, answers)) > 4

    def fed_back(model: Decoder, row: int) -> Tensor:
        ids = torch.tensor(prompts[row] + answers[row], device=DEVICE)
        with torch.inference_mode():
            hidden = model(ids, Packed.of_lengths([len(ids)], DEVICE))[len(prompts[row]) : -1]
            return model.lm_head(hidden).float().log_softmax(-1).cpu()

    for row, answer in enumerate(answers):
        if len(answer) > 1:
            ours = torch.stack(kept[row][: len(answer) - 1])
            truth, plain = fed_back(models[torch.float32], row), fed_back(models[DTYPES[0]], row)
            limit = 1.5 * (plain - truth).norm() + 1e-4 * truth.norm()
            assert (ours - truth).norm() <= limit, (row, float((ours - truth).norm()), float(limit))


def test_a_batch_that_shrinks_has_a_graph_captured_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in larger batches than needed count together, whatever size each would have needed; of what takes other
    kernels, more of them."""
    monkeypatch.setattr(decode_graph, "PATIENCE", 3)
    monkeypatch.setattr(decode_graph, "PATIENCE_FEW", 5)
    engine = Captured.__new__(Captured)
    engine.graphs, engine.forwards, engine.oversized = {}, {}, 0

    def step(rows: int) -> int:
        size = engine.size(rows)
        engine.forwards.setdefault(size, lambda state: state)
        engine.graphs[size] = cast(Any, None)
        return size

    assert [step(rows) for rows in (300, 250, 190, 120, 60)] == [320, 320, 320, 320, 64]
    assert [step(rows) for rows in (60, 30, 15, 7, 3)] == [64, 64, 64, 64, 64]
    assert [step(rows) for rows in (3, 3, 5, 3)] == [64, 4, 64, 4], "4 is there"
    assert [step(rows) for rows in (200, 400, 60, 4)] == [320, 448, 64, 4], "a batch that grows never waits"


@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("quantize", [None, "bnb.nf4-dq", "fp8"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 50, seed=7)], ids=["greedy", "sampled"])
def test_captured_or_not_gives_the_same_text(
    monkeypatch: pytest.MonkeyPatch, sampling: Sampling, quantize: str | None, rows: int
) -> None:
    """bf16: bit for bit, whatever the other rows of a batch of one size are."""
    if quantize == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no fp8")
    model = build(torch.bfloat16, quantize, LoRA(4, 16, 0.0, ("q_proj", "v_proj")), sliding_windows=(8, None))
    prompts = prompts_of(*(5 + 7 * i % 40 for i in range(rows)))
    captured = texts(model, prompts, sampling, 40)
    monkeypatch.setattr(
        Captured, "capture", lambda self, size, state: self.graphs.setdefault(size, _Eager(self, size, state))
    )
    assert texts(model, prompts, sampling, 40) == captured
    others = [[3] * len(prompt) for prompt in prompts[1:]]
    assert texts(model, [prompts[0], *others], sampling, 40)[0] == captured[0]


@pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
def test_a_shrinking_batch_is_captured_without_having_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: bit for bit what the same steps give uncaptured, through one size after the other."""
    monkeypatch.setattr(decode_graph, "PATIENCE", 0)
    monkeypatch.setattr(decode_graph, "PATIENCE_FEW", 0)
    model = build(torch.bfloat16, None, None)
    prompts, settings = prompts_of(*(5 + 7 * i % 40 for i in range(150))), {"stop_ids": range(3, 9)}
    seen: list[tuple[int, bool]] = []
    capture = Captured.capture

    def spy(self: Captured, size: int, state: Any) -> None:
        seen.append((size, size in self.forwards))
        capture(self, size, state)

    monkeypatch.setattr(Captured, "capture", spy)
    captured = texts(model, prompts, Sampling(1.0, seed=3), 120, **settings)
    assert seen[0] == (192, True)
    assert {(128, False), (64, False), (32, False), (16, True)} <= set(seen), seen
    monkeypatch.setattr(
        Captured, "capture", lambda self, size, state: self.graphs.setdefault(size, _Eager(self, size, state))
    )
    assert texts(model, prompts, Sampling(1.0, seed=3), 120, **settings) == captured


class _Eager:
    """A graph that is none."""

    def __init__(self, engine: Captured, size: int, state: Any) -> None:
        self.replay = lambda: engine.run(size, state)
