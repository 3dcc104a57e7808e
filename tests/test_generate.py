"""Generation: cached, ragged, sampled, stopped, from every kind of model; beside transformers where it can be had."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_family, make_peft_adapter, reference

import litlora.decode as decode
from litlora.errors import InputError
from litlora.frozen import Dense, make_quantizer
from litlora.kv_cache import PAGE, Pages
from litlora.load import Directory, load_model
from litlora.model import Decoder
from litlora.peft_format import Adapter, attach
from litlora.sampling import NOT_FINITE, Sampling, uniform
from litlora.sequences import Packed
from litlora.tokenizer import Tokenizer

FP32 = Dense(torch.float32)
LENGTHS = (1, 7, 3, 20, 12)
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)


def load(path: Path, quantizer: Any = FP32) -> Decoder:
    return load_model(Directory.open(path), quantizer, dtype=torch.float32, device="cpu").eval()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    """One model of each kind of attention: rope scaling, one kv head, windows in all and in some layers, q/k norm."""
    made = {}
    for family in ("llama3", "tinyllama", "mistral", "qwen2-window", "qwen3"):
        made[family] = load(make_family(tmp_path_factory.mktemp(family), family))
    return made


@pytest.fixture(scope="module")
def model(families: dict[str, Decoder]) -> Decoder:
    return families["mistral"]


def prompts_of(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 67) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def texts(model: Decoder, prompts: list[list[int]], sampling: Sampling, count: int, **settings: Any) -> list[list[int]]:
    """The new tokens of each row."""
    found: list[list[int]] = [[] for _ in prompts]
    settings = {"stop_ids": (), **settings}
    for row, token in decode.generate(model, prompts, sampling, max_new_tokens=count, **settings):
        found[row].append(token)
    return found


def logits_of(model: Decoder, ids: list[int]) -> torch.Tensor:
    """(N, V), without a cache."""
    with torch.no_grad():
        return model.lm_head(model(torch.tensor(ids), Packed.of_lengths([len(ids)])))


def uncached(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama3", "tinyllama", "mistral", "qwen2-window", "qwen3"])
def test_cached_equals_uncached(families: dict[str, Decoder], family: str) -> None:
    """Ragged rows through the cache against one row at a time without one; windows and rope boundaries are crossed."""
    model, prompts = families[family], prompts_of((5, 1, 60))
    wanted = [uncached(model, prompt, 16) for prompt in prompts]
    assert texts(model, prompts, Sampling(), 16) == wanted
    assert len({tuple(row) for row in wanted}) == 3  # not all the same by a degenerate model


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, 20, 0.9, 1.2, seed=7)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("late", [0, 1, 3], ids=["read at once", "read late", "read later"])
@pytest.mark.parametrize("prefill", [8192, 8])
def test_ragged_batch_equals_one_by_one(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, sampling: Sampling, late: int, prefill: int
) -> None:
    """Rows that end early leave the others as they are, however prompts are grouped and whenever tokens are read."""
    prompts, count = prompts_of(), 30
    stop_ids = range(3, 9)
    settings: dict[str, Any] = {"stop_ids": stop_ids, "vocab_size": 60}
    alone = [texts(model, [p], sampling, count, streams=[row], **settings)[0] for row, p in enumerate(prompts)]
    monkeypatch.setattr(decode, "_late", lambda device, rows: late)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", prefill)
    assert texts(model, prompts, sampling, count, **settings) == alone
    ends = [row[-1] in stop_ids for row in alone]
    assert len({len(row) for row in alone}) > 2, "the rows end at different steps"
    assert any(ends)
    assert all(token not in stop_ids for row in alone for token in row[:-1])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, 20, 0.9, 1.2, seed=7)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("late", [0, 1, 3], ids=["read at once", "read late", "read later"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_rows_take_the_places_of_those_that_end(
    model: Decoder, monkeypatch: pytest.MonkeyPatch, sampling: Sampling, late: int, slots: int
) -> None:
    """Never more than `slots` of them at a time, in the order of the prompts, each with the text it has alone."""
    prompts, count = prompts_of((1, 7, 3, 20, 12, 250, 9, 2)), 20
    settings: dict[str, Any] = {"stop_ids": range(3, 9), "vocab_size": 60}
    alone = [texts(model, [p], sampling, count, streams=[row], **settings)[0] for row, p in enumerate(prompts)]
    monkeypatch.setattr(decode, "_late", lambda device, rows: late)
    widths: list[int] = []
    step = decode.Eager.step
    monkeypatch.setattr(
        decode.Eager, "step", lambda self, s, lengths: (widths.append(len(lengths)), step(self, s, lengths))[1]
    )
    found: list[list[int]] = [[] for _ in prompts]
    first: list[int] = []
    for row, token in decode.generate(model, prompts, sampling, max_new_tokens=count, side_by_side=slots, **settings):
        first += [] if found[row] else [row]
        found[row].append(token)
    assert found == alone
    assert max(widths) == slots
    assert first == list(range(len(prompts)))
    assert sum(widths) < sum(map(len, alone)) + late * len(prompts), "no row is written on long after its end"


@pytest.mark.parametrize("bound", ["tokens", "memory"])
def test_a_long_prompt_in_pieces_is_the_whole(
    families: dict[str, Decoder], monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    """Windows and rope boundaries lie between the pieces, and within them."""
    prompts, seen = prompts_of((100, 3, 64)), []
    prefill = decode.Prefill

    def spy(cache: Any, places: Any, device: Any) -> Any:
        seen.append(sum(map(len, places)))
        return prefill(cache, places, device)

    for model in families.values():
        whole = texts(model, prompts, Sampling(), 12)
        width = 3 * model.config.intermediate_size + 2 * model.config.hidden_size
        if bound == "tokens":
            monkeypatch.setattr(decode, "PREFILL_TOKENS", 32)
        else:
            monkeypatch.setattr(decode, "PREFILL_MEMORY", 32.5 * 4 * width)
        monkeypatch.setattr(decode, "CONTINUED_TOKENS", 9)
        monkeypatch.setattr(decode, "Prefill", spy)
        seen.clear()
        assert texts(model, prompts, Sampling(), 12) == whole
        assert seen == [32, 3, 32]
        monkeypatch.undo()


def test_pages_of_the_cache() -> None:
    """Whatever comes, grows and goes, no two rows share a page, each has just enough, and all are free at the end."""
    chance, pages, held = random.Random(0), Pages(21), {}
    for _ in range(3000):
        row = chance.randrange(8)
        if row in held and chance.random() < 0.3:
            pages.give_back(row)
            del held[row]
        else:
            tokens = held.get(row, 0) + chance.randint(1, 200)
            before = list(pages.free)
            if pages.hold(row, tokens):
                held[row] = tokens
            else:
                assert pages.free == before
                assert -(-tokens // PAGE) - len(pages.of[row]) > len(before)
                if row not in held:
                    pages.give_back(row)
        taken = [page for mine in pages.of.values() for page in mine]
        assert sorted([*taken, *pages.free]) == list(range(1, 21))
        assert all(len(pages.of[row]) == -(-tokens // PAGE) for row, tokens in held.items())
    for row, tokens in held.items():
        places = pages.places(row, 3, tokens - 3).tolist()
        assert len(set(places)) == tokens - 3
        assert all(place // PAGE in pages.of[row] for place in places)
        assert [place % PAGE for place in places] == [token % PAGE for token in range(3, tokens)]


def test_rows_make_room_for_others(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in which not all rows can grow: the last wait again, with what they have, and say the same."""
    prompts, count = prompts_of((5, 9, 2, 7)), 20
    for sampling in (Sampling(), Sampling(1.3, 20, 0.9, 1.2, seed=7)):
        for late in (0, 1, 3):
            wanted = texts(model, prompts, sampling, count, stop_ids=range(3, 6))
            monkeypatch.setattr(decode, "_late", lambda device, rows, late=late: late)
            left: list[int] = []
            rooms: dict[int, int] = {}

            def put_back(rows: Any, left: list[int] = left, put_back: Any = decode._Rows.put_back) -> None:
                left.append(max(rows.live))
                put_back(rows)

            def grow(self: Any, row: int, tokens: int, rooms: dict[int, int] = rooms) -> bool:
                if sum(rooms.values()) - rooms.get(row, 0) + tokens > 60:
                    return False
                rooms[row] = tokens
                return True

            def leave(self: Any, row: int, rooms: dict[int, int] = rooms, leave: Any = decode.Eager.leave) -> None:
                rooms.pop(row, None)
                leave(self, row)

            def admit(self: Any, row: int, tokens: int, live: int, admit: Any = decode.Eager.admit) -> bool:
                return grow(self, row, tokens) and bool(admit(self, row, tokens, live))

            monkeypatch.setattr(decode._Rows, "put_back", put_back)
            monkeypatch.setattr(decode.Eager, "grow", grow)
            monkeypatch.setattr(decode.Eager, "leave", leave)
            monkeypatch.setattr(decode.Eager, "admit", admit)
            assert texts(model, prompts, sampling, count, stop_ids=range(3, 6)) == wanted
            assert left, "some had to wait"
            monkeypatch.undo()


