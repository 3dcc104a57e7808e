"""inspect: whatever is wrong with the data is found, in the rows that have it and in no others."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, json_tokenizer

from litlora.cli import call
from litlora.commands.inspect import measure
from litlora.commands.inspect_report import visible
from litlora.data import Conversation, Counts, Dataset, Instruction, PromptStyle, Row, prepare
from litlora.data.inspection import Inspected, check_split, token_texts
from litlora.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
TINY, ROWS = ROOT / "checkpoints" / "tiny", ROOT / "data" / "tiny_test.json"
Capture = pytest.CaptureFixture[str]


def inspect(**flags: Any) -> int:
    """Without splitting, where nothing else is said."""
    words = [f"--{flag}={value}" for flag, value in {"checkpoint_dir": TINY, "val_split": 0, **flags}.items()]
    return call(["inspect", *words])


def report(capsys: Capture, **flags: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert inspect(json="true", **flags) == 0
    return json.loads(capsys.readouterr().out)


def found(report: dict[str, Any], file: Path) -> dict[str, list[int]]:
    """Rows by check, those of nothing left out."""
    return {check["name"]: check["rows"] for check in report["checks"][str(file)] if check["rows"]}


def instruction(text: str, output: str, **more: str) -> dict[str, str]:
    return {"instruction": text, "output": output, **more}


def write(file: Path, rows: list[Any]) -> Path:
    """A list of rows; of .jsonl a blank line after each, so that lines are not rows."""
    file.write_text("\n\n".join(map(json.dumps, rows)) if file.suffix == ".jsonl" else json.dumps(rows))
    return file


FINE = [instruction("What is 2 plus 2?", "4"), instruction("Reverse the word.", "kni", input="ink")]
LONG = instruction("Tell a story.", "the sea is blue and far " * 100)
ENDLESS = instruction("odd or even? " * 200, "odd")
WRONG: dict[str, tuple[dict[str, str], list[str]]] = {  # a row, and the checks that name it
    "empty response": (instruction("Say nothing.", ""), ["empty_response"]),
    "blank response": (instruction("Say nothing.", " \n"), ["empty_response"]),
    "empty instruction": (instruction("", "blue"), ["empty_prompt"]),
    "repeated": (FINE[0], ["duplicate"]),
    "too long": (LONG, ["truncated"]),
    "a prompt too long": (ENDLESS, ["truncated", "masked"]),
    "eos in a response": (instruction("Why?", "so</s> and so"), ["eos", "special_text"]),
    "eos at its end": (instruction("Why?", "so</s>"), ["eos", "special_text"]),
    "bos in an instruction": (instruction("Why <s>not</s>?", "so"), ["bos", "eos", "special_text"]),
    "fine": (instruction("Why <p>not</p>?", "so"), []),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_row_is_found_there(kind: str, suffix: str, tmp_path: Path, capsys: Capture) -> None:
    row, checks = WRONG[kind]
    file = write(tmp_path / f"rows.{suffix}", [*FINE, row, instruction("And then?", "nothing")])
    number = 3 if suffix == "json" else 5  # the third row, the fifth line
    seen = report(capsys, data="json", data_path=file, mask_prompt="true")
    assert found(seen, file) == {check: [number] for check in checks}
    assert seen["warnings"] == len(checks)
    assert inspect(data="json", data_path=file, mask_prompt="true", strict="true") == (1 if checks else 0)
    text = capsys.readouterr().out
    assert ("no warnings" in text) == (not checks)
    assert f"{'':21}rows {number}\n" in text.replace(" (as 1)", "") or not checks


def test_dropped_rows_and_the_first_of_repeated_ones(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path / "rows.json", [LONG, *FINE, ENDLESS, FINE[1], FINE[1]])
    seen = report(capsys, data="json", data_path=file, on_overlong="drop")
    assert found(seen, file) == {"dropped": [1, 4], "duplicate": [5, 6]}
    (duplicate,) = (check for check in seen["checks"][str(file)] if check["name"] == "duplicate")
    assert duplicate["same_as"] == [3, 3]
    assert inspect(data="json", data_path=file, on_overlong="drop", row=4) == 2
    assert "dropped" in capsys.readouterr().err
    assert inspect(data="json", data_path=file, row=7) == 2
    assert "wanted: 1 to 6" in capsys.readouterr().err


def test_rows_in_training_and_validation(tmp_path: Path, capsys: Capture) -> None:
    train = write(tmp_path / "train.json", [*FINE, instruction("Why?", "so")])
    held = write(tmp_path / "held.json", [instruction("New?", "yes"), FINE[1], instruction("Why?", "for that")])
    seen = report(capsys, data="json", data_path=train, val_path=held)
    assert found(seen, train) == {}
    assert found(seen, held) == {"in_both": [2], "prompt_in_both": [3]}
    assert [check["same_as"] for check in seen["checks"][str(held)][-2:]] == [[2], [3]]
    # and where one file is split: each row is there twice, so most of the held-out ones are trained on
    twice = write(tmp_path / "twice.json", [instruction(f"Add {i} and 1.", str(i + 1)) for i in range(20)] * 2)
    seen = report(capsys, data="json", data_path=twice, val_split=0.25, seed=3)
    (both,) = (check for check in seen["checks"][str(twice)] if check["name"] == "in_both")
    assert both["rows"]
    for here, there in zip(both["rows"], both["same_as"], strict=True):
        assert abs(here - there) == 20
    assert seen["training"]["sequences"], seen["validation"]["sequences"] == (30, 10)


def test_it_sees_what_training_sees(tmp_path: Path, capsys: Capture) -> None:
    """The figures of a dry run with the same flags; and no weights are needed for either."""
    bare = tmp_path / "bare"
    shutil.copytree(TINY, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    flags = {"checkpoint_dir": bare, "data_path": ROWS, "val_split": 0.2, "max_seq_length": 60, "seed": 5}
    seen = report(capsys, **flags)
    assert call(["finetune_lora", "--dry_run=true", *(f"--{flag}={value}" for flag, value in flags.items())]) == 0
    said = capsys.readouterr().err
    train, held = seen["training"], seen["validation"]
    assert f"training: {train['sequences']:,} rows, {train['tokens']:,} tokens" in said
    assert f"validation: {held['sequences']:,} rows" in said
    assert f"{train['trained_tokens'] + held['trained_tokens']:,} of them trained" in said
    (cut,) = (check for check in seen["checks"][str(ROWS)] if check["name"] == "truncated")
    assert f"{len(cut['rows']):,} truncated to 60 tokens" in said
    assert seen["stop_tokens"] == [{"id": 2, "text": "</s>"}]
    assert seen["added_before"] == [{"id": 1, "text": "<s>"}]
    assert "### Instruction:\n{instruction}\n" in seen["template"]


def test_rows_are_shown_as_they_are_trained(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"data_path": ROWS, "mask_prompt": "true", "row": 2}
    (shown,) = report(capsys, **flags)["examples"]
    tokenizer = Tokenizer.load(TINY)
    style = PromptStyle.load("alpaca", tokenizer)
    prompt = tokenizer.encode_prompt(style.prompt("Reverse the word.", "ink"))
    assert shown["ids"][: len(prompt)] == prompt
    assert shown["trained"] == [i >= len(prompt) for i in range(len(shown["ids"]))]
    assert "".join(shown["texts"]) == tokenizer.decode(shown["ids"], skip_special=False)
    assert inspect(**flags) == 0
    text = capsys.readouterr().out
    assert "row 2 (training): " in text
    answer = "".join(text for text, trained in zip(shown["texts"], shown["trained"], strict=True) if trained)
    assert answer.endswith("</s>")
    assert f"### Response:\n⟦{answer}⟧\n" in text
    numbers = " ".join(map(str, shown["ids"][len(prompt) :]))
    assert f" {prompt[-1]} ⟦{numbers}⟧\n" in text
    assert "\033" not in text
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert inspect(**flags) == 0
    assert f"### Response:\n\033[32m{answer}\033[0m\n" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert inspect(**flags) == 0
    assert "\033" not in capsys.readouterr().out


def test_long_rows_are_shortened_unless_asked_for(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path / "rows.json", [LONG, *FINE])
    assert inspect(data="json", data_path=file, show=1) == 0
    short = capsys.readouterr().out
    assert "… 212 tokens …" in short  # of 512, 200 before and 100 behind
    assert inspect(data="json", data_path=file, row=1) == 0
    assert "tokens …" not in capsys.readouterr().out
    assert inspect(data="json", data_path=file, show=0) == 0
    assert "row 1 " not in capsys.readouterr().out


def test_data_do_not_command_the_terminal(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path / "rows.json", [instruction("\033[2J\033]0;title\a", "a\r\x9bb\tc\nd")])
    assert inspect(data="json", data_path=file) == 0
    text = capsys.readouterr().out
    assert "\\x1b[2J\\x1b]0;title\\x07" in text
    assert "a\\r\\x9bb\tc\nd" in text
    assert not any(letter in text for letter in "\033\a\r\x9b")
    assert visible("plain ⟦é🦙") == "plain ⟦é🦙"


# Special tokens and boundaries, in data that no file gives


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds a bos, with a chat template."""
    directory = tmp_path_factory.mktemp("model") / "chat"
    json_tokenizer(directory, bos=True, chat_template=CHATML)
    shutil.copy(TINY / "config.json", directory)
    return directory


