"""`litlora generate` and `litlora chat`: text, stop strings, files, errors, a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_family, make_peft_adapter

from litlora import answers as answering
from litlora.answers import Piece, StopStrings, answers, in_order
from litlora.checkpoint import Checkpoint
from litlora.cli import main
from litlora.commands import chat, models
from litlora.commands import generate as command
from litlora.commands.answers_file import AnswersFile
from litlora.commands.prompts import read_prompts
from litlora.config import ModelConfig
from litlora.data import PromptStyle
from litlora.decode import generate
from litlora.errors import InputError
from litlora.frozen import Dense
from litlora.load import Directory, load_model
from litlora.model import Decoder
from litlora.peft_format import RECORD, Adapter, Record, attach
from litlora.sampling import Sampling
from litlora.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>A:{% endif %}"
)
Litlora = Callable[..., tuple[int, str, str]]


def make_tokenizer(directory: Path, template: str | None = None) -> None:
    """Bytes as tokens, 259 ids: every id below them decodes, and characters are cut by tokens."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    made.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | ({"chat_template": template} if template else {})
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 272 ids, 13 of them padding, and 256 tokens of context."""
    directory = make_family(tmp_path_factory.mktemp("base"), "llama", vocab_size=272, hidden_size=64)
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template and room for a very long answer."""
    directory = tmp_path_factory.mktemp("chatty")
    make_family(directory, "llama", vocab_size=272, max_position_embeddings=100_000)
    make_tokenizer(directory, TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = [tmp_path_factory.mktemp("adapter") for _ in range(2)]
    for seed, directory in enumerate(made):
        make_peft_adapter(directory=directory, base=base, seed=seed, r=4 + seed)
    return made


@pytest.fixture
def litlora(capsys: pytest.CaptureFixture[str]) -> Litlora:
    """Runs a command line: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        code = stopped.value.code
        return code if isinstance(code, int) else 0, *capsys.readouterr()

    return call


def load(path: Path) -> tuple[Decoder, Tokenizer]:
    model = load_model(Directory.open(path), Dense(torch.float32), dtype=torch.float32, device="cpu").eval()
    return model, Tokenizer.load(path)


def text_of(loaded: tuple[Decoder, Tokenizer], ids: list[int], count: int, sampling: Sampling | None = None) -> str:
    """What an answer must be: ids through one decode."""
    model, tokenizer = loaded
    settings: dict[str, Any] = {"stop_ids": tokenizer.stop_ids, "vocab_size": tokenizer.vocab_size}
    new = [token for _, token in generate(model, [ids], sampling or Sampling(), max_new_tokens=count, **settings)]
    return tokenizer.decode(new)


def plain_part(text: str) -> str:
    """Two characters out of a random model's text, which is full of broken ones."""
    return next(part for i in range(3, len(text) - 1) if "\ufffd" not in (part := text[i : i + 2]))


# --- text ---


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one two three", ["two"], "one "),
        ("aaab, aab", ["aab"], "a"),
        ("abcabd", ["abd", "zz"], "abc"),
        ("x### Response:y", ["### Response:", "###"], "x"),
        ("no stop, only its beginning: ##", ["###"], "no stop, only its beginning: ##"),
        ("nothing", [], "nothing"),
        ("stop", ["stop"], ""),
    ],
)
def test_stop_strings_wherever_the_pieces_are_cut(text: str, stops: list[str], wanted: str) -> None:
    for cuts in range(2 ** min(len(text) - 1, 12)):
        pieces, start = [], 0
        for position in range(1, len(text)):
            if cuts >> (position - 1) & 1:
                pieces.append(text[start:position])
                start = position
        filter, shown = StopStrings(stops), ""
        for piece in [*pieces, text[start:]]:
            shown += filter.push(piece)
            assert wanted.startswith(shown), "what was shown is never taken back"
        assert shown + filter.flush() == wanted
        assert filter.found == (wanted != text)


def test_text_flows_as_soon_as_it_is_certain() -> None:
    filter = StopStrings(["END"])
    assert [filter.push(piece) for piece in ("a", "bE", "x", "EN", "E")] == ["a", "b", "Ex", "", "EN"]


