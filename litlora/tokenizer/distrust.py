"""Tokenizer files that others wrote, kept from the libraries where those would crash, or grow a text without bounds."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from litlora.checkpoint import read_json
from litlora.errors import InputError

PARTS = 50  # of a normalizer or a decoder; real ones have up to 10
GROWTH = 64  # ids or characters made of one character
AROUND = 16  # special tokens around a text
# every printable character of ASCII, since a table may make a page of one; and what is not ASCII
SAMPLE = "".join(map(chr, range(32, 127))) + "\n\tnaïve 🦙 ﷺ"


class Coder(Protocol):
    prefix: list[int]
    suffix: list[int]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...


class Refusals:
    """`with refusals:` turns whatever a library raises into an InputError that names its file."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (InputError, MemoryError)):
            return
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # Rust's, a BaseException
            raise InputError(self._what, where=self._path, got=str(error).split("\n")[0]) from error


def check_file(path: Path) -> None:
    """Raises InputError for a tokenizer.json whose table of characters is shorter than it says: reading one asks for
    as much memory as it says, and ends the process where there is not so much."""
    # the name may be written with escapes; other letters never are
    if not re.search(rb"recompiled|\\u00[4-7]", path.read_bytes()):
        return
    todo: list[Any] = [read_json(path)]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
            if "precompiled_charsmap" in value and not _is_table(value["precompiled_charsmap"]):
                raise InputError("tokenizer.json holds a damaged precompiled_charsmap", where=path)
        elif isinstance(value, list):
            todo += [item for item in value if isinstance(item, (dict, list))]


def _is_table(text: Any) -> bool:
    """Four bytes of length, a table of so many bytes, texts behind it."""
    try:
        table = base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        return False
    size = int.from_bytes(table[:4], "little")
    return len(table) >= 4 and not size % 4 and 4 + size <= len(table)


def check_parts(tokenizer: Any, path: Path) -> None:
    """Raises InputError for a normalizer or decoder that makes a long text of a short one, step after step."""
    for name in ("normalizer", "decoder"):
        part = getattr(tokenizer, name)
        parts = list(_flat(json.loads(part.__getstate__()))) if part is not None else []
        growth = 1.0
        for step in parts:
            growth *= _growth(step)
        if len(parts) > PARTS or growth > GROWTH:
            got = f"{len(parts)} steps, which make {growth:.3g} characters of one"
            raise InputError(f"a {name} that makes too much of a text", where=path, got=got, wanted=f"at most {GROWTH}")


def _flat(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    steps = part.get("normalizers") or part.get("decoders") if part.get("type") == "Sequence" else None
    if steps is None:
        yield part
    else:
        for step in steps:
            yield from _flat(step)


def _growth(step: dict[str, Any]) -> float:
    """Characters made of one, at most, by one step."""
    kind = step.get("type")
    if kind == "Replace":
        content, pattern = len(step["content"]), step["pattern"].get("String")
        return 1 + content if not pattern else max(1.0, content / len(pattern))
    if kind == "Prepend":
        return 1 + len(step["prepend"]) / 16
    # bytes as characters, of two bytes each; nothing replaced by a space
    return 2.0 if kind == "ByteLevel" or (kind in ("CTC", "BPEDecoder", "WordPiece") and "" in step.values()) else 1.0


def try_out(coder: Coder, path: Path) -> None:
    """Raises InputError for a tokenizer that cannot be used, or makes far too much of an ordinary text."""
    (ids,) = coder.encode_batch([SAMPLE])
    around = len(coder.prefix) + len(coder.suffix)
    text = coder.decode(ids[: 2 * len(SAMPLE)], False)
    if len(ids) > GROWTH * len(SAMPLE) or around > AROUND or len(text) > GROWTH * len(SAMPLE):
        got = f"{len(ids)} ids and {len(text)} characters again of {len(SAMPLE)}, {around} tokens around a text"
        raise InputError(f"{path.name} makes too much of a text", where=path, got=got)
