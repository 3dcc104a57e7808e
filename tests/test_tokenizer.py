"""The tokenizer gives what the model's own gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHATML, json_tokenizer, sentencepiece_tokenizer

from litlora.errors import InputError
from litlora.tokenizer import Tokenizer

TEXTS = [
    "Hello world",
    " Hello",
    "  x",
    "x\ty  ",
    "\n",
    "\n\nA",
    "",
    " ",
    "é漢字🦙",
    "### Response:\n21",
    "1234.5",
    "<s>Hello",
    "a</s>b",
    "a</s> b",
    "<s>[INST] hi [/INST] ho </s><s>[INST] x [/INST]",
    "Hello <unk> x",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return [Tokenizer.load(json_tokenizer(root / "json")), Tokenizer.load(sentencepiece_tokenizer(root / "model"))]


def _transformers_llama(path: Path, legacy: bool):
    """transformers' LlamaTokenizer over the pieces of a sentencepiece model."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    vocab, _, merges = SentencePieceExtractor(str(path)).extract(vocab_scores=True)
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True)


@pytest.mark.parametrize("name", ["tokenizer-llama2", "stories260K-hf"])
def test_sentencepiece_ids_are_transformers_llama_ids(material, name: str) -> None:
    directory = material(name)
    ours = Tokenizer.load(directory)
    theirs = _transformers_llama(directory / "tokenizer.model", legacy=True)
    # A leading space is where sentencepiece itself (▁, ▁Hello) and transformers' conversion (▁Hello) differ; and
    # stories260K's model takes runs of spaces as one, which the conversion does not know.
    plain = [text for text in TEXTS if not text.startswith(" ") and "> " not in text]
    texts = plain if name == "tokenizer-llama2" else ["Hello world", "One day, Lily</s>met", "<s>Once upon a time"]
    for text in texts:
        wanted = theirs.encode(text)
        if text.startswith("<s>"):
            assert wanted[:2] == [1, 1]
            wanted = wanted[1:]  # never a second bos
        assert ours.encode(text) == wanted, text


def test_llama2_is_sentencepiece_itself_with_one_bos(material) -> None:
    tokenizer = Tokenizer.load(material("tokenizer-llama2"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(material("tokenizer-llama2/tokenizer.model")))
    rows = json.loads(material("alpaca/alpaca_5000.json").read_text())[:300]
    texts = [row["output"] for row in rows]
    assert tokenizer.encode("Hello world") == [1, 15043, 3186]
    assert tokenizer.encode_batch(texts, special=False) == model.encode(texts)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.vocab_size) == (1, 2, (2,), 32000)
    assert tokenizer.encode("a</s>b") == [1, 263, 2, 289]


@pytest.mark.slow
def test_smollm2_is_transformers(smollm2, material) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(smollm2), AutoTokenizer.from_pretrained(smollm2)
    rows = json.loads(material("alpaca/alpaca_5000.json").read_text())[:300]
    texts = TEXTS + [row["output"] for row in rows]
    assert ours.encode_batch(texts) == [theirs.encode(text) for text in texts]
    assert ours.eos_id == 2
    assert 2 in ours.stop_ids
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for prompt in (True, False):
        wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.apply_chat_template(messages, prompt) == wanted


@pytest.mark.parametrize(("bos", "flag"), [(False, None), (False, True), (True, None), (True, False)])
def test_json_special_tokens_are_transformers(tmp_path: Path, bos: bool, flag: bool | None) -> None:
    """The post-processor decides; with tokenizer.json transformers ignores add_bos_token."""
    from transformers import AutoTokenizer

    config = {} if flag is None else {"add_bos_token": flag}
    directory = json_tokenizer(tmp_path, bos=bos, **config)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    ours, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("What is 59?", "", "naïve 🦙"):
        assert ours.encode(text) == theirs.encode(text)
    assert ours.encode("What")[:1] == ([1] if bos else ours.encode("What", special=False)[:1])


