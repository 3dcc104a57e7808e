"""Makes the embedded base model and the embedded data: `python scripts/pretrain_tiny.py --device cuda`.

Plain statements are generated (scripts/tiny_facts.py), a small sentencepiece tokenizer is trained on some of them, and
a small Llama is pretrained on the rest with litlora's own Decoder and CausalLoss, every token of it fresh text. The
result is a Hugging Face directory in bf16, as the real ones are. `--data_only` writes data/ alone.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tiny_facts  # noqa: E402

from litlora.checkpoint import write_checkpoint, write_json  # noqa: E402
from litlora.config import ModelConfig  # noqa: E402
from litlora.model import CausalLoss, Decoder  # noqa: E402
from litlora.packing import IGNORED, Batch  # noqa: E402

DOCUMENTS_PER_SHARD = 5000  # about half a million tokens
TOKENIZER_SEED, TEXT_SEED = 1_000_000, 2_000_000  # apart from each other; `--seed` is added

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "vocab_size": 1024,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
# The instruction template's words are known to the tokenizer, so that a prompt is short. They are never pretrained on.
TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. ### Instruction: ### Input: ### Response:"
)


def train_tokenizer(seed: int, vocab_size: int) -> bytes:
    """A sentencepiece BPE model as Llama's: identity normalization, single digits, bytes for what it does not know."""
    text = tiny_facts.documents(4000, TOKENIZER_SEED + seed)
    lines = [line for document in text for line in document.split("\n")]
    asked = [row["instruction"] for row in tiny_facts.rows(seed)[0]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([*lines, *asked, *[TEMPLATE] * 1000]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        unk_surface=" \u2047 ",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(directory: Path, model: bytes) -> None:
    (directory / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    flags = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "legacy": False}
    size = {"model_max_length": CONFIG["max_position_embeddings"], "tokenizer_class": "LlamaTokenizer"}
    write_json(directory / "tokenizer_config.json", {**special, **flags, **size})


def encode_shard(model: bytes, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Fresh documents as <s> ids </s>: (ids of all of them (N,), their lengths (S,))."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    encoded = processor.Encode(tiny_facts.documents(DOCUMENTS_PER_SHARD, seed), add_bos=True, add_eos=True)
    return np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded]), np.array([len(ids) for ids in encoded])


def shards(model: bytes, seed: int, workers: int) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Endless, in the same order whatever the number of workers, which run a few shards ahead."""
    seeds = iter(range(TEXT_SEED + seed * 100_000, TEXT_SEED + (seed + 1) * 100_000))
    if workers == 0:
        yield from (encode_shard(model, number) for number in seeds)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(encode_shard, model, next(seeds)) for _ in range(2 * workers)]
        try:
            while True:
                waiting.append(pool.submit(encode_shard, model, next(seeds)))
                yield waiting.pop(0).result()
        finally:
            pool.shutdown(cancel_futures=True)


def batches(model: bytes, seed: int, workers: int, tokens: int, device: torch.device) -> Iterator[Batch]:
    """Packed streams of whole documents, at most `tokens` each."""
    ids, lengths = np.zeros(0, np.uint16), np.zeros(0, np.int64)
    for more_ids, more_lengths in shards(model, seed, workers):
        ids, lengths = np.concatenate([ids, more_ids]), np.concatenate([lengths, more_lengths])
        while lengths.sum() > tokens:
            count = int(np.searchsorted(lengths.cumsum(), tokens, side="right"))
            size = int(lengths[:count].sum())
            yield _batch(ids[:size], lengths[:count], device)
            ids, lengths = ids[size:], lengths[count:]


def _batch(ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], device: torch.device) -> Batch:
    bounds = np.concatenate([[0], lengths.cumsum()])
    places = np.arange(len(ids)) - bounds[:-1].repeat(lengths)
    targets = np.append(ids[1:], 0).astype(np.int64)
    targets[bounds[1:] - 1] = IGNORED  # a document's end predicts nothing
    kept = (targets != IGNORED).nonzero()[0]
    arrays = (ids.astype(np.int64), targets, kept, places, bounds.astype(np.int32))
    input_ids, labels, trained, positions, cu_seqlens = (torch.from_numpy(array) for array in arrays)
    # one max_seqlen for all: each new value would compile anew
    rows = tuple(range(len(lengths)))
    return Batch(input_ids, labels, trained, positions, cu_seqlens, 512, rows).to(device)


def initialize(decoder: Decoder) -> None:
    """Normal 0.02; what is added to the stream is smaller by the root of the number of additions, as in GPT-2."""
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / (2 * decoder.config.num_hidden_layers) ** 0.5 if residual else 0.02
            nn.init.normal_(parameter, std=std)


def make_optimizer(decoder: Decoder, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices of the blocks only."""
    decayed = [p for name, p in decoder.named_parameters() if p.ndim == 2 and ".layers." in name]
    rest = [p for name, p in decoder.named_parameters() if p.ndim != 2 or ".layers." not in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def pretrain(decoder: Decoder, stream: Iterator[Batch], steps: int, learning_rate: float) -> int:
    """Trains all weights, with linear warmup and decay. Returns the number of trained tokens."""
    loss_module, optimizer = CausalLoss(decoder), make_optimizer(decoder, learning_rate)
    device, warmup = next(decoder.parameters()).device, min(200, max(1, steps // 10))
    trained, start, shown = 0, time.perf_counter(), Tensor()
    for step in range(steps):
        factor = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        batch = next(stream)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_module(batch) / batch.trained_tokens
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained, shown = trained + batch.trained_tokens, loss.detach()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}/{steps}  loss {shown.item():.4f}  {trained / seconds:,.0f} tokens/s", flush=True)
    return trained


def write_model(directory: Path, decoder: Decoder, raw: dict[str, Any]) -> None:
    """config.json, generation_config.json and the weights in bf16."""
    write_json(directory / "config.json", raw)
    special = {"bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"]}
    write_json(directory / "generation_config.json", {**special, "do_sample": False, "max_length": 512})
    weights = {name: tensor.detach().to("cpu", torch.bfloat16) for name, tensor in decoder.state_dict().items()}
    write_checkpoint(directory, [(n, t.dtype, tuple(t.shape)) for n, t in weights.items()], weights.__getitem__)


def write_data(directory: Path, seed: int) -> None:
    """tiny_train.json and tiny_test.json."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("tiny_train", "tiny_test"), tiny_facts.rows(seed), strict=True):
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (directory / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "checkpoints" / "tiny")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "data")
    parser.add_argument("--data_only", action="store_true", help="write the instruction rows and stop")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_tokens", type=int, default=65536, help="tokens a step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes for the text")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        parser.add_argument(f"--{key}", type=int, default=CONFIG[key])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    write_data(flags.data_dir, flags.seed)
    if flags.data_only:
        return
    sizes = {key: getattr(flags, key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    raw, device = {**CONFIG, **sizes}, torch.device(flags.device)
    flags.out_dir.mkdir(parents=True, exist_ok=True)
    model = train_tokenizer(flags.seed, raw["vocab_size"])
    write_tokenizer(flags.out_dir, model)

    torch.manual_seed(flags.seed)
    decoder = Decoder(ModelConfig.from_dict(raw))
    initialize(decoder)  # on the CPU: one seed, one start, whatever the device
    decoder.to(device)
    stream = batches(model, flags.seed, flags.workers, flags.batch_tokens, device)
    if device.type == "cuda":
        for block in decoder.model.layers:
            block.compile(dynamic=True)
    start = time.perf_counter()
    trained = pretrain(decoder, stream, flags.steps, flags.learning_rate)
    stream.close()  # type: ignore[attr-defined]
    count = sum(p.numel() for p in decoder.parameters())
    print(f"{count:,} parameters, {trained:,} tokens, {time.perf_counter() - start:.0f} s on {device}")
    write_model(flags.out_dir, decoder, raw)


if __name__ == "__main__":
    main()
