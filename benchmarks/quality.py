"""Proof that fast is right, on a real model and real rows: the fused operations beside the plain ones, the weight
formats beside bf16, and NF4 and FP4 beside transformers + PEFT over bitsandbytes' layers.

Every run is a forked process, several at a time (the card waits for the host when a model is small); one that fails or
hangs leaves the others, and its row is on disk at once. `equal bytes` is the share of the packed weights that litlora
and transformers hold alike.

    python benchmarks/quality.py --base SMOLLM2 --data alpaca_5000.json --out DIR
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from parity import (  # noqa: E402
    DTYPES,
    Encode,
    Run,
    choose_rows,
    open_tokenizer,
    train_ours,
    train_reference,
    validate_reference,
)
from tables import conditions  # noqa: E402
from train import Results, in_child, machine  # noqa: E402

import litlora.commands.finetune_lora  # noqa: E402, F401  # before the forks
from litlora.checkpoint import Checkpoint  # noqa: E402
from litlora.frozen import FOUR_BIT, FourBitLinear  # noqa: E402
from litlora.markdown import table  # noqa: E402
from litlora.ops import Ops  # noqa: E402
from litlora.precision import pick_device  # noqa: E402

Row = dict[str, Any]
FUSED_STEPS = 60  # of the runs that are compared step by step
VALIDATION_ROWS = 256
LORA = {
    "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0, "lora_key": True, "lora_projection": True, "lora_mlp": True,
    "seed": 0, "quiet": True, "overwrite": True, "save_interval": 10_000,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One training run."""

    quantize: str | None = None
    short: bool = False  # FUSED_STEPS, without validation
    keep: str = "none"  # as --activation_checkpointing
    plain: bool = False  # the plain operations
    precision: str | None = None  # another than --precision
    peft: bool = False  # by transformers + PEFT


WORK = {
    "PEFT bnb.nf4": Work("bnb.nf4", peft=True),  # the longest runs begin first
    "PEFT bnb.fp4": Work("bnb.fp4", peft=True),
    "plain": Work(short=True, plain=True),
    "fp32": Work(short=True, plain=True, precision="32-true"),
    "bf16": Work(),
    "fp8": Work("fp8"),
    "bnb.nf4": Work("bnb.nf4"),
    "bnb.nf4-dq": Work("bnb.nf4-dq"),
    "bnb.fp4": Work("bnb.fp4"),
    "fused": Work(short=True),
    "fused, selective": Work(short=True, keep="selective"),
    "fused, full": Work(short=True, keep="full"),
}
PARTS = {
    "fused": ("fp32", "plain", "fused", "fused, selective", "fused, full"),
    "formats": ("bf16", "fp8", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4"),
    "peers": ("PEFT bnb.nf4", "PEFT bnb.fp4", "bnb.nf4", "bnb.fp4"),
}
# (run, beside, what of them, the largest relative difference; None: for information)
CHECKS: tuple[tuple[str, str, str, float | None], ...] = (
    ("fused", "plain", "losses", 1e-2),
    ("fused, selective", "plain", "losses", 1e-2),
    ("fused, full", "plain", "losses", 1e-2),
    ("fused", "fp32", "losses", None),  # how far bf16 is from it anyhow
    ("plain", "fp32", "losses", None),
    ("fused, selective", "fused", "losses", 1e-2),
    ("fused, full", "fused", "losses", 1e-2),
    ("fp8", "bf16", "val_loss", 1e-2),
    ("bnb.nf4", "bf16", "val_loss", None),
    ("bnb.nf4-dq", "bf16", "val_loss", None),
    ("bnb.fp4", "bf16", "val_loss", None),
    ("bnb.nf4", "PEFT bnb.nf4", "val_loss", 1e-2),
    ("bnb.fp4", "PEFT bnb.fp4", "val_loss", 1e-2),
)


# ---------------------------------------------------------------- runs


def ours(run: Run, work: Work, out: Path, **more: object) -> Row:
    flags = {**LORA, "activation_checkpointing": work.keep, "micro_batch_tokens": 2 * run.longest, **more}
    plain = patch("litlora.commands.finetune_lora.fastest", lambda device: (Ops(), None))
    with plain if work.plain else nullcontext():
        losses, summary = train_ours(run, out, **flags)
    return {"losses": losses, "val_loss": summary["val_loss"]}


def theirs(run: Run, encode: Encode, eos: int, out: Path) -> Row:
    """PEFT starts from the adapter that litlora begins with: a first step at rate 0 saves it untrained."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    first = replace(run, steps=1, batch_size=1, warmup=1, validation=())
    ours(first, Work(run.quantize), out)
    losses, model = train_reference(run, out, encode, eos)
    row: Row = {"losses": losses, "equal_bytes": equal_bytes(run, model)}
    return row | {"val_loss": validate_reference(run, model, encode, eos)}


def equal_bytes(run: Run, model: Any) -> float:
    """Of the packed weights of PEFT's base. Raises RuntimeError where other linears than ours are quantized."""
    import bitsandbytes as bnb

    checkpoint, (kind, nested) = Checkpoint(run.base), FOUR_BIT[str(run.quantize)]
    same = total = 0
    packed = {
        name.removesuffix(".base_layer").removeprefix("base_model.model."): module.weight.data
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit) and "lora_" not in name
    }
    wanted = {name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith("_proj.weight")}
    if packed.keys() != wanted:
        raise RuntimeError(f"quantized in one of the two only: {sorted(packed.keys() ^ wanted)[:4]}")
    for name, weight in packed.items():
        published = checkpoint.read(f"{name}.weight").to(run.device)
        mine = FourBitLinear(published, None, kind, nested, torch.bfloat16).weight
        same += int((mine.flatten() == weight.flatten()).sum())
        total += weight.numel()
    return same / total


