"""Data files to ids and masks: what is trained is the response, and nothing is lost without being counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, json_tokenizer, sentencepiece_tokenizer

from litlora.data import (
    Conversation,
    Dataset,
    Document,
    Instruction,
    PromptStyle,
    Row,
    load_rows,
    prepare,
    split,
)
from litlora.data import (
    dataset as dataset_module,
)
from litlora.errors import InputError
from litlora.tokenizer import Tokenizer, boundaries

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
# Llama 3's way of writing turns, and one that leaves thoughts out of earlier turns, as Qwen3's does.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def chat(root: Path) -> Tokenizer:
    return Tokenizer.load(json_tokenizer(root / "chat", chat_template=CHATML))


@pytest.fixture(scope="module")
def llama(root: Path) -> Tokenizer:
    return Tokenizer.load(sentencepiece_tokenizer(root / "llama"))


@pytest.fixture(scope="module")
def kinds(chat: Tokenizer, llama: Tokenizer) -> list[Tokenizer]:
    return [chat, llama]


def build(rows: Sequence[Row], tokenizer: Tokenizer, style: str = "alpaca", **options) -> Dataset:
    options = {"mask_prompt": True, "max_seq_length": 2048, "use_cache": False, **options}
    return prepare(rows, tokenizer, PromptStyle.load(style, tokenizer), **options)


def trained_text(dataset: Dataset, index: int, tokenizer: Tokenizer, skip_special: bool = False) -> str:
    return tokenizer.decode(dataset.ids(index)[dataset.trained(index)].tolist(), skip_special)


# Sources


def write(path: Path, content: object) -> Path:
    if isinstance(content, list):
        is_lines = path.suffix == ".jsonl"
        content = "\n".join(map(json.dumps, content)) if is_lines else json.dumps(content)
    path.write_text(str(content), encoding="utf-8", newline="")
    return path


def test_every_shape_of_file_becomes_rows(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3"}
    wanted = [Instruction(1, "Add", "1 2", "3"), Instruction(2, "Hi", "", "Ho")]
    short = {"instruction": "Hi", "output": "Ho"}
    assert load_rows("alpaca", write(tmp_path / "a.json", [row, short])) == wanted
    assert load_rows("json", write(tmp_path / "a.jsonl", [row, {**short, "input": None}])) == wanted
    lines_named_json = write(tmp_path / "b.json", json.dumps(row) + "\n\n" + json.dumps(short))
    assert [r.number for r in load_rows("json", lines_named_json)] == [1, 3]
    table = write(tmp_path / "a.csv", 'instruction,input,output\r\nAdd,1 2,3\r\nHi,,"Ho\nho"\r\nx,,y\r\n')
    assert load_rows("json", table) == [
        Instruction(2, "Add", "1 2", "3"),
        Instruction(3, "Hi", "", "Ho\nho"),
        Instruction(5, "x", "", "y"),
    ]
    dolly = [{"instruction": "Q", "context": "C", "response": "A", "category": "x"}]
    assert load_rows("dolly", write(tmp_path / "d.jsonl", dolly)) == [Instruction(1, "Q", "C", "A")]


def test_conversations_become_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    path = write(tmp_path / "a.json", [{"messages": messages}, {"conversations": turns}])
    assert load_rows("json", path) == [Conversation(1, tuple(messages)), Conversation(2, tuple(messages))]


def test_lima_first_exchange_or_all_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"conversations": ["a", "b"]}, {"conversations": ["a", "b", "c", "d", "e"]}])
    assert load_rows("lima", path) == [Instruction(1, "a", "", "b"), Instruction(2, "a", "", "b")]
    _, many = load_rows("lima", path, multiturn=True)
    assert [message["content"] for message in many.messages] == ["a", "b", "c", "d"]


def test_text_files_are_documents(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "One.\n\nTwo.")
    write(tmp_path / "a.txt", "Three.")
    assert load_rows("text", tmp_path / "b.txt") == [Document(1, "One.\n\nTwo.")]
    assert load_rows("text", tmp_path) == [Document(1, "Three."), Document(2, "One.\n\nTwo.")]
    assert load_rows("text", write(tmp_path / "c.jsonl", [{"text": "x"}])) == [Document(1, "x")]


def test_the_real_files_are_read(material) -> None:
    assert len(load_rows("alpaca", material("alpaca/alpaca_5000.json"))) == 5000
    assert len(load_rows("dolly", material("dolly/databricks-dolly-3k.jsonl"))) == 2996
    path = material("lima/lima.jsonl")
    assert all(isinstance(row, Instruction) for row in load_rows("lima", path))
    assert sum(isinstance(row, Conversation) for row in load_rows("lima", path, multiturn=True)) == 29


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", None, "does not exist"),
        ("a.json", " \n", "empty"),
        ("a.json", "[]", "no rows"),
        ("a.json", '[\n{"a": 1},\n{"b" 2}]', "line 3"),
        ("a.json", '{\n"a": 1\n}', "not a list"),
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruc', "line 2"),
        ("a.csv", "instruction,output\na,b\na,b,c\n", "line 3"),
        ("a.csv", "instruction,output\n", "no rows"),
        ("a.csv", "instruction,answer\na,b\n", 'line 2 lacks the column "output"'),
        ("a.xml", "<a/>", "unknown"),
        ("a.json", [{"instruction": "a", "output": "b"}, {"instruction": "a"}], 'row 2 lacks the column "output"'),
        ("a.jsonl", [{"instruction": 3, "output": "b"}], "line 1 has a number"),
        ("a.json", ["text"], "row 1 is text"),
        ("a.json", [{"instruction": "a", "output": None}], "null"),
        ("a.json", [{"instruction": "a", "output": "\ud83d"}], "broken Unicode"),
        ("a.json", [{"messages": [{"role": "user", "content": "a"}]}], "no assistant turn"),
        ("a.json", [{"messages": [{"role": "user"}]}], "turn 1 lacks"),
        ("a.json", [{"messages": "a"}], "lacks a list"),
        ("a.json", [{"conversations": [{"from": "nobody", "value": "a"}]}], "nobody"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: object, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(InputError) as caught:
        load_rows("json", path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_many_bad_rows_are_counted_and_the_first_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [{"instruction": "a"}] * 8)
    with pytest.raises(InputError, match=r"(?s)8 of 8 rows.*row 5 .*3 more"):
        load_rows("json", path)


def test_without_the_hub_the_file_to_get_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(**_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match=r"(?s)train\.jsonl.*--data_path"):
        load_rows("lima")
    with pytest.raises(InputError, match="--data_path"):
        load_rows("json")
    with pytest.raises(InputError, match="alpaca, lima"):
        load_rows("lime")


# Prompts


def test_alpaca_prompt_is_verbatim(chat: Tokenizer) -> None:
    style = PromptStyle.load("alpaca", chat)
    assert style.prompt("Add {x}.\n", "1\n2") == WITH_INPUT.format("Add {x}.\n", "1\n2")
    assert style.prompt("Hi") == WITHOUT_INPUT.format("Hi")
    assert style.segments(Instruction(1, "Hi", "", "Ho")) == [(WITHOUT_INPUT.format("Hi"), False), ("Ho", True)]


def test_other_styles(chat: Tokenizer, tmp_path: Path) -> None:
    assert PromptStyle.load("none", chat).prompt("Hi") == "Hi"
    assert PromptStyle.load("chat", chat).prompt("Hi", "x").endswith("Hi\n\nx<|im_end|>\n<|im_start|>assistant\n")
    path = write(tmp_path / "mine.txt", "Q: {{ instruction }}{% if input %} ({{ input }}){% endif %}\n\nA:\n")
    style = PromptStyle.load(str(path), chat)
    assert style.prompt("Hi") == "Q: Hi\n\nA:\n"
    assert style.prompt("Hi", "x") == "Q: Hi (x)\n\nA:\n"
    assert PromptStyle.from_source(style.name, style.source, chat).prompt("{{ x }}") == "Q: {{ x }}\n\nA:\n"


@pytest.mark.parametrize("text", ["no field", "{{ instruction }}{{ other }}", "{% if instruction %}", "{{ instruction"])
def test_bad_templates_are_named(chat: Tokenizer, tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"mine\.txt"):
        PromptStyle.load(str(write(tmp_path / "mine.txt", text)), chat)


def test_unknown_style_and_missing_template_are_said(llama: Tokenizer) -> None:
    with pytest.raises(InputError, match="alpaca, none, chat"):
        PromptStyle.load("alpacca", llama)
    with pytest.raises(InputError, match="chat template"):
        PromptStyle.load("chat", llama)
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    with pytest.raises(InputError, match=r"row 7 .*chat template"):
        build([Conversation(7, messages)], llama)


# Ids and masks

ROWS = [
    Instruction(1, "What is 59 minus 38?", "", "21"),
    Instruction(2, "Say", "fox", "The fox.\n\nAnd so on, naïve 🦙"),
    Instruction(3, "Nothing", "", ""),
    Instruction(4, "Space", "", " quick"),
    Instruction(5, "Line", "", "\n\nfox"),
]


@pytest.mark.parametrize("style", ["alpaca", "none"])
def test_prompt_is_what_generation_sees_and_the_rest_is_trained(kinds: list[Tokenizer], style: str) -> None:
    for tokenizer in kinds:
        dataset = build(ROWS, tokenizer, style)
        made = PromptStyle.load(style, tokenizer)
        for i, row in enumerate(ROWS):
            prompt = tokenizer.encode_prompt(made.prompt(row.instruction, row.input))
            ids, trained = dataset.ids(i).tolist(), dataset.trained(i)
            assert ids[: len(prompt)] == prompt
            assert not trained[: len(prompt)].any()
            assert trained[len(prompt) :].all()
            assert ids[-1] == tokenizer.eos_id
            whole = made.prompt(row.instruction, row.input) + row.output
            assert tokenizer.decode(ids) == whole
        assert dataset.rows.tolist() == [1, 2, 3, 4, 5]


def test_one_string_unless_a_token_straddles(chat: Tokenizer) -> None:
    """ "\\n" before "\\n\\n" is one token of this tokenizer: that row, and no other, is tokenized in two parts."""
    style = PromptStyle.load("alpaca", chat)
    dataset = build(ROWS, chat)
    for i, row in enumerate(ROWS):
        whole = chat.encode(style.prompt(row.instruction) + row.output) if not row.input else None
        if whole is not None:
            assert (dataset.ids(i)[:-1].tolist() == whole) == (row.number != 5)
    assert dataset.counts.straddling == 1


def test_unmasked_trains_the_prompt_too(kinds: list[Tokenizer]) -> None:
    for tokenizer in kinds:
        dataset = build(ROWS, tokenizer, mask_prompt=False)
        assert dataset.flat_trained.sum() == len(dataset.flat_ids) - len(ROWS)  # all but the first tokens
        assert dataset.counts.trained_tokens == dataset.flat_trained.sum()


def test_truncated_rows_have_no_eos_and_are_counted(chat: Tokenizer) -> None:
    full = build(ROWS, chat)
    limit = int(full.lengths[1]) - 1
    dataset = build(ROWS, chat, max_seq_length=limit)
    labels = dataset.flat_ids[dataset.flat_trained]
    assert dataset.counts.truncated == (full.lengths > limit).sum()
    assert (labels == chat.eos_id).sum() == len(ROWS) - dataset.counts.truncated
    assert dataset.counts.longest == full.lengths.max()
    dropped = build(ROWS, chat, max_seq_length=limit, on_overlong="drop")
    assert len(dropped) + dropped.counts.dropped == len(ROWS)
    assert 2 not in dropped.rows
    with pytest.raises(InputError, match=rf"(?s)row 2 .*{full.lengths[1]} tokens.*{limit}"):
        build(ROWS, chat, max_seq_length=limit, on_overlong="error")


def test_nothing_left_to_train_is_said(chat: Tokenizer) -> None:
    with pytest.raises(InputError, match="every label is masked"):
        build(ROWS, chat, max_seq_length=8)
    with pytest.raises(InputError, match="all rows are overlong"):
        build(ROWS, chat, max_seq_length=8, on_overlong="drop")
    with pytest.raises(InputError, match="no rows"):
        build([], chat)
    for wrong in ({"max_seq_length": 1}, {"on_overlong": "cut"}):
        with pytest.raises(InputError):
            build(ROWS, chat, **wrong)


CHAT = Conversation(
    1,
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 59 minus 38?"},
        {"role": "assistant", "content": "21"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "The quick fox."},
        {"role": "user", "content": "Thanks."},
    ),
)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CHATML, "21<|im_end|>The quick fox.<|im_end|>"),
        (HEADERS, "21<|im_end|>The quick fox.<|im_end|>"),
        (THINKING, "21<|im_end|>The quick fox.<|im_end|>"),
    ],
)
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_conversations_train_assistant_turns_and_their_end(
    tmp_path: Path, template: str, wanted: str, mask_prompt: bool
) -> None:
    tokenizer = Tokenizer.load(json_tokenizer(tmp_path, chat_template=template))
    dataset = build([CHAT], tokenizer, mask_prompt=mask_prompt)
    assert trained_text(dataset, 0, tokenizer) == wanted
    # What stands before the first answer is what generation would be given.
    prompt = tokenizer.encode_prompt(PromptStyle.load("chat", tokenizer).chat(CHAT.messages[:2]))
    assert dataset.ids(0)[: len(prompt)].tolist() == prompt
    assert dataset.trained(0)[len(prompt)]


def test_thoughts_written_before_the_last_turn_are_trained(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(json_tokenizer(tmp_path, chat_template=THINKING))
    dataset = build([Conversation(1, CHAT.messages[:5])], tokenizer)
    wanted = "21<|im_end|><think>\n\n</think>\n\nThe quick fox.<|im_end|>"
    assert trained_text(dataset, 0, tokenizer) == wanted


def test_a_template_without_turn_ends_gets_eos(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = Tokenizer.load(json_tokenizer(tmp_path, chat_template=template))
    dataset = build([Instruction(1, "Hi", "", "fox")], tokenizer, style="chat")
    assert trained_text(dataset, 0, tokenizer) == "fox<|im_end|>"


def test_lima_turns_follow_the_prompt_style(kinds: list[Tokenizer]) -> None:
    row = Conversation(1, CHAT.messages[1:5], own_template=False)
    for tokenizer in kinds:
        dataset = build([row], tokenizer)
        style = PromptStyle.load("alpaca", tokenizer)
        eos = tokenizer.token_text(tokenizer.eos_id)
        assert trained_text(dataset, 0, tokenizer) in (f"21{eos}The quick fox.{eos}", f" 21{eos}The quick fox.{eos}")
        prompt = tokenizer.encode_prompt(style.chat(CHAT.messages[1:4]))
        assert dataset.ids(0)[: len(prompt)].tolist() == prompt


def test_raw_text_trains_every_token_once(kinds: list[Tokenizer]) -> None:
    text = "The quick brown fox. " * 40
    for tokenizer in kinds:
        whole = [*tokenizer.encode(text), tokenizer.eos_id]
        dataset = build([Document(1, text)], tokenizer, max_seq_length=16)
        assert dataset.lengths.max() == 16
        labels = [token for i in range(len(dataset)) for token in dataset.ids(i)[1:].tolist()]
        assert labels == whole[1:]
        assert dataset.counts.trained_tokens == len(whole) - 1
        assert set(dataset.rows.tolist()) == {1}


texts = st.text("ab \n\t#:é🦙<>/s|im_end0", max_size=30)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=12), st.sampled_from(["alpaca", "none", "chat"]))
def test_masks_whatever_the_text(kinds: list[Tokenizer], parts: list[tuple[str, str, str]], style: str) -> None:
    parts = [*parts, ("a question", "", "an answer")]  # at least one row has something to train: all masked is refused
    rows = [Instruction(i, *part) for i, part in enumerate(parts, start=1)]
    for tokenizer in kinds[: 1 if style == "chat" else 2]:
        made = PromptStyle.load(style, tokenizer)
        dataset = build(rows, tokenizer, style)
        for i, row in enumerate(rows):
            prompt = tokenizer.encode_prompt(made.prompt(row.instruction, row.input))
            assert dataset.ids(i)[: len(prompt)].tolist() == prompt
            assert not dataset.trained(i)[: len(prompt)].any()
            assert dataset.trained(i)[max(len(prompt), 1) :].all()
            assert dataset.ids(i)[-1] == tokenizer.eos_id


def test_prompts_found_by_their_tail_are_those_compared_in_full(
    material, kinds: list[Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load_rows("alpaca", material("alpaca/alpaca_5000.json"))[:400]
    rows += load_rows("lima", material("lima/lima.jsonl"), multiturn=True)[-60:]
    tokenizers = [*kinds, Tokenizer.load(material("tokenizer-llama2")), Tokenizer.load(material("stories260K-hf"))]
    for tokenizer in tokenizers:
        monkeypatch.setattr(boundaries, "_WORTH_IT", 2)
        quick = build(rows, tokenizer)
        monkeypatch.setattr(boundaries, "_WORTH_IT", 10**9)
        full = build(rows, tokenizer)
        assert np.array_equal(quick.flat_ids, full.flat_ids)
        assert np.array_equal(quick.flat_trained, full.flat_trained)
        assert quick.counts == full.counts


def test_llama2_lengths_are_the_published_ones(material) -> None:
    """13,354 rows gave a mean of 127.6 and a median of 111; a sample of 5,000 lies close by."""
    tokenizer = Tokenizer.load(material("tokenizer-llama2"))
    dataset = build(load_rows("alpaca", material("alpaca/alpaca_5000.json"))[:2000], tokenizer)
    assert np.all(dataset.flat_ids[dataset.offsets[:-1]] == 1)
    assert (dataset.flat_ids == 1).sum() == len(dataset)
    assert abs(dataset.lengths.mean() - 127.6) < 5
    assert abs(np.median(dataset.lengths) - 111) < 3


# The cache


def test_the_cache_gives_the_same_and_is_rebuilt_when_damaged(
    chat: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"use_cache": True, "cache_dir": tmp_path}
    first = build(ROWS, chat, **options)
    (path,) = tmp_path.iterdir()
    assert dataset_module.load(path).counts == first.counts
    assert np.array_equal(build(ROWS, chat, **options).flat_ids, first.flat_ids)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:200] + b"\xff" * 40 + whole[240:]):
        path.write_bytes(damaged)
        assert np.array_equal(build(ROWS, chat, **options).flat_ids, first.flat_ids)
        assert path.read_bytes() != damaged
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_is_found_by_content(chat: Tokenizer, llama: Tokenizer, tmp_path: Path) -> None:
    options = {"use_cache": True, "cache_dir": tmp_path}
    build(ROWS, chat, **options)
    build([*ROWS[:4], Instruction(5, "Line", "", "\n\nfoy")], chat, **options)
    build(ROWS, chat, "none", **options)
    build(ROWS, chat, mask_prompt=False, **options)
    build(ROWS, chat, max_seq_length=100, **options)
    build(ROWS, llama, **options)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_cache_that_cannot_be_written_is_done_without(chat: Tokenizer, tmp_path: Path) -> None:
    blocked = write(tmp_path / "file", "x")
    assert len(build(ROWS, chat, use_cache=True, cache_dir=blocked / "cache")) == len(ROWS)


# The split


@given(st.integers(2, 3000), st.one_of(st.floats(0.01, 0.49), st.just(0), st.just(1), st.none()), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_split_is_a_partition_that_the_seed_decides(n: int, val_split: float | None, seed: int) -> None:
    train, held = split(n, val_split, seed)
    assert sorted(train + held) == list(range(n))
    assert (train, held) == split(n, val_split, seed)


def test_split_sizes() -> None:
    assert len(split(52_000)[1]) == 2000
    assert len(split(1000)[1]) == 50
    assert len(split(2)[1]) == 1
    assert split(1) == ([0], [])
    assert len(split(1000, 0.1)[1]) == 100
    assert len(split(1000, 7)[1]) == 7
    assert split(1000, 0)[1] == []
    assert split(1000, 0.1, seed=1) != split(1000, 0.1, seed=2)


@pytest.mark.parametrize("wrong", [-1, 1.5, 10, 11])
def test_bad_splits_are_said(wrong: float) -> None:
    with pytest.raises(InputError, match="--val_split"):
        split(10, wrong)
