"""What holds for every input of packing, masking, merging and sampling, beyond the cases of their own tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, json_tokenizer, sentencepiece_tokenizer
from torch import Tensor, nn

from litlora import merge
from litlora.checkpoint import Checkpoint, make_header, write_checkpoint, write_json, write_shard
from litlora.config import ModelConfig, Rope
from litlora.data import Conversation, Dataset, Document, Instruction, PromptStyle, prepare
from litlora.load import Directory, RandomWeights, expected_shapes, load_model
from litlora.lora import LoRA
from litlora.merge import Merge
from litlora.model import CausalLoss
from litlora.packing import micro_batches
from litlora.peft_format import CONFIG, PREFIX, WEIGHTS, Adapter, combine, peft_config
from litlora.precision import RunPrecision
from litlora.sampling import Sampling, uniform
from litlora.tokenizer import Tokenizer

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    model_type="llama", vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=256, rms_norm_eps=1e-5,
    rope=Rope(1e4), sliding_windows=(None, None),
)  # fmt: skip
EVERY = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text("ab \n\t#:é🦙<>/s|im_end0", max_size=30)
ROWS = st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(json_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=CHATML))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(sentencepiece_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def loss() -> nn.Module:
    quantizer = RunPrecision("32-true", None, CPU).quantizer
    weights = RandomWeights(SHAPE, torch.float32)
    return CausalLoss(load_model(weights, quantizer, dtype=torch.float32, device=CPU)).eval()


def build(rows: Any, tokenizer: Tokenizer, style: str = "alpaca", **options: Any) -> Dataset:
    options = {"max_seq_length": 256, "mask_prompt": True, **options}
    return prepare(rows, tokenizer, PromptStyle.load(style, tokenizer), use_cache=False, **options)


def instructions(parts: list[tuple[str, str, str]]) -> list[Instruction]:
    return [Instruction(number, *part) for number, part in enumerate([*parts, ("a", "", "b")], start=1)]


# --- packing


@EVERY
@given(parts=ROWS, budget=st.integers(1, 900), seed=st.randoms(use_true_random=False))
def test_a_rows_loss_does_not_depend_on_its_pack(
    parts: list[tuple[str, str, str]], budget: int, seed: Any, tokenizer: Tokenizer, loss: nn.Module
) -> None:
    dataset = build(instructions(parts), tokenizer)
    order = list(range(len(dataset)))
    seed.shuffle(order)
    with torch.no_grad():
        alone = {i: float(loss(micro_batches(dataset, [i])[0])) for i in order}
        for pack in micro_batches(dataset, order, max_tokens=budget):
            together = float(loss(pack))
            assert together == pytest.approx(sum(alone[i] for i in pack.rows), rel=1e-5, abs=1e-4)


@EVERY
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), budget=st.integers(1, 200))
def test_packs_are_no_more_than_needed_and_alike(lengths: list[int], budget: int, tokenizer: Tokenizer) -> None:
    documents = [Document(number, "0 " * length) for number, length in enumerate(lengths, start=1)]
    dataset = build(documents, tokenizer, mask_prompt=False)
    packs = [len(batch.input_ids) for batch in micro_batches(dataset, range(len(dataset)), max_tokens=budget)]
    sizes = [int(length) for length in dataset.lengths]
    fitting = [size for size in sizes if size <= budget]
    # each pack but one is more than half full, or two of them would have been one
    assert len(packs) <= len(sizes) - len(fitting) + 2 * math.ceil(sum(fitting) / budget)
    shared = sorted(size for size in packs if size <= budget)
    assert not shared or shared[-1] - shared[0] <= max(fitting)


# --- masking


@EVERY
@given(
    turns=st.lists(st.tuples(TEXTS, TEXTS.filter(lambda text: text.strip() == text != "")), min_size=1, max_size=4),
    system=st.none() | TEXTS,
)  # fmt: skip
def test_just_the_assistants_turns_are_trained(
    turns: list[tuple[str, str]], system: str | None, tokenizer: Tokenizer
) -> None:
    """And each is trained behind the very ids that generation would be given there."""
    # what a turn says is numbered, so that no text stands in another one's place
    messages = [{"role": "system", "content": system}] if system is not None else []
    for number, (question, answer) in enumerate(turns):
        messages += [{"role": "user", "content": f"q{number} {question}"}]
        messages += [{"role": "assistant", "content": f"a{number} {answer}"}]
    row = Conversation(1, tuple(messages))
    style = PromptStyle.load("chat", tokenizer)
    segments = style.segments(row)
    assert "".join(text for text, _ in segments) == tokenizer.apply_chat_template(messages, False).removesuffix("\n")
    answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    assert [text for text, trained in segments if trained] == answers
    dataset = build([row], tokenizer, "chat", max_seq_length=2000)
    ids, trained = dataset.ids(0).tolist(), dataset.trained(0).tolist()
    assert tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t], skip_special=False) == "".join(answers)
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    prompt = tokenizer.encode_prompt(style.chat(messages[:first]))
    assert ids[: len(prompt)] == prompt
    assert trained.index(True) == len(prompt)


@EVERY
@given(parts=ROWS, limit=st.integers(60, 120), masked=st.booleans())
def test_a_cut_row_is_the_beginning_of_the_whole_one(
    parts: list[tuple[str, str, str]], limit: int, masked: bool, tokenizer: Tokenizer, llama: Tokenizer
) -> None:
    for made in (tokenizer, llama):
        whole = build(instructions(parts), made, max_seq_length=2000, mask_prompt=masked)
        if not any(whole.trained(i)[:limit].any() for i in range(len(whole))):
            continue  # refused: nothing to train
        cut = build(instructions(parts), made, max_seq_length=limit, mask_prompt=masked)
        for i in range(len(whole)):
            assert cut.ids(i).tolist() == whole.ids(i)[:limit].tolist()
            assert cut.trained(i).tolist() == whole.trained(i)[:limit].tolist()
        overlong = [i for i in range(len(whole)) if whole.lengths[i] > limit]
        assert cut.counts.truncated == len(overlong)
        assert cut.truncated.tolist() == [int(whole.rows[i]) for i in overlong]
        fitting = [i for i in range(len(whole)) if i not in overlong]
        if any(whole.trained(i).any() for i in fitting):
            options = {"max_seq_length": limit, "mask_prompt": masked, "on_overlong": "drop"}
            kept = build(instructions(parts), made, **options)
            assert kept.rows.tolist() == [int(whole.rows[i]) for i in fitting]
            assert kept.counts.dropped == len(overlong)


@EVERY
@given(text=st.text("ab \né🦙.", min_size=3, max_size=200), limit=st.integers(2, 40))
def test_raw_text_is_trained_once_token_by_token(text: str, limit: int, tokenizer: Tokenizer, llama: Tokenizer) -> None:
    for made in (tokenizer, llama):
        whole = [*made.encode(text), made.eos_id]
        dataset = build([Document(1, text)], made, max_seq_length=limit)
        labels = [token for i in range(len(dataset)) for token in dataset.ids(i)[dataset.trained(i)].tolist()]
        assert labels == whole[1:]
        assert dataset.lengths.max() <= limit


# --- merging


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), 10**9)


def write_base(directory: Path, shard_bytes: int) -> Path:
    names = (
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings rms_norm_eps"
    )
    write_json(directory / "config.json", {name: getattr(SHAPE, name) for name in names.split()})
    weights = RandomWeights(SHAPE, torch.float32)
    entries = [(name, torch.float32, shape) for name, shape in expected_shapes(SHAPE).items()]
    write_checkpoint(directory, entries, weights.read, shard_bytes=shard_bytes)
    return directory


def adapter(directory: Path, r: int, alpha: float, targets: tuple[str, ...], seed: int) -> Adapter:
    """Random A and B, small whole numbers: their products and sums are exact."""
    directory.mkdir()
    random = torch.Generator().manual_seed(seed)
    write_json(directory / CONFIG, peft_config(LoRA(r, alpha, 0.0, targets), "base"))
    tensors: list[tuple[str, Tensor]] = []
    for layer in range(SHAPE.num_hidden_layers):
        for name, (outputs, inputs) in SHAPE.linear_shapes.items():
            if name.rpartition(".")[2] in targets and name != "lm_head":
                key = f"{PREFIX}model.layers.{layer}.{name}.lora"
                for side, shape in (("A", (r, inputs)), ("B", (outputs, r))):
                    tensors.append((f"{key}_{side}.weight", torch.randint(-4, 5, shape, generator=random).float()))
    header = make_header([(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors], {})
    write_shard(directory / WEIGHTS, header, [tensor for _, tensor in tensors])
    return Adapter.open(directory, SHAPE)


LEAVES = [name.rpartition(".")[2] for name in SHAPE.linear_shapes if name != "lm_head"]
ADAPTERS = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 5]), st.sampled_from([1.0, 4.0, 10.0]), st.sets(st.sampled_from(LEAVES), min_size=1),
        st.sampled_from([1.0, 0.5, -2.0, 0.0]),
    ), min_size=1, max_size=3,
)  # fmt: skip


@settings(EVERY, max_examples=20)
@given(parts=ADAPTERS, block=st.sampled_from([1, 7, 100, 2**20]))
def test_merged_is_the_base_and_each_adapters_share(
    parts: list[tuple[int, float, set[str], float]],
    block: int,
    base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the ranks, scales, targets and weights, in any order, and however the work is cut into blocks; what no
    adapter touches stays bit for bit."""
    directory = tmp_path_factory.mktemp("adapters")
    adapters = [
        adapter(directory / str(i), r, alpha, tuple(sorted(targets)), seed=i)
        for i, (r, alpha, targets, _) in enumerate(parts)
    ]
    weights = [weight for *_, weight in parts]
    opened = Directory.open(base)
    monkeypatch.setattr(merge, "BLOCK", block)
    forwards, backwards = Merge(opened, adapters, weights), Merge(opened, adapters[::-1], weights[::-1])
    for name in expected_shapes(SHAPE):
        module, w = name.removesuffix(".weight"), opened.read(name)
        merged = forwards.read(name)
        if module not in forwards.adapted:
            assert torch.equal(merged, w)
            continue
        found = [
            (each.factors(module), weight)
            for each, weight in zip(adapters, weights, strict=True)
            if module in each.modules
        ]
        shares = [weight * factors.scale * (factors.B.double() @ factors.A.double()) for factors, weight in found]
        exact = w.double() + sum(shares)
        assert (merged.double() - exact).abs().max() <= 1e-6 * max(1.0, float(exact.abs().max()))
        assert (merged - backwards.read(name)).abs().max() <= 1e-5 * max(1.0, float(exact.abs().max()))
        together = combine(adapters, weights, module)
        assert together is not None
        assert (together.delta().double() - sum(shares)).abs().max() <= 1e-5 * max(1.0, float(sum(shares).abs().max()))


