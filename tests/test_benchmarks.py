"""The benchmark scripts: what they count and compare. Tiny, on the CPU; no figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import card  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402
from breakdown import IDLE, OTHER, Kernel, busy, kind_of, summarize, top  # noqa: E402
from runs import measure  # noqa: E402
from settings import GROUPS, SETTINGS, choose, config_of, mean_length, random_rows  # noqa: E402

Row = dict[str, Any]


def test_kernels_that_overlap_are_not_busy_twice_and_what_is_left_is_idle() -> None:
    kernels = [Kernel("nvjet_a", 0, 1000), Kernel("_rms_norm", 500, 1500), Kernel("nvjet_a", 4000, 5000)]
    assert busy(kernels) == 2500
    summary = summarize(kernels, wall=0.006)
    assert summary["ms"] == {"gemm": 2.0, OTHER: 1.0, IDLE: 3.5}
    assert top(kernels, 1).split() == ["2.000", "ms", "x", "2", "gemm", "nvjet_a"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_bwd_kernel<Flash_bwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("void at::native::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor>", "optimizer"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "dequant"),
        ("_quantize_rows", "dequant"),
        ("cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::float_e4m3_t>>", "gemm"),
        ("_low_rank_add", "adapter"),
        ("_cross_entropy", "cross-entropy"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("_swiglu_backward", OTHER),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_rows_have_alpacas_lengths_or_the_one_that_is_asked_for() -> None:
    lengths = random_rows(4000, 512, None).lengths
    assert lengths.mean() == pytest.approx(mean_length(), rel=0.05)
    assert mean_length() == pytest.approx(127.6, abs=0.1)
    assert set(random_rows(3, 512, 77).lengths) == {77}


def test_groups_hold_every_setting_and_goals_name_settings() -> None:
    assert {name for names in GROUPS.values() for name in names} == set(SETTINGS)
    assert [setting.name for setting in choose(["nf4-qv", "memory"])] == ["nf4-qv", *GROUPS["memory"]]
    assert all(setting.goal_share[0] in SETTINGS for setting in SETTINGS.values() if setting.goal_share)
    assert config_of("llama2-70b").linear_shapes["self_attn.k_proj"] == (1024, 8192)


@pytest.mark.parametrize("name", ["bf16-all-full", "nf4dq-r256-2048"])
def test_a_setting_counts_the_real_tokens_of_its_timed_steps(name: str, tmp_path: Path) -> None:
    setting = replace(SETTINGS[name], model="tiny", batch_size=3, warmup=1, steps=2, optimizer="adamw")
    setting = replace(setting, length=setting.length and 100)
    row = measure(setting, listing=tmp_path / "kernels.txt")
    lengths = random_rows(9, 512, setting.length).lengths
    assert row["tokens_per_step"] == lengths[3:].sum() / 2
    assert row["recomputed"]
    assert row["first_loss"] == pytest.approx(6.24, abs=0.5)  # ln 512: nothing is learned from random ids
    assert "error" not in row
    assert ("articles_minutes" in row) == (setting.length is None)
    assert row["profile"]["kernels"] > 0
    assert (tmp_path / "kernels.txt").read_text().startswith(f"== {name}")


def test_the_card_is_timed_at_the_rows_lengths_and_what_fails_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Row:
        raise RuntimeError("no such product")

    monkeypatch.setattr(card, "square", broken)
    rows = list(card.measure(config_of("tiny"), {"alpaca": [5, 11], "16": [16]}, torch.device("cpu"), 0.001))
    assert [row["error"] for row in rows if row["card"] == "square"] == ["RuntimeError: no such product"] * 2
    kept = [row for row in rows if row["card"] in ("attention", "linears") and "error" not in row]
    assert {(row["card"], row["rows"], row["tokens"]) for row in kept} == {
        (name, rows, 16) for name in ("attention", "linears") for rows in ("alpaca", "16")
    }
    linears = next(row for row in kept if row.get("dtype") == "bf16")
    weights = 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256) + 512 * 128
    milliseconds = linears["forward_ms"] + linears["backward_ms"]
    assert linears["tflops"] == pytest.approx(4 * weights * 16 / milliseconds / 1e9)


def test_what_cannot_run_here_says_so() -> None:
    from litlora.errors import InputError

    with pytest.raises(InputError, match="quantize"):
        measure(replace(SETTINGS["nf4-all"], model="tiny", quantize="bnb.nf3"))


# ---------------------------------------------------------------- one process a setting

SCRIPT = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
import train
assert train.in_child(lambda: None, 20) is None
assert train.in_child(lambda: os._exit(3), 20) == "exit code 3"
assert train.in_child(lambda: os.kill(os.getpid(), 11), 20) == "ended by SIGSEGV"
assert train.in_child(lambda: time.sleep(60), 0.2) == "not done after 0 s"
ours = train.measure
train.measure = lambda setting, *rest: os.abort() if setting.name == "bf16-qv" else ours(setting, *rest)
train.main(["--settings", "bf16-qv", "bf16-all", "--model", "tiny", "--rows", "6",
            "--peers", {out!r}, "--peers_site", {site!r}, "--out", {out!r}])
"""
DRIVER = """
import json, os, pathlib, sys
assert (pathlib.Path(os.environ["BENCH_TMP"]) / "bench/site/here").exists()
row = dict(peer="torchtune", setting="bf16 r16 all-linear, packed 4096, compile, checkpointing off", tok_s=9.0)
with open(os.environ["OUT"] + "/results.jsonl", "a") as stream:
    stream.write(json.dumps(row | dict(alloc_gb=1.0, jobs=sys.argv[2:])) + "\\n")
"""