def figures(name: str, run: Run, encode: Encode, eos: int, results: Results, scratch: str) -> None:
    """Adds the run's row, or one that says why there are no figures. Its files lie in `scratch`."""
    work, started = WORK[name], time.perf_counter()
    run = replace(run, quantize=work.quantize, precision=work.precision or run.precision)
    if work.short:
        run = replace(run, steps=min(FUSED_STEPS, run.steps), validation=())
    directory = Path(scratch) / name.replace(", ", "_").replace(" ", "_")
    try:
        row = theirs(run, encode, eos, directory) if work.peft else ours(run, work, directory)
        row["losses"] = [round(loss, 6) for loss in row["losses"]]
        row["seconds"] = time.perf_counter() - started
    except Exception as error:
        traceback.print_exc()
        row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    results.add({"run": name, "steps": run.steps, "batch_size": run.batch_size, **row})


# ---------------------------------------------------------------- what the rows say


def apart(one: Row, other: Row, what: str) -> float:
    """Relative: the end's, with its sign, or the furthest of all steps. NaN is infinitely far."""
    if what == "losses":
        pairs = list(zip(one["losses"], other["losses"], strict=True))
        far = [abs(a - b) / b for a, b in pairs]
        return max((value if value == value else float("inf") for value in far), default=float("inf"))
    if one[what] is None or other[what] is None:
        return float("inf")
    value = float((one[what] - other[what]) / other[what])
    return value if value == value else float("inf")


def checks(rows: Sequence[Row]) -> list[Row]:
    """Each limit, and whether it holds; none for runs without figures."""
    runs = {row["run"]: row for row in rows if "losses" in row}
    found = []
    for name, beside, what, limit in CHECKS:
        if name in runs and beside in runs:
            value = apart(runs[name], runs[beside], what)
            holds = None if limit is None else abs(value) <= limit
            about = {"check": name, "beside": beside, "what": what}
            found.append({**about, "apart": value, "limit": limit, "holds": holds})
    return found


def report(rows: Sequence[Row]) -> str:
    """Markdown: the runs, the checks, and what has no figures."""
    runs = [row for row in rows if "losses" in row]
    lines = [
        [
            row["run"],
            f"{row['steps']} of {row['batch_size']} rows",
            f"{row['losses'][0]:.4f}",
            f"{sum(row['losses'][-10:]) / len(row['losses'][-10:]):.4f}",
            "" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
            "" if "equal_bytes" not in row else f"{row['equal_bytes']:.2%}",
            f"{row['seconds']:.0f}",
        ]
        for row in runs
    ]
    head = ["run", "steps", "first loss", "last 10 losses", "validation loss", "equal bytes", "seconds"]
    parts = [conditions(rows), table(head, lines)]
    lines = [
        [
            f"{check['check']} beside {check['beside']}",
            {"losses": "furthest step", "val_loss": "validation loss"}[check["what"]],
            f"{check['apart']:.2e}" if check["what"] == "losses" else f"{check['apart']:+.2%}",
            "" if check["limit"] is None else f"≤ {check['limit']:.0%} {'✓' if check['holds'] else '✗'}",
        ]
        for check in checks(rows)
    ]
    parts.append(table(["apart", "in", "relative", "limit"], lines))
    failed = [f"- {row['run']}: {row['error']}" for row in rows if "error" in row]
    return "\n\n".join(parts + (["Without figures:\n\n" + "\n".join(failed)] if failed else []))


# ---------------------------------------------------------------- the script


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a small model's Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, help="a JSON list of Alpaca's rows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps; at most 60 where steps are compared")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--validation_rows", type=int, default=VALIDATION_ROWS)
    parser.add_argument("--longest", type=int, default=512, help="tokens of a row; longer ones are cut")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--precision", choices=DTYPES, default="bf16-true", help="32-true to try it on a CPU")
    parser.add_argument("--at_once", type=int, default=5, help="runs side by side")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one run")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "out")))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    results = Results(args.out)
    about: Row = {"machine": machine() | {"command": " ".join(["benchmarks/quality.py", *sys.argv[1:]])}}
    results.add(about)
    encode, eos = open_tokenizer(args.base)
    count = args.steps * args.batch_size
    rows = choose_rows(json.loads(args.data.read_text()), encode, count + args.validation_rows, args.longest)
    run = Run(
        args.base, rows[:count], args.steps, args.batch_size, args.longest, False, learning_rate=args.learning_rate,
        warmup=min(20, args.steps // 3), precision=args.precision, device=pick_device("auto").type,
        validation=rows[count:],
    )  # fmt: skip
    wanted = {name for part in args.parts for name in PARTS[part]}
    names = [name for name in WORK if name in wanted]

    start = len(results.file.read_text().splitlines())
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.at_once) as pool:
        jobs = [partial(figures, name, run, encode, eos, results, scratch) for name in names]
        ended = dict(zip(names, pool.map(lambda job: in_child(job, args.limit), jobs), strict=True))
    for name, reason in ended.items():
        if reason:
            results.add({"run": name, "error": reason})
    found = [about, *map(json.loads, results.file.read_text().splitlines()[start:])]
    for check in checks(found):
        results.add(check)
    print(report(found))


if __name__ == "__main__":
    main()
