"""litlora merge_lora: adapters into the base's weights, as a Hugging Face directory of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from litlora import __version__
from litlora.checkpoint import require_writable, write_json
from litlora.commands.adapters import parse_weights
from litlora.commands.prompts import Prompt, read_prompts
from litlora.data import PromptStyle
from litlora.errors import InputError
from litlora.load import Directory
from litlora.merge import Merge
from litlora.merge_verify import Cost, Swallowed, check_tensors, compare_models
from litlora.merge_write import merge_directory
from litlora.metrics import duration, say
from litlora.peft_format import RECORD, Adapter
from litlora.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_TOKENS = 16_384  # of all prompts of the verification together
PROMPTS = (
    "Give three tips for staying healthy.",
    "What are the three primary colors?",
    "Describe the structure of an atom.",
    "How can we reduce air pollution?",
    "Write a short story about a lost key.",
    "Explain why the sky is blue in one sentence.",
    "Translate 'good morning' into French.",
    "What is 59 minus 38?",
)


@dataclass(frozen=True)
class Args:
    """Merge LoRA adapters into the base model's weights: merged = W + weight * scale * B A, rounded once.

    Streams tensor by tensor, without a GPU. The result keeps the base's files, names, order and dtypes; what no
    adapter touches is copied byte for byte. A LoRA over a head that is tied to the embedding gives an untied model.

    Attributes:
        checkpoint_dir: The base model's Hugging Face directory.
        lora_path: An adapter directory, litlora's or PEFT's; may be given several times.
        out_dir: Where the merged model is written.
        weights: How much of each adapter, in the order of --lora_path, for example 0.7,0.3. Default: 1 each.
        base_rounding: Merge onto the weights as this format rounds them (every linear that it held in training,
            adapted or not). Right for an adapter that was trained with --quantize of the same name, when the merged
            model shall compute exactly what training saw; the rest of the base's precision is lost for good. Without
            it the adapter is added to the full weights, which is usually as good or better.
        dtype: Dtype of the written weights. Default: the base's. float32 keeps the small digits of the update, which
            16 bits partly swallow (--verify true says how much), at twice the size.
        verify: Read the result back, check every tensor and the logits, and print what rounding cost. Loads the
            model, one copy at a time.
        verify_prompts: A file of prompts for --verify (.txt, a prompt a line; .jsonl, .json or .csv with instruction
            and input, prompt, or messages). Default: eight plain instructions in the adapter's prompt style.
        overwrite: Replace an out_dir that is not empty, once the new one is whole.
    """

    checkpoint_dir: Path
    lora_path: list[Path]
    out_dir: Path
    weights: str | None = None
    base_rounding: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "fp8"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    verify: bool = False
    verify_prompts: Path | None = None
    overwrite: bool = False


def run(args: Args) -> None:
    """Merges, verifies where asked to, and prints the merged directory on stdout. Raises InputError, VerifyError."""
    check_paths(args)
    merge = open_merge(args)
    prompts = verification_prompts(args, merge) if args.verify else []
    for note in merge.notes():
        say(note)
    shards = len(merge.base.checkpoint.shards)
    amount = merge.tensor_bytes
    size = f"{amount / 1e9:.2f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"
    size = f"{size} in {shards} file{'s' if shards > 1 else ''}"
    say(f"merging {len(merge.adapted)} linears of {args.checkpoint_dir}, {size}, into {args.out_dir}")
    if merge.unties:
        say("note: the head was the embedding's own tensor; it becomes one of its own (tie_word_embeddings: false)")

    record = describe(args, merge)
    started = time.perf_counter()
    checked: list[Swallowed] = []
    total = merge.tensor_bytes * (2 if args.verify else 1)
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=None) as bar:

        def check(directory: Path) -> None:
            checked.append(check_tensors(merge, directory, bar.update))

        merge_directory(
            merge,
            args.out_dir.absolute(),
            overwrite=args.overwrite,
            record=record,
            advance=bar.update,
            check=check if args.verify else None,
        )
    say(f"merged{' and read back' if args.verify else ''} in {duration(time.perf_counter() - started)}")
    if args.verify:
        cost = compare_models(merge, args.out_dir, prompts)
        report(merge, checked[0], cost)
        record["verified"] = {"swallowed": asdict(checked[0]), "cost": asdict(cost)}
        write_json(args.out_dir / RECORD, record)
    print(args.out_dir)


def check_paths(args: Args) -> None:
    """Raises InputError unless the result can be written without touching what it is made from."""
    if not args.lora_path:
        raise InputError("no adapter to merge", wanted="at least one --lora_path")
    out = args.out_dir.resolve()
    for flag, path in (("checkpoint_dir", args.checkpoint_dir), *(("lora_path", path) for path in args.lora_path)):
        source = path.resolve()
        if source == out or source in out.parents:
            relation = "is" if source == out else "lies inside"
            raise InputError(f"the output directory {relation} --{flag}", where=args.out_dir, fix="another --out_dir")
        if out in source.parents:
            got = f"{path} lies inside it"
            raise InputError(f"the output would replace --{flag}", where=args.out_dir, got=got, fix="another --out_dir")
    if args.verify_prompts and not args.verify:
        raise InputError("--verify_prompts without --verify true", got=args.verify_prompts, fix="--verify true")
    require_writable(out, overwrite=args.overwrite)
    for left in sorted(out.parent.glob(f".{out.name}.*.tmp")) if out.parent.is_dir() else []:
        say(f"note: {left} is left from a run that was interrupted, or from one that is under way")


def open_merge(args: Args) -> Merge:
    """Base and adapters, opened and checked. Raises InputError."""
    if args.dtype is not None and args.dtype not in DTYPES:
        raise InputError("unknown --dtype", got=args.dtype, wanted=", ".join(DTYPES))
    weights = parse_weights(args.weights, len(args.lora_path))
    base = Directory.open(args.checkpoint_dir)
    adapters = [Adapter.open(path, base.config, base.checkpoint) for path in args.lora_path]
    return Merge(base, adapters, weights, args.base_rounding, DTYPES[args.dtype] if args.dtype else None)


def prompt_style(merge: Merge) -> tuple[str | None, str | None]:
    """(prompt_style, prompt_template) that all recorded adapters agree on, else None."""
    records = [adapter.record for adapter in merge.adapters if adapter.record]
    styles = {(record.prompt_style, record.prompt_template) for record in records}
    return next(iter(styles)) if len(styles) == 1 else (None, None)


def verification_prompts(args: Args, merge: Merge) -> list[list[int]]:
    """Token ids, each prompt cut to the model's context and all together to MAX_TOKENS. Raises InputError."""
    listed: Sequence[Prompt] = [Prompt("built in", text) for text in PROMPTS]
    if args.verify_prompts:
        listed = read_prompts(None, "", args.verify_prompts)
    tokenizer = Tokenizer.load(args.checkpoint_dir)
    name, template = prompt_style(merge)
    style = PromptStyle.from_source(name or "alpaca", template, tokenizer)
    context = merge.config.max_position_embeddings
    kept: list[list[int]] = []
    for prompt in listed:
        ids = tokenizer.encode_prompt(prompt.render(style))[: min(context, MAX_TOKENS)]
        if sum(map(len, kept)) + len(ids) > MAX_TOKENS:
            break
        if ids:
            kept.append(ids)
    if not kept:
        raise InputError("the prompts to verify with are empty", where=args.verify_prompts)
    if len(kept) < len(listed):
        say(f"verifying with the first {len(kept)} of {len(listed)} prompts")
    return kept


