"""Small real tokenizers in Hugging Face directories, made in a second: byte-level BPE and sentencepiece."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, pre_tokenizers, processors, trainers

CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nWhat is 59 minus 38?\n\n### Response:\n21",
    "user\nassistant\nsystem\n\n\nThe quick brown fox jumps over the lazy dog.\n\n  Indented text, naïve café.",
] * 4
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def json_tokenizer(directory: Path, bos: bool = False, **config: Any) -> Path:
    """Byte-level BPE with <|im_start|> (bos) and <|im_end|> (eos and pad); `bos`: the post-processor adds it."""
    directory.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    made.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    return directory


def sentencepiece_tokenizer(directory: Path, **config: Any) -> Path:
    """Llama's kind of sentencepiece BPE: byte fallback, a leading space, digits apart, text taken as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(CORPUS).split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))
    return directory
