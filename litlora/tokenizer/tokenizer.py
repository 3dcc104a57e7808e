"""The tokenizer of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from litlora.errors import InputError
from litlora.tokenizer.backends import Backend, JsonBackend, SentencePieceBackend
from litlora.tokenizer.boundaries import Bounded, encode_at
from litlora.tokenizer.chat import ChatTemplate
from litlora.tokenizer.files import TokenizerFiles
from litlora.tokenizer.stream import Stream

# Tokens that end a text or a turn wherever they are special tokens of the vocabulary.
_TURN_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end|>",
)


class Tokenizer:
    """Text to ids and back as the model's own tokenizer does it.

    tokenizer.json (library `tokenizers`) wins over tokenizer.model (sentencepiece). Special tokens around a text are
    those that the model's tokenizer adds; a text that already begins with bos does not get a second one.
    """

    def __init__(self, backend: Backend, files: TokenizerFiles, path: Path) -> None:
        self._backend = backend
        self._files = files
        self.path = path
        self.vocab_size = backend.size
        """Ids below this decode; those from here on are padding of the embedding and must never be sampled."""
        self.bos_id = self._named_id("bos", files.bos_id)
        self._eos_id = self._named_id("eos", next(iter(files.eos_ids), None))
        self.stop_ids = self._find_stop_ids()
        """Every id that ends a text or a turn, ascending."""
        self.chat_template = files.chat_template

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Raises InputError, naming the file, where it is missing or cannot be read."""
        directory = Path(directory)
        path = next((p for name in ("tokenizer.json", "tokenizer.model") if (p := directory / name).is_file()), None)
        if path is None:
            raise InputError(
                "no tokenizer found",
                where=directory,
                wanted="tokenizer.json or tokenizer.model",
                fix="download the whole model directory, tokenizer files included",
            )
        files = TokenizerFiles.read(directory)
        backend: Backend = JsonBackend(path) if path.name == "tokenizer.json" else SentencePieceBackend(path, files)
        return cls(backend, files, path)

    def _named_id(self, name: str, otherwise: int | None) -> int | None:
        default = {"bos": "<s>", "eos": "</s>"}[name] if self.path.name == "tokenizer.model" else None
        text = self._files.named.get(f"{name}_token", default)
        found = self._backend.id_of(text) if text is not None else None
        return found if found is not None else otherwise

    def _find_stop_ids(self) -> tuple[int, ...]:
        turns = (self._backend.id_of(token) for token in _TURN_ENDS)
        ids = {token_id for token_id in turns if token_id is not None and self._backend.is_special(token_id)}
        ids.update(self._files.eos_ids)
        if self._eos_id is not None:
            ids.add(self._eos_id)
        return tuple(sorted(ids))

    @property
    def prefix(self) -> list[int]:
        """The ids that the tokenizer puts before every text."""
        return self._backend.prefix

    @property
    def special_texts(self) -> tuple[str, ...]:
        """What is taken for a special token wherever a text has it."""
        return self._backend.hard

    @property
    def eos_id(self) -> int:
        """Raises InputError where no file of the model names an eos token."""
        if self._eos_id is None:
            raise InputError(
                "the tokenizer has no eos token",
                where=self.path.parent / "tokenizer_config.json",
                wanted='an "eos_token" of the vocabulary, or eos_token_id in config.json',
            )
        return self._eos_id

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the files that decide ids and chat prompts."""
        return self._files.fingerprint(self.path)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; `special`: with the tokens that the model's tokenizer puts around it."""
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        batch = self._backend.encode_batch(texts)
        if not special:
            return batch
        return [[*self.lead(ids), *ids, *self._backend.suffix] for ids in batch]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that the model shall continue: bos as the tokenizer adds it, but never an eos behind."""
        ids = self._backend.encode_batch([text])[0]
        return [*self.lead(ids), *ids]

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another one: no special tokens, no leading space of sentencepiece's."""
        return self._backend.encode_continuation(text)

    def encode_at(self, texts: Sequence[str], bounds: Sequence[Sequence[int]]) -> list[Bounded]:
        """Each text's ids without special tokens; for each bound how many of them are the ids of `text[:bound]` alone.

        None in place of a count: a token straddles the bound, or the beginning alone has other ids.
        """
        return encode_at(self._backend, texts, bounds)

    def lead(self, ids: Sequence[int]) -> list[int]:
        """What the tokenizer puts before these ids: nothing where they begin with it already (a template's bos)."""
        prefix = self._backend.prefix
        return [] if list(ids[: len(prefix)]) == prefix else prefix

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._backend.decode(ids, skip_special)

    def stream(self, prompt_ids: Sequence[int] = (), skip_special: bool = True) -> Stream:
        """Text of ids as they come; with `prompt_ids` it continues their text."""
        return Stream(self, prompt_ids, skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of one token given as its text, None where the vocabulary lacks it."""
        return self._backend.id_of(token)

    def token_text(self, token_id: int) -> str:
        """The text of one token, special ones too."""
        return self.decode([token_id], skip_special=False)

    @cached_property
    def _chat(self) -> ChatTemplate:
        if self.chat_template is None:
            raise InputError(
                "the model has no chat template",
                where=self.path.parent,
                wanted="chat_template in tokenizer_config.json, or chat_template.jinja",
                fix="a chat (instruct) model; rows that are no messages may take --prompt_style alpaca instead",
            )
        tokens: dict[str, Any] = dict(self._files.named)
        if self._files.extra_special:
            tokens["additional_special_tokens"] = list(self._files.extra_special)
        return ChatTemplate(self.chat_template, tokens, self.path.parent)

    def require_chat_template(self) -> None:
        """Raises InputError where the model has none, or one that is not valid."""
        _ = self._chat

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The text of [{"role": …, "content": …}, …] in the model's own format.

        Raises InputError where the model has no template or the template refuses the messages.
        """
        return self._chat.render(messages, add_generation_prompt)
