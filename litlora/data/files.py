"""Data files to Python values, each with its row or line number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.errors import InputError


@dataclass(frozen=True)
class Table:
    """`values` are (number, value), given once and made as they are asked for: a file of short rows would be many times
    its size in memory. `unit` says whether numbers count rows of a JSON list or lines of the file."""

    path: Path
    unit: str
    values: Iterable[tuple[int, Any]]


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises InputError: missing, a directory, empty, not UTF-8."""
    if not path.is_file():
        what = "the data file is a directory" if path.is_dir() else "the data file does not exist"
        raise InputError(what, where=path, fix="check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("the data file is not UTF-8 text", where=f"{path}, byte {error.start}") from error
    except OSError as error:
        raise InputError("the data file cannot be read", where=path, got=error) from error
    if not text.strip():
        raise InputError("the data file is empty", where=path)
    return text


def read_table(path: Path) -> Table:
    """A .json (a list of rows), .jsonl (a row a line) or .csv file (a header, then rows).

    Raises InputError, with the line, where the file is malformed; its values may raise it later.
    """
    suffix = path.suffix.lower()
    if path.is_file() and suffix not in (".json", ".jsonl", ".csv"):
        raise InputError("this kind of data file is unknown", where=path, wanted="a .json, .jsonl or .csv file")
    text = read_text(path)
    if suffix == ".csv":
        return Table(path, "line", _csv(path, text))
    # JSON lines under the name .json are common: what the file begins with decides.
    if suffix == ".json" and (text.lstrip().startswith("[") or _is_one_value(text)):
        return _json(path, text)
    return Table(path, "line", _json_lines(path, text))


def _is_one_value(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    # A single line that is one object is a file of JSON lines with one row.
    return "\n" in text.strip()


def _json(path: Path, text: str) -> Table:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError("malformed JSON", where=f"{path}{line}", got=error) from error
    if not isinstance(value, list):
        raise InputError("the data file is not a list of rows", where=path, got=type(value).__name__, wanted="[{…}, …]")
    if not value:
        raise InputError("the data file has no rows", where=path)
    return Table(path, "row", enumerate(value, start=1))


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Only \n ends a line here: others stand inside strings (U+2028 and the like).
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            wanted = "one JSON value a line"
            # the error counts lines within this one
            got = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise InputError("malformed JSON", where=f"{path}, line {number}", got=got, wanted=wanted) from error
        yield number, value


def _csv(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses an answer of more than 131,072 characters
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    found = False
    line = 1
    try:
        for cells in reader:
            if not cells:
                pass
            elif not header:
                header = [name.strip() for name in cells]
            elif len(cells) != len(header):
                got, wanted = f"{len(cells)} cells", f"{len(header)}: {', '.join(header)}"
                raise InputError("malformed CSV", where=f"{path}, line {line}", got=got, wanted=wanted)
            else:
                found = True
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError("malformed CSV", where=f"{path}, line {line}", got=error) from error
    if not found:
        raise InputError("the data file has no rows", where=path)
