"""The two libraries behind a tokenizer, brought to one shape: `tokenizers` and `sentencepiece`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from litlora.errors import InputError
from litlora.tokenizer.files import AddedToken, TokenizerFiles

# A normalizer_spec with add_dummy_prefix = false. Appended to a serialized model it is merged into it, which is
# what protobuf does with a message given in two pieces.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# Encodings keep offsets and strings (about 100 bytes a token): so many texts at a time.
_CHUNK = 4096
_LONGEST_TAIL = 200
# What the special pieces are called where tokenizer_config.json does not say.
_SPECIAL_PIECES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# What a text is put behind to be tokenized as a continuation.
_ANCHORS = ("\n", "0", ":", "a", ".")


# A text's ids, and for each of its bounds how many ids stand before it.
Bounded = tuple[list[int], list[int | None]]


class Backend(Protocol):
    """What a tokenizer library gives. `prefix` and `suffix` are the ids that it puts around every text."""

    prefix: list[int]
    suffix: list[int]
    size: int  # the highest id that decodes, plus one

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without prefix and suffix; the text of special tokens becomes their ids."""

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that continues another: no space is put in front of it."""

    def encode_at(self, texts: Sequence[str], bounds: Sequence[Sequence[int]]) -> list[Bounded]:
        """Each text's ids, and for each bound how many of them are the ids of text[:bound] alone (None: no prefix)."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def is_special(self, token_id: int) -> bool: ...


def compare_prefixes(
    full: Sequence[list[int]], wanted: Sequence[tuple[int, str]], encode: Callable[[list[str]], list[list[int]]]
) -> list[int | None]:
    """For each (text number, its beginning): how many of the text's ids are those of the beginning alone, or None."""
    alone = encode([beginning for _, beginning in wanted])
    return [len(part) if full[i][: len(part)] == part else None for (i, _), part in zip(wanted, alone, strict=True)]


class JsonBackend:
    """tokenizer.json, through Hugging Face's `tokenizers`; its post-processor alone decides the special tokens.

    (transformers 5 ignores add_bos_token and add_eos_token of tokenizer_config.json where tokenizer.json is there.)
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError("tokenizer.json cannot be read", where=path, got=error) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.prefix, self.suffix = self._around()

    def _around(self) -> tuple[list[int], list[int]]:
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_continuation(self, text: str) -> list[int]:
        for anchor in _ANCHORS:
            lead = self._tokenizer.encode(anchor, add_special_tokens=False).ids
            ids = self._tokenizer.encode(anchor + text, add_special_tokens=False).ids
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_at(self, texts: Sequence[str], bounds: Sequence[Sequence[int]]) -> list[Bounded]:
        """One pass over the texts: the library tells at which token a bound lies, so that only the last line of what
        stands before it must be tokenized again to know that these ids are also those of the beginning alone.

        A tokenizer splits from left to right and looks ahead no further than the end of a run of like characters;
        merges on the left of a bound that no token crosses do not depend on the right. So equal ids over a tail that
        ends a run mean equal ids before it. Whatever is not that plain is compared in full.
        """
        result: list[Bounded] = []
        tails: dict[str, list[int]] = {}
        for start in range(0, len(texts), _CHUNK):
            chunk, at = texts[start : start + _CHUNK], bounds[start : start + _CHUNK]
            encodings = self._tokenizer.encode_batch(list(chunk), add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
            counts = [
                [self._plain_count(encoding, own, text, bound, tails) for bound in text_bounds]
                for encoding, own, text, text_bounds in zip(encodings, ids, chunk, at, strict=True)
            ]
            doubtful = [(i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count is None]
            wanted = [(i, chunk[i][: at[i][j]]) for i, j in doubtful]
            for (i, j), count in zip(doubtful, compare_prefixes(ids, wanted, self.encode_batch), strict=True):
                counts[i][j] = count
            result.extend(zip(ids, counts, strict=True))
        return result

    def _plain_count(
        self, encoding: Any, ids: list[int], text: str, bound: int, tails: dict[str, list[int]]
    ) -> int | None:
        """Tokens before the bound, where the tail before it shows that they are also the beginning's own; else None."""
        count = len(ids) if bound == len(text) else encoding.char_to_token(bound)
        if not count or (span := encoding.token_to_chars(count - 1)) is None or span[1] != bound:
            return None
        tail = _tail(text, bound)
        if tail not in tails:
            tails[tail] = self.encode_continuation(tail) if tail else []
        wanted = tails[tail]
        return count if wanted and ids[max(count - len(wanted), 0) : count] == wanted else None

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special


