"""Bad input, command by command: one clear message that says what and where, exit code 2, no traceback, before any
long work, and nothing on the disk is touched."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizers import CHATML
from torch import nn

from litlora import frozen, merge, merge_write, precision
from litlora.checkpoint import INDEX, SINGLE, Checkpoint
from litlora.cli import call
from litlora.commands import finetune_job, finetune_lora, generate, models, validate
from litlora.config import ModelConfig
from litlora.data import hub
from litlora.load import load_model, meta_decoder
from litlora.lora import LoRA, adapt, lora_modules
from litlora.memory import WORKSPACE
from litlora.peft_format import CONFIG, PREFIX, RECORD, WEIGHTS, Record, save_adapter

ROOT = Path(__file__).parents[1]
TINY, ROWS = ROOT / "checkpoints" / "tiny", ROOT / "data" / "tiny_test.json"
FINETUNE, GENERATE, MERGE, VALIDATE = "finetune_lora", "generate", "merge_lora", "validate"
ALL = (FINETUNE, GENERATE, MERGE, VALIDATE)
RUNNING = (FINETUNE, GENERATE, VALIDATE)  # the model itself, on data or prompts
DATA = (FINETUNE, VALIDATE)
ADAPTED = (GENERATE, MERGE, VALIDATE, FINETUNE)
WRITING = (FINETUNE, MERGE)
Q = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"


def write_adapter(directory: Path, base: Path, **record: Any) -> Path:
    """An untrained adapter over `base`, without reading its weights."""
    directory.mkdir()
    model: nn.Module = meta_decoder(ModelConfig.load(base))
    lora = LoRA(r=2, alpha=4)
    adapt(model, lora)
    model.to_empty(device="cpu")
    for module in lora_modules(model).values():
        nn.init.ones_(module.lora_A.weight)
        nn.init.zeros_(module.lora_B.weight)
    fields: dict[str, Any] = {
        "base_name": "checkpoints/tiny", "base_fingerprint": Checkpoint(base).fingerprint, "quantize": None,
        "quantize_head": False, "precision": "32-true", "prompt_style": "alpaca", "prompt_template": None,
        "tokenizer_fingerprint": "", "step": 1, "val_loss": None, "litlora_version": "0",
    }  # fmt: skip
    save_adapter(directory, lora_modules(model), lora, Record(**{**fields, **record}), torch.float32)
    return directory


@dataclass
class Desk:
    """What a user has in front of them; a case damages it."""

    path: Path
    patch: pytest.MonkeyPatch

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def out(self) -> Path:
        return self.path / "out"

    def write(self, name: str, content: object) -> Path:
        """Text, bytes, or JSON."""
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def edit(self, name: str, **changes: Any) -> None:
        """Sets keys of a JSON file."""
        self.write(name, {**json.loads((self.path / name).read_text()), **changes})

    def retensor(self, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Rewrites a safetensors file after `change` to its tensors."""
        tensors = load_file(self.path / name)
        change(tensors)
        save_file(tensors, self.path / name)

    def line(self, command: str, flags: dict[str, Any]) -> list[str]:
        """A command line that is right but for `flags`; None takes a flag out, a list gives it several times."""
        right: dict[str, dict[str, Any]] = {
            FINETUNE: {"checkpoint_dir": "base", "data_path": "rows.json", "out_dir": "out", "accelerator": "cpu"},
            GENERATE: {"checkpoint_dir": "base", "prompt": "Hello", "accelerator": "cpu"},
            MERGE: {"checkpoint_dir": "base", "lora_path": "adapter", "out_dir": "out"},
            VALIDATE: {"checkpoint_dir": "base", "data_path": "rows.json", "accelerator": "cpu"},
        }
        words = [command]
        for flag, value in {**right[command], **flags}.items():
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                words.append(f"--{flag}={one}")
        return words

    def tree(self) -> dict[str, str]:
        """Every path, and what is in it."""
        return {
            str(path.relative_to(self.path)): "directory" if path.is_dir() else digest(path)
            for path in sorted(self.path.rglob("*"))
        }


def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else "no file"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base (the embedded one's first two blocks), an adapter and data that fit each other."""
    path = tmp_path_factory.mktemp("good")
    shutil.copytree(TINY, path / "base")
    raw = json.loads((TINY / "config.json").read_text())
    (path / "base" / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 2}))
    tensors = {name: t for name, t in load_file(TINY / SINGLE).items() if not re.search(r"layers\.[2-9]", name)}
    save_file(tensors, path / "base" / SINGLE)
    write_adapter(path / "adapter", path / "base")
    (path / "rows.json").write_text(json.dumps(json.loads(ROWS.read_text())[:40]))
    return path


