"""results.jsonl of train.py -> Markdown: the settings beside their goals and peers, where the time goes, the card.

Figures of two machines are never set against each other: each start of a machine has tables of its own.

    python benchmarks/tables.py FILE.jsonl…
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from litlora.markdown import table

Row = dict[str, Any]
PEERS = {"litgpt": "LitGPT", "hf+peft+liger": "HF + PEFT + Liger", "torchtune": "torchtune", "unsloth": "Unsloth"}
FIRST_STEP = {"cold": 60.0, "warm": 25.0}  # seconds at most
RATIOS = {("bf16", "none"): 1.2, ("nf4", "none"): 1.25, ("bf16", "full"): 1.3, ("nf4", "full"): 1.3}  # goals


def read(files: Iterable[Path]) -> dict[str, list[Row]]:
    """The rows of each start of a machine, its `machine` rows among them; those before any are of none."""
    found: dict[str, list[Row]] = {}
    for file in files:
        key = ""
        for line in file.read_text().splitlines():
            row = json.loads(line)
            key = row["machine"]["id"] if "machine" in row else key
            found.setdefault(key, []).append(row)
    return found


# ---------------------------------------------------------------- what the card allows


def seconds_per_token(row: Row, rows: Sequence[Row]) -> float | None:
    """What the setting's linears and attention alone take on this card, at its micro-batches' lengths."""
    dtype = "fp8" if row["quantize"] == "fp8" else "bf16"
    again = 1 if row["recomputed"] else 0
    total = 0.0
    for wanted in ({"card": "linears", "dtype": dtype}, {"card": "attention"}):
        wanted |= {"model": row["model"], "rows": row["rows"]}
        found = [r for r in rows if wanted.items() <= r.items() and "error" not in r]
        if not found:
            return None
        total += ((1 + again) * found[-1]["forward_ms"] + found[-1]["backward_ms"]) / found[-1]["tokens"] / 1e3
    return total


# ---------------------------------------------------------------- the peers


def kind(row: Row) -> tuple[str, str, str]:
    """(weights, targets, recomputation) of our row or a peer's: what may be compared."""
    if "peer" in row:
        name = row["setting"]
        recomputed = any(f"checkpointing {word}" in name for word in ("on", "unsloth"))
        targets = next((word for word in ("qv", "r256") if f" {word} " in name), "all")
        return name[: 4 if name.startswith("bf16") else 3], targets, _full(recomputed)
    weights = "nf4" if "nf4" in row["quantize"] else "bf16"  # no peer has fp8: it stands beside their bf16
    return weights, "qv" if row["adapter"].startswith("q+v ") else "all", _full(row["recomputed"])


def _full(recomputed: bool) -> str:
    return "full" if recomputed else "none"


def best_peers(row: Row, rows: Sequence[Row]) -> dict[str, Row]:
    """The fastest comparable row of each peer: Alpaca's lengths, the same targets, weights and recomputation."""
    best: dict[str, Row] = {}
    if row["rows"] != "alpaca" or row["model"] not in ("llama2-7b", "tiny"):
        return best
    for peer in (r for r in rows if r.get("tok_s") and kind(r) == kind(row)):
        if peer["tok_s"] > best.get(peer["peer"], {"tok_s": 0})["tok_s"]:
            best[peer["peer"]] = peer
    return best


# ---------------------------------------------------------------- tables


def number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def beside(value: float | None, goal: float | None, digits: int = 0, *, at_most: bool = False) -> str:
    """A figure and its goal: 19,412 (≥ 19,000 ✓)."""
    if value is None or goal is None:
        return number(value, digits)
    met = value <= goal if at_most else value >= goal
    return f"{number(value, digits)} ({'≤' if at_most else '≥'} {number(goal, digits)} {'✓' if met else '✗'})"


def speed_goal(row: Row, ours: Sequence[Row]) -> float | None:
    if not row["goal_share"]:
        return row["goal_speed"]  # type: ignore[no-any-return]
    other, share = row["goal_share"]
    return next((share * r["tokens_per_second"] for r in ours if r["setting"] == other), None)


