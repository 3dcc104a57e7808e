"""Ids to text while they come, one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

# A character is at most four byte tokens; a longer run of undecodable ones is not the beginning of a character.
_LONGEST_HELD = 16
_CONTEXT = 8
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    def decode(self, ids: list[int], skip_special: bool = True) -> str: ...


class Stream:
    """Text of ids as they come; the pieces joined are `decode` of all ids.

    Text is returned once it is final: half a character is held back until its other bytes arrive. With `prompt_ids`
    the text continues that of the prompt (its leading space is kept), without it begins like a decoded text.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Iterable[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # Decoding a short window of ids is enough, and each step costs the same however long the text is.
        self._window = list(prompt_ids)[-_CONTEXT:]
        self._read = len(self._window)
        self._done = self._decode(self._window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)

    def push(self, token_id: int) -> str:
        """Add one id; the text that is final now, maybe empty."""
        self._window.append(int(token_id))
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE) and len(self._window) - self._read < _LONGEST_HELD:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is still held, at the end."""
        return self._emit(self._decode(self._window))

    def _emit(self, text: str) -> str:
        new = text[len(self._done) :]
        if new:
            # The window now begins with the ids just emitted: what comes next is decoded with these before it.
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._done = self._decode(self._window)
        return new