def test_a_setting_that_crashes_leaves_the_others_and_the_peers(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    (tmp_path / "drive.py").write_text(DRIVER)
    site = tmp_path / "site.tgz"
    subprocess.run(["tar", "czf", str(site), "-C", str(tmp_path), "here"], check=True)
    code = SCRIPT.format(benchmarks=str(BENCHMARKS), out=str(tmp_path), site=str(site))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    crashed, measured, peer = rows[-3:]
    assert (crashed["setting"], crashed["error"]) == ("bf16-qv", "ended by SIGABRT")
    assert measured["tokens_per_second"] > 0
    assert len(peer["jobs"]) > 5
    text = tables.report([tmp_path / "results.jsonl"])
    assert "| bf16-all |" in text
    assert "- bf16-qv: ended by SIGABRT" in text
    assert "9 / 1.0" in text


# ---------------------------------------------------------------- tables


def ours(name: str, speed: float, **changes: object) -> Row:
    setting = SETTINGS[name]
    row = {
        "setting": name, "model": setting.model, "quantize": setting.quantize or "none", "rows": "alpaca",
        "adapter": "q+v r=8" if name.endswith("qv") else "q+k+v r=16", "recomputed": name.endswith("full"),
        **{goal: getattr(setting, goal) for goal in train.GOALS}, "ops": "auto", "tokens_per_second": speed,
        "peak_gb": 17.0, "load_peak_gb": 16.0, "weights_gb": 13.5, "first_step_seconds": 20.0, "kernels_compiled": 0,
        "articles_minutes": 5.5, "articles_measured": False,
    }  # fmt: skip
    return row | changes


def peer(name: str, setting: str, speed: float) -> Row:
    return {"peer": name, "setting": setting, "tok_s": speed, "alloc_gb": 30.0}


CARD = [
    {"card": "linears", "dtype": "bf16", "model": "llama2-7b", "rows": "alpaca", "tokens": 1000, "forward_ms": 20.0,
     "backward_ms": 20.0},
    {"card": "attention", "model": "llama2-7b", "rows": "alpaca", "tokens": 500, "forward_ms": 1.0, "backward_ms": 4.0},
]  # fmt: skip


def cells(rows: list[Row], setting: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.settings_table(rows).splitlines()]
    return next(dict(zip(lines[0], line, strict=True)) for line in lines if line[0] == setting)


def test_goals_limits_and_peers_stand_beside_the_figures() -> None:
    rows = [
        *CARD, ours("bf16-all", 19_500), ours("nf4dq-all", 18_000), ours("bf16-all-full", 14_000), ours("nf4-qv", 3000),
        peer("torchtune", "bf16 r16 all-linear, packed 4096, compile, checkpointing off", 15_000),
        peer("torchtune", "bf16 r16 all-linear, packed 4096, compile, checkpointing on", 10_000),
        peer("hf+peft+liger", "nf4-dq r16 all-linear, packed 4096 varlen, checkpointing off", 12_000),
        peer("unsloth", "nf4 r16 all-linear, packed 4096, checkpointing off", 16_000),
        peer("unsloth", "nf4 r16 all-linear, packed 4096, checkpointing unsloth", 20_000),
        peer("litgpt", "nf4 r8 qv mb1 (defaults)", 752), peer("litgpt", "nf4 r8 qv mb4", 1_500),
        {"peer": "litgpt", "setting": "bf16 r8 qv mb4", "error": "out of memory"},
    ]  # fmt: skip
    bf16 = cells(rows, "bf16-all")
    assert bf16["tokens/s"] == "19,500 (≥ 19,000 ✓)"
    assert bf16["of the card's"] == "98%"  # 40 + 10 µs a token: 20,000 tokens/s
    assert bf16["torchtune"] == "15,000 / 30.0"
    assert bf16["× best peer"] == "1.30 (≥ 1.20 ✓)"
    nf4 = cells(rows, "nf4dq-all")
    assert nf4["tokens/s"] == "18,000 (≥ 18,915 ✗)"
    assert (nf4["HF + PEFT + Liger"], nf4["Unsloth"]) == ("12,000 / 30.0", "16,000 / 30.0")
    assert nf4["× best peer"] == "1.12 (≥ 1.25 ✗)"
    full = cells(rows, "bf16-all-full")
    assert full["of the card's"] == "101%"  # 60 + 12 µs a token
    assert full["× best peer"] == "1.40 (≥ 1.30 ✓)"
    assert full["to 1st step, s"] == "warm 20 (≤ 25 ✓)"
    assert full["peak GB"] == "17.0 (≤ 18.0 ✓)"
    assert cells(rows, "nf4-qv")["LitGPT"] == "1,500 / 30.0"
    assert tables.failures(rows) == "Without figures:\n\n- litgpt bf16 r8 qv mb4: out of memory"


def test_two_machines_are_never_compared(tmp_path: Path) -> None:
    setting = "bf16 r16 all-linear, packed 4096, compile, checkpointing off"
    about = {"gpu": "a card", "torch": "2", "python": "3", "commit": "c", "date": "d", "command": "train.py"}
    for name, machine in (("a", "one"), ("b", "one"), ("c", "two")):
        rows: list[Row] = [{"machine": {"id": machine, **about}}]
        rows += [ours("bf16-all", 1234)] if name == "a" else [peer("torchtune", setting, 100 if name == "b" else 200)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    text = tables.report([tmp_path / name for name in "abc"])
    assert "12.34" in text
    assert "6.17" not in text