def settings_table(rows: Sequence[Row]) -> str:
    """tokens/s, memory, the card's share, peers; a peer's cell is tokens/s / peak GB."""
    ours = [r for r in rows if "tokens_per_second" in r]
    names = [peer for peer in PEERS if any(r.get("peer") == peer for r in rows)]
    head = ["setting", "tokens/s", "of the card's", "peak GB", "load GB", "weights GB", "to 1st step, s"]
    head += ["50,000 rows, min", *(PEERS[name] for name in names), "× best peer"]
    lines = []
    for row in ours:
        peers, limit = best_peers(row, rows), seconds_per_token(row, rows)
        speed = row["tokens_per_second"]
        ratio = speed / max(p["tok_s"] for p in peers.values()) if peers else None
        goal = RATIOS.get(kind(row)[::2]) if kind(row)[1] == "all" and row["quantize"] != "fp8" else None
        minutes = beside(row.get("articles_minutes"), row["goal_minutes"], 2, at_most=True)
        start = "cold" if row["kernels_compiled"] else "warm"
        lines.append(
            [
                row["setting"] + (" (plain ops)" if row["ops"] == "reference" else ""),
                beside(speed, speed_goal(row, ours)),
                "" if limit is None else f"{speed * limit:.0%}",
                beside(row["peak_gb"], row["goal_gb"], 1, at_most=True),
                beside(row["load_peak_gb"], row["peak_gb"], 1, at_most=True),
                beside(row["weights_gb"], row["goal_weights_gb"], 1, at_most=True),
                f"{start} {beside(row['first_step_seconds'], FIRST_STEP[start], at_most=True)}",
                minutes and minutes + ("" if row["articles_measured"] else " projected"),
                *(f"{peers[n]['tok_s']:,.0f} / {peers[n]['alloc_gb']:.1f}" if n in peers else "" for n in names),
                beside(ratio, goal, 2),
            ]
        )
    return table(head, lines) if lines else "no setting has figures"


def time_table(rows: Sequence[Row]) -> str:
    """Shares of the wall time: of one optimizer step of ours, of a micro-batch of a peer's."""
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        if "profile" in row:
            profile = row["profile"]
            name = f"{row['setting']}, {profile['wall_ms']:,.0f} ms, {profile['kernels']:,} kernels"
            shares[name] = {kind: ms / profile["wall_ms"] for kind, ms in profile["ms"].items()}
        elif "breakdown" in row:
            shares[f"{row['peer']}: {row['setting']}, {row['wall_ms_per_microbatch']:,.0f} ms"] = row["breakdown"]
    kinds = sorted({kind for parts in shares.values() for kind in parts}, key=lambda k: -sum_of(k, shares))
    lines = [[name, *(f"{parts.get(kind, 0):.1%}" for kind in kinds)] for name, parts in shares.items()]
    return table(["where the time goes", *kinds], lines) if lines else ""


def sum_of(kind: str, shares: dict[str, dict[str, float]]) -> float:
    return sum(parts.get(kind, 0) for parts in shares.values())


def card_table(rows: Sequence[Row]) -> str:
    """What the card sustains, and the tokens/s that this leaves for settings without recomputation."""
    lines = []
    for row in (r for r in rows if "card" in r and "error" not in r):
        about = " ".join(str(row[key]) for key in ("card", "rows", "dtype") if key in row)
        skipped = ("model", "card", "rows", "dtype")
        lines.append([about, ", ".join(f"{key} {number(row[key], 1)}" for key in row if key not in skipped)])
    for dtype in ("bf16", "fp8"):
        for name in dict.fromkeys(r["rows"] for r in rows if r.get("card") == "linears"):
            model = next(r["model"] for r in rows if r.get("card") == "linears")
            limit = seconds_per_token({"quantize": dtype, "recomputed": False, "rows": name, "model": model}, rows)
            if limit:
                lines.append([f"limit of {model}, rows {name}, {dtype}", f"{1 / limit:,.0f} tokens/s"])
    return table(["the card", "sustains"], lines) if lines else ""


def failures(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        reason = row.get("error") or row.get("skipped")
        if reason:
            keys = ("card", "rows", "dtype") if "card" in row else ("peer", "setting")
            name = " ".join(str(row[key]) for key in keys if key in row)
            lines.append(f"- {name}: {reason}")
    return "Without figures:\n\n" + "\n".join(lines) if lines else ""


def conditions(rows: Sequence[Row]) -> str:
    machines = [row["machine"] for row in rows if "machine" in row]
    if not machines:
        return ""
    text = "{date}, {gpu}, torch {torch}, Python {python}, commit {commit}".format(**machines[0])
    return text + ":\n\n" + "\n".join(f"    python {machine['command']}" for machine in machines)


def report(files: Iterable[Path]) -> str:
    parts = []
    for rows in read(files).values():
        parts += [make(rows) for make in (conditions, settings_table, time_table, card_table, failures)]
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    print(report([Path(name) for name in sys.argv[1:]]))