def _tail(text: str, bound: int) -> str:
    """The last line before the bound, long enough to end a run of like characters; empty where there is none."""
    tail = text[text.rfind("\n", 0, max(bound - 12, 0)) + 1 : bound]
    return tail if len(tail) < min(bound, _LONGEST_TAIL) and re.search(r"\w\W", tail) else ""


class SentencePieceBackend:
    """tokenizer.model, through sentencepiece; special tokens are split off first, as transformers' tokenizer does.

    Bos is added unless tokenizer_config.json's add_bos_token is false, eos only where add_eos_token is true. With
    `legacy` (the default) the text after a special token gets sentencepiece's leading space again.
    """

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, TypeError) as error:
            raise InputError("tokenizer.model is not a sentencepiece model", where=path, got=error) from error
        self._pieces = int(self._model.get_piece_size())
        self._legacy = bool(files.config.get("legacy", True))
        self._added = {token.content: token for token in self._special_pieces(files)}
        self._added.update({token.content: token for token in files.added})
        self._by_id = {token.id: token for token in self._added.values()}
        self.size = max([self._pieces, *(index + 1 for index in self._by_id)])
        longest_first = sorted(self._added, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        bos, eos = (self.id_of(files.named.get(name, _SPECIAL_PIECES[name])) for name in ("bos_token", "eos_token"))
        self.prefix = [bos] if bos is not None and files.config.get("add_bos_token", True) else []
        self.suffix = [eos] if eos is not None and files.config.get("add_eos_token", False) else []
        self._threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def _special_pieces(self, files: TokenizerFiles) -> Iterable[AddedToken]:
        names = {**_SPECIAL_PIECES, **files.named}
        for text in dict.fromkeys([*names.values(), *files.extra_special]):
            index = self._piece_id(text)
            if index is not None:
                yield AddedToken(index, text, special=True)

    @cached_property
    def _continuing(self) -> Any:
        """The same model without the leading space that sentencepiece puts before a text."""
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._model.serialized_model_proto() + _NO_DUMMY_PREFIX)

    def _piece_id(self, token: str) -> int | None:
        index = int(self._model.piece_to_id(token))
        return index if 0 <= index < self._pieces and self._model.id_to_piece(index) == token else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        together = "\0".join(texts)
        if not any(content in together for content in self._added):
            ids: list[list[int]] = self._model.encode(list(texts), num_threads=self._threads)
            return ids
        return [self._split_and_encode(text, self._model) for text in texts]

    def encode_continuation(self, text: str) -> list[int]:
        return self._split_and_encode(text, self._continuing)

    def _split_and_encode(self, text: str, first: Any) -> list[int]:
        ids: list[int] = []
        parts = self._splitter.split(text) if self._splitter else [text]
        for position, part in enumerate(parts):
            token = self._added.get(part) if position % 2 else None
            if token is not None:
                ids.append(token.id)
            elif part:
                later = self._model if self._legacy else self._continuing
                ids += (first if position == 0 else later).encode(part)
        return ids

    def encode_at(self, texts: Sequence[str], bounds: Sequence[Sequence[int]]) -> list[Bounded]:
        full = self.encode_batch(texts)
        wanted = [(i, texts[i][:bound]) for i, text_bounds in enumerate(bounds) for bound in text_bounds]
        counts = iter(compare_prefixes(full, wanted, self.encode_batch))
        return [(ids, [next(counts) for _ in text_bounds]) for ids, text_bounds in zip(full, bounds, strict=True)]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        out: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            token = self._by_id.get(index)
            if token is None:
                run.append(index)
            elif not (token.special and skip_special):
                out += [self._decode_run(run, first=not out), token.content]
                run = []
        return "".join([*out, self._decode_run(run, first=not out)])

    def _decode_run(self, run: list[int], first: bool) -> str:
        text: str = (self._model if first or self._legacy else self._continuing).decode(run) if run else ""
        return text

    def id_of(self, token: str) -> int | None:
        added = self._added.get(token)
        return added.id if added is not None else self._piece_id(token)

    def is_special(self, token_id: int) -> bool:
        token = self._by_id.get(token_id)
        if token is not None:
            return token.special
        return token_id < self._pieces and bool(self._model.is_control(token_id))
