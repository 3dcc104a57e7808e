"""The two libraries behind a tokenizer, brought to one shape: `tokenizers` and `sentencepiece`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from litlora.tokenizer.distrust import Refusals, check_file, check_parts, try_out
from litlora.tokenizer.files import AddedToken, TokenizerFiles

# A normalizer_spec with add_dummy_prefix = false. Appended to a serialized model it is merged into it, which is
# what protobuf does with a message given in two pieces.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
# The library's encodings keep more than ids: so many texts at a time.
_CHUNK = 4096
# What the special pieces are called where tokenizer_config.json does not say.
_SPECIAL_PIECES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# What a text is put behind to be tokenized as a continuation.
_ANCHORS = ("\n", "0", ":", "a", ".")


class Backend(Protocol):
    """What a tokenizer library gives. `prefix` and `suffix` are the ids that it puts around every text."""

    prefix: list[int]
    suffix: list[int]
    size: int  # the highest id that decodes, plus one
    hard: tuple[str, ...]  # special tokens, at which every text is split before anything else

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without prefix and suffix; the text of special tokens becomes their ids."""

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that continues another: no space is put in front of it."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def is_special(self, token_id: int) -> bool: ...


class JsonBackend:
    """tokenizer.json, through Hugging Face's `tokenizers`; its post-processor alone decides the special tokens.

    (transformers 5 ignores add_bos_token and add_eos_token of tokenizer_config.json where tokenizer.json is there.)
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        check_file(path)
        self._refusals = Refusals(path, "tokenizer.json cannot be read")
        with self._refusals:
            self._tokenizer = Tokenizer.from_file(str(path))
            check_parts(self._tokenizer, path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        # Those that take in the spaces beside them, or hold only as whole words, are no plain borders.
        plain = [token for token in added.values() if not (token.lstrip or token.rstrip or token.single_word)]
        self.hard = tuple(token.content for token in plain if token.special and not token.normalized)
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        with self._refusals:
            self.prefix, self.suffix = self._around()
        try_out(self, path)

    def _around(self) -> tuple[list[int], list[int]]:
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        for start in range(0, len(texts), _CHUNK):
            with self._refusals:
                found = self._tokenizer.encode_batch_fast(list(texts[start : start + _CHUNK]), add_special_tokens=False)
            ids += [encoding.ids for encoding in found]
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        for anchor in _ANCHORS:
            lead, ids = self.encode_batch([anchor, anchor + text])
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        with self._refusals:
            text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special


class SentencePieceBackend:
    """tokenizer.model, through sentencepiece; special tokens are split off first, as transformers' tokenizer does.

    Bos is added unless tokenizer_config.json's add_bos_token is false, eos only where add_eos_token is true. With
    `legacy` (the default) the text after a special token gets sentencepiece's leading space again.
    """

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        from sentencepiece import SentencePieceProcessor

        self._refusals = Refusals(path, "not a sentencepiece model")
        with self._refusals:
            self._model = SentencePieceProcessor(model_file=str(path))
        self._pieces = int(self._model.get_piece_size())
        self._legacy = bool(files.config.get("legacy", True))
        self._added = {token.content: token for token in self._special_pieces(files)}
        self._added.update({token.content: token for token in files.added})
        self._by_id = {token.id: token for token in self._added.values()}
        self.size = max([self._pieces, *(index + 1 for index in self._by_id)])
        longest_first = sorted(self._added, key=len, reverse=True)
        self.hard = tuple(longest_first)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        bos, eos = (self.id_of(files.named.get(name, _SPECIAL_PIECES[name])) for name in ("bos_token", "eos_token"))
        self.prefix = [bos] if bos is not None and files.config.get("add_bos_token", True) else []
        self.suffix = [eos] if eos is not None and files.config.get("add_eos_token", False) else []
        self._threads: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        try_out(self, path)

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
            with self._refusals:
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
                with self._refusals:
                    ids += (first if position == 0 else later).encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        out: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            token = self._by_id.get(index)
            if token is None:
                run += [index] if 0 <= index < self._pieces else []
            elif not (token.special and skip_special):
                out += [self._decode_run(run, first=not out), token.content]
                run = []
        return "".join([*out, self._decode_run(run, first=not out)])

    def _decode_run(self, run: list[int], first: bool) -> str:
        with self._refusals:
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