def describe(args: Args, merge: Merge) -> dict[str, Any]:
    """What made the merged model, for its litlora.json: generate takes the prompt style from there."""
    style, template = prompt_style(merge)
    return {
        "merged_from": str(args.checkpoint_dir),
        "base_fingerprint": merge.base.checkpoint.fingerprint,
        "adapters": [
            {"path": os.fspath(adapter.directory), "weight": weight}
            for adapter, weight in zip(merge.adapters, merge.weights, strict=True)
        ],
        "base_rounding": args.base_rounding,
        "dtype": args.dtype,
        "prompt_style": style,
        "prompt_template": template,
        "litlora_version": __version__,
    }


def report(merge: Merge, swallowed: Swallowed, cost: Cost) -> None:
    dtype = str(merge.out_dtype(merge.source(f"{min(merge.adapted)}.weight"))).removeprefix("torch.")
    names = [name for shard in merge.base.checkpoint.shards for name in merge.names(shard)]
    touched = sum(map(merge.touched, names))
    say(
        f"verify: {touched} tensors are within half a unit in the last place of W + ΔW, "
        f"{len(names) - touched} are byte for byte the base's"
    )
    say(
        f"verify: rounding to {dtype} cost {swallowed.overall:.2%} of ‖ΔW‖ "
        f"(most in {swallowed.worst_tensor}: {swallowed.worst:.2%})"
    )
    say(
        f"verify: base + adapter against merged: KL {cost.kl_mean:.3g} nats a token (at most {cost.kl_max:.3g}), "
        f"greedy agreement {cost.agreement:.2%} of {cost.positions} tokens in {cost.prompts} prompts"
    )
    say(
        f"verify: the reloaded logits equal the same rounding in memory (difference {cost.logits_difference:.2g}; "
        f"computed in {cost.computed_in})"
    )
    if swallowed.overall > 0.1 and dtype != "float32":
        say(f"note: {dtype} rounds away more than a tenth of the update; --dtype float32 keeps it, at more disk")