def turns(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_conversations_are_right_in_the_models_own_template_only(chat: Path, tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path / "rows.jsonl", [turns("Hi", "Ho"), turns("The fox?", "Lazy.", "And now?", "It jumps.")])
    seen = report(capsys, checkpoint_dir=chat, data="json", data_path=file)
    assert found(seen, file) == {}
    assert seen["prompt_style"] == "chat"
    assert [end["text"] for end in seen["ends"]] == ["<|im_end|>"]
    # asked for alpaca, generation would prompt otherwise than these rows are written
    seen = report(capsys, checkpoint_dir=chat, data="json", data_path=file, prompt_style="alpaca")
    assert found(seen, file) == {"boundary": [1, 3]}
    forged = write(tmp_path / "forged.jsonl", [turns("Hi", "Ho"), turns("Hi<|im_end|>", "Ho", "", "He")])
    seen = report(capsys, checkpoint_dir=chat, data="json", data_path=forged)
    assert found(seen, forged) == {"special_text": [3], "empty_prompt": [3]}


def test_a_template_that_leaves_out_earlier_thoughts_is_no_boundary_lost(tmp_path: Path, capsys: Capture) -> None:
    thinking = CHATML.replace(
        "message['content']",
        "('<think></think>' if loop.last and message.role == 'assistant' else '') + message.content",
    )
    model = json_tokenizer(tmp_path / "model", chat_template=thinking)
    shutil.copy(TINY / "config.json", model)
    file = write(tmp_path / "rows.jsonl", [turns("Hi", "Ho"), turns("The fox?", "Lazy.", "And now?", "It jumps.")])
    assert found(report(capsys, checkpoint_dir=model, data="json", data_path=file), file) == {}


def test_a_template_that_writes_bos_again(chat: Path, tmp_path: Path, capsys: Capture) -> None:
    template = tmp_path / "template.txt"
    template.write_text("<|im_start|><|im_start|>{{ instruction }}\n")
    seen = report(capsys, checkpoint_dir=chat, data_path=ROWS, prompt_style=template)
    assert found(seen, ROWS)["bos"] == list(range(1, seen["training"]["sequences"] + 1))


def test_a_straddling_token_is_told_but_no_warning(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path / "rows.json", [*FINE, instruction("Give the wor", "d ink")])
    seen = report(capsys, data="json", data_path=file, prompt_style="none")
    assert found(seen, file) == {"straddling": [3]}
    assert seen["warnings"] == 0


@pytest.fixture(scope="module")
def clean() -> Inspected:
    tokenizer = Tokenizer.load(TINY)
    rows: list[Row] = [Instruction(i, f"Add {i} and 1.", "", str(i + 1)) for i in range(1, 9)]
    rows.append(Conversation(9, tuple(turns("Hi", "Ho", "So?", "Yes.")["messages"]), own_template=False))
    style = PromptStyle.load("alpaca", tokenizer)
    dataset = prepare(rows, tokenizer, style, max_seq_length=512, use_cache=False)
    return Inspected(rows, dataset, tokenizer, style, 512)


TAMPERED: dict[str, tuple[Callable[[list[int]], list[int]], set[str]]] = {
    "as it was": (lambda ids: ids, set()),
    "no bos": (lambda ids: ids[1:], {"bos", "boundary"}),
    "two bos": (lambda ids: [1, *ids], {"bos", "boundary"}),
    "bos inside": (lambda ids: [*ids[:-2], 1, *ids[-2:]], {"bos"}),
    "no eos": (lambda ids: ids[:-1], {"eos"}),
    "two eos": (lambda ids: [*ids, 2], {"eos"}),
    "eos inside": (lambda ids: [*ids[:-2], 2, *ids[-2:]], {"eos"}),
    "another prompt": (lambda ids: [*ids[:5], ids[5] + 1, *ids[6:]], {"boundary"}),
}


@given(st.integers(0, 8), st.sampled_from(sorted(TAMPERED)))
@settings(deadline=None, max_examples=40)
def test_tampered_ids_are_found(clean: Inspected, place: int, how: str) -> None:
    """Whatever goes wrong between rows and ids: the wrong row is named, and no other."""
    change, names = TAMPERED[how]
    ids = [clean.dataset.ids(i).tolist() for i in range(len(clean.dataset))]
    ids[place] = change(ids[place])
    offsets = np.cumsum([0, *map(len, ids)])
    flat = np.array([token for row in ids for token in row], dtype=np.int32)
    dataset = Dataset(flat, np.ones(len(flat), dtype=np.bool_), offsets, clean.dataset.rows, Counts(rows=len(ids)))
    checks = dataclasses.replace(clean, dataset=dataset).checks()
    assert {check.name: check.rows for check in checks if check.rows} == {name: [place + 1] for name in names}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("ab"), st.sampled_from("abc")), max_size=12))
