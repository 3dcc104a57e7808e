"""Markdown from text that nobody vouches for (paths, prompts, answers): it is shown as it is and starts nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# what turns the direction of text around, and so can make it look like another
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

_PLAIN = re.compile(r"""[\w .,:;?!'"%/+=()–‖Δ-]*""")
_NOT_PLAIN = re.compile(r"://|\bwww\.|^[-+]|^\d+[.)] |(?<!\w)_|_(?!\w)")  # a link, a list, italics


def printable(text: str, limit: int = 1000) -> str:
    """Text without control characters (a terminal's commands) and what turns its direction: they become U+FFFD. Line
    ends stay. At most `limit` characters of it."""
    text = re.sub(r"\r\n|[\r\v\f\x85\u2028\u2029]", "\n", text[: limit + 1]).replace("\t", " ")
    bad = (c != "\n" and (unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI) for c in text)
    text = "".join("\ufffd" if wrong else c for c, wrong in zip(text, bad, strict=True))
    return text if len(text) <= limit else text[:limit] + "…"


def clean(text: str, limit: int = 1000) -> str:
    """Printable text on one line: a line's end is ⏎."""
    return printable(text, limit).replace("\n", "⏎")


def code(text: str, limit: int = 1000) -> str:
    """A code span, which no character of the text can end."""
    text = clean(text, limit)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def block(text: str, language: str = "") -> str:
    """A fenced block, which no line of the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def inline(text: str, limit: int = 1000) -> str:
    """The text as it is where nothing in it means anything in Markdown, else a code span."""
    plain = _PLAIN.fullmatch(text) and not _NOT_PLAIN.search(text) and len(text) <= limit
    return text if plain else code(text, limit)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """A table of ready Markdown; the columns after the first are aligned to the right, or all to the left."""
    lines = [head, ["---", *["---" if left else "---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """A pipe is escaped; a backslash before it would escape the escape."""
    return text.replace("\\|", "\\ |").replace("|", "\\|")