def test_rows_that_end_are_not_computed(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows whose limits differ by the context's end: the model sees just the tokens that are needed."""
    prompts = [prompts_of((n,))[0] for n in (250, 10, 253)]
    seen: list[int] = []
    forward = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, ids, s: (seen.append(len(ids)), forward(self, ids, s))[1])
    found = texts(model, prompts, Sampling(), 9)
    assert [len(row) for row in found] == [6, 9, 3]
    assert seen == [513, 3, 3, 2, 2, 2, 1, 1, 1]
    assert found[1] == uncached(model, prompts[1], 9)


def test_a_row_ended_by_the_caller_stops(model: Decoder) -> None:
    ended: set[int] = set()
    found: dict[int, int] = {0: 0, 1: 0}
    for row, _ in decode.generate(model, prompts_of((4, 4)), Sampling(), max_new_tokens=9, stop_ids=(), ended=ended):
        found[row] += 1
        if row == 0 and found[0] == 3:
            ended.add(0)
    assert found == {0: 3, 1: 9}


def test_generated_text_fed_back_has_the_same_probabilities(
    families: dict[str, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache computed token by token is what one pass over the whole text computes."""
    for model in families.values():
        kept: list[torch.Tensor] = []
        choose = Sampling.choose

        def spy(self: Sampling, logits: torch.Tensor, *rest: Any, kept: Any = kept, choose: Any = choose) -> Any:
            kept.append(logits.log_softmax(-1))
            return choose(self, logits, *rest)

        monkeypatch.setattr(Sampling, "choose", spy)
        prompt = prompts_of((9,))[0]
        new = texts(model, [prompt], Sampling(1.0, seed=3), 40)[0]
        monkeypatch.undo()
        cached = torch.cat(kept)[range(40), new]
        again = logits_of(model, prompt + new)[len(prompt) - 1 : -1].log_softmax(-1)[range(40), new]
        torch.testing.assert_close(cached, again, atol=2e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_padded_vocabulary_is_never_sampled(tmp_path: Path, temperature: float) -> None:
    model = load(make_family(tmp_path, "llama"))
    model.lm_head.weight.data[60:] = 100 * model.lm_head.weight.data[:7]  # huge where they are not negative
    prompts = prompts_of((3, 3, 3, 3), 60)
    free = texts(model, prompts, Sampling(temperature), 20)
    assert any(token >= 60 for row in free for token in row), "without the limit they would be taken"
    held = texts(model, prompts, Sampling(temperature), 20, vocab_size=60)
    assert max(token for row in held for token in row) < 60


def test_logits_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    model = load(make_family(tmp_path, "llama"))
    model.model.norm.weight.data[:] = math.nan
    for sampling in (Sampling(), Sampling(1.0, 5, 0.5, 1.1)):
        with pytest.raises(InputError, match="not finite"):
            texts(model, prompts_of((3,)), sampling, 2)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[3], []], 5, "empty prompt"),
        ([[3] * 256], 5, "longer than the model's context\n.*prompt 1\n.*256 tokens\n.*at most 255"),
        ([[3, 67]], 5, "no embedding"),
        ([[3]], 0, "max_new_tokens"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(
    model: Decoder, prompts: list[list[int]], count: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        decode.generate(model, prompts, Sampling(), max_new_tokens=count, stop_ids=())


def test_no_prompts_give_nothing(model: Decoder) -> None:
    assert texts(model, [], Sampling(), 3) == []


# --- sampling ---


def processors(sampling: Sampling) -> Any:
    from transformers.generation import logits_process as hf

    made = hf.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        made.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    made.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        made.append(hf.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        made.append(hf.TopPLogitsWarper(sampling.top_p))
    return made


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.0, top_k=5),
        Sampling(1.0, top_k=1000),
        Sampling(2.5, top_p=0.6),
        Sampling(1.0, top_p=0.0),
        Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.3, 20, 0.8, 0.6),
    ],
    ids=str,
)
def test_distributions_are_transformers(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(16, 97, generator=generator) * 4
    logits[0, :40] = 3.0  # equals at the k-th place all stay
    history = torch.randint(0, 97, (16, 30), generator=generator)
    seen = torch.zeros(16, 97, dtype=torch.bool).scatter_(1, history, True)
    wanted = processors(sampling)(history, logits.clone()).softmax(-1)
    found = sampling.filtered(sampling.penalized(logits, seen)).softmax(-1)
    # where top-p has to choose among equals the order of a sort decides: these rows are compared by their counts
    rows = slice(1 if sampling.top_p is not None else 0, None)
    torch.testing.assert_close(found[rows], wanted[rows])
    assert torch.equal((found[rows] > 0).sum(-1), (wanted[rows] > 0).sum(-1))


def test_draws_follow_the_distribution_and_their_own_number_only() -> None:
    sampling, count = Sampling(1.0, top_k=6, seed=11), 40_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).expand(count, -1)
    streams, steps = torch.arange(count) % 200, torch.arange(count) // 200
    drawn = sampling.choose(logits, None, streams, steps)
    share = torch.bincount(drawn, minlength=12) / count
    wanted = sampling.filtered(logits[:1]).softmax(-1)[0]
    assert (share[wanted == 0] == 0).all()
    assert (share - wanted).abs().max() < 4 * 0.5 / math.sqrt(count)  # four standard deviations
    some = torch.tensor([39_999, 17, 2_000])
    assert torch.equal(sampling.choose(logits[some], None, streams[some], steps[some]), drawn[some])
    other = Sampling(1.0, top_k=6, seed=12).choose(logits, None, streams, steps)
    # two independent draws agree as often as two dice do
    assert abs((other == drawn).float().mean() - wanted.square().sum()) < 0.02


def splitmix(x: int) -> int:
    """The published C code's next() on state x, in Python's whole numbers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_uniform_is_splitmix64_and_spread_evenly() -> None:
    assert splitmix(1234567) == 6457827717110365317  # the first number of a published sequence

    def wanted(seed: int, stream: int, step: int) -> float:
        golden = 0x9E3779B97F4A7C15
        first = splitmix((stream * golden + splitmix(seed) - golden) % 2**64)
        return (splitmix((first + (step - 1) * golden) % 2**64) >> 12) / 2**52

    triples = [(0, 0, 0), (7, 1, 2), (2**63 - 1, (3 << 32) + 5, 10**6)]
    for seed, stream, step in triples:
        found = uniform(seed, torch.tensor([stream]), torch.tensor([step]))
        assert found.tolist() == [wanted(seed, stream, step)]
    grid = torch.cartesian_prod(torch.arange(300), torch.arange(300))
    numbers = uniform(1, *grid.unbind(1))
    assert len(numbers.unique()) == 90_000
    assert (torch.histc(numbers, 20, 0, 1) / 90_000 - 0.05).abs().max() < 0.004
    square = numbers.view(300, 300) - 0.5
    for shifted in (square[1:] * square[:-1], square[:, 1:] * square[:, :-1]):  # neighbours know nothing of each other
        assert shifted.mean().abs() * 12 < 0.015


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 1.5}, {"repetition_penalty": 0.0},
     {"seed": -1}],
    ids=str,
)  # fmt: skip
def test_sampling_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**values)


