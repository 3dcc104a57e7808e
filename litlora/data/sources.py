"""Data files in the shapes people have them to rows: alpaca, lima, dolly, json, text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from litlora.checkpoint import refuse_links
from litlora.data.files import Table, read_table, read_text
from litlora.data.hub import HUB_FILES, fetch
from litlora.data.rows import Conversation, Document, Instruction, Row
from litlora.errors import InputError

_SHOWN = 5
_ENOUGH = 100_000  # rows that cannot be used, to read no further
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
}


class _RowError(Exception):
    """What is wrong with one row; rows are collected into one InputError."""


def load_rows(data: str, data_path: Path | str | None = None, multiturn: bool = False) -> list[Row]:
    """The rows of a data set.

    Args:
        data: alpaca, lima, dolly, json or text.
        data_path: the file; None fetches alpaca, lima or dolly from the hub. text also takes a directory of .txt.
        multiturn: lima: all turns of a conversation, not the first exchange only.

    Raises InputError: unknown name, no file, an empty or malformed one, rows that lack columns (the first few named).
    """
    if data not in _CONVERTERS:
        raise InputError("unknown data set", where="--data", got=data, wanted=", ".join(_CONVERTERS))
    if data_path is None:
        if data not in HUB_FILES:
            raise InputError(f"--data {data} needs a file", where="--data_path", fix="give it with --data_path FILE")
        data_path = fetch(data)
    path = Path(data_path)
    if data == "text" and path.suffix.lower() != ".jsonl":
        return _text_files(path)
    convert = partial(_lima, multiturn=multiturn) if data == "lima" else _CONVERTERS[data]
    return _convert(read_table(path), convert)


def _convert(table: Table, convert: Callable[[int, Mapping[str, Any]], Row]) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []  # the first few
    refused = 0
    for number, value in table.values:
        try:
            if not isinstance(value, dict):
                raise _RowError(f"is {_kind(value)}, not an object with named columns")
            rows.append(convert(number, value))
        except _RowError as error:
            refused += 1
            if refused <= _SHOWN:
                problems.append(f"{table.unit} {number} {error}")
            if refused == _ENOUGH:
                break
    if refused:
        more = f"\n          … and {refused - _SHOWN} more" if refused > _SHOWN else ""
        listed = "\n          ".join(problems)
        read = f"{'the first ' if refused == _ENOUGH else ''}{refused + len(rows)}"
        what = f"{refused} of {read} rows cannot be used"
        raise InputError(what, where=table.path, got=listed + more)
    return rows


def _kind(value: object) -> str:
    names = {"dict": "an object", "list": "a list", "str": "text", "NoneType": "null", "bool": "true/false"}
    return names.get(type(value).__name__, "a number")


def _text(value: Mapping[str, Any], column: str, optional: bool = False) -> str:
    """A column's text; an optional one may be missing, null or empty."""
    if column not in value:
        if optional:
            return ""
        present = ", ".join(map(str, value)) or "no columns"
        raise _RowError(f'lacks the column "{column}" (it has {present})')
    text = value[column]
    if text is None and optional:
        return ""
    if not isinstance(text, str):
        raise _RowError(f'has {_kind(text)} in the column "{column}", not text')
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, written as \ud83d
            raise _RowError(f'has broken Unicode in the column "{column}"') from error
    return text


def _alpaca(number: int, value: Mapping[str, Any]) -> Row:
    return Instruction(number, _text(value, "instruction"), _text(value, "input", True), _text(value, "output"))


def _dolly(number: int, value: Mapping[str, Any]) -> Row:
    return Instruction(number, _text(value, "instruction"), _text(value, "context", True), _text(value, "response"))


def _lima(number: int, value: Mapping[str, Any], multiturn: bool = False) -> Row:
    turns = value.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, str) for turn in turns):
        raise _RowError('lacks "conversations": a list of texts, user and assistant in turn')
    texts = [_text({"conversations": turn}, "conversations") for turn in turns]
    if not multiturn or len(texts) < 4:
        return Instruction(number, texts[0], "", texts[1])
    turns = texts[: len(texts) // 2 * 2]  # a last question without an answer has nothing to train
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(turns))
    return Conversation(number, messages, own_template=False)


def _json(number: int, value: Mapping[str, Any]) -> Row:
    """Alpaca's columns, or `messages` (role, content), or ShareGPT's `conversations` (from, value)."""
    if "messages" in value:
        return _conversation(number, value["messages"], "messages", "role", "content")
    if "conversations" in value:
        return _conversation(number, value["conversations"], "conversations", "from", "value")
    return _alpaca(number, value)


def _conversation(number: int, turns: object, column: str, who: str, what: str) -> Row:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _RowError(f'lacks a list of {{"{who}": …, "{what}": …}} in the column "{column}"')
    messages = []
    for position, turn in enumerate(turns, start=1):
        try:
            role, content = _text(turn, who), _text(turn, what)
        except _RowError as error:
            raise _RowError(f"turn {position} {error}") from error
        if column == "conversations":
            if role not in _ROLES:
                raise _RowError(f"turn {position} is from {role!r}; known are {', '.join(_ROLES)}")
            role = _ROLES[role]
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise _RowError("has no assistant turn, so nothing to train")
    return Conversation(number, tuple(messages))


def _document(number: int, value: Mapping[str, Any]) -> Row:
    return Document(number, _text(value, "text"))


def _text_files(path: Path) -> list[Row]:
    """A .txt file is one document (a blank line is only a paragraph's end); a directory is its .txt files by name."""
    if path.is_dir():
        refuse_links(path)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise InputError("no .txt file in the directory", where=path)
    if not path.is_dir() and path.exists() and path.suffix.lower() != ".txt":
        wanted = 'a .txt file, a directory of them, or a .jsonl file with "text"'
        raise InputError("this kind of text file is unknown", where=path, wanted=wanted)
    return [Document(number, read_text(file)) for number, file in enumerate(files, start=1)]


_CONVERTERS: dict[str, Callable[[int, Mapping[str, Any]], Row]] = {
    "alpaca": _alpaca,
    "lima": _lima,
    "dolly": _dolly,
    "json": _json,
    "text": _document,
}