@settings(EVERY, max_examples=12)
@given(shard_bytes=st.integers(1, 40_000))
def test_shards_change_nothing(shard_bytes: int, base: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    sharded = Directory.open(write_base(tmp_path_factory.mktemp("sharded"), shard_bytes))
    one = adapter(tmp_path_factory.mktemp("adapters") / "one", 2, 4.0, ("q_proj", "down_proj"), seed=0)
    whole = Merge(Directory.open(base), [one], [1.0])
    cut = Merge(sharded, [one], [1.0])
    assert all(torch.equal(whole.read(name), cut.read(name)) for name in expected_shapes(SHAPE))
    assert sharded.checkpoint.fingerprint == Checkpoint(base).fingerprint


# --- sampling

# whole numbers: sums and differences are exact
LOGITS = st.lists(st.lists(st.integers(-3, 3) | st.integers(-20, 20), min_size=12, max_size=12), min_size=1, max_size=5)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.25, 1.0, 4.0]),
    top_k=st.none() | st.integers(0, 15),
    top_p=st.none() | st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    seed=st.integers(0, 2**63 - 1),
)


def tensors(rows: list[list[int]], seen: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, seen, streams, steps."""
    logits = torch.tensor(rows, dtype=torch.float32)
    mask = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seen)) < 0.3
    streams = torch.arange(len(rows)) * 7 + seen
    return logits, mask, streams, torch.arange(len(rows)) + seen % 5


@EVERY
@given(rows=LOGITS, sampling=SAMPLINGS, seed=st.integers(0, 10**6), order=st.randoms(use_true_random=False))
def test_a_rows_token_does_not_depend_on_the_rows_beside_it(
    rows: list[list[int]], sampling: Sampling, seed: int, order: Any
) -> None:
    arguments = tensors(rows, seed)
    together = sampling.choose(*arguments)
    places = list(range(len(rows)))
    order.shuffle(places)
    assert sampling.choose(*(part[places] for part in arguments)).tolist() == together[places].tolist()
    for place in places:
        assert sampling.choose(*(part[place : place + 1] for part in arguments)).item() == together[place].item()


@EVERY
@given(rows=LOGITS, sampling=SAMPLINGS, seed=st.integers(0, 10**6), shift=st.integers(-50, 50))
def test_only_likely_tokens_are_chosen(rows: list[list[int]], sampling: Sampling, seed: int, shift: int) -> None:
    """The kept ones are the most likely: as few as hold top_p together, at most top_k and their equals."""
    logits, seen, streams, steps = tensors(rows, seed)
    scores = sampling.penalized(logits, seen)
    chosen = sampling.choose(logits, seen, streams, steps)
    best = scores.amax(-1)
    if sampling.temperature == 0:
        assert scores.gather(1, chosen[:, None]).squeeze(1).tolist() == best.tolist()
        return
    kept = sampling.filtered(scores).isfinite()
    for row in range(len(rows)):
        inside, outside = scores[row][kept[row]], scores[row][~kept[row]]
        assert kept[row][chosen[row]]
        assert inside.max() == best[row]
        assert not len(outside) or outside.max() <= inside.min()
        if sampling.top_k:
            assert (inside > inside.min()).sum() < sampling.top_k
        if sampling.top_p in (None, 1.0):
            assert len(inside) >= min(sampling.top_k or len(scores[row]), len(scores[row]))
        else:
            # of what top-k left: without the last kept one they hold less than top_p
            allowed = scores[row]
            if sampling.top_k:
                allowed = allowed[allowed >= allowed.topk(min(sampling.top_k, len(allowed))).values[-1]]
            shares = (allowed.double() / sampling.temperature).softmax(0).sort(descending=True).values
            count = int(kept[row].sum())
            assert shares[: count - 1].sum() < sampling.top_p + 1e-6
            assert shares[:count].sum() >= sampling.top_p - 1e-6
    if sampling.repetition_penalty == 1.0:  # logits mean only differences
        assert sampling.choose(logits + shift, seen, streams, steps).tolist() == chosen.tolist()


@EVERY
@given(rows=LOGITS, seed=st.integers(0, 10**6), penalty=st.floats(1.01, 10))
def test_a_penalty_lowers_what_was_seen_and_nothing_else(rows: list[list[int]], seed: int, penalty: float) -> None:
    logits, seen, *_ = tensors(rows, seed)
    lowered = Sampling(repetition_penalty=penalty).penalized(logits, seen)
    assert torch.equal(lowered[~seen], logits[~seen])
    assert (lowered[seen] <= logits[seen]).all()
    assert ((lowered < logits) == (seen & (logits != 0))).all()


@EVERY
@given(
    seed=st.integers(0, 2**63 - 1),
    streams=st.lists(st.integers(0, 2**62), min_size=1, max_size=20),
    step=st.integers(0, 2**31),
)
def test_random_numbers_are_counted(seed: int, streams: list[int], step: int) -> None:
    """From 0 up, below 1; each by its own seed, stream and step alone."""
    many = uniform(seed, torch.tensor(streams), torch.full((len(streams),), step))
    assert (many >= 0).all()
    assert (many < 1).all()
    for stream, value in zip(streams, many.tolist(), strict=True):
        assert uniform(seed, torch.tensor([stream]), torch.tensor([step])).item() == value
    for other in (uniform(seed ^ 1, torch.tensor(streams), torch.full((len(streams),), step)),
                  uniform(seed, torch.tensor(streams), torch.full((len(streams),), step + 1))):  # fmt: skip
        assert (other != many).all()
