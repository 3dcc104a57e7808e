"""The tokenizer.model of Meta's checkpoints: sentencepiece (Llama 1, 2, Code Llama) or tiktoken's format (Llama 3).

tiktoken's format is a line `BASE64 RANK` a token; encoding merges, in each piece of text that a pattern cuts out, the
adjacent pair whose joined bytes have the lowest rank, the leftmost first (https://github.com/openai/tiktoken). The
`tokenizers` library merges by a list of pairs instead: here every way to cut a token into two tokens, in the order of
the tokens' ranks, so that whatever pair tiktoken may join, it may join too. That is the construction of the
tokenizer.json which Llama 3's repositories on the hub carry. Of two overlapping pairs that give the same token (a|aa
and aa|a) tiktoken joins the left one, `tokenizers` the one listed first: no text was found where that shows.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.checkpoint import refuse_link, write_json, write_text
from litlora.errors import InputError

NAME = "tokenizer.model"
# Llama 3's cut of a text into pieces, and the names of its 256 special tokens, from Meta's llama-models repository
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, EOT, EOM = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
SPECIAL_TOKENS = 256
LONGEST = 256  # bytes of a token; Llama 3's has 128 spaces


class MetaTokenizer(ABC):
    """What a Hugging Face directory needs to know of Meta's tokenizer."""

    size: int  # tokens, special ones included

    @classmethod
    def find(cls, directory: Path, *, newer: bool) -> MetaTokenizer:
        """tokenizer.model in `directory`, or one level up, where Llama 1 has it. `newer`: Llama 3.1 and later, which
        name more of the special tokens. Raises InputError when it is missing or of neither format."""
        places = (directory / NAME, directory.resolve().parent / NAME)
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise InputError(f"no {NAME} beside the weights", where=directory, fix="copy it there from Meta's download")
        refuse_link(file)
        with file.open("rb") as stream:
            first = stream.readline(4096)
        if re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\s*", first):
            return TiktokenTokenizer(_read_ranks(file), newer)
        return SentencePieceTokenizer.open(file)

    @abstractmethod
    def special_ids(self) -> dict[str, Any]:
        """bos_token_id and eos_token_id, as config.json and generation_config.json have them."""

    @abstractmethod
    def write(self, directory: Path, max_length: int) -> None:
        """The tokenizer's files of a Hugging Face directory; `max_length` in tokens."""


@dataclass(frozen=True)
class SentencePieceTokenizer(MetaTokenizer):
    """Copied as it is: sentencepiece itself reads it."""

    file: Path
    size: int
    bos: tuple[int, str]
    eos: tuple[int, str]
    unk: tuple[int, str]

    @classmethod
    def open(cls, file: Path) -> SentencePieceTokenizer:
        from sentencepiece import SentencePieceProcessor

        try:
            processor = SentencePieceProcessor(model_file=str(file))
            ids = (processor.bos_id(), processor.eos_id(), processor.unk_id())
            bos, eos, unk = ((number, processor.id_to_piece(number)) for number in ids)
        except (RuntimeError, OSError, IndexError, ValueError) as error:
            got, fix = str(error).split("\n")[0], "take tokenizer.model from Meta's download again"
            raise InputError(f"{NAME} cannot be read", where=file, got=got, fix=fix) from None
        return cls(file, processor.get_piece_size(), bos, eos, unk)

    def special_ids(self) -> dict[str, Any]:
        return {"bos_token_id": self.bos[0], "eos_token_id": self.eos[0]}

    def write(self, directory: Path, max_length: int) -> None:
        shutil.copyfile(self.file, directory / NAME)
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": self.bos[1],
            "eos_token": self.eos[1],
            "unk_token": self.unk[1],
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
        }
        write_json(directory / "tokenizer_config.json", config)


class TiktokenTokenizer(MetaTokenizer):
    """Llama 3's, rewritten as tokenizer.json."""

    def __init__(self, ranks: dict[bytes, int], newer: bool) -> None:
        self.ranks = ranks
        self.special = _special_tokens(newer)
        self.size = len(ranks) + len(self.special)

    def _id(self, token: str) -> int:
        return len(self.ranks) + self.special.index(token)

    def special_ids(self) -> dict[str, Any]:
        """All three ends: which of them a model uses (base or instruct) is not in Meta's files, and a base model never
        writes the others."""
        ends = [self._id(token) for token in (EOS, EOM, EOT) if token in self.special]
        return {"bos_token_id": self._id(BOS), "eos_token_id": ends}

    def write(self, directory: Path, max_length: int) -> None:
        write_text(directory / "tokenizer.json", json.dumps(self.tokenizer_json(), ensure_ascii=False, indent=1) + "\n")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
        }
        write_json(directory / "tokenizer_config.json", config)

    def tokenizer_json(self) -> dict[str, Any]:
        """In the format of the `tokenizers` library, opened once by it."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

        names = byte_names()
        vocabulary = {"".join(names[byte] for byte in token): rank for token, rank in self.ranks.items()}
        merges = [
            ("".join(names[byte] for byte in left), "".join(names[byte] for byte in right))
            for left, right in pairs(self.ranks)
        ]
        # a piece that is a token as a whole is never merged up: tiktoken looks it up first
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in self.special])
        single, pair = f"{BOS} $A", f"{BOS} $A {BOS}:1 $B:1"
        template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[(BOS, self._id(BOS))])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        parsed: dict[str, Any] = json.loads(tokenizer.to_str())
        return parsed


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Raises InputError unless the ranks are 0..n-1, each once, and every single byte is a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if len(token) > LONGEST:
                raise ValueError(len(token))
            ranks[token] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(
                f"{NAME} is malformed",
                where=f"{file}, line {number}",
                wanted=f"BASE64 RANK, tokens of up to {LONGEST} bytes",
            ) from None
    whole = sorted(ranks.values()) == list(range(len(ranks)))
    if not whole or any(bytes([byte]) not in ranks for byte in range(256)):
        fix = "the file is truncated or not Llama 3's: take tokenizer.json from the Hugging Face repository"
        raise InputError(f"{NAME} lacks tokens", where=file, got=f"{len(ranks)} tokens", fix=fix)
    return ranks


def pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to cut a token into two tokens, by the token's rank, then by the ranks of the two."""
    found = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        valid = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        found += sorted(valid, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return found


def byte_names() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table): itself where it is
    printable, the others in order from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def _special_tokens(newer: bool) -> list[str]:
    """In the order of their ids. Llama 3.1 gave names to four of Llama 3's reserved ones."""
    named: dict[int, str] = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: EOT}
    if newer:
        named |= {4: "<|finetune_right_pad_id|>", 8: EOM, 10: "<|python_tag|>"}
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(SPECIAL_TOKENS))
    return [named.get(place) or next(reserved) for place in range(SPECIAL_TOKENS)]