def test_extreme_logits_and_temperatures() -> None:
    rows = torch.tensor([[0.0, 900.0, -900.0], [-math.inf, -math.inf, 1.0], [math.nan, 0.0, 1.0], [math.inf, 0.0, 0.0]])
    zeros = torch.zeros(4, dtype=torch.int64)
    for temperature in (0.0, 1e-30, 1.0):
        found = Sampling(temperature).choose(rows, None, zeros, zeros)
        assert found.tolist() == [1, 2, NOT_FINITE, NOT_FINITE]


# --- adapters and formats ---


def make_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    make_peft_adapter(directory=directory, base=base, **settings)
    return directory


@pytest.mark.parametrize("family", ["llama", "qwen3-tied"])
def test_adapter_unmerged_equals_merged(tmp_path: Path, family: str) -> None:
    base = make_family(tmp_path / "base", family)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    opened = Directory.open(base)
    paths = [
        make_adapter(base, tmp_path / "a", seed=1, r=4, target_modules=targets),
        make_adapter(base, tmp_path / "b", seed=2, r=6, use_rslora=True),
    ]
    adapters, weights = [Adapter.open(path, opened.config, opened.checkpoint) for path in paths], [0.7, -0.4]
    unmerged, merged, plain = load(base), load(base), load(base)
    attach(unmerged, adapters, weights)
    for adapter, weight in zip(adapters, weights, strict=True):
        for name in adapter.modules:
            merged.get_submodule(name).weight.data += weight * adapter.factors(name).delta()
    prompt = prompts_of((15,))[0]
    torch.testing.assert_close(logits_of(unmerged.eval(), prompt), logits_of(merged, prompt), atol=1e-4, rtol=1e-4)
    found = texts(unmerged, [prompt], Sampling(), 20)
    assert found == texts(merged, [prompt], Sampling(), 20)
    assert found != texts(plain, [prompt], Sampling(), 20), "the adapters do something"


