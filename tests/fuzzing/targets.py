"""What is fuzzed: every file that litlora reads, how it is mutated, and the commands (or what they call) that read
it."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.hostile import EXPRESSIONS, PATHS, TEMPLATES, YAML
from fuzzing.mutations import (
    HUGE,
    Mutation,
    damage_bytes,
    damage_csv,
    damage_json,
    damage_json_lines,
    damage_lines,
    damage_protobuf,
    damage_safetensors,
    damage_template,
    from_list,
    mixed,
    with_keys,
)
from fuzzing.pickles import damage_pth, payload

Reader = Callable[[Path], object]
LINK = b"a link to: "  # what a mutation may give in place of content
LINKS = (
    "{secret}/model.safetensors", "{secret}/config.json", "../../secret/tokenizer.json", "/dev/zero", "/", "nowhere",
    "{self}",
)  # fmt: skip
_CACHE: dict[Any, Any] = {}


def place(file: Path, content: bytes | None) -> None:
    """Writes it, or a link, in place of what is there; None: nothing."""
    file.unlink(missing_ok=True)
    if content is not None and content.startswith(LINK):
        file.symlink_to(content[len(LINK) :].decode())
    elif content is not None:
        file.write_bytes(content)


@dataclass(frozen=True)
class Target:
    """A file on the desk (@ stands for what only the desk knows), how it is mutated, and who reads it: one of `readers`
    in turn. `seeds`: whole contents beside the desk's own that mutations start from. `links`: the file may also be
    replaced by a link. `share`: of the inputs that others get."""

    file: str
    mutation: Mutation
    readers: tuple[Reader, ...]
    seeds: Callable[[], list[bytes]] = list
    links: bool = True
    share: float = 1.0

    def find(self, desk: Path) -> Path:
        return next(desk.glob(self.file.replace("@", "*"))) if "@" in self.file else desk / self.file

    def input(self, random: Random, desk: Path, original: bytes) -> bytes:
        """One mutated content, or LINK and where it leads."""
        if self.links and random.random() < 0.01:
            content = LINK + random.choice(LINKS).encode()
        else:
            seeds = [original] if original else []
            content = self.mutation(random, random.choice([*seeds, *once(self.seeds)]))
        secret = str(desk.parent / "secret").encode()
        return content.replace(b"{secret}", secret).replace(b"{self}", str(self.find(desk)).encode())


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """What is not fuzzed is made once a process."""
    key = (function, arguments)
    if key not in _CACHE:
        _CACHE[key] = function(*arguments)
    return _CACHE[key]


# --- who reads


def _answer(base: str, *adapters: str, **flags: Any) -> Reader:
    def read(desk: Path) -> None:
        from litlora.commands import generate

        settings = {
            "prompt": "What is 1 + 1?",
            "max_new_tokens": 3,
            "precision": "32-true",
            "accelerator": "cpu",
            **flags,
        }
        paths = tuple(desk / adapter for adapter in adapters)
        generate.run(generate.Args(checkpoint_dir=desk / base, lora_path=paths, **settings))

    return read


def _loss(base: str, *adapters: str, file: str = "rows.json", **flags: Any) -> Reader:
    def read(desk: Path) -> None:
        from litlora.commands import validate

        settings = {"data": "json", "val_path": desk / file, "precision": "32-true", "accelerator": "cpu", **flags}
        paths = tuple(desk / adapter for adapter in adapters)
        validate.run(validate.Args(checkpoint_dir=desk / base, lora_path=paths, max_seq_length=64, **settings))

    return read


def _as_in_the_run(desk: Path) -> None:
    """The data are given by hand: what settings name, validate reads, as it says."""
    from litlora.commands import validate

    args = validate.Args(desk / "json", lora_path=(desk / "own",), val_path=desk / "rows.json", accelerator="cpu")
    validate.run(args, frozenset({"val_path"}))


def _inspect(desk: Path) -> None:
    from litlora.commands import inspect

    inspect.run(inspect.Args(checkpoint_dir=desk / "json", data="json", data_path=desk / "rows.json", val_split=0.5))


def _plan(desk: Path) -> None:
    from litlora.commands import plan

    files = {"checkpoint_dir": desk / "json", "data_path": desk / "rows.json", "out_dir": desk / "out"}
    with contextlib.suppress(SystemExit):  # where no setting fits
        plan.run(plan.Args(data="json", gpu="24GB", **files))


def _merge(desk: Path) -> None:
    from litlora.commands import merge_lora

    merge_lora.run(merge_lora.Args(desk / "json", [desk / "adapter"], desk / "out"))


def _merge_shards(desk: Path) -> None:
    """The sharded base, with an adapter whose record, which names another base, is left out."""
    from litlora.commands import merge_lora

    other = desk / "out" / "other"
    other.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (other / name).write_bytes((desk / "adapter" / name).read_bytes())
    merge_lora.run(merge_lora.Args(desk / "sp", [other], desk / "out" / "merged"))


def _convert(desk: Path) -> None:
    from litlora.commands import convert

    convert.run(convert.Args(desk / "meta", desk / "out"))


def _tiktoken(desk: Path) -> None:
    from litlora.meta_tokenizer import MetaTokenizer

    found = MetaTokenizer.find(desk / "llama3", newer=True)
    (desk / "out").mkdir()
    found.write(desk / "out", 64)


def _rows(data: str, file: str, **flags: Any) -> Reader:
    """As finetune_lora reads and tokenizes them."""

    def read(desk: Path) -> None:
        from litlora.data import PromptStyle, load_rows, prepare
        from litlora.tokenizer import Tokenizer

        rows = load_rows(data, desk / file, **flags)
        tokenizer = once(Tokenizer.load, desk / "json")
        for style in ("alpaca", "chat"):
            prepare(rows, tokenizer, PromptStyle.load(style, tokenizer), max_seq_length=64, use_cache=False)

    return read


def _only_rows(data: str, file: str) -> Reader:
    def read(desk: Path) -> None:
        from litlora.data import load_rows

        load_rows(data, desk / file)

    return read


def _prompts(file: str) -> Reader:
    def read(desk: Path) -> None:
        from litlora.commands.prompts import read_prompts
        from litlora.data import PromptStyle
        from litlora.tokenizer import Tokenizer

        tokenizer = once(Tokenizer.load, desk / "json")
        for style in ("alpaca", "chat"):
            for prompt in read_prompts(None, "", desk / file):
                tokenizer.encode_prompt(prompt.render(PromptStyle.load(style, tokenizer)))

    return read


def _kept(desk: Path) -> None:
    """A download of what is there already, and of more."""
    from litlora.commands import download
    from litlora.hub import RemoteFile

    names = [name for name in (*download.SMALL, download.SINGLE) if (desk / "json" / name).is_file()]
    files = [RemoteFile(name, (desk / "json" / name).stat().st_size, "0" * 64) for name in names]
    download._missing([*files, RemoteFile("x", 1, "1")], desk / "json", "a/b")


def _offline(desk: Path) -> None:
    from litlora.commands import download
    from litlora.hub import Unreachable

    download._accept_offline(download.Args("a/b", desk / "json"), desk / "json", Unreachable("the hub"))


def _answers(desk: Path) -> None:
    """The unfinished answers of `generate --out_file`, gone on from; the file is put back behind it."""
    from litlora.commands.answers_file import AnswersFile

    out = desk / "out" / "answers.jsonl"
    out.parent.mkdir()
    (out.parent / "answers.jsonl.part").write_bytes((desk / "answers.jsonl.part").read_bytes())
    answers = AnswersFile(out, {"seed": 1, "prompts": ["a", "b", "c"]}, 3, overwrite=False)
    answers.add(2, "c")
    answers.close()


def _style(desk: Path) -> None:
    from litlora.data import PromptStyle, load_rows, prepare
    from litlora.tokenizer import Tokenizer

    tokenizer = once(Tokenizer.load, desk / "json")
    style = PromptStyle.load(str(desk / "style.jinja"), tokenizer)
    prepare(load_rows("alpaca", desk / "rows.json"), tokenizer, style, max_seq_length=64, use_cache=False)


def _config(desk: Path) -> None:
    from litlora import cli
    from litlora.commands import finetune_flags, finetune_lora

    args, _ = cli.parse("finetune_lora", finetune_lora, ["--config", str(desk / "run.yaml")])
    finetune_flags.check_flags(args)


def _cached_rows(desk: Path) -> None:
    from litlora.data import dataset

    found = dataset.load(desk / "cached" / "rows.npz")
    if found is not None:
        [(found.ids(i), found.trained(i)) for i in range(len(found))]


def _report(desk: Path) -> None:
    from litlora.commands import report

    report.run(report.Args((desk / "run",)))


def _resume(desk: Path) -> None:
    import torch

    from fuzzing.desk import CPU, tiny_model
    from litlora.resume import find_checkpoint, trained_parameters

    model = once(tiny_model, desk / "json")
    checkpoint = find_checkpoint(str(desk / "run"), desk / "out")
    assert checkpoint is not None
    len(checkpoint.metrics)
    checkpoint.restore(model, torch.optim.AdamW(trained_parameters(model).values()))
    checkpoint.restore_random(CPU)


def _go_on(desk: Path) -> None:
    """A copy of the run that was killed after its second step, to its end."""
    from fuzzing.desk import finetuning
    from litlora.commands import finetune_lora

    run = desk / "out" / "run"
    shutil.copytree(desk / "stopped", run, symlinks=True)
    finetune_lora.run(finetuning(desk, run))


# --- mutations of one kind of file


def _index(random: Random, content: bytes) -> bytes:
    """Names of shards that lead elsewhere."""
    index = json.loads(content)
    others = ("config.json", "litlora.json", "tokenizer.model", ".hidden", "a\0b", "x" * 300, 1, None, [], {})
    for name in random.sample(sorted(index["weight_map"]), random.choice((1, 1, 5))):
        index["weight_map"][name] = random.choice((*PATHS, *others))
    return json.dumps(index).encode()


def _sizes(*keys: str) -> Mutation:
    """A size that things would be made of."""
    return with_keys(*((key, lambda random: random.choice((*HUGE, 10**5, 10**7, 10**9, 0))) for key in keys))


def _in_config(random: Random, content: bytes) -> bytes:
    """A hostile template in tokenizer_config.json, as a text or in a list of named ones."""
    config = json.loads(content)
    template = damage_template(random, config["chat_template"].encode()).decode("utf-8", "surrogatepass")
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
    config["chat_template"] = random.choice((template, template, named))
    return json.dumps(config).encode()


def _record(random: Random, content: bytes) -> bytes:
    """litlora.json that names another file as its prompt style, or brings a hostile template."""
    template = random.choice(TEMPLATES)
    style, source = random.choice((
        (random.choice(PATHS), None), ("own", template), ("own", "{{ instruction }}" + template), ("chat", template),
        ("none", None),
    ))  # fmt: skip
    changed = {**json.loads(content), "prompt_style": style, "prompt_template": source}
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def _adapter_settings(random: Random, content: bytes) -> bytes:
    """adapter_config.json with patterns that never end."""
    settings, pattern = json.loads(content), random.choice(EXPRESSIONS)
    key, value = random.choice((
        ("target_modules", pattern), ("target_modules", [pattern]), ("exclude_modules", pattern), ("r", 2**31),
        ("rank_pattern", {pattern: 2}), ("layers_pattern", pattern), ("alpha_pattern", {pattern: 2}),
        ("rank_pattern", {f"x{i}.*": 2 for i in range(3000)}), ("target_modules", ["q_proj"] * 9999),
        ("layers_to_transform", list(range(random.choice((1, 99999))))), ("lora_alpha", 1e308),
        ("target_modules", "all-linear"), ("layers_pattern", [pattern] * 99),
    ))  # fmt: skip
    layers = {"layers_to_transform": [1]} if key == "layers_pattern" else {}
    return json.dumps({**settings, key: value, **layers}).encode()


def _long_tokens(random: Random, content: bytes) -> bytes:
    """tiktoken's file with tokens that are far too long, or cut in too many ways."""
    token = random.choice((b"a" * 30_000, b"ab" * 9_000, random.randbytes(9_000), b"\xff" * 20_000))
    return content + base64.b64encode(token) + b" 260\n"


