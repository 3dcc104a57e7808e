"""Hostile and damaged files: one of every class that the campaign of benchmarks/fuzz.py has found, a small seeded part
of the campaign itself, and proof that it would see what it looks for."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fuzzing.desk import make_desk
from fuzzing.hostile import TIME, YAML
from fuzzing.pickles import PAYLOADS, payload
from fuzzing.targets import LINK, TARGETS, place

from litlora.errors import InputError
from litlora.tokenizer import sandbox

ROOT = Path(__file__).parents[1]


def edited(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def with_text(key: str, text: str) -> Callable[[bytes], bytes]:
    """JSON that Python would not write."""
    return lambda content: content.rstrip()[:-1] + f', "{key}": {text}}}'.encode()


def whole(content: bytes | str) -> Callable[[bytes], bytes]:
    return lambda _: content if isinstance(content, bytes) else content.encode()


def added(content: bytes) -> Callable[[bytes], bytes]:
    return lambda before: before + content


def template(text: str) -> Callable[[bytes], bytes]:
    return lambda content: (content.decode() + text).encode()


def index_of(name: Any) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        index = json.loads(content)
        return json.dumps({**index, "weight_map": dict.fromkeys(index["weight_map"], name)}).encode()

    return change


def huge_tensor(content: bytes) -> bytes:
    """Offsets and shape of 2^62 bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header[next(iter(header))] |= {"shape": [2**60], "data_offsets": [0, 2**62]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def pickled(number: int) -> Callable[[bytes], bytes]:
    class One(Random):
        def choice(self, options: Any) -> Any:
            return PAYLOADS[number] if options is PAYLOADS else options[-1]

        def random(self) -> float:
            return 0.9

    return lambda content: payload(One(), content)


def linked(to: str) -> Callable[[bytes], bytes]:
    return whole(LINK + to.encode())


def steps(part: str) -> Callable[[bytes], bytes]:
    """Twenty steps that each make ten characters of one."""
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    return edited(**{part: {"type": "Sequence", f"{part}s": [grow] * 20}})


DIGITS, DEEP = "9" * 5000, "[" * 100_000
INDEX, CONFIG, SECRET = "model.safetensors.index.json", "--config FILE.yaml", "../../secret/tokenizer.json"
STRIP = {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}
NO_TENSORS = "other things than tensors|cannot be read|larger than their data"
Case = tuple[str, Callable[[bytes], bytes], str]
CASES: list[Case] = [
    # numbers of thousands of digits and brackets in brackets, which Python's own JSON reader gives up on
    *((name, with_text("x", DIGITS), "digits") for name in ("config.json", "params.json", "adapter_config.json")),
    *((name, with_text("x", DEEP), "recursion|malformed") for name in ("special_tokens_map.json", "litlora.json")),
    ("rows.json", whole(f"[{DIGITS}]"), "digits"),
    ("rows.jsonl", whole(f'{{"messages": []}}\n{DIGITS}'), "line 2"),
    # sizes that things are made of
    ("config.json", edited(num_hidden_layers=2**31 - 1), "num_hidden_layers"),
    ("config.json", edited(head_dim=2**31 - 2), "head_dim"),
    ("params.json", edited(n_layers=10**9), "n_layers"),
    ("params.json", edited(rope_theta=10**400), "rope_theta"),
    ("model.safetensors", huge_tensor, "not a valid safetensors"),
    # paths that lead out
    (INDEX, index_of("../secret/model.safetensors"), "outside"),
    (INDEX, index_of("/etc/passwd"), "outside"),
    (INDEX, index_of([]), "missing"),
    (INDEX, edited(metadata=[1]), "metadata"),
    *((name, linked(SECRET), "leads out") for name in ("config.json", "adapter_config.json", "a shard", "texts/*.txt")),
    ("litlora.json", edited(prompt_style="{secret}/template.jinja", prompt_template=None), "unknown prompt style"),
    ("litlora.json", edited(prompt_style="\x1b[2J", prompt_template="{{ instruction }}"), "unknown prompt style"),
    ("litlora.json of a merged model", whole('{"prompt_style": "a", "prompt_template": [1]}'), "prompt_template"),
    # expressions that never end, or are none where they are used
    ("adapter_config.json", edited(target_modules="(.|.)*x", rank_pattern={}), "too long"),
    ("adapter_config.json", edited(rank_pattern={"(?i)q_proj": 2}), "not a regular expression"),
    # templates, where they are read; more of them below
    ("tokenizer_config.json", edited(chat_template=TIME[1]), "does too much"),
    ("litlora.json", edited(prompt_style="own", prompt_template="{{ instruction }}" + TIME[1]), "does too much"),
    ("tokenizer_config.json", edited(chat_template="{{ '\\ud800' }}"), "broken Unicode"),
    # ids and texts that are none
    ("generation_config.json", edited(eos_token_id=2**70), "token id"),
    ("added_tokens.json", edited(x=float("inf")), "wrong shape"),
    ("added_tokens.json", edited(x=-1), "wrong shape"),
    ("tokenizer_config.json", edited(eos_token="\ud800"), "wrong shape"),
    # what makes the libraries panic, hang, or take the memory
    ("tokenizer.json", edited(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}), "charsmap"),
    ("tokenizer.json", steps("normalizer"), "makes too much"),
    ("tokenizer.json", steps("decoder"), "makes too much"),
    ("tokenizer.json", edited(pre_tokenizer={"type": "FixedLength", "length": 0}), "cannot be read"),
    ("tokenizer.json", edited(decoder=STRIP), "cannot be read"),
    ("Meta's tokenizer.model", lambda content: content.replace(b"<s>", b"<\xd8>", 1), "cannot be read"),
    ("Llama 3's tokenizer.model", added(b"YWFh" * 5000 + b" 260\n"), "up to 256 bytes"),
    ("FILE.part of generate --out_file", added(b'{"number": 2, "line": "\\ud800"}\n'), "not the unfinished"),
    # configs
    *((CONFIG, whole(text), "not flat|not valid") for text in YAML[:6]),
    (CONFIG, whole("prompt_style: !!python/name:os.system"), "tag"),
    (CONFIG, whole("config: '{secret}/config.yaml'"), "names another"),
    (CONFIG, added(b"seed: ~\n"), "--seed"),
    (CONFIG, whole("a: [" + "1," * 45_000 + "1]"), "too large"),
    (CONFIG, whole("seed: 0b" + "1" * 9000), "out of range"),
    # pickles: code, other things than tensors, memory
    *(("consolidated.00.pth", pickled(number), NO_TENSORS) for number in range(len(PAYLOADS))),
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_desk(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def canary(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that code of the others would make."""
    monkeypatch.chdir(desk.parent)
    yield desk.parent / "canary"
    assert not (desk.parent / "canary").exists()
    assert "CANARY" not in os.environ


@pytest.mark.parametrize(("name", "change", "said"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_found_once(
    name: str,
    change: Callable[[bytes], bytes],
    said: str,
    desk: Path,
    canary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "WORK", 10_000)  # a loop without end ends sooner
    target = TARGETS[name]
    file = target.find(desk)
    original = file.read_bytes() if file.exists() else None
    content = change(original or b"").replace(b"{secret}", str(desk.parent / "secret").encode())
    try:
        place(file, content)
        with pytest.raises(InputError) as caught:
            target.readers[0](desk)
    finally:
        place(file, original)
        shutil.rmtree(desk / "out", ignore_errors=True)
    message = str(caught.value)
    assert re.search(said, message), message
    assert len(message) < 10_000
    assert "SECRET" not in message


# --- the campaign itself

PLANTED = """
import os, sys, time
sys.path[:0] = [r"{root}/benchmarks"]
import fuzz
from fuzzing import targets

def allocate(desk): bytes(10) + bytearray(200_000_000)
def swallow(desk): raise KeyError("bug")
faults = dict(
    hang=lambda desk: time.sleep(60), death=lambda desk: os.abort(), memory=allocate, bug=swallow,
    outside=lambda desk: (desk.parent / "secret" / "config.json").read_text(),
    written=lambda desk: (desk / "rows.json").write_text("x"),
    started=lambda desk: os.system("true"), code=lambda desk: (desk.parent / "canary").write_text("x"),
    well=lambda desk: None, panic=lambda desk: (_ for _ in ()).throw(type("Panic", (BaseException,), dict())()),
)
def first(read, calls=[]):  # the first reading is of the file as it is
    def reader(desk):
        calls.append(1)
        return read(desk) if len(calls) > 1 else None
    return reader
targets.TARGETS = {{
    name: targets.Target("rows.csv", lambda random, content: content, (first(read, []),), links=False)
    for name, read in faults.items()
}}
fuzz.SECONDS, fuzz.IMPORTED = 8.0, ("litlora.train",)  # seconds of imports, or of a busy machine, are no hang
sys.argv = ["fuzz", "--inputs", "1"]
sys.exit(fuzz.main())
"""


SEEN = {
    "hang": "hang: over", "death": "died: SIGABRT", "memory": "memory: well", "bug": "KeyError",
    "outside": "outside: open", "written": "changed: ", "started": "outside: os.system", "code": "code of",
    "panic": "Panic",
}  # fmt: skip


def test_the_campaign_sees_what_it_looks_for() -> None:
    command = [sys.executable, "-c", PLANTED.format(root=ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    rows = dict(re.findall(r"^\| (\w+) \| 1 \| \d \| 0 \| (\d) \|", done.stdout, re.MULTILINE))
    assert rows == {**dict.fromkeys(SEEN, "1"), "well": "0"}, done.stdout + done.stderr
    said = re.findall(r"1 x (.+) \(inputs 0\)", done.stderr)
    assert all(found.startswith(start) for found, start in zip(said, SEEN.values(), strict=True)), said
    assert done.returncode == 1


def test_a_small_part_of_the_campaign() -> None:
    files = ["model.safetensors", INDEX, "config.json", "adapter_config.json", "litlora.json", "tokenizer.json"]
    files += ["tokenizer.model", "special_tokens_map.json", "rows.jsonl", "rows.csv", CONFIG, "consolidated.00.pth"]
    command = [sys.executable, "benchmarks/fuzz.py", "--inputs", "15", "--seed", "7", "--target", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert re.search(r"\d{3} inputs, 0 findings", done.stdout)