def test_rows_of_a_batch_end_for_their_own_reasons(base: Path) -> None:
    """A stop token, a stop string, the length, the context; the text of each is that of the row alone."""
    model, tokenizer = load(base)
    prompts = [tokenizer.encode_prompt(text) for text in ("first", "second one", "third", "x" * 250)]
    full = [text_of((model, tokenizer), ids, 40) for ids in prompts]
    _, ids = zip(*generate(model, prompts[:1], Sampling(), max_new_tokens=40, stop_ids=()), strict=True)
    at = next(i for i in range(5, 40) if ids[i] not in ids[:i])
    stop = plain_part(full[1])
    tokenizer.stop_ids = (2, ids[at])
    found: dict[int, tuple[str, str | None, int]] = dict.fromkeys(range(4), ("", None, 0))
    for piece in answers(model, tokenizer, prompts, Sampling(), max_new_tokens=40, stop=[stop]):
        assert found[piece.row][1] is None, "nothing comes after a row's end"
        found[piece.row] = (found[piece.row][0] + piece.text, piece.end, piece.tokens)
    assert found[0] == (tokenizer.decode(ids[:at]), "stop", at + 1)
    assert found[1][:2] == (full[1][: full[1].index(stop)], "stop")
    assert found[2] == (full[2], "length", 40)
    assert found[3][1] in ("context", "stop")
    assert found[3][2] <= 6


def test_a_special_token_as_stop_string_is_met_by_its_id(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(base)
    tokens = iter([(0, 40), (0, 0)])
    monkeypatch.setattr(answering, "generate", lambda *_, stop_ids, **__: tokens if 0 in stop_ids else None)
    *_, last = answers(model, tokenizer, [[5]], Sampling(), max_new_tokens=9, stop=["<pad>"])
    assert (last.end, last.tokens) == ("stop", 2)


def test_in_order() -> None:
    pieces = [Piece(1, "b", 1), Piece(0, "a", 1), Piece(2, "c", 1, "stop"), Piece(0, "A", 2, "stop")]
    pieces.append(Piece(1, "B", 2, "stop"))
    source = iter(pieces)
    ordered = in_order(source, 3)
    assert next(ordered).text == "a"
    assert next(source).text == "c", "the first row came live"
    assert [piece.text for piece in in_order(pieces, 3)] == ["a", "A", "b", "B", "c"]


# --- generate ---


def test_text_to_stdout_all_else_to_stderr(base: Path, litlora: Litlora) -> None:
    loaded = load(base)
    code, out, err = litlora("generate", "--checkpoint_dir", base, "--prompt", "# a [b]", "--temperature", 0,
                             "--max_new_tokens", 30)  # fmt: skip
    assert code == 0
    assert out == text_of(loaded, loaded[1].encode_prompt("# a [b]"), 30) + "\n"
    assert re.search(
        r"^Time for inference: \d+\.\d\d sec total, \d+\.\d\d tokens/sec\nMemory used: \d+\.\d\d GB\n\Z", err, re.M
    )


def test_samples_differ_and_come_again(base: Path, litlora: Litlora) -> None:
    flags = ("generate", "--checkpoint_dir", base, "--prompt", "q", "--max_new_tokens", 20, "--temperature", 1,
             "--num_samples", 3)  # fmt: skip
    _, out, _ = litlora(*flags)
    assert litlora(*flags)[1] == out
    assert litlora(*flags, "--batch_size", 1)[1] == out, "not by their place in the batch"
    assert litlora(*flags, "--seed", 2)[1] != out
    first = litlora(*flags, "--num_samples", 1)[1]
    assert out.startswith(first)
    assert first not in out[len(first) :]


def test_prompt_file_to_jsonl(base: Path, litlora: Litlora, tmp_path: Path) -> None:
    loaded, style = load(base), "alpaca"
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "id": 7},
        {"prompt": "Say é"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "deep" / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n")
    flags = ("generate", "--checkpoint_dir", base, "--prompt_file", source, "--prompt_style", style, "--temperature", 0,
             "--max_new_tokens", 12, "--batch_size", 2, "--out_file", target)  # fmt: skip
    code, out, err = litlora(*flags)
    assert (code, out) == (0, "")
    assert "3 of 3 answers" in err
    found = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]]
    renderer = PromptStyle.load(style, loaded[1])
    prompts = [renderer.prompt("Add.", "1 and 2"), renderer.prompt("Say é"), renderer.prompt("Hi")]
    for row, given, prompt, asked in zip(found, rows, prompts, ("Add.", "Say é", "Hi"), strict=True):
        assert row["text"] == text_of(loaded, loaded[1].encode_prompt(prompt), 12)
        assert given.items() <= row.items()
        assert (row["prompt"], row["end"], row["tokens"]) == (asked, "length", 12)
    before = target.read_bytes()
    code, _, err = litlora(*flags)
    assert code == 2
    assert "exists" in err
    assert target.read_bytes() == before
    assert litlora(*flags, "--overwrite", "true")[0] == 0
    assert target.read_bytes() == before


