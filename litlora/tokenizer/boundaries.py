"""Where the ids of a text's beginning end among the ids of the whole text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

# A text's ids, and for each of its bounds how many ids stand before it.
Bounded = tuple[list[int], list[int | None]]

_SHORTEST_TAIL, _LONGEST_TAIL = 12, 200
_WORTH_IT = 8  # bounds with the same tail


class Encoder(Protocol):
    hard: tuple[str, ...]  # special tokens, at which every text is split before anything else

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_continuation(self, text: str) -> list[int]: ...


def encode_at(encoder: Encoder, texts: Sequence[str], bounds: Sequence[Sequence[int]]) -> list[Bounded]:
    """Each text's ids, and for each bound how many of them are the ids of `text[:bound]` alone (None: no prefix).

    Prompts of one style end alike ("### Response:" and a newline). Where the ids of that tail stand in the text's ids,
    they have the tail's own borders, and everything before them is what it would be without what follows: merges on
    the left of a border that no token crosses do not depend on the right, and splitting into words goes from left to
    right and looks ahead no further than to the end of a run of like characters, which the tail holds. So prompts are
    not tokenized a second time, except where the tail is not found so plainly: these are compared in full.
    """
    ids = encoder.encode_batch(texts)
    counts: list[list[int | None]] = [[None] * len(own) for own in bounds]
    by_tail: dict[str, list[tuple[int, int]]] = defaultdict(list)
    together = "\0".join(texts)
    hard = [token for token in encoder.hard if token in together]
    special = re.compile("|".join(map(re.escape, hard))) if hard else None
    for i, (text, own) in enumerate(zip(texts, bounds, strict=True)):
        for j, bound in enumerate(own):
            by_tail[_tail(text, bound, special, hard)].append((i, j))
    doubtful: list[tuple[int, int]] = []
    for tail, places in by_tail.items():
        plain = len(places) >= _WORTH_IT and (tail in hard or _is_plain(tail))
        wanted = encoder.encode_continuation(tail) if plain else []
        for i, j in places:
            counts[i][j] = _ids_before(texts[i], bounds[i][j], tail, ids[i], wanted) if wanted else None
            if counts[i][j] is None:
                doubtful.append((i, j))
    alone = encoder.encode_batch([texts[i][: bounds[i][j]] for i, j in doubtful])
    for (i, j), part in zip(doubtful, alone, strict=True):
        counts[i][j] = len(part) if ids[i][: len(part)] == part else None
    return list(zip(ids, counts, strict=True))


def _tail(text: str, bound: int, special: re.Pattern[str] | None, hard: Iterable[str]) -> str:
    """The end of `text[:bound]` from its last line or special token on; "" where nothing plain is there."""
    window = text[max(0, bound - _LONGEST_TAIL) : bound]
    if special is not None:
        ending = next((token for token in hard if window.endswith(token)), "")
        if ending:
            return ending
    latest = max(len(window) - _SHORTEST_TAIL, 0)
    cut = window.rfind("\n", 0, latest) + 1
    if special is not None:
        cut = max([cut, *(match.start() for match in special.finditer(window) if match.start() <= latest)])
    return window[cut:] if cut else ""


def _is_plain(tail: str) -> bool:
    """A word and what ends it (no run of like characters reaches from before the tail to behind it), and no overlap
    with itself (which could be counted in two ways)."""
    overlaps = any(tail.startswith(tail[k:]) for k in range(1, len(tail)))
    return re.search(r"\w\W", tail) is not None and not overlaps


def _ids_before(text: str, bound: int, tail: str, ids: list[int], wanted: list[int]) -> int | None:
    """How many ids stand before the bound, where the tail is found in the ids as often as in the text; else None."""
    ends = []
    position, size = 0, len(wanted)
    while True:
        try:
            position = ids.index(wanted[0], position)
        except ValueError:
            break
        if ids[position : position + size] == wanted:
            position += size
            ends.append(position)
        else:
            position += 1
    return ends[text.count(tail, 0, bound) - 1] if ends and len(ends) == text.count(tail) else None