def _parts(random: Random, content: bytes) -> bytes:
    """tokenizer.json with a hostile part: a step that multiplies, an expression that never ends, sizes that lie."""
    pattern: dict[str, Any] = {"Regex": random.choice((*EXPRESSIONS, "", "(?:)", "a*", "."))}
    patterns = ({"String": "a"}, {"String": ""}, pattern)
    content_of = "a" * random.choice((0, 2, 9, 999))
    grow = {"type": "Replace", "pattern": random.choice(patterns), "content": content_of}
    behavior = random.choice(("Isolated", "Removed", "MergedWithNext", "Contiguous"))
    split = {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": random.random() < 0.5}
    table = base64.b64encode(random.randbytes(random.choice((0, 3, 4, 99)))).decode()
    special = {"x": {"id": "x", "ids": [random.choice((0, 7, 2**31, 2**32 - 1))], "tokens": ["x"]}}
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}] * random.choice((1, 9999))
    token = {"single_word": True, "lstrip": True, "rstrip": True, "normalized": random.random() < 0.5, "special": True}
    ids, contents = (0, 5, 399, 2**31, 2**32 - 1), ("", "a", " ", "\0", "<|im_end|>")
    part, value = random.choice((
        ("normalizer", {"type": "Sequence", "normalizers": [grow] * random.choice((1, 4, 20, 300))}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 9999}] * 9}),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": table}), ("normalizer", grow),
        ("pre_tokenizer", split), ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split] * 50}),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": random.choice(contents), "prepend_scheme": "always"}),
        ("pre_tokenizer", {"type": "FixedLength", "length": random.choice((0, 1, 2**63))}), ("decoder", grow),
        ("decoder", {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}),
        ("decoder", {"type": "Sequence", "decoders": [grow] * 20}),
        ("decoder", {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}),
        ("post_processor", {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}),
        ("post_processor", {"type": "RobertaProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 5],
                            "trim_offsets": True, "add_prefix_space": True}),
        ("padding", {"strategy": {"Fixed": 10**12}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": ""}),
        ("truncation", {"direction": "Right", "max_length": random.choice((0, 1, 5)), "strategy": "LongestFirst",
                        "stride": random.choice((0, 5, 2**62))}),
        ("added_tokens", [{"id": random.choice(ids), "content": random.choice(contents), **token}]),
    ))  # fmt: skip
    return json.dumps({**json.loads(content), part: value}).encode()


