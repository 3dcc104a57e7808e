"""Finetunes the embedded tiny model on the embedded data, merges, asks all three models the held-out questions, and
prints a table. What an earlier run left is taken up. The commands are the ones that anybody would type.

python scripts/quickstart.py [--out_dir out/quickstart]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from litlora.checkpoint import write_json  # noqa: E402

BASE, TEST = Path("checkpoints/tiny"), Path("data/tiny_test.json")


def litlora(*arguments: object) -> tuple[str, str]:
    """Runs one litlora command, shown as one would type it; returns what it wrote to stdout and to stderr."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ litlora {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", "litlora", *words]
    # one thread: a second one makes so small a model 1.4 times as fast on an idle machine, several times slower on a
    # busy one
    settings = {"OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        notes = []
        for line in process.stderr:
            notes.append(line)
            print(f"  {line}", end="", flush=True)
        answer = process.stdout.read()
    if process.returncode:
        sys.exit(f"the command above failed with exit code {process.returncode}")
    return answer, "".join(notes)


def finetune(out: Path) -> Path:
    adapter = out / "finetuned"
    if (adapter / "summary.json").is_file():
        print(f"taking up {adapter}: it is finetuned already (delete it to train again)")
    else:
        litlora("finetune_lora", "--config", "configs/quickstart.yaml", "--out_dir", adapter, "--overwrite", "true")
    return adapter


def merge(out: Path, adapter: Path) -> Path:
    merged = out / "merged"
    if (merged / "config.json").is_file():  # a merge takes its name only when it is whole
        print(f"taking up {merged}: it is merged already")
    else:
        litlora("merge_lora", "--checkpoint_dir", BASE, "--lora_path", adapter, "--out_dir", merged, "--verify", "true")
    return merged


def examine(name: str, out: Path, model: list[object]) -> dict[str, Any]:
    """Exact match by generating and comparing, and the validation loss, both on the held-out questions."""
    result = out / f"{name}.json"
    if result.is_file():
        print(f"taking up {result}: {name} is examined already")
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    answers = out / f"{name}-answers.jsonl"
    _, notes = litlora(
        "generate", *model, "--prompt_style", "alpaca", "--prompt_file", TEST, "--out_file", answers, "--overwrite",
        "true", "--temperature", 0, "--max_new_tokens", 16, "--batch_size", 64, "--precision", "32-true",
    )  # fmt: skip
    validated, _ = litlora(
        "validate", *model, "--val_path", TEST, "--mask_prompt", "true", "--prompt_style", "alpaca",
        "--precision", "32-true",
    )  # fmt: skip
    wanted = [row["output"] for row in json.loads((ROOT / TEST).read_text())]
    given = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    right = sum(text.strip() == output.strip() for text, output in zip(given, wanted, strict=True))
    seconds, rate = re.findall(r"Time for inference: ([\d.]+) sec total, ([\d.]+) tokens/sec", notes)[-1]
    memory = re.findall(r"Memory used: ([\d.]+) GB", notes)[-1]
    found = {
        "exact_match": right / len(wanted),
        "val_loss": json.loads(validated)["val_loss"],
        "questions": len(wanted),
        "seconds": float(seconds),
        "tokens_per_second": float(rate),
        "peak_memory_gb": float(memory),
    }
    write_json(result, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path("out/quickstart"))
    out = (ROOT / parser.parse_args().out_dir).resolve()
    out = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    rows = {"base": examine("base", out, ["--checkpoint_dir", BASE])}
    adapter = finetune(out)
    rows["finetuned"] = examine("finetuned", out, ["--checkpoint_dir", BASE, "--lora_path", adapter])
    merged = merge(out, adapter)
    rows["merged"] = examine("merged", out, ["--checkpoint_dir", merged])
    training = json.loads((ROOT / adapter / "summary.json").read_text())
    write_json(out / "quickstart.json", {**rows, "training": training})

    question = json.loads((ROOT / TEST).read_text())[0]["instruction"]
    answer, _ = litlora("generate", "--checkpoint_dir", merged, "--prompt", question, "--temperature", 0)
    print(f"  {answer.strip()}")
    print(f"\n{'':<10} {'exact match':>11} {'val loss':>9} {'seconds':>8} {'tokens/s':>9} {'peak memory':>12}")
    for name, row in rows.items():
        print(
            f"{name:<10} {row['exact_match']:>11.1%} {row['val_loss']:>9.4f} {row['seconds']:>8.1f} "
            f"{row['tokens_per_second']:>9,.0f} {row['peak_memory_gb']:>9.2f} GB"
        )
    print(
        f"\n(answering {rows['base']['questions']} held-out questions; finetuning took "
        f"{training['training_seconds']:.1f} s at {training['tokens_per_second']:,.0f} tokens/s and "
        f"{training['peak_memory_gb']:.2f} GB; all together {time.perf_counter() - started:.0f} s)"
    )
    print(f"the same is in {out / 'quickstart.json'}")


if __name__ == "__main__":
    main()
