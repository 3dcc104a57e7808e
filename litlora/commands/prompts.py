"""Prompts from flags, files and stdin."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litlora.data import PromptStyle
from litlora.data.files import read_table, read_text
from litlora.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """What a user asks. `row`: all fields of a file's row; `where` names it in messages."""

    where: str
    instruction: str
    input: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)

    def render(self, style: PromptStyle) -> str:
        """The text for the model. Raises InputError where it is no Unicode: bytes of a command line that are not
        UTF-8, half a surrogate pair in JSON."""
        text = style.chat(self.messages) if self.messages else style.prompt(self.instruction, self.input)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("a prompt with broken Unicode", where=self.where, got=ascii(error.object)[:80]) from None
        return text


def read_prompts(prompt: str | None, input: str, file: Path | None) -> list[Prompt]:
    """From --prompt, else --prompt_file, else stdin. Raises InputError: none, more than one, a bad file."""
    if prompt is not None and file is not None:
        raise InputError("two sources of prompts", got="--prompt and --prompt_file", wanted="one of them")
    if file is not None and input:
        raise InputError("--input goes with --prompt", got="--input and --prompt_file", fix='an "input" in each row')
    if file is not None:
        return _read_file(file)
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("no prompt", wanted="--prompt, --prompt_file, or text on stdin")
        try:
            prompt = sys.stdin.read().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError("stdin is not UTF-8 text", got=error) from None
        if not prompt:
            raise InputError("no prompt: stdin is empty", wanted="--prompt, --prompt_file, or text on stdin")
        return [Prompt("stdin", prompt, input)]
    return [Prompt("--prompt", prompt, input)]


def _read_file(file: Path) -> list[Prompt]:
    if not file.is_file():
        what = "the prompt file is a directory" if file.is_dir() else "the prompt file does not exist"
        raise InputError(what, where=file, fix="check --prompt_file")
    suffix = file.suffix.lower()
    if suffix == ".txt":
        lines = enumerate(read_text(file).split("\n"), start=1)
        return [Prompt(f"{file}, line {n}", text.rstrip("\r")) for n, text in lines if text.strip()]
    if suffix not in (".jsonl", ".json", ".csv"):
        wanted = ".txt (a prompt a line), .jsonl, .json or .csv"
        raise InputError("this kind of prompt file is unknown", where=file, wanted=wanted)
    table = read_table(file)
    return [_of_row(value, f"{file}, {table.unit} {number}") for number, value in table.values]


def _of_row(row: Any, where: str) -> Prompt:
    """A row with `messages`, or `instruction` (and `input`), or `prompt`, or a bare text."""
    if isinstance(row, str):
        return Prompt(where, row)
    wanted = 'an object with "prompt", "instruction" (and "input"), or "messages"'
    if not isinstance(row, dict):
        raise InputError("a row that is no prompt", where=where, got=type(row).__name__, wanted=wanted)
    if row.get("messages") is not None:
        return _of_messages(row, where)
    column = next((name for name in ("instruction", "prompt") if row.get(name) is not None), None)
    if column is None:
        raise InputError("a row that is no prompt", where=where, got=", ".join(map(str, row)) or "{}", wanted=wanted)
    text, extra = row[column], row.get("input") or ""
    for name, value in ((column, text), ("input", extra)):
        if not isinstance(value, str):
            raise InputError("a row's field is no text", where=f"{where}: {name}", got=type(value).__name__)
    return Prompt(where, text, extra, row=row)


def _of_messages(row: dict[str, Any], where: str) -> Prompt:
    """A conversation; closing assistant turns are the reference answer of a training row and not shown to the model."""
    messages = row["messages"]
    fine = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not fine:
        wanted = '[{"role": "user", "content": "…"}, …]'
        raise InputError("messages of the wrong shape", where=where, got=repr(messages)[:80], wanted=wanted)
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end or messages[end - 1]["role"] == "system":
        raise InputError("messages without a question", where=where, wanted="a user's turn to answer")
    turns = tuple(messages[:end])
    return Prompt(where, turns[-1]["content"], messages=turns, row=row)