def test_lines_of_text_and_stdin(base: Path, litlora: Litlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, source = load(base), tmp_path / "in.txt"
    source.write_text("one\n\ntwo\n")
    flags = ("generate", "--checkpoint_dir", base, "--temperature", 0, "--max_new_tokens", 9)
    texts = [text_of(loaded, loaded[1].encode_prompt(prompt), 9) for prompt in ("one", "two")]
    _, out, err = litlora(*flags, "--prompt_file", source)
    assert out == "".join(text + "\n" for text in texts)
    assert "[2/2] two" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\n"))
    assert litlora(*flags)[1] == texts[1] + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = litlora(*flags)
    assert code == 2
    assert "stdin is empty" in err


def test_an_empty_prompt_begins_from_bos(base: Path, litlora: Litlora) -> None:
    _, out, _ = litlora("generate", "--checkpoint_dir", base, "--prompt", "", "--temperature", 0, "--max_new_tokens", 9)
    assert out == text_of(load(base), [1], 9) + "\n"


def test_what_is_finished_is_kept_when_interrupted(
    base: Path, litlora: Litlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[Piece]:
        yield Piece(2, "third", 1, "stop")
        yield Piece(0, "fir", 1)
        yield Piece(0, "st", 2, "stop")
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "answers", broken)
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("a\nb\nc")
    code, _, err = litlora("generate", "--checkpoint_dir", base, "--prompt_file", source, "--out_file", target)
    assert code == 130
    assert "2 of 3" in err
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == [("a", "first"), ("c", "third")]


def test_an_interrupted_run_goes_on(
    base: Path, litlora: Litlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether by Ctrl-C or without a word: what is answered is not asked again, and the file is that of one run."""
    source, target, part = tmp_path / "in.txt", tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    source.write_text("\n".join("abcdef"))
    flags = ("generate", "--checkpoint_dir", base, "--prompt_file", source, "--temperature", 1, "--max_new_tokens", 12,
             "--num_samples", 2, "--batch_size", 4)  # fmt: skip
    assert litlora(*flags, "--out_file", tmp_path / "whole.jsonl")[0] == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    assert not list(tmp_path.glob("*.part"))
    real, asked = command.answers, []

    def broken(*arguments: Any, **settings: Any) -> Iterator[Piece]:
        asked.append(len(arguments[2]))
        for piece in real(*arguments, **settings):
            yield piece
            if piece.end and len(part.read_text().splitlines()) == 1 + 5 * len(asked):
                raise KeyboardInterrupt

    monkeypatch.setattr(command, "answers", broken)
    code, _, err = litlora(*flags, "--out_file", target)
    assert code == 130
    assert "5 of 12 answers" in err
    lines = target.read_text().splitlines()
    assert len(lines) == 5
    assert [line for line in whole.splitlines() if line in lines] == lines, "in order"
    target.unlink()  # as if the process had been killed, in the middle of a line
    part.write_text(part.read_text() + '{"number": 3, "li')
    for changed in (["--temperature", 0.9], ["--seed", 1], ["--stop", "x"]):
        before = part.read_bytes()
        code, _, err = litlora(*flags, "--out_file", target, *changed)
        assert code == 2
        assert re.search(rf"asked otherwise.*{changed[0][2:]} .*was", err, re.S)
        assert part.read_bytes() == before
    code, _, err = litlora(*flags, "--out_file", target)
    assert code == 130
    assert "going on: 5 of 12 answers" in err
    assert "10 of 12 answers" in err
    monkeypatch.setattr(command, "answers", lambda *a, **k: (asked.append(len(a[2])), real(*a, **k))[1])
    code, _, err = litlora(*flags, "--out_file", target)
    assert code == 0
    assert asked == [12, 7, 2]
    assert target.read_text() == whole
    assert not part.exists()
    assert litlora(*flags, "--out_file", target)[0] == 2, "finished is finished"


def test_other_prompts_or_a_damaged_file_are_not_gone_on_with(base: Path, litlora: Litlora, tmp_path: Path) -> None:
    source, target, part = tmp_path / "in.txt", tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    flags = ("generate", "--checkpoint_dir", base, "--prompt_file", source, "--out_file", target, "--max_new_tokens", 5)
    source.write_text("a\nb")
    assert litlora(*flags)[0] == 0
    whole = target.read_text()
    question = asked_of(base, source, litlora, tmp_path)
    for damage in (
        "",
        "no json\n",
        "{}\n",
        '{"asked": 3}\n',
        question + '{"number": "a", "line": "b"}\n',
        "[" * 9999 + "\n",
    ):
        part.write_text(damage)
        code, _, err = litlora(*flags)
        assert code == 2
        assert "not the unfinished answers" in err
        assert target.read_text() == whole
    part.write_text(question)
    source.write_text("a\nc")
    code, _, err = litlora(*flags)
    assert code == 2
    assert re.search(r"asked otherwise.*prompts", err, re.S)
    assert litlora(*flags, "--overwrite", "true")[0] == 0
    assert [json.loads(line)["prompt"] for line in target.read_text().splitlines()] == ["a", "c"]
    assert not part.exists()


def asked_of(base: Path, source: Path, litlora: Litlora, tmp_path: Path) -> str:
    """The first line of an unfinished file."""
    kept: list[str] = []
    finish = AnswersFile.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswersFile, "close", lambda self: (kept.append(self.part.read_text()), finish(self))[1])
        litlora("generate", "--checkpoint_dir", base, "--prompt_file", source, "--out_file", tmp_path / "other.jsonl",
                "--max_new_tokens", 5)  # fmt: skip
    return kept[0].split("\n")[0] + "\n"


def test_the_context_ends_the_answer_and_it_is_said_once(base: Path, litlora: Litlora, tmp_path: Path) -> None:
    source, target = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("x" * 250 + "\n" + "y" * 240)
    code, _, err = litlora("generate", "--checkpoint_dir", base, "--prompt_file", source, "--out_file", target,
                           "--max_new_tokens", 100, "--temperature", 0)  # fmt: skip
    assert code == 0
    assert err.count("context of 256") == 1
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["end"], row["tokens"]) for row in rows] == [("context", 6), ("context", 16)]


def test_stop_flags(base: Path, litlora: Litlora) -> None:
    flags = ("generate", "--checkpoint_dir", base, "--prompt", "q", "--temperature", 0, "--max_new_tokens", 100)
    full = litlora(*flags)[1][:-1]
    stop = plain_part(full)
    assert litlora(*flags, "--stop", "never, [this]", "--stop", stop)[1] == full[: full.index(stop)] + "\n"


def test_adapters_on_the_command_line(base: Path, adapters: list[Path], litlora: Litlora) -> None:
    loaded = load(base)
    opened = [Adapter.open(path, ModelConfig.load(base), Checkpoint(base)) for path in adapters]
    attach(loaded[0], opened, [0.7, -0.4])
    flags = ("generate", "--checkpoint_dir", base, "--prompt", "hello", "--temperature", 0, "--max_new_tokens", 20)
    with_adapters = ("--lora_path", adapters[0], "--lora_path", adapters[1], "--weights", "0.7,-0.4")
    found = litlora(*flags, *with_adapters)[1]
    assert found == text_of((loaded[0].eval(), loaded[1]), loaded[1].encode_prompt("hello"), 20) + "\n"
    assert found != litlora(*flags)[1]


def test_nf4_on_the_command_line(base: Path, litlora: Litlora) -> None:
    flags = ("generate", "--checkpoint_dir", base, "--prompt", "hello", "--temperature", 0, "--max_new_tokens", 20)
    code, out, _ = litlora(*flags, "--quantize", "bnb.nf4-dq", "--quantize_head", "true")
    assert code == 0
    assert out != litlora(*flags)[1]
    assert litlora(*flags, "--precision", "bf16-true")[0] == 0


def record_of(base: Path, **changes: Any) -> dict[str, Any]:
    values = {"base_name": "b", "base_fingerprint": Checkpoint(base).fingerprint, "quantize": None,
              "quantize_head": False, "precision": "32-true", "prompt_style": "alpaca", "prompt_template": None,
              "tokenizer_fingerprint": Tokenizer.load(base).fingerprint, "step": 1, "val_loss": None,
              "litlora_version": "0"}  # fmt: skip
    return asdict(Record(**{**values, **changes}))


def test_the_prompt_style_is_the_adapters_then_the_models(
    base: Path, chatty: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def style(path: Path, otherwise: str = "none", **flags: Any) -> str:
        return models.open_model(models.ModelArgs(path, **flags), otherwise=otherwise).style.prompt("Q")

    assert style(base) == "Q"
    assert style(chatty) == "<s>user:Q</s><s>A:"
    assert style(chatty, prompt_style="none") == "Q"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in adapters[0].iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    (adapter / RECORD).write_text(json.dumps(record_of(base, quantize="bnb.nf4")))
    capsys.readouterr()
    assert "### Instruction:\nQ" in style(base, lora_path=(adapter,))
    assert "trained on bnb.nf4" in capsys.readouterr().err
    template = record_of(base, prompt_style="my.txt", prompt_template="<{{ instruction }}>")
    (adapter / RECORD).write_text(json.dumps(template))
    assert style(base, lora_path=(adapter,)) == "<Q>"
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in base.iterdir():
        (merged / file.name).write_bytes(file.read_bytes())
    (merged / RECORD).write_text(json.dumps({"prompt_style": "alpaca", "prompt_template": None}))
    capsys.readouterr()
    assert "### Instruction:\nQ" in style(merged)
    assert f"(as {merged} was trained)" in capsys.readouterr().err
    (merged / RECORD).write_text(json.dumps({"prompt_style": None}))
    assert style(merged) == "Q"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "x" * 256], r"longer than the model's context.*--prompt.*256 tokens.*at most 255"),
        (["--prompt_file", "absent.txt"], r"prompt file does not exist.*absent\.txt"),
        (["--prompt_file", "bad.jsonl"], r"malformed JSON.*bad\.jsonl, line 2"),
        (["--prompt_file", "row.jsonl"], r"row that is no prompt.*row\.jsonl, line 1"),
        (["--prompt_file", "empty.txt"], r"empty"),
        (["--prompt", "x", "--prompt_file", "row.jsonl"], r"two sources"),
        (["--prompt", "x", "--prompt_style", "chta"], r"unknown prompt style.*chta.*alpaca"),
        (["--prompt", "x", "--prompt_style", "chat"], r"no chat template"),
        (["--prompt", "x", "--temperature", "-1"], r"--temperature.*-1"),
        (["--prompt", "x", "--top_p", "2"], r"--top_p"),
        (["--prompt", "x", "--max_new_tokens", "0"], r"--max_new_tokens"),
        (["--prompt", "x", "--num_samples", "0"], r"--num_samples"),
        (["--prompt", "x", "--precision", "17"], r"--precision.*17.*bf16-true"),
        (["--prompt", "x", "--quantize", "bnb.nf5"], r"--quantize.*bnb\.nf5.*bnb\.nf4"),
        (["--prompt", "x", "--stop", ""], r"empty stop string"),
        (["--prompt", "x", "--lora_path", "nowhere"], r"adapter_config\.json.*nowhere"),
        (["--prompt", "x", "--lora_path", "other"], r"adapter was trained on another base.*fingerprint"),
        (["--prompt", "x", "--weights", "1,2"], r"--weights.*2 weights, 0 adapters"),
        (["--prompt", "x", "--out_file", "row.jsonl/x"], r"cannot be written"),
        (["--prompt", "x", "--tempperature", "1"], r"did you mean --temperature"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_errors_come_before_the_weights_are_read(
    base: Path, adapters: list[Path], litlora: Litlora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    flags: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ')
    Path("row.jsonl").write_text('{"question": "a"}\n')
    Path("empty.txt").write_text("")
    Path("other").mkdir()
    for file in adapters[0].iterdir():
        (Path("other") / file.name).write_bytes(file.read_bytes())
    (Path("other") / RECORD).write_text(json.dumps(record_of(base, base_fingerprint="f" * 64)))
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    code, out, err = litlora("generate", "--checkpoint_dir", base, *flags)
    assert (code, out) == (2, "")
    assert re.search(message, err, re.S), err
    assert "Traceback" not in err


def test_messages_of_the_wrong_shape(tmp_path: Path) -> None:
    for messages in ("text", [{"role": "user"}], [{"role": "assistant", "content": "a"}], []):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
        with pytest.raises(InputError, match="messages"):
            read_prompts(None, "", tmp_path / "a.jsonl")


# --- chat ---


@pytest.fixture
def talk(litlora: Litlora, monkeypatch: pytest.MonkeyPatch) -> Litlora:
    """Runs chat with these lines on stdin: talk(lines, flags…)."""

    def call(lines: Sequence[str], *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return litlora("chat", "--temperature", 0, *flags)

    return call


def test_chat_remembers_until_reset(chatty: Path, talk: Litlora) -> None:
    loaded, count = load(chatty), 12
    code, out, err = talk(["Hi", "And?", "/reset", "Hi", "/exit", "never"], "--checkpoint_dir", chatty,
                          "--max_new_tokens", count, "--system", "Be brief.")  # fmt: skip
    system = "<s>system:Be brief.</s>"
    first = text_of(loaded, loaded[1].encode_prompt(f"{system}<s>user:Hi</s><s>A:"), count)
    history = f"{system}<s>user:Hi</s><s>assistant:{first}</s><s>user:And?</s><s>A:"
    second = text_of(loaded, loaded[1].encode_prompt(history), count)
    assert (code, out) == (0, f"{first}\n{second}\n{first}\n")
    assert first != second
    assert err.count("tokens/sec") == 3


def test_chat_without_a_template_takes_alpacas_form(base: Path, talk: Litlora) -> None:
    loaded = load(base)
    _, out, _ = talk(["Q"], "--checkpoint_dir", base, "--max_new_tokens", 9)
    prompt = PromptStyle.load("alpaca", loaded[1]).prompt("Q")
    assert out == text_of(loaded, loaded[1].encode_prompt(prompt), 9) + "\n"


def test_chat_leaves_out_the_oldest_turns(base: Path, talk: Litlora, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def answer(model: Decoder, tokenizer: Tokenizer, prompts: list[list[int]], *_: Any, **__: Any) -> Iterator[Piece]:
        seen.append(tokenizer.decode(prompts[0], skip_special=False))
        yield Piece(0, "yes", 1, "stop")

    monkeypatch.setattr(chat, "answers", answer)
    questions = ["a" * 80, "b" * 80, "c" * 80, "d" * 300, "e" * 80]
    code, out, err = talk(questions, "--checkpoint_dir", base, "--prompt_style", "none", "--max_new_tokens", 50,
                          "--system", "S")  # fmt: skip
    assert code == 0
    assert out == "yes\n" * 4
    assert seen[1] == "S\n\n" + "a" * 80 + "yes</s>" + "b" * 80
    assert seen[2] == "S\n\n" + "b" * 80 + "yes</s>" + "c" * 80
    assert seen[3] == "S\n\n" + "c" * 80 + "yes</s>" + "e" * 80, "a question that is too long alone is forgotten"
    assert err.count("oldest turns left out") == 2
    assert re.search(r"longer than the model's context\n  got: +30\d tokens", err)


def test_ctrl_c_stops_the_answer_not_the_program(chatty: Path, talk: Litlora, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []

    def interrupted(model: Decoder, _: Tokenizer, prompts: list[list[int]], *__: Any, **___: Any) -> Iterator[Piece]:
        calls.append(prompts[0])
        yield Piece(0, "part", 1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield Piece(0, ".", 2, "stop")

    monkeypatch.setattr(chat, "answers", interrupted)
    code, out, _ = talk(["one", "two"], "--checkpoint_dir", chatty)
    assert (code, out) == (0, "part…\npart.\n")
    assert "assistant:part</s>" in Tokenizer.load(chatty).decode(calls[1], skip_special=False)


def test_chat_in_a_terminal(chatty: Path) -> None:
    """A real one: a prompt, an answer that would take long, Ctrl-C, then Ctrl-D."""
    master, slave = pty.openpty()
    code = "import sys; from litlora.cli import main; main(sys.argv[1:])"
    flags = ["chat", "--checkpoint_dir", str(chatty), "--max_new_tokens", "90000", "--accelerator", "cpu"]
    environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags], stdin=slave, stdout=slave, stderr=slave, env=environment,
        start_new_session=True, preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    seen = b""

    def until(pattern: bytes, start: int = 0) -> int:
        nonlocal seen
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, seen[start:], re.S)):
            assert time.monotonic() < deadline, seen[-500:]
            try:
                seen += os.read(master, 65536)
            except OSError:  # how Linux says that the other side has closed
                assert re.search(pattern, seen[start:], re.S), seen[-500:]
        return start + found.end() if found else len(seen)

    try:
        position = until(rb"leaves, Ctrl-C.*?> ")
        os.write(master, b"hello\n")
        position = until(rb"hello.*?\n.{20}", position)
        os.write(master, b"\x03")
        position = until(rb"tokens/sec\].*?> ", position)
        os.write(master, b"\x04")
        until(rb"Memory used: \d+\.\d\d GB", position)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