def _many(random: Random, content: bytes) -> bytes:
    """Files of a megabyte or more whose rows are as short as can be."""
    count = random.choice((300_000, 1_000_000))
    return random.choice((
        b"[" + b"{}," * count + b"{}]", b"[" + b"[]," * count + b"1]", b"1\n" * count, b"{}\n" * count,
        b"\n" * count + b"{}", b'{"text":""}\n' * (count // 4), b'{"instruction":"","output":""}\n' * (count // 10),
        b"\xf0\x9f\xa6\x99" * count, b"a\n" * count,
        b"instruction,output\n" + b"a,b\n" * (count // 2), b"instruction,output\n" + b",\n" * count,
        b'[{"a":1}' + b',{"b":2}' * count + b"]", b'{"instruction":"' + b"a" * 3 * count + b'","output":"b"}\n',
        b"instruction," + b"x," * count + b"output\n" + b"a,b\n", b'[{"messages":[' + b"{}," * count + b"{}]}]",
    ))  # fmt: skip


def _large(random: Random, content: bytes) -> bytes:
    """A JSON object of a megabyte or more, of many small values."""
    count = random.choice((100_000, 300_000))
    made = random.choice((b"[" + b"[]," * count + b"1]", b"[" + b"{}," * count + b"1]", b'"' + b"a" * 9 * count + b'"',
                          b"{" + b"".join(b'"%d":1,' % i for i in range(count)) + b'"x":1}'))  # fmt: skip
    key = random.choice((b"x", b"rope_scaling", b"architectures", b"eos_token_id", b"layer_types"))
    return content.rstrip()[:-1] + b', "' + key + b'": ' + made + b"}"


# --- seeds


def _json_lines() -> list[bytes]:
    lima = [{"conversations": ["Hi", "Hello", "Why?", "Because."], "source": "x"}] * 3
    dolly = [{"instruction": "a", "context": "b", "response": "c", "category": "d"}] * 3
    return ["\n".join(map(json.dumps, rows)).encode() for rows in (lima, dolly, [{"text": "a b c"}])]


def _tokenizers() -> list[bytes]:
    """Other kinds of tokenizer.json: unigram, word pieces and BPE with every kind of part."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    scores = [("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0), ("<0x41>", -9.0)]
    unigram = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    steps: Any = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.NFKC()]
    unigram.normalizer = normalizers.Sequence(steps)
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    unigram.decoder = decoders.Sequence(steps)
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "what": 3}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    split = pre_tokenizers.Split(Regex(r"\s+|\p{N}{1,3}"), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(True)]
    )
    around = [("[A]", 1), ("[B]", 2)]
    words.post_processor = processors.TemplateProcessing(single="[A] $A [B]", pair=None, special_tokens=around)
    words.decoder = decoders.WordPiece()
    words.enable_padding(length=16)
    words.enable_truncation(12, stride=2)
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<unk>": 3}
    bpe = Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>", dropout=0.5, end_of_word_suffix=""))
    steps = [
        normalizers.Lowercase(),
        normalizers.StripAccents(),
        normalizers.Replace(Regex("a+"), "b"),
        normalizers.Strip(),
    ]
    bpe.normalizer = normalizers.Sequence(steps)
    steps = [pre_tokenizers.Punctuation(), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.CharDelimiterSplit("x")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    bpe.decoder = decoders.BPEDecoder()
    for tokenizer in (unigram, words, bpe):
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return [tokenizer.to_str().encode() for tokenizer in (unigram, words, bpe)]


def _merged_record() -> list[bytes]:
    return [b'{"prompt_style": "alpaca", "prompt_template": null}']


# --- the targets

_BASE = (_answer("json"), _loss("json"), _merge)
_SHARDS = (_answer("sp"), _loss("sp"), _merge_shards)
_ADAPTED = (_answer("json", "adapter"), _loss("json", "adapter"), _merge)
_JSON_CHAT = (_answer("json", prompt_style="chat"), _loss("json", file="chat.jsonl", prompt_style="chat"), _inspect)
_SP_CHAT = (_answer("sp", prompt_style="chat"), _loss("sp", file="chat.jsonl", prompt_style="chat"))
_SAFETENSORS = mixed((6, damage_safetensors), (4, damage_bytes))
_JSON = mixed((7, damage_json), (3, damage_bytes))
_YAML = mixed((4, from_list(YAML)), (3, damage_lines), (3, damage_bytes))
_TEMPLATE = mixed((8, damage_template), (2, damage_bytes))
_RECORD = mixed((5, _record), (5, _JSON))
_SIZES = _sizes(
    "num_hidden_layers", "hidden_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "max_position_embeddings", "sliding_window", "rope_theta", "rms_norm_eps",
)  # fmt: skip
_LINES = tuple(_rows(data, "chat.jsonl", multiturn=data == "lima") for data in ("json", "lima", "dolly", "text"))
_CSV = mixed((6, damage_csv), (4, damage_bytes))
_LINED = mixed((7, damage_json_lines), (3, damage_bytes))
_PROTOBUF = mixed((5, damage_protobuf), (5, damage_bytes))
_PARAMS = mixed((2, _sizes("dim", "n_layers", "n_heads", "n_kv_heads")), (8, _JSON))
_RANKS = mixed((8, damage_bytes), (2, _long_tokens))
_STEP, _STOPPED = (f"{run}/checkpoints/step-00000002" for run in ("run", "stopped"))
TARGETS: Mapping[str, Target] = {
    "model.safetensors": Target("json/model.safetensors", _SAFETENSORS, _BASE),
    "a shard": Target("sp/model-00002-of-@.safetensors", _SAFETENSORS, _SHARDS),
    "model.safetensors.index.json": Target("sp/model.safetensors.index.json", mixed((5, _index), (5, _JSON)), _SHARDS),
    "config.json": Target("json/config.json", mixed((2, _SIZES), (8, _JSON)), (*_BASE, _plan, _inspect)),
    "config.json, large": Target("json/config.json", _large, _BASE, share=0.05),
    "generation_config.json": Target("json/generation_config.json", _JSON, _BASE),
    "adapter_config.json": Target("adapter/adapter_config.json", mixed((3, _adapter_settings), (7, _JSON)), _ADAPTED),
    "adapter_model.safetensors": Target("adapter/adapter_model.safetensors", _SAFETENSORS, _ADAPTED),
    "litlora.json": Target("adapter/litlora.json", _RECORD, _ADAPTED),
    "litlora.json of a merged model": Target("json/litlora.json", _RECORD, _BASE, _merged_record),
    "tokenizer.json": Target(
        "json/tokenizer.json", mixed((4, _parts), (4, damage_json), (2, damage_bytes)), _JSON_CHAT, _tokenizers
    ),
    "tokenizer.json, large": Target("json/tokenizer.json", _large, _JSON_CHAT, share=0.05),
    "tokenizer.model": Target("sp/tokenizer.model", _PROTOBUF, _SP_CHAT),
    "tokenizer_config.json": Target("json/tokenizer_config.json", mixed((5, _in_config), (5, _JSON)), _JSON_CHAT),
    "special_tokens_map.json": Target("sp/special_tokens_map.json", _JSON, _SP_CHAT),
    "added_tokens.json": Target("sp/added_tokens.json", _JSON, _SP_CHAT),
    "chat_template.jinja": Target("sp/chat_template.jinja", _TEMPLATE, _SP_CHAT),
    "a prompt template": Target("style.jinja", _TEMPLATE, (_style,), links=False),
    "rows.json": Target(
        "rows.json", _JSON, (_rows("alpaca", "rows.json"), _rows("json", "rows.json"), _prompts("rows.json"), _inspect),
        links=False,
    ),
    "rows.jsonl": Target(
        "chat.jsonl", _LINED, (*_LINES, _prompts("chat.jsonl")), _json_lines,
        links=False,
    ),
    "rows.csv": Target(
        "rows.csv", _CSV, (_rows("alpaca", "rows.csv"), _prompts("rows.csv")),
        links=False,
    ),
    "rows.json, large": Target("rows.json", _many, (_only_rows("json", "rows.json"),), links=False, share=0.05),
    "rows.jsonl, large": Target("chat.jsonl", _many, (_only_rows("text", "chat.jsonl"),), links=False, share=0.05),
    "rows.csv, large": Target("rows.csv", _many, (_only_rows("alpaca", "rows.csv"),), links=False, share=0.05),
    "texts/*.txt": Target("texts/a.txt", damage_bytes, (_rows("text", "texts"),)),
    "prompts.txt": Target("prompts.txt", damage_bytes, (_prompts("prompts.txt"),), links=False),
    "FILE.part of generate --out_file": Target("answers.jsonl.part", _LINED, (_answers,), links=False),
    "--config FILE.yaml": Target("run.yaml", _YAML, (_config,), links=False),
    ".litlora-download.json": Target("json/.litlora-download.json", _JSON, (_kept, _offline)),
    "the cache of tokenized rows": Target("cached/rows.npz", damage_bytes, (_cached_rows,), links=False),
    "hyperparameters.yaml": Target("run/hyperparameters.yaml", _YAML, (_report,)),
    "hyperparameters.yaml of an adapter": Target("own/hyperparameters.yaml", _YAML, (_as_in_the_run,)),
    "metrics.csv": Target("run/metrics.csv", _CSV, (_report,)),
    "summary.json": Target("run/summary.json", _JSON, (_report,)),
    "samples.jsonl": Target("run/samples.jsonl", _LINED, (_report,)),
    "rounding.json": Target("run/rounding.json", _JSON, (_report,)),
    "a checkpoint's state.json": Target(f"{_STEP}/state.json", _JSON, (_resume,)),
    "a checkpoint's state.safetensors": Target(
        f"{_STEP}/state.safetensors", _SAFETENSORS, (_resume,), links=False
    ),
    "state.json of a run": Target(f"{_STOPPED}/state.json", _JSON, (_go_on,), links=False),
    "state.safetensors of a run": Target(f"{_STOPPED}/state.safetensors", _SAFETENSORS, (_go_on,), links=False),
    "metrics.csv of a run": Target(f"{_STOPPED}/metrics.csv", _CSV, (_go_on,), links=False),
    "samples.jsonl of a run": Target("stopped/samples.jsonl", _LINED, (_go_on,), links=False),
    "consolidated.00.pth": Target(
        "meta/consolidated.00.pth", mixed((4, damage_pth), (2, payload), (4, damage_bytes)), (_convert,)
    ),
    "params.json": Target("meta/params.json", _PARAMS, (_convert,)),
    "Meta's tokenizer.model": Target("meta/tokenizer.model", _PROTOBUF, (_convert,)),
    "Llama 3's tokenizer.model": Target("llama3/tokenizer.model", _RANKS, (_tiktoken,)),
}  # fmt: skip