@pytest.mark.parametrize("name", ["bnb.nf4", "bnb.fp4-dq"])
def test_four_bit_on_the_cpu(tmp_path: Path, name: str) -> None:
    """Text of the quantized model, cached and ragged, equals that of a dense model of the rounded weights."""
    base = make_family(tmp_path, "llama", hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    quantized = load(base, make_quantizer(name, torch.float32, torch.device("cpu")))
    rounded = load(base)
    for path, module in quantized.named_modules():
        if path.startswith("model.layers") and hasattr(module, "dense_weight"):
            rounded.get_submodule(path).weight.data = module.dense_weight().clone()
    prompts = prompts_of()
    assert texts(quantized, prompts, Sampling(), 12) == texts(rounded, prompts, Sampling(), 12)
    assert texts(rounded, prompts, Sampling(), 12) != texts(load(base), prompts, Sampling(), 12)


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA card")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.3, 20, 0.9, 1.2, seed=7)], ids=["greedy", "sampled"])
def test_a_gpu_gives_the_cpus_text(tmp_path: Path, gpu: torch.device, sampling: Sampling) -> None:
    """fp32; read one step late on a real card."""
    base = make_family(tmp_path, "mistral")
    card = load_model(Directory.open(base), FP32, dtype=torch.float32, device=gpu).eval()
    found = texts(card, prompts_of(), sampling, 30, stop_ids=range(3, 9))
    assert found == texts(load(base), prompts_of(), sampling, 30, stop_ids=range(3, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [None, "bnb.nf4", "bnb.nf4-dq"])
def test_16_and_4_bit_on_a_gpu(tmp_path: Path, gpu: torch.device, name: str | None) -> None:
    if name is not None:
        pytest.importorskip("bitsandbytes")
    base = make_family(tmp_path, "mistral", hidden_size=64, intermediate_size=128, head_dim=16)
    quantizer = make_quantizer(name, torch.bfloat16, gpu)
    model = load_model(Directory.open(base), quantizer, dtype=torch.bfloat16, device=gpu).eval()
    prompts, sampling = [*prompts_of(), [3] * 250], Sampling(1.3, 20, 0.9, 1.2, seed=7)
    found = texts(model, prompts, sampling, 30, stop_ids=range(3, 9), vocab_size=60)
    assert all(token not in range(3, 9) and token < 60 for row in found for token in row[:-1])
    assert all(len(row) == 30 or row[-1] in range(3, 9) for row in found[:-1])
    assert 1 <= len(found[-1]) <= 6
    assert found == texts(model, prompts, sampling, 30, stop_ids=range(3, 9), vocab_size=60)


# --- beside transformers, on real models ---


def transformers_greedy(path: Path, ids: list[int], count: int, **settings: Any) -> list[int]:
    model = reference(path)
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=count, do_sample=False,
            pad_token_id=0, **settings,
        )  # fmt: skip
    return out[0, len(ids) :].tolist()


def test_repetition_penalty_along_the_way_is_transformers(tmp_path: Path) -> None:
    """Prompt and answer both count, in a batch whose rows move."""
    base = make_family(tmp_path, "llama", max_position_embeddings=64)
    model, prompts = load(base), prompts_of((60, 20, 1))
    found = texts(model, prompts, Sampling(repetition_penalty=1.6), 40, stop_ids=(2,))
    limits = zip(prompts, (4, 40, 40), strict=True)
    wanted = [transformers_greedy(base, ids, limit, repetition_penalty=1.6) for ids, limit in limits]
    assert found == wanted
    assert found != [transformers_greedy(base, ids, len(new)) for ids, new in zip(prompts, found, strict=True)]


def test_stories_greedy_is_transformers_and_the_published_story(material: Callable[[str], Path]) -> None:
    stories = material("stories260K-hf")
    tokenizer, model = Tokenizer.load(stories), load(stories)
    prompts = [tokenizer.encode_prompt(text) for text in ("", "Tim and his dog", "One day, a bird")]
    found = texts(model, prompts, Sampling(), 250, stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size)
    assert tokenizer.decode(found[0]).startswith(STORY)
    for prompt, new in zip(prompts, found, strict=True):
        assert len(new) > 200
        assert new == transformers_greedy(stories, prompt, 250)


@pytest.mark.slow
def test_smollm2_greedy_is_transformers(smollm2: Path) -> None:
    tokenizer, model = Tokenizer.load(smollm2), load(smollm2)
    prompts = [tokenizer.encode_prompt(text) for text in ("The steam engine was invented", "def fibonacci(n):")]
    found = texts(model, prompts, Sampling(), 200, stop_ids=tokenizer.stop_ids, vocab_size=tokenizer.vocab_size)
    for prompt, new in zip(prompts, found, strict=True):
        assert new == transformers_greedy(smollm2, prompt, 200)
    assert max(map(len, found)) == 200


@pytest.mark.slow
def test_smollm2_perplexity_is_transformers(smollm2: Path) -> None:
    tokenizer, model = Tokenizer.load(smollm2), load(smollm2)
    words = (
        "The lighthouse stood at the end of a long pier, and every evening the keeper climbed its narrow stairs. "
        "Water boils at a lower temperature on a mountain, because the air there presses on it less. "
        "In the spring of that year the river rose above its banks and flooded the lower streets of the town."
    )
    ids = torch.tensor(tokenizer.encode_prompt(words))
    ours = F.cross_entropy(logits_of(model, ids.tolist())[:-1], ids[1:]).exp()
    with torch.no_grad():
        theirs = F.cross_entropy(reference(smollm2)(ids[None]).logits[0, :-1], ids[1:]).exp()
    print(f"perplexity {ours:.4f}, transformers {theirs:.4f}")
    assert abs(ours - theirs) / theirs < 1e-3
    assert 2 < ours < 100
