"""What the files beside a tokenizer say: named tokens, added tokens, the chat template, the turn ends."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litlora.checkpoint import read_json
from litlora.errors import InputError

# The files that decide what ids a text becomes; their bytes are the tokenizer's fingerprint.
_FINGERPRINTED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that text is split on before the model behind the tokenizer sees it."""

    id: int
    content: str
    special: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """The small JSON files of a Hugging Face directory, read once.

    `named` maps bos_token, eos_token, … to their text; `eos_ids` are the eos ids of generation_config.json and
    config.json, in this order.
    """

    directory: Path
    config: dict[str, Any]
    named: dict[str, str]
    added: tuple[AddedToken, ...]
    chat_template: str | None
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    extra_special: tuple[str, ...] = field(default=())

    @classmethod
    def read(cls, directory: Path) -> TokenizerFiles:
        """Raises InputError, naming the file, where one is there and is not a JSON object, or not of its shape."""
        try:
            return cls._read(directory)
        except InputError:
            raise
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            where = f"tokenizer_config.json, added_tokens.json or generation_config.json in {directory}"
            raise InputError("tokenizer settings of the wrong shape", where=where, got=error) from error

    @classmethod
    def _read(cls, directory: Path) -> TokenizerFiles:
        config = _read_object(directory / "tokenizer_config.json")
        special_map = _read_object(directory / "special_tokens_map.json")
        both = {**special_map, **{key: value for key, value in config.items() if value is not None}}
        generation, model = (_read_object(directory / name) for name in ("generation_config.json", "config.json"))
        extra = both.get("extra_special_tokens") or both.get("additional_special_tokens") or ()
        bos = next(iter(_ids(generation.get("bos_token_id")) + _ids(model.get("bos_token_id"))), None)
        return cls(
            directory=directory,
            config=config,
            named={name: text for name in _NAMED if (text := _content(both.get(name))) is not None},
            added=_added_tokens(directory, config),
            chat_template=_chat_template(directory, config),
            eos_ids=tuple(dict.fromkeys(_ids(generation.get("eos_token_id")) + _ids(model.get("eos_token_id")))),
            bos_id=bos,
            extra_special=tuple(text for item in extra if (text := _content(item)) is not None),
        )

    def fingerprint(self, vocabulary: Path) -> str:
        """Sha256 (hex) over the vocabulary file and the small files that change what ids or prompts come out."""
        digest = hashlib.sha256()
        for path in (vocabulary, *(self.directory / name for name in _FINGERPRINTED)):
            if path.is_file():
                content = path.read_bytes()
                digest.update(f"{path.name}\0{len(content)}\0".encode())
                digest.update(content)
        return digest.hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A token is written as its text or as an object holding it."""
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str) or not token:
        return None
    token.encode()  # half a surrogate pair is a ValueError here
    return token


def _ids(value: Any) -> list[int]:
    """Token ids; below 0 means none."""
    values = value if isinstance(value, list) else [value]
    return [_id(item) for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0]


def _id(value: int | str) -> int:
    index = int(value)
    if not 0 <= index < 2**31:
        raise ValueError(f"token id {index}")
    return index


def _added_tokens(directory: Path, config: dict[str, Any]) -> tuple[AddedToken, ...]:
    added: dict[int, AddedToken] = {}
    mentioned = _mentioned(config)
    for content, index in _read_object(directory / "added_tokens.json").items():
        if (text := _content(content)) is not None:
            added[_id(index)] = AddedToken(_id(index), text, special=text in mentioned)
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if (text := _content(token)) is not None:
            added[_id(key)] = AddedToken(_id(key), text, bool(token.get("special", False)))
    return tuple(added[index] for index in sorted(added))


def _mentioned(config: dict[str, Any]) -> set[str]:
    named = [_content(config.get(name)) for name in _NAMED]
    listed = [_content(item) for item in config.get("additional_special_tokens") or ()]
    return {text for text in named + listed if text is not None}


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """The file wins over tokenizer_config.json, whose list of named templates means the one called default."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError("the chat template is not UTF-8 text", where=path, got=error) from error
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) and template else None
