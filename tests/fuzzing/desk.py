"""A desk with one small file of every kind that litlora reads, and a directory beside it that nothing may read."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_tokenizers import CHATML, json_tokenizer, sentencepiece_tokenizer
from torch import nn

from litlora.checkpoint import Checkpoint, write_checkpoint
from litlora.commands import finetune_lora
from litlora.config import ModelConfig
from litlora.data import PromptStyle, dataset, load_rows, prepare
from litlora.load import RandomWeights, expected_shapes, load_model, meta_decoder
from litlora.lora import LoRA, adapt, lora_modules
from litlora.peft_format import Record, save_adapter
from litlora.precision import RunPrecision
from litlora.resume import Conditions, Totals, save_checkpoint, trained_parameters
from litlora.tokenizer import Tokenizer

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 400, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1,
    "eos_token_id": [2], "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32", "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
CPU = torch.device("cpu")


def make_desk(root: Path) -> Path:
    """root/desk, and root/secret."""
    desk = root / "desk"
    desk.mkdir(parents=True)
    json_tokenizer(desk / "json", chat_template=CHATML, added_tokens_decoder={"0": {"content": "<|endoftext|>"}})
    sentencepiece_tokenizer(desk / "sp", add_bos_token=True, legacy=False)
    (desk / "sp" / "chat_template.jinja").write_text(CHATML)
    named = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "additional_special_tokens": []}
    _json(desk / "sp" / "special_tokens_map.json", named)
    _json(desk / "sp" / "added_tokens.json", {"<|im_end|>": 381})
    _weights(desk / "json", 10**9)
    _weights(desk / "sp", 9_000)
    _data(desk)
    _adapter(desk / "adapter", desk / "json")
    _adapter(desk / "own", desk / "json")  # with the settings of the run that made it
    (desk / "own" / "hyperparameters.yaml").write_text("data: alpaca\nmax_seq_length: 64\nmask_prompt: true\nseed: 3\n")
    _run(desk / "run", desk / "json")
    _stopped(desk)
    _meta(desk / "meta", desk / "sp" / "tokenizer.model")
    _llama3(desk / "llama3")
    status = (desk / "json" / "config.json").stat()
    stamp = {"digest": "0" * 64, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    record = {"repo_id": "a/b", "revision": "main", "commit": "0123", "files": {"config.json": stamp}}
    _json(desk / "json" / ".litlora-download.json", record)
    tokenizer = Tokenizer.load(desk / "json")
    rows = load_rows("alpaca", desk / "rows.json")
    cached = prepare(rows, tokenizer, PromptStyle.load("alpaca", tokenizer), max_seq_length=64, use_cache=False)
    dataset.save(cached, desk / "cached" / "rows.npz")
    secret = root / "secret"
    secret.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (secret / name).write_bytes((desk / "json" / name).read_bytes())
    (secret / "template.jinja").write_text("{{ instruction }} SECRET")
    (secret / "config.yaml").write_text("lora_r: 77\n")
    return desk


def _json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


def _weights(base: Path, shard_bytes: int) -> None:
    _json(base / "config.json", CONFIG)
    _json(base / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 0]})
    weights = RandomWeights(ModelConfig.load(base), torch.float32)
    entries = [(name, torch.float32, shape) for name, shape in expected_shapes(weights.config).items()]
    write_checkpoint(base, entries, weights.read, shard_bytes=shard_bytes)


def _data(desk: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": f"What is {i} + {i}?", "input": "" if i % 2 else "naïve", "output": f"{2 * i}"}
        for i in range(6)
    ]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chats = [{"messages": [*turns, {"role": "assistant", "content": f"Hello {i}"}]} for i in range(3)]
    share = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}] * 2
    _json(desk / "rows.json", rows)
    (desk / "chat.jsonl").write_text("\n".join(map(json.dumps, [*chats, *share])))
    cells = [f'"{row["instruction"]}",{row["input"]},"{row["output"]}"' for row in rows]
    (desk / "rows.csv").write_text("\n".join(["instruction,input,output", *cells]))
    (desk / "prompts.txt").write_text("Hello\n\nWhat is 1 + 1?\n")
    lines = [{"asked": {"seed": 1, "prompts": ["a", "b", "c"]}}, {"number": 1, "line": "b"}, {"number": 0, "line": "a"}]
    (desk / "answers.jsonl.part").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (desk / "style.jinja").write_text("Q: {{ instruction }}\n{% if input %}{{ input }}\n{% endif %}A: ")
    (desk / "texts").mkdir()
    (desk / "texts" / "a.txt").write_text("Once upon a time.\n\nThe end.\n")
    flags = {"checkpoint_dir": "json", "data_path": "rows.json", "lora_r": 4, "learning_rate": 3e-4}
    (desk / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in flags.items()))


def tiny_model(base: Path) -> nn.Module:
    """The base with a LoRA to train."""
    from litlora.load import Directory

    precision = RunPrecision("32-true", None, CPU)
    weights = Directory.open(base)
    model = load_model(weights, precision.quantizer, dtype=torch.float32, device=CPU)
    adapt(model, LoRA(r=2, alpha=4))
    return model


def _adapter(directory: Path, base: Path) -> None:
    model: nn.Module = meta_decoder(ModelConfig.load(base))
    lora = LoRA(r=2, alpha=4, rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={r".*\.v_proj": 8.0})
    adapt(model, lora)
    model.to_empty(device="cpu")
    for module in lora_modules(model).values():
        nn.init.constant_(module.lora_A.weight, 0.1)
        nn.init.constant_(module.lora_B.weight, 0.1)
    made = ("json", Checkpoint(base).fingerprint, None, False, "32-true", "own.jinja", "{{ instruction }}\n{{ input }}")
    directory.mkdir()
    save_adapter(directory, lora_modules(model), lora, Record(*made, "", 3, 1.5, "0"), torch.float32)


def _run(directory: Path, base: Path) -> None:
    """What a run leaves: settings, metrics, summary, samples, and a checkpoint."""
    directory.mkdir()
    (directory / "hyperparameters.yaml").write_text(yaml.safe_dump({"lora_r": 8, "data_path": "x", "out_dir": "y"}))
    metrics = "step,epoch,loss,val_loss,lr,seconds\n1,1,2.5,,0.001,0.1\n2,1,2.25,2.0,0.001,0.1\n"
    (directory / "metrics.csv").write_text(metrics)
    _json(directory / "summary.json", {"steps": 2, "val_loss": 2.0, "tokens_per_second": 99.5, "settings": {"a": 1}})
    (directory / "samples.jsonl").write_text(json.dumps({"step": 2, "prompt": "Hi", "answer": "Hello"}) + "\n")
    _json(directory / "rounding.json", {"variants": [{"name": "adapter on fp32", "val_loss": 2.0, "perplexity": 7.4}]})
    model = tiny_model(base)
    optimizer = torch.optim.AdamW(trained_parameters(model).values())
    for parameter in trained_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    conditions = Conditions({"lora_r": 2}, "a", "b", "cpu", {"micro_batch": 64}, {"torch": "2"})
    checkpoint = directory / "checkpoints" / "step-00000002"
    save_checkpoint(checkpoint, Totals(step=2), conditions, model, optimizer, CPU, metrics, [])


def finetuning(desk: Path, out_dir: Path) -> finetune_lora.Args:
    """A run of three steps, with a checkpoint and a validation after each."""
    return finetune_lora.Args(
        checkpoint_dir=desk / "json", data_path=desk / "rows.json", out_dir=out_dir, accelerator="cpu", max_steps=3,
        batch_size=2, warmup_steps=0, save_interval=1, eval_interval=1, val_split=2, epochs=2, keep_last=3,
        max_seq_length=64, resume="auto", quiet=True,
    )  # fmt: skip


def _stopped(desk: Path) -> None:
    """That run, as if it had been killed after its second step."""
    run = desk / "stopped"
    finetune_lora.run(finetuning(desk, run))
    (run / "summary.json").unlink()
    for step in (1, 3):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")


def _meta(directory: Path, tokenizer: Path) -> None:
    """Two shards of a Llama 2."""
    dim, heads, vocab, ffn = 16, 2, 384, 24
    directory.mkdir()
    params = {"dim": dim, "n_layers": 1, "n_heads": heads, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1}
    _json(directory / "params.json", params)
    (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    half = {
        "tok_embeddings.weight": (vocab, dim // 2), "norm.weight": (dim,), "output.weight": (vocab // 2, dim),
        "layers.0.attention.wq.weight": (dim // 2, dim), "layers.0.attention.wk.weight": (dim // 2, dim),
        "layers.0.attention.wv.weight": (dim // 2, dim), "layers.0.attention.wo.weight": (dim, dim // 2),
        "layers.0.feed_forward.w1.weight": (ffn // 2, dim), "layers.0.feed_forward.w2.weight": (dim, ffn // 2),
        "layers.0.feed_forward.w3.weight": (ffn // 2, dim), "layers.0.attention_norm.weight": (dim,),
        "layers.0.ffn_norm.weight": (dim,), "rope.freqs": (4,),
    }  # fmt: skip
    for number in range(2):
        state = {key: torch.ones(shape) for key, shape in half.items()}
        torch.save(state, directory / f"consolidated.{number:02d}.pth")


def _llama3(directory: Path) -> None:
    """tiktoken's format."""
    directory.mkdir()
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b" the", b"the"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")
