"""Markdown from text that nobody vouches for (paths, prompts, answers): it is shown as it is and starts nothing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# what turns the direction of text around, and so can make it look like another
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean(text: str, limit: int = 1000) -> str:
    """One line of printable text: control characters (a terminal's commands) become U+FFFD, line ends ⏎; at most
    `limit` characters of it."""
    text = text[: limit + 1]
    text = re.sub(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", "⏎", text).replace("\t", " ")
    text = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in text)
    return text if len(text) <= limit else text[:limit] + "…"


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


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of ready Markdown; the columns after the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