@pytest.fixture
def desk(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A copy of the good things, in the working directory; the long work is out of bounds."""
    path = Path(shutil.copytree(good, tmp_path / "desk"))
    monkeypatch.chdir(path)
    for module in (finetune_lora, models):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(merge_write, "atomic_directory", lambda *_, **__: pytest.fail("something was written"))
    return Desk(path, monkeypatch)


def refusal(desk: Desk, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command line that is refused as it should be."""
    before = desk.tree()
    code = call(words)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    notes, _, message = ("\n" + err).partition("\nerror: ")
    assert message, err
    assert "error: " not in notes
    assert "\nerror: " not in message
    assert desk.tree() == before
    return message


Prepare = Callable[[Desk], dict[str, Any]]
CASES: list[Any] = []


def case(commands: tuple[str, ...], *said: str) -> Callable[[Prepare], Prepare]:
    """Registers a function that damages the desk and returns the flags to go wrong with; `said` must be in the message
    (and so says what, where, and the way out)."""

    def register(prepare: Prepare) -> Prepare:
        for command in commands:
            CASES.append(pytest.param(command, prepare, said, id=f"{prepare.__name__}-{command}"))
        return prepare

    return register


# --- the base model ---------------------------------------------------------------------------------------------------


@case(ALL, "does not exist", "nowhere", "--checkpoint_dir")
def base_missing(desk: Desk) -> dict[str, Any]:
    return {"checkpoint_dir": "nowhere"}


@case(ALL, "is empty", "void", "litlora download")
def base_empty(desk: Desk) -> dict[str, Any]:
    (desk.path / "void").mkdir()
    return {"checkpoint_dir": "void"}


@case(ALL, "not a directory", "model.safetensors", "a Hugging Face checkpoint directory")
def base_a_file(desk: Desk) -> dict[str, Any]:
    return {"checkpoint_dir": "base/model.safetensors"}


@case(ALL, "an adapter", "where:  adapter", "--lora_path")
def base_an_adapter(desk: Desk) -> dict[str, Any]:
    return {"checkpoint_dir": "adapter", "lora_path": "base"}


@case(ALL, "no config.json", "where:  base", "litlora download")
def config_missing(desk: Desk) -> dict[str, Any]:
    (desk.base / "config.json").unlink()
    return {}


@case(ALL, "malformed JSON", "config.json, line 2")
def config_malformed(desk: Desk) -> dict[str, Any]:
    desk.write("base/config.json", '{"model_type": "llama",\n "vocab_size": }')
    return {}


@case(ALL, "malformed JSON", "config.json", "list", "an object")
def config_a_list(desk: Desk) -> dict[str, Any]:
    desk.write("base/config.json", ["llama"])
    return {}


@case(ALL, "not a JSON text file", "config.json")
def config_garbage(desk: Desk) -> dict[str, Any]:
    desk.write("base/config.json", bytes(range(256)))
    return {}


@case(ALL, "family is not supported", "config.json", "'gpt_neox'", "llama", "qwen3")
def family_unknown(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", model_type="gpt_neox")
    return {}


@case(ALL, "not supported", "config.json", "attn_logit_softcapping = 50.0")
def config_key_unknown(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", attn_logit_softcapping=50.0)
    return {}


@case(ALL, "not supported", "hidden_act = 'gelu'", "'silu'")
def config_value_unknown(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", hidden_act="gelu")
    return {}


@case(ALL, "rope scaling is not supported", "yarn", "llama3")
def rope_unknown(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    return {}


@case(ALL, "config.json: hidden_size", "'192'", "int")
def config_of_the_wrong_kind(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", hidden_size="192")
    return {}


@case(ALL, "do not fit config.json", "model.embed_tokens.weight is [1024, 192], config.json says [2048, 192]")
def shapes_do_not_fit(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", vocab_size=2048)
    return {}


@case(ALL, "do not fit config.json", "model.layers.2.self_attn.q_proj.weight is missing", "more")
def layers_missing(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", num_hidden_layers=3)
    return {}


@case(ALL, "do not fit config.json", "model.layers.1.input_layernorm.weight is not a tensor of a llama model", "more")
def layers_extra(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", num_hidden_layers=1)
    return {}


@case(ALL, "ties the head", "where:  base", "tie_word_embeddings")
def tied_but_different(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", tie_word_embeddings=True)
    return {}


@case(ALL, "no weights", "where:  base", "model.safetensors")
def weights_missing(desk: Desk) -> dict[str, Any]:
    (desk.base / SINGLE).unlink()
    return {}


@case(ALL, "no weights", "pytorch_model.bin", "safetensors")
def weights_pickled(desk: Desk) -> dict[str, Any]:
    (desk.base / SINGLE).rename(desk.base / "pytorch_model.bin")
    return {}


@case(ALL, "not a valid safetensors file", "model.safetensors", "truncated", "again")
def weights_truncated(desk: Desk) -> dict[str, Any]:
    os.truncate(desk.base / SINGLE, 1_000_000)
    return {}


@case(ALL, "not a valid safetensors file", "model.safetensors", "again")
def weights_empty(desk: Desk) -> dict[str, Any]:
    desk.write("base/model.safetensors", b"")
    return {}


@case(ALL, "not a valid safetensors file", "model.safetensors", "again")
def weights_a_web_page(desk: Desk) -> dict[str, Any]:
    desk.write("base/model.safetensors", "<!DOCTYPE html><html><body>404: not found</body></html>")
    return {}


@case(ALL, "not a valid safetensors file", "model.safetensors", "a header that does not parse")
def weights_with_a_corrupt_header(desk: Desk) -> dict[str, Any]:
    content = bytearray((desk.base / SINGLE).read_bytes())
    content[8:12] = b"\xff\x00\xff\x00"
    desk.write("base/model.safetensors", bytes(content))
    return {}


@case(ALL, "unsupported dtype", "model.safetensors: ", "F8_E4M3")
def weights_of_another_dtype(desk: Desk) -> dict[str, Any]:
    header = json.dumps({"lm_head.weight": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    desk.write("base/model.safetensors", struct.pack("<Q", len(header)) + header + b"ab")
    return {}


@case(ALL, "a weights file is missing", "model-00002-of-00002.safetensors", "download")
def shard_missing(desk: Desk) -> dict[str, Any]:
    weight_map = dict.fromkeys(Checkpoint(desk.base).tensors, "model-00001-of-00002.safetensors")
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (desk.base / SINGLE).rename(desk.base / "model-00001-of-00002.safetensors")
    desk.write(f"base/{INDEX}", {"weight_map": weight_map})
    return {}


@case(ALL, "the weights index", INDEX, "ghost.weight (index: model.safetensors, found: nowhere)")
def index_with_a_ghost(desk: Desk) -> dict[str, Any]:
    names = [*Checkpoint(desk.base).tensors, "ghost.weight"]
    desk.write(f"base/{INDEX}", {"weight_map": dict.fromkeys(names, SINGLE)})
    return {}


@case(ALL, "no weight_map", INDEX)
def index_without_a_map(desk: Desk) -> dict[str, Any]:
    desk.write(f"base/{INDEX}", {"metadata": {}})
    return {}


@case(RUNNING, "no tokenizer", "where:  base", "tokenizer.model")
def tokenizer_missing(desk: Desk) -> dict[str, Any]:
    (desk.base / "tokenizer.model").unlink()
    return {}


@case((MERGE,), "no tokenizer", "where:  base", "tokenizer.model")
def tokenizer_missing_for_the_verification(desk: Desk) -> dict[str, Any]:
    (desk.base / "tokenizer.model").unlink()
    return {"verify": "true"}


@case(RUNNING, "not a sentencepiece model", "tokenizer.model")
def tokenizer_garbage(desk: Desk) -> dict[str, Any]:
    desk.write("base/tokenizer.model", bytes(range(256)) * 4)
    return {}


@case(RUNNING, "tokenizer.json cannot be read")
def tokenizer_json_garbage(desk: Desk) -> dict[str, Any]:
    desk.write("base/tokenizer.json", '{"version": "1.0", ')
    return {}


@case(RUNNING, "tokenizer_config.json", "JSON")
def tokenizer_config_garbage(desk: Desk) -> dict[str, Any]:
    desk.write("base/tokenizer_config.json", "[]")
    return {}


@case(RUNNING, "tokenizer_config.json", "'first'")
def tokenizer_config_of_the_wrong_shape(desk: Desk) -> dict[str, Any]:
    desk.edit("base/tokenizer_config.json", added_tokens_decoder={"first": {"content": "<a>"}})
    return {}


@case(RUNNING, "chat_template.jinja")
def chat_template_garbage(desk: Desk) -> dict[str, Any]:
    desk.write("base/chat_template.jinja", bytes(range(256)))
    return {}


@case(RUNNING, "more ids than the model", "1024 ids", "1023")
def tokenizer_of_another_model(desk: Desk) -> dict[str, Any]:
    desk.edit("base/config.json", vocab_size=1023)
    desk.retensor(f"base/{SINGLE}", lambda tensors: tensors.update({
        name: tensors[name][:1023].clone() for name in ("lm_head.weight", "model.embed_tokens.weight")
    }))  # fmt: skip
    return {}


# --- the adapter ------------------------------------------------------------------------------------------------------


def adapted(desk: Desk, **flags: Any) -> dict[str, Any]:
    return {"lora_path": "adapter", **flags}


@case(ADAPTED, "no adapter_config.json", "nowhere", "--lora_path")
def adapter_missing(desk: Desk) -> dict[str, Any]:
    return adapted(desk, lora_path="nowhere")


@case(ADAPTED, "no adapter_config.json", "void", "--lora_path")
def adapter_empty(desk: Desk) -> dict[str, Any]:
    (desk.path / "void").mkdir()
    return adapted(desk, lora_path="void")


@case(ADAPTED, "no adapter_config.json", "adapter_model.safetensors", "the directory")
def adapter_a_file(desk: Desk) -> dict[str, Any]:
    return adapted(desk, lora_path=f"adapter/{WEIGHTS}")


@case(ADAPTED, "no adapter_config.json", "where:  copy", "--checkpoint_dir")
def adapter_a_model(desk: Desk) -> dict[str, Any]:
    shutil.copytree(desk.base, desk.path / "copy")
    return adapted(desk, lora_path="copy")


@case(ADAPTED, "a weights file is missing", "adapter_model.safetensors")
def adapter_without_weights(desk: Desk) -> dict[str, Any]:
    (desk.adapter / WEIGHTS).unlink()
    return adapted(desk)


@case(ADAPTED, "pickled", "adapter_model.bin", "PEFT")
def adapter_pickled(desk: Desk) -> dict[str, Any]:
    (desk.adapter / WEIGHTS).rename(desk.adapter / "adapter_model.bin")
    return adapted(desk)


@case(ADAPTED, "not a valid safetensors file", "adapter_model.safetensors")
def adapter_truncated(desk: Desk) -> dict[str, Any]:
    os.truncate(desk.adapter / WEIGHTS, 1000)
    return adapted(desk)


@case(ADAPTED, "malformed JSON", "adapter_config.json, line 1")
def adapter_config_malformed(desk: Desk) -> dict[str, Any]:
    desk.write(f"adapter/{CONFIG}", "{'r': 8}")
    return adapted(desk)


@case(ADAPTED, "another base", "where:  adapter", "base (fingerprint ", "models/of-somebody (fingerprint ffff")
def adapter_of_another_base(desk: Desk) -> dict[str, Any]:
    desk.edit(f"adapter/{RECORD}", base_fingerprint="f" * 64, base_name="models/of-somebody")
    return adapted(desk)


@case(ADAPTED, "do not fit", "q_proj.lora_A.weight is [2, 192]", "[2, 96]", "base", "models/of-somebody")
def adapter_of_another_shape_of_base(desk: Desk) -> dict[str, Any]:
    other = desk.path / "other"
    shutil.copytree(desk.base, other)
    desk.edit("other/config.json", hidden_size=96)
    shapes = {name: tuple(p.shape) for name, p in meta_decoder(ModelConfig.load(other)).named_parameters()}
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, other / SINGLE)
    (desk.adapter / RECORD).unlink()  # as PEFT's adapters: nothing but the shapes tells
    desk.edit(f"adapter/{CONFIG}", base_model_name_or_path="models/of-somebody")
    shutil.rmtree(desk.base)
    other.rename(desk.base)
    return adapted(desk)


@case(ADAPTED, "do not fit its config", "lora_A.weight is [2, 192]", "say [4, 192]")
def adapter_of_another_rank(desk: Desk) -> dict[str, Any]:
    desk.edit(f"adapter/{CONFIG}", r=4)
    return adapted(desk)


@case(ADAPTED, "do not fit its config", f"{Q} is missing", WEIGHTS)
def adapter_with_missing_keys(desk: Desk) -> dict[str, Any]:
    desk.retensor(f"adapter/{WEIGHTS}", lambda tensors: tensors.pop(Q))
    return adapted(desk)


@case(ADAPTED, "do not fit its config", "k_proj.lora_A.weight is not expected", WEIGHTS)
def adapter_with_extra_keys(desk: Desk) -> dict[str, Any]:
    desk.retensor(
        f"adapter/{WEIGHTS}", lambda tensors: tensors.update({Q.replace("q_proj", "k_proj"): torch.zeros(2, 192)})
    )
    return adapted(desk)


@case(ADAPTED, "not supported", "use_dora = True", CONFIG)
def adapter_with_dora(desk: Desk) -> dict[str, Any]:
    desk.edit(f"adapter/{CONFIG}", use_dora=True)
    return adapted(desk)


@case(ADAPTED, "not a LoRA adapter", "'IA3'", CONFIG)
def adapter_of_another_kind(desk: Desk) -> dict[str, Any]:
    desk.edit(f"adapter/{CONFIG}", peft_type="IA3")
    return adapted(desk)


@case(ADAPTED, "match nothing", "c_attn", CONFIG)
def adapter_of_another_family(desk: Desk) -> dict[str, Any]:
    desk.edit(f"adapter/{CONFIG}", target_modules=["c_attn"])
    return adapted(desk)


@case(ADAPTED, "rank out of range", CONFIG, "0")
def adapter_of_rank_0(desk: Desk) -> dict[str, Any]:
    desk.edit(f"adapter/{CONFIG}", r=0)
    return adapted(desk)


@case(ADAPTED, "wrong kind", "lora_alpha = 'sixteen'", CONFIG)
def adapter_with_a_word_for_alpha(desk: Desk) -> dict[str, Any]:
    desk.edit(f"adapter/{CONFIG}", lora_alpha="sixteen")
    return adapted(desk)


@case(ADAPTED, "a record that litlora did not write", RECORD)
def adapter_with_a_strange_record(desk: Desk) -> dict[str, Any]:
    desk.write(f"adapter/{RECORD}", {"made_by": "hand"})
    return adapted(desk)


@case(ADAPTED, "a record that litlora did not write", RECORD, "base_fingerprint")
def adapter_with_numbers_in_its_record(desk: Desk) -> dict[str, Any]:
    desk.edit(f"adapter/{RECORD}", base_fingerprint=7, prompt_style=None)
    return adapted(desk)


@case((GENERATE, MERGE, VALIDATE), "--weights", "3 weights, 2 adapters")
def weights_of_another_number(desk: Desk) -> dict[str, Any]:
    return adapted(desk, lora_path=["adapter", "adapter"], weights="0.5,0.3,0.2")


@case((GENERATE, MERGE, VALIDATE), "--weights", "half", "0.7,0.3")
def weights_that_are_no_numbers(desk: Desk) -> dict[str, Any]:
    return adapted(desk, weights="half")


@case((GENERATE, MERGE, VALIDATE), "--weights", "nan")
def weights_that_are_not_finite(desk: Desk) -> dict[str, Any]:
    return adapted(desk, weights="nan")


@case((GENERATE, VALIDATE), "different prompt styles", "adapter", "second", "--prompt_style")
def adapters_that_disagree(desk: Desk) -> dict[str, Any]:
    shutil.copytree(desk.adapter, desk.path / "second")
    desk.edit(f"second/{RECORD}", prompt_style="none")
    return adapted(desk, lora_path=["adapter", "second"])


@case((FINETUNE,), "contradict", "--lora_r 8", "lora_r 2", "--lora_path adapter")
def adapter_that_the_flags_contradict(desk: Desk) -> dict[str, Any]:
    return adapted(desk, lora_r=8)


# --- data -------------------------------------------------------------------------------------------------------------


@case(DATA, "does not exist", "nowhere.json")
def data_missing(desk: Desk) -> dict[str, Any]:
    return {"data_path": "nowhere.json"}


@case(DATA, "is a directory", "where:  base")
def data_a_directory(desk: Desk) -> dict[str, Any]:
    return {"data_path": "base"}


@case(DATA, "kind of data file is unknown", "rows.parquet", ".jsonl")
def data_of_an_unknown_kind(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.parquet", "PAR1")}


@case(DATA, "could not be fetched", "tatsu", "alpaca", "--data_path")
def data_not_to_be_fetched(desk: Desk) -> dict[str, Any]:
    def fail(**_: object) -> str:
        raise OSError("tatsu: no route to host")

    import huggingface_hub

    desk.patch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert "alpaca" in hub.HUB_FILES
    return {"data_path": None}


@case(DATA, "--data json needs a file", "--data_path")
def data_not_given(desk: Desk) -> dict[str, Any]:
    return {"data": "json", "data_path": None}


@case(DATA, "is empty", "rows.json")
def data_empty(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.json", "")}


@case(DATA, "no rows", "rows.json")
def data_an_empty_list(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.json", [])}


@case(DATA, "malformed JSON", "rows.json, line 4")
def data_malformed(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.json", '[\n{"instruction": "a", "output": "b"},\n{"instruction": \n]')}


@case(DATA, "malformed JSON", "rows.jsonl, line 2", ", column ")
def data_lines_malformed(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": ')}


@case(DATA, "not UTF-8", "rows.json, byte 128")
def data_garbage(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.json", bytes(range(256)))}


@case(DATA, "malformed JSON", "rows.jsonl, line 1")
def data_of_nul_bytes(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.jsonl", bytes(64))}


@case(DATA, "malformed CSV", "rows.csv, line ")
def data_csv_of_uneven_rows(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.csv", "instruction,input,output\na,b,c\na,b\n"), "data": "json"}


@case(DATA, "2 of 2 rows cannot be used", "rows.csv", "line 2", '"instruction"', "question, answer")
def data_csv_of_another_header(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.csv", "question,answer\na,b\nc,d\n"), "data": "json"}


@case(DATA, "1 of 3 rows cannot be used", "rows.json", 'row 2 lacks the column "output"', "instruction, input")
def data_row_lacks_a_column(desk: Desk) -> dict[str, Any]:
    fine = {"instruction": "a", "output": "b"}
    return {"data_path": desk.write("rows.json", [fine, {"instruction": "a", "input": ""}, fine])}


@case(DATA, "row 1 is a list, not an object", "rows.json")
def data_rows_are_lists(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.json", [["a", "b"], ["c", "d"]])}


@case(DATA, "not a list of rows", "rows.json", "dict")
def data_of_columns(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.json", '{\n"instruction": ["a"],\n"output": ["b"]\n}')}


@case(DATA, 'row 1 has a number in the column "output", not text', "rows.json")
def data_of_numbers(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.json", [{"instruction": "a", "output": 21}])}


@case(DATA, "row 1", "broken Unicode", "rows.json")
def data_with_half_a_character(desk: Desk) -> dict[str, Any]:
    return {"data_path": desk.write("rows.json", [{"instruction": "a\ud83d", "output": "b"}])}


@case(DATA, "row 1", "no assistant turn")
def data_conversation_without_an_answer(desk: Desk) -> dict[str, Any]:
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    return {"data_path": desk.write("rows.json", rows), "data": "json"}


@case(DATA, "no chat template", "--prompt_style")
def data_conversation_without_a_template(desk: Desk) -> dict[str, Any]:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    return {"data_path": desk.write("rows.json", rows), "data": "json", "prompt_style": "chat"}


@case(DATA, "all rows are overlong", "--max_seq_length", "40 rows", "truncate")
def data_all_overlong(desk: Desk) -> dict[str, Any]:
    return {"max_seq_length": 8, "on_overlong": "drop", "val_path": desk.path / "rows.json"}


@case(DATA, "row ", "is too long", "at most 8", "--max_seq_length")
def data_overlong_row(desk: Desk) -> dict[str, Any]:
    return {"max_seq_length": 8, "on_overlong": "error"}


@case(DATA, "every label is masked", "--max_seq_length")
def data_all_masked(desk: Desk) -> dict[str, Any]:
    return {"max_seq_length": 8, "mask_prompt": "true"}


def masked_but(desk: Desk, seed: int, validation: bool) -> Path:
    """20 rows of which those that train, or those that validate, hold nothing but a prompt within 64 tokens."""
    from litlora.data import split

    kept = set(split(20, 4, seed)[int(validation)])
    long = "many words " * 40
    return desk.write(
        "rows.json", [{"instruction": "a" if i in kept else long, "input": "", "output": "b"} for i in range(20)]
    )


@case((FINETUNE,), "every label", "masked", "rows.json", "--max_seq_length")
def data_all_that_train_masked(desk: Desk) -> dict[str, Any]:
    data = masked_but(desk, 1337, validation=True)
    return {"data_path": data, "max_seq_length": 110, "mask_prompt": "true", "val_split": 4}


@case((FINETUNE, VALIDATE), "every label", "masked", "--max_seq_length")
def data_all_that_validate_masked(desk: Desk) -> dict[str, Any]:
    data = masked_but(desk, 1337, validation=False)
    return {"data_path": data, "max_seq_length": 110, "mask_prompt": "true", "val_split": 4}


@case(DATA, "needs two tokens", "--max_seq_length", "1")
def max_seq_length_1(desk: Desk) -> dict[str, Any]:
    return {"max_seq_length": 1}


@case(DATA, "leaves no row to train on", "--val_split", "40 of 40 rows")
def val_split_of_all(desk: Desk) -> dict[str, Any]:
    return {"val_split": 40}


@case(DATA, "does not exist", "nowhere.json")
def val_path_missing(desk: Desk) -> dict[str, Any]:
    return {"val_path": "nowhere.json"}


@case((VALIDATE,), "no row to validate on", "--val_split")
def val_split_of_none(desk: Desk) -> dict[str, Any]:
    return {"val_split": 0}


# --- prompts ----------------------------------------------------------------------------------------------------------


@case((GENERATE,), "longer than the model's context", "--prompt", "tokens", "at most 511")
def prompt_too_long(desk: Desk) -> dict[str, Any]:
    return {"prompt": "many words " * 600}


@case((GENERATE,), "longer than the model's context", "questions.jsonl, line 2", "at most 511")
def prompt_of_a_file_too_long(desk: Desk) -> dict[str, Any]:
    lines = [json.dumps({"prompt": text}) for text in ("short", "many words " * 600)]
    return {"prompt": None, "prompt_file": desk.write("questions.jsonl", "\n".join(lines))}


@case((FINETUNE,), "longer than the model's context", "--sample_prompt", "at most 511")
def sample_prompt_too_long(desk: Desk) -> dict[str, Any]:
    return {"sample_prompt": "many words " * 600}


@case((GENERATE,), "does not exist", "nowhere.txt", "--prompt_file")
def prompt_file_missing(desk: Desk) -> dict[str, Any]:
    return {"prompt": None, "prompt_file": "nowhere.txt"}


@case((GENERATE,), "is a directory", "where:  base")
def prompt_file_a_directory(desk: Desk) -> dict[str, Any]:
    return {"prompt": None, "prompt_file": "base"}


@case((GENERATE,), "malformed JSON", "questions.jsonl, line 2")
def prompt_file_malformed(desk: Desk) -> dict[str, Any]:
    return {"prompt": None, "prompt_file": desk.write("questions.jsonl", '{"prompt": "a"}\n{"prompt"')}


@case((GENERATE,), "no prompt", "questions.csv, line 2", "question", '"instruction"')
def prompt_file_of_other_columns(desk: Desk) -> dict[str, Any]:
    return {"prompt": None, "prompt_file": desk.write("questions.csv", "question\nWhy?\n")}


@case((GENERATE,), "stdin is empty", "--prompt_file")
def prompt_of_an_empty_stdin(desk: Desk) -> dict[str, Any]:
    desk.patch.setattr("sys.stdin", io.StringIO(""))
    return {"prompt": None}


@case((GENERATE,), "stdin is not UTF-8")
def prompt_of_a_binary_stdin(desk: Desk) -> dict[str, Any]:
    desk.patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(bytes(range(256))), encoding="utf-8"))
    return {"prompt": None}


@case((GENERATE,), "broken Unicode", "--prompt")
def prompt_with_half_a_character(desk: Desk) -> dict[str, Any]:
    return {"prompt": "a\udcff"}


@case((FINETUNE,), "broken Unicode", "--sample_prompt")
def sample_prompt_with_half_a_character(desk: Desk) -> dict[str, Any]:
    return {"sample_prompt": "a\udcff"}


@case(RUNNING, "unknown prompt style", "--prompt_style", "alpacka", "alpaca, none, chat")
def prompt_style_unknown(desk: Desk) -> dict[str, Any]:
    return {"prompt_style": "alpacka"}


@case(RUNNING, "unknown prompt style", "--prompt_style", "template file")
def prompt_style_too_long_for_a_file(desk: Desk) -> dict[str, Any]:
    return {"prompt_style": "Answer the question. " * 50}


@case(RUNNING, "never names the instruction", "style.txt")
def prompt_style_without_instruction(desk: Desk) -> dict[str, Any]:
    return {"prompt_style": desk.write("style.txt", "Answer!")}


@case(RUNNING, "no chat template", "where:  base", "--prompt_style alpaca")
def prompt_style_chat_without_a_template(desk: Desk) -> dict[str, Any]:
    return {"prompt_style": "chat"}


@case(RUNNING, "chat template", "jinja", "where:  base")
def chat_template_broken(desk: Desk) -> dict[str, Any]:
    desk.write("base/chat_template.jinja", CHATML[:-5])
    return {"prompt_style": "chat"}


@case((MERGE,), "does not exist", "nowhere.txt")
def verify_prompts_missing(desk: Desk) -> dict[str, Any]:
    return {"verify": "true", "verify_prompts": "nowhere.txt"}


@case((MERGE,), "--verify_prompts without --verify true")
def verify_prompts_alone(desk: Desk) -> dict[str, Any]:
    return {"verify_prompts": desk.write("p.txt", "a")}


# --- flags ------------------------------------------------------------------------------------------------------------


def flags(commands: tuple[str, ...], given: dict[str, Any], *said: str) -> None:
    """A case that is a matter of flags alone."""
    name = " ".join(f"{flag}={value}" for flag, value in given.items())
    for command in commands:
        CASES.append(pytest.param(command, lambda _: given, said, id=f"{name}-{command}"))


OFF = {"lora_query": "false", "lora_value": "false"}
flags((FINETUNE,), OFF, "no LoRA target", "--lora_query true", "--lora_head true")
for name, values, wanted in (
    ("lora_r", (0, -8), "at least 1"),
    ("lora_alpha", (0, -16, ".nan", ".inf"), "above 0"),
    ("lora_dropout", (1, -0.1, ".nan"), "0 <= p < 1"),
    ("learning_rate", (0, ".nan", ".inf", -1e-4), "above 0"),
    ("weight_decay", (-1, ".nan", ".inf"), "0 or more"),
    ("max_norm", (0, ".nan"), "above 0"),
    ("warmup_steps", (-1,), "0 or more"),
    ("batch_size", (0,), "at least 1"),
    ("epochs", (0,), "at least 1"),
    ("max_steps", (0,), "at least 1"),
    ("micro_batch_size", (-4,), "at least 1"),
    ("eval_interval", (0,), "at least 1"),
    ("log_interval", (0,), "at least 1"),
    ("devices", (2,), "not supported yet"),
):
    for value in values:
        flags((FINETUNE,), {name: value}, name, str(value).removeprefix("."), wanted)
flags(DATA, {"micro_batch_tokens": -1}, "--micro_batch_tokens", "-1", "at least 1")
flags(DATA, {"max_seq_length": 0}, "--max_seq_length", "0")
flags(DATA, {"val_split": ".nan"}, "--val_split", "nan", "a share between 0 and 1")
flags(DATA, {"val_split": ".inf"}, "--val_split", "inf")
flags(DATA, {"val_split": -0.1}, "--val_split", "-0.1")
flags(DATA, {"val_split": 2.5}, "--val_split", "2.5")
flags(DATA, {"seed": -1}, "--seed", "-1", "0 to ")
flags(RUNNING, {"seed": 2**70}, "--seed", str(2**70), "0 to ")
flags((FINETUNE,), {"micro_batch_tokens": 64, "micro_batch_size": 2}, "micro-batch", "--micro_batch_size")
flags(DATA, {"on_overlong": "cut"}, "--on_overlong", "cut", "truncate")
flags(DATA, {"data": "alpacca"}, "--data", "alpacca", "dolly")
flags((FINETUNE,), {"activation_checkpointing": "lean"}, "--activation_checkpointing", "lean", "selective")
flags((FINETUNE,), {"activation_checkpointing": "full:7"}, "--activation_checkpointing", "full:7", "1 to 2 blocks")
flags((FINETUNE,), {"optimizer": "adan"}, "--optimizer", "adan", "adamw_8bit")
flags((FINETUNE,), {"lr_schedule": "cosin"}, "--lr_schedule", "cosin", "linear")
flags((FINETUNE,), {"lora_r": "eight"}, "--lora_r", "eight", "int")
flags((FINETUNE,), {"max_norm": "nan"}, "--max_norm", "nan", "float, null")
flags((FINETUNE,), {"lora_dropout": "half"}, "--lora_dropout", "half", "float")
flags((FINETUNE,), {"lora_r": 8.5}, "--lora_r", "8.5", "int")
flags((FINETUNE,), {"lora_mlp": "maybe"}, "--lora_mlp", "maybe", "bool")
flags((GENERATE,), {"temperature": -1}, "--temperature", "-1")
flags((GENERATE,), {"temperature": ".nan"}, "--temperature", "nan")
flags((GENERATE,), {"top_p": 1.5}, "--top_p", "1.5")
flags((GENERATE,), {"top_k": -1}, "--top_k", "-1")
flags((GENERATE,), {"repetition_penalty": 0}, "--repetition_penalty", "0")
flags((GENERATE,), {"max_new_tokens": 0}, "--max_new_tokens", "0")
flags((GENERATE,), {"batch_size": 0}, "--batch_size", "0")
flags((GENERATE,), {"num_samples": -1}, "--num_samples", "-1")
flags((GENERATE,), {"stop": ""}, "empty stop string")
flags((MERGE,), {"dtype": "float8"}, "--dtype", "float8", "bfloat16")
flags((MERGE,), {"base_rounding": "nf4"}, "--base_rounding", "nf4", "bnb.nf4-dq")
flags((MERGE,), {"lora_path": None}, "required", "--lora_path")
flags((MERGE,), {"out_dir": None}, "required", "--out_dir")
flags(ALL, {"checkpoint_dir": None}, "required", "--checkpoint_dir")
flags(RUNNING, {"quantize": "bnb.nf5"}, "--quantize", "bnb.nf5", "bnb.nf4")
flags(RUNNING, {"precision": "fp16"}, "--precision", "fp16", "bf16-true")
flags(RUNNING, {"accelerator": "gpu"}, "--accelerator", "gpu", "cuda")
flags((FINETUNE,), {"lora_alfa": 16}, "unknown flag", "lora_alfa", "did you mean --lora_alpha?")
flags((FINETUNE,), {"lora-r": 16}, "unknown flag", "lora-r", "did you mean --lora_r?")
flags(RUNNING, {"quantise": "bnb.nf4"}, "unknown flag", "quantise", "did you mean --quantize?")
flags((MERGE,), {"lora_paths": "a"}, "unknown flag", "did you mean --lora_path?")
flags((GENERATE,), {"prompt": "a", "prompt_file": "rows.json"}, "two sources", "--prompt_file")
flags(ALL, {"config": "nowhere.yaml"}, "nowhere.yaml")
flags(ALL, {"config": "base"}, "config", "base")


@case(ALL, "unknown flag or config key", "chekpoint_dir", "did you mean --checkpoint_dir?")
def yaml_key_unknown(desk: Desk) -> dict[str, Any]:
    return {"config": desk.write("run.yaml", "chekpoint_dir: base\n")}


@case(ALL, "line 2", "run.yaml")
def yaml_malformed(desk: Desk) -> dict[str, Any]:
    return {"config": desk.write("run.yaml", "precision: [1\n")}


@case(ALL, "run.yaml")
def yaml_a_list(desk: Desk) -> dict[str, Any]:
    return {"config": desk.write("run.yaml", "- precision\n- 32-true\n")}


@case(ALL, "run.yaml")
def yaml_garbage(desk: Desk) -> dict[str, Any]:
    return {"config": desk.write("run.yaml", bytes(range(256)))}


@case((FINETUNE,), "--lora_r", "many", "int")
def yaml_value_of_the_wrong_kind(desk: Desk) -> dict[str, Any]:
    return {"config": desk.write("run.yaml", "lora_r: many\n")}


@case(WRITING, "--out_dir", "NUL")
def yaml_path_with_a_nul(desk: Desk) -> dict[str, Any]:
    return {"config": desk.write("run.yaml", 'out_dir: "a\\0b"\n'), "out_dir": None}


# --- the machine ------------------------------------------------------------------------------------------------------


def broken_library(*_: object, **__: object) -> None:
    raise OSError("libbitsandbytes_cpu.so: cannot open shared object file")


@case(RUNNING, "this machine cannot quantize", "--quantize bnb.nf4", "libbitsandbytes_cpu.so", "leave --quantize out")
def quantize_cannot(desk: Desk) -> dict[str, Any]:
    desk.patch.setattr(frozen, "_quantize", broken_library)
    return {"quantize": "bnb.nf4"}


@case((MERGE,), "this machine cannot quantize", "bnb.nf4-dq", "libbitsandbytes_cpu.so", "--base_rounding")
def base_rounding_cannot(desk: Desk) -> dict[str, Any]:
    desk.patch.setattr(frozen, "_quantize", broken_library)
    desk.patch.setattr(merge, "_quantizer", merge._quantizer.__wrapped__)  # what other tests made is not asked
    return {"base_rounding": "bnb.nf4-dq"}


@case((FINETUNE,), "--optimizer adamw_8bit", "libbitsandbytes_cpu.so", "--optimizer adamw")
def optimizer_cannot(desk: Desk) -> dict[str, Any]:
    import bitsandbytes

    desk.patch.setattr(bitsandbytes.optim.AdamW8bit, "__init__", broken_library)
    return {"optimizer": "adamw_8bit"}


@case(RUNNING, "no bf16", "--precision bf16-true", "Tesla T4", "--precision 32-true")
def bf16_cannot(desk: Desk) -> dict[str, Any]:
    desk.patch.setattr(precision, "has_bf16", lambda _: False)
    desk.patch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    return {"precision": "bf16-true"}


@case(RUNNING, "no CUDA GPU", "--accelerator cuda", "--accelerator cpu")
def no_gpu(desk: Desk) -> dict[str, Any]:
    desk.patch.setattr(torch.cuda, "is_available", lambda: False)
    return {"accelerator": "cuda"}


# --- where results go -------------------------------------------------------------------------------------------------


@case(WRITING, "file", "where:", "out")
def out_dir_a_file(desk: Desk) -> dict[str, Any]:
    desk.write("out", "precious")
    return {"overwrite": "true"}


@case(WRITING, "file", "notes/deep/out", "notes is a file")
def out_dir_under_a_file(desk: Desk) -> dict[str, Any]:
    desk.write("notes", "precious")
    return {"out_dir": "notes/deep/out", "overwrite": "true"}


@case(WRITING, "not empty", "out", "--overwrite true")
def out_dir_not_empty(desk: Desk) -> dict[str, Any]:
    desk.write("out/thesis.txt", "precious")
    return {}


@case(WRITING, "--checkpoint_dir", "where:  base", "another --out_dir")
def out_dir_the_base(desk: Desk) -> dict[str, Any]:
    return {"out_dir": "base", "overwrite": "true"}


@case(WRITING, "--lora_path", "where:  ", "another --out_dir")
def out_dir_around_the_adapter(desk: Desk) -> dict[str, Any]:
    desk.out.mkdir()
    desk.adapter.rename(desk.out / "last")
    return {"lora_path": "out/last", "overwrite": "true"}


@case(WRITING, "not writable", "where:  ")
def out_dir_not_writable(desk: Desk) -> dict[str, Any]:
    desk.patch.setattr(os, "access", lambda *_, **__: False)
    return {}


@case(WRITING, "not writable", "where:  ", "locked")
def out_dir_locked(desk: Desk) -> dict[str, Any]:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (desk.path / "locked").mkdir(mode=0o500)
    return {"out_dir": "locked/out"}


@case(WRITING, "File name too long", "x" * 100)
def out_dir_too_long(desk: Desk) -> dict[str, Any]:
    return {"out_dir": "x" * 300}


@case(WRITING, "too little free disk", "0.00 GB free", "free some space")
def disk_too_small(desk: Desk) -> dict[str, Any]:
    usage = shutil.disk_usage(desk.path)
    desk.patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    desk.patch.setattr(finetune_job, "load_data", lambda *_: pytest.fail("the data were read"))
    return {}


@case((GENERATE,), "exists", "answers.jsonl", "--overwrite true")
def out_file_there(desk: Desk) -> dict[str, Any]:
    return {"out_file": desk.write("answers.jsonl", "precious")}


@case((GENERATE,), "exists", "where:  base", "another --out_file")
def out_file_a_directory(desk: Desk) -> dict[str, Any]:
    return {"out_file": "base", "overwrite": "true"}


@case((GENERATE,), "cannot be written", "rows.json/answers.jsonl")
def out_file_under_a_file(desk: Desk) -> dict[str, Any]:
    return {"out_file": "rows.json/answers.jsonl"}


@case((GENERATE,), "--prompt_file", "questions.txt", "another --out_file")
def out_file_the_prompts(desk: Desk) -> dict[str, Any]:
    questions = desk.write("questions.txt", "Why?")
    return {"prompt": None, "prompt_file": questions, "out_file": questions, "overwrite": "true"}


@pytest.mark.parametrize(("command", "prepare", "said"), CASES)
def test_is_refused(
    command: str, prepare: Prepare, said: tuple[str, ...], desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = prepare(desk)
    message = refusal(desk, capsys, *desk.line(command, flags))
    for text in said:
        assert text in message, message


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "secret.json"),
            2,
            "error: Permission denied\n  where:  secret",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: No space left on device\n  fix:    free some space",
        ),
        (OSError("a library does not load"), 1, "internal error: OSError: a library does not load"),
    ],
    ids=str,
)
def test_what_the_system_refuses(
    error: OSError, code: int, said: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object) -> None:
        raise error

    desk.patch.setattr(validate, "run", run)
    assert call(desk.line(VALIDATE, {})) == code
    assert capsys.readouterr().err.startswith(said)


# --- a GPU that is too small ------------------------------------------------------------------------------------------


@dataclass
class Card:
    """What torch says of a GPU."""

    total_memory: int = 8_000_000_000


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.fixture
def card(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """The GPU's queries answered; the model may be loaded."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Card())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 6_000_000_000)
    for module in (finetune_lora, models):
        monkeypatch.setattr(module, "load_model", load_model)
    return desk


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({}, ""),
        ({"micro_batch_tokens": 90}, ""),
        ({"micro_batch_tokens": 73, "activation_checkpointing": "full:1"}, ""),
        ({"micro_batch_tokens": 73, "activation_checkpointing": "offload"}, ""),
        ({"micro_batch_tokens": 73, "activation_checkpointing": "offload", "quantize": "bnb.nf4"}, ""),
        ({"micro_batch_size": 8}, "8 rows, "),
        ({"micro_batch_size": 1}, "1 rows, "),
    ],
    ids=str,
)
def test_out_of_memory_in_training_names_the_parts_and_flags_that_take_less(
    given: dict[str, Any], held: str, card: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    card.patch.setattr(finetune_lora, "train", out_of_memory)
    assert call(card.line(FINETUNE, given)) == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert message.startswith("out of memory on the GPU\n  where:  a card of 8.0 GB\n  got:    base weights ")
    assert f"the rest activations of {held}" in message, message
    advice = message.partition("fix:    ")[2].split("\n")[0].split()
    kept = {name: value for name, value in given.items() if "without" not in advice or f"--{name}" not in advice}
    flags = {name.removeprefix("--"): value for name, value in zip(advice[::2], advice[1::2], strict=False)}
    flags.pop("without", None)
    peaks, fp32 = [], {"precision": "32-true"}  # a CPU's
    for line in (card.line(FINETUNE, fp32 | given), card.line(FINETUNE, fp32 | kept | flags)):
        assert call(["plan", *line[1:], "--gpu", "80GB", "--json", "true"]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["peak"] - WORKSPACE)
    assert peaks[1] <= 0.9 * peaks[0], (advice, peaks)


@pytest.mark.parametrize(
    ("command", "given", "part", "fix"),
    [
        (FINETUNE, {}, "the weights of base", "--quantize bnb.nf4-dq"),
        (FINETUNE, {"quantize": "bnb.nf4"}, "the weights of base", "--accelerator cpu"),
        (GENERATE, {}, "the weights of base", "--quantize bnb.nf4-dq"),
        (GENERATE, {"quantize": "bnb.nf4"}, "the weights of base", "--accelerator cpu"),
        (VALIDATE, {}, "the weights of base", "--quantize bnb.nf4-dq"),
    ],
    ids=str,
)
def test_out_of_memory_while_loading(
    command: str, given: dict[str, Any], part: str, fix: str, card: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (finetune_lora, models):
        card.patch.setattr(module, "load_model", out_of_memory)
    message = refusal(card, capsys, *card.line(command, given))
    assert f"got:    {part}, with 6.00 GB held already" in message
    assert f"fix:    {fix}" in message


def test_out_of_memory_in_answers_and_in_validation(card: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    card.patch.setattr(generate, "answers", out_of_memory)
    message = refusal(card, capsys, *card.line(GENERATE, {"num_samples": 4}))
    assert "keys and values of 4 rows" in message
    assert "fix:    --batch_size 2" in message
    card.patch.setattr(validate, "validation_loss", out_of_memory)
    message = refusal(card, capsys, *card.line(VALIDATE, {"micro_batch_tokens": 512}))
    assert "activations of 117 tokens" in message  # all that there are
    assert "fix:    --micro_batch_tokens 58" in message


def test_a_validation_row_longer_than_the_context_is_not_asked(card: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """It is cut where it is validated on; as a sample to answer it leaves no room, and the next one is taken."""
    rows = [{"instruction": "many words " * 600, "output": "b"}, {"instruction": "Why so?", "output": "c"}]
    data = card.write("held.json", rows)
    assert call(card.line(FINETUNE, {"val_path": data, "max_steps": 1, "warmup_steps": 0})) == 0
    assert "'Why so?' -> " in capsys.readouterr().err