def test_sentencepiece_flags(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(sentencepiece_tokenizer(tmp_path / "a", add_bos_token=False, add_eos_token=True))
    ids = tokenizer.encode("fox")
    assert ids[0] != tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.encode_prompt("fox") == ids[:-1]


def test_never_a_double_bos(tmp_path: Path) -> None:
    for tokenizer, text in (
        (Tokenizer.load(json_tokenizer(tmp_path / "json", bos=True)), "<|im_start|>user"),
        (Tokenizer.load(sentencepiece_tokenizer(tmp_path / "model")), "<s>user"),
    ):
        assert tokenizer.encode(text).count(tokenizer.bos_id) == 1
        assert tokenizer.encode_prompt(text)[0] == tokenizer.bos_id


def test_text_after_a_special_token_follows_legacy(tmp_path: Path) -> None:
    legacy = Tokenizer.load(sentencepiece_tokenizer(tmp_path / "a"))
    modern = Tokenizer.load(sentencepiece_tokenizer(tmp_path / "b", legacy=False))
    after = legacy.encode("fox", special=False)
    assert legacy.encode("</s>fox", special=False) == [2, *after]
    assert modern.encode("</s>fox", special=False) == [2, *modern.encode_continuation("fox")] != [2, *after]
    assert modern.decode(modern.encode("fox</s> fox")) == "fox fox"


def test_added_tokens_split_text_and_count_as_vocabulary(tmp_path: Path) -> None:
    added = {"500": {"content": "<|turn|>", "special": True}, "501": {"content": "KEEP", "special": False}}
    tokenizer = Tokenizer.load(sentencepiece_tokenizer(tmp_path, added_tokens_decoder=added))
    ids = tokenizer.encode("fox<|turn|>KEEP", special=False)
    assert ids[-2:] == [500, 501]
    assert tokenizer.vocab_size == 502
    assert tokenizer.decode(ids) == "foxKEEP"
    assert tokenizer.decode(ids, skip_special=False) == "fox<|turn|>KEEP"


def test_stop_ids_are_every_end(tmp_path: Path) -> None:
    directory = json_tokenizer(tmp_path, eos_token="<|endoftext|>")
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 77]}')
    (directory / "config.json").write_text('{"eos_token_id": 78}')
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.eos_id == 0
    assert tokenizer.stop_ids == (0, 2, 77, 78)  # 2: <|im_end|>


def test_tokenizer_json_wins(tmp_path: Path) -> None:
    json_tokenizer(sentencepiece_tokenizer(tmp_path))
    assert Tokenizer.load(tmp_path).path.name == "tokenizer.json"


def test_fingerprint_changes_with_what_changes_ids(tmp_path: Path) -> None:
    one = Tokenizer.load(json_tokenizer(tmp_path / "a")).fingerprint
    assert one == Tokenizer.load(json_tokenizer(tmp_path / "b")).fingerprint
    assert one != Tokenizer.load(json_tokenizer(tmp_path / "c", bos=True)).fingerprint
    assert one != Tokenizer.load(json_tokenizer(tmp_path / "d", chat_template=CHATML)).fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_corrupt_files_are_named(tmp_path: Path, name: str) -> None:
    sentencepiece_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(b'{"truncated": ')
    with pytest.raises(InputError, match=name):
        Tokenizer.load(tmp_path)


def test_missing_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json or tokenizer\.model"):
        Tokenizer.load(tmp_path)


@settings(deadline=None, max_examples=150)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_streaming_gives_the_decoded_text(both: list[Tokenizer], text: str) -> None:
    for tokenizer in both:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [stream.push(token_id) for token_id in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(deadline=None, max_examples=60)
@given(st.text("ab \nfoxé🦙", min_size=1), st.text("ab \nfoxé🦙"))
def test_streaming_continues_a_prompt(both: list[Tokenizer], prompt: str, text: str) -> None:
    for tokenizer in both:
        before = tokenizer.encode(prompt)
        after = tokenizer.encode_continuation(text)
        stream = tokenizer.stream(before)
        streamed = "".join(map(stream.push, after)) + stream.flush()
        assert tokenizer.decode(before) + streamed == tokenizer.decode(before + after) == prompt + text


def test_endless_garbage_is_not_held_for_ever(both: list[Tokenizer]) -> None:
    tokenizer = both[1]
    byte = tokenizer.token_id("<0xFF>")
    stream = tokenizer.stream()
    assert byte is not None
    assert any(stream.push(byte) for _ in range(40))


TEMPLATES = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}{% if loop.index0 > 3 %}{% break %}{% endif %}\n"
    "    {% if m.role == 'user' %}\n[INST] {{ m.content | trim }} [/INST]\n{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}\n"
    "{% endfor %}",
    "{% for m in messages %}{{ {'a': m.content, 'b': '<&>é'} | tojson }}{% generation %}{{ m.role }}{% endgeneration %}"
    "{% endfor %}{{ strftime_now('%Y') }}{{ tools is none }}{{ unk_token }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_templates_render_as_in_transformers(tmp_path: Path, template: str, prompt: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = json_tokenizer(tmp_path, chat_template=template)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    messages = [
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "x"},
    ]
    wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert Tokenizer.load(directory).apply_chat_template(messages, prompt) == wanted


def test_the_template_file_wins(tmp_path: Path) -> None:
    directory = json_tokenizer(tmp_path, chat_template=CHATML)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.load(directory).apply_chat_template([{"role": "user", "content": "Hi"}], True) == "Hi!"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('roles must alternate') }}", "{{ messages.pop() }}", "{% if %}"]
)
def test_refusing_unsafe_and_broken_templates(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.load(json_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(InputError, match="chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], True)


def test_no_chat_template_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        Tokenizer.load(json_tokenizer(tmp_path)).apply_chat_template([], True)