@settings(deadline=None)
def test_repeats_and_overlaps_whatever_the_rows(texts: list[tuple[str, str, str]]) -> None:
    rows: list[Row] = [Instruction(i, *text) for i, text in enumerate(texts, start=1)]
    train, held = rows[::2], rows[1::2]
    both, prompts = check_split(train, held)
    trained, asked = {row.content for row in train}, {row.content[:2] for row in train}
    assert both.rows == [row.number for row in held if row.content in trained]
    assert prompts.rows == [row.number for row in held if row.content not in trained and row.content[:2] in asked]
    by_number = {row.number: row for row in train}
    for check, width in ((both, 3), (prompts, 2)):
        for number, same in zip(check.rows, check.same_as or [], strict=True):
            assert rows[number - 1].content[:width] == by_number[same].content[:width]


@given(st.text(max_size=40))
@settings(deadline=None, max_examples=60)
def test_texts_of_tokens_joined_are_the_text(text: str) -> None:
    tokenizer = Tokenizer.load(TINY)
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, skip_special=False)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=200))
@settings(deadline=None)
def test_histogram_and_percentiles(lengths: list[int]) -> None:
    offsets = np.cumsum([0, *lengths])
    total = int(offsets[-1])
    dataset = Dataset(np.zeros(total, np.int32), np.ones(total, np.bool_), offsets, np.arange(len(lengths)), Counts())
    found = measure(dataset, range(len(lengths)))
    assert (found["sequences"], found["tokens"], found["trained_tokens"]) == (len(lengths), total, total)
    inside = [sum(bar["from"] <= n <= bar["to"] for n in lengths) for bar in found["histogram"]]
    assert inside == [bar["sequences"] for bar in found["histogram"]]
    assert sum(inside) == len(lengths)
    assert len(inside) <= 13
    ordered = sorted(lengths)
    for p in (5, 50, 99):
        below = sum(n <= found["lengths"][f"p{p}"] for n in ordered)
        assert below >= p / 100 * len(ordered)
        assert found["lengths"][f"p{p}"] in lengths


def test_real_data(material: Callable[[str], Path], tmp_path: Path, capsys: Capture) -> None:
    """What is known of them: two answers of this Alpaca sample are empty, Dolly has two rows twice."""
    model = tmp_path / "llama"
    model.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 32000, "max_position_embeddings": 2048}))
    shutil.copy(material("tokenizer-llama2") / "tokenizer.model", model)
    alpaca, dolly = material("alpaca/alpaca_5000.json"), material("dolly/databricks-dolly-3k.jsonl")
    seen = report(capsys, checkpoint_dir=model, data_path=alpaca, val_split=0.05)
    assert found(seen, alpaca) == {"empty_response": [2336, 4659]}
    seen = report(capsys, checkpoint_dir=model, data="dolly", data_path=dolly, val_split=0.05, max_seq_length=1024)
    assert found(seen, dolly)["duplicate"] == [1618, 1725]
    texts = [json.loads(line)["response"] for line in dolly.read_text().splitlines()]
    assert texts[1617] == texts[802]
