"""Validation lies nowhere: the same loss in training and in a fresh process, however rows are packed, merged or not."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import make_peft_adapter
from torch import Tensor

from litlora.cli import call
from litlora.commands.common import Base, validation_batches
from litlora.config import ModelConfig, Rope
from litlora.data import Counts, Dataset, PromptStyle, load_rows, prepare, split
from litlora.frozen import Dense
from litlora.load import RandomWeights, load_model
from litlora.model import CausalLoss, validation_loss
from litlora.packing import IGNORED, collate, micro_batches

ROOT = Path(__file__).parents[1]
TINY, DATA = ROOT / "checkpoints" / "tiny", ROOT / "data" / "tiny_test.json"
Capture = pytest.CaptureFixture[str]
# A pack of validation rows is another one than training's: neither its size nor the rate may matter.
RUN = {
    "checkpoint_dir": TINY, "data_path": DATA, "accelerator": "cpu", "max_steps": 2, "batch_size": 4,
    "micro_batch_tokens": 90, "warmup_steps": 0, "learning_rate": 5e-2, "val_split": 30, "eval_interval": 2,
    "mask_prompt": "true", "lora_mlp": "true", "sample_prompt": "Hi",
}  # fmt: skip


def words(flags: Mapping[str, Any]) -> list[str]:
    return [f"--{flag}={value}" for flag, value in flags.items() if value is not None]


def trained(out: Path, **flags: Any) -> float:
    """A run in `out`; the validation loss of its last step."""
    assert call(["finetune_lora", *words({**RUN, "out_dir": out, **flags})]) == 0
    with (out / "metrics.csv").open() as stream:
        return float(list(csv.DictReader(stream))[-1]["val_loss"])


def validate(capsys: Capture, **flags: Any) -> float:
    """Data flags, quantization and precision come from the run, where there is an adapter."""
    capsys.readouterr()
    assert call(["validate", *words({"checkpoint_dir": TINY, "accelerator": "cpu", **flags})]) == 0
    return float(json.loads(capsys.readouterr().out)["val_loss"])


def fresh_process(command: str, **flags: Any) -> str:
    """Its stdout."""
    line = [sys.executable, "-m", "litlora", command, *words(flags)]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout


# In training and in a fresh process


@pytest.mark.parametrize(
    ("precision", "quantize"),
    [("32-true", None), ("32-true", "bnb.nf4"), ("bf16-true", None), ("bf16-true", "bnb.nf4"), ("bf16-mixed", None)],
)
def test_a_fresh_process_measures_what_training_measured(precision: str, quantize: str | None, tmp_path: Path) -> None:
    inside = trained(tmp_path / "run", precision=precision, quantize=quantize)
    line = {"checkpoint_dir": TINY, "lora_path": tmp_path / "run" / "last", "accelerator": "cpu"}
    outside = json.loads(fresh_process("validate", **line))["val_loss"]
    assert outside == pytest.approx(inside, rel=0, abs=1e-5)


DATA_FLAGS = ("data_path", "val_split", "mask_prompt")


@pytest.mark.parametrize("formats", [{}, {"precision": "bf16-true", "quantize": "bnb.nf4"}], ids=str)
def test_the_base_too(formats: dict[str, str], tmp_path: Path, capsys: Capture) -> None:
    """A rate so small that the adapter adds nothing: training then validates the base."""
    inside = trained(tmp_path / "run", learning_rate=1e-30, **formats)
    data = {key: RUN[key] for key in DATA_FLAGS}
    assert validate(capsys, **data, **formats) == pytest.approx(inside, rel=0, abs=1e-5)


# Merged, and what rounding costs


@dataclass(frozen=True)
class Qlora:
    """A QLoRA run, and what `validate --rounding true` says of it."""

    out: Path
    val_loss: float
    rounding: dict[str, Any]
    table: str

    @property
    def losses(self) -> dict[str, float]:
        return {variant["name"]: variant["val_loss"] for variant in self.rounding["variants"]}


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Qlora:
    out = tmp_path_factory.mktemp("qlora") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITLORA_CACHE", str(out.parent / "cache"))
        loss = trained(out, quantize="bnb.nf4", precision="32-true", learning_rate=3e-3)
        said = fresh_process("validate", checkpoint_dir=TINY, lora_path=out, accelerator="cpu", rounding="true")
    return Qlora(out, loss, json.loads((out / "rounding.json").read_text()), said)


def test_rounding_puts_the_variants_side_by_side(qlora: Qlora) -> None:
    names = ["adapter on bnb.nf4", "adapter on bf16", "merged into bf16", "merged onto bnb.nf4-rounded bf16"]
    assert list(qlora.losses) == names
    assert qlora.losses["adapter on bnb.nf4"] == pytest.approx(qlora.val_loss, rel=0, abs=1e-5)
    assert len(set(qlora.losses.values())) == 4
    about = {key: qlora.rounding[key] for key in ("step", "recorded_val_loss", "data_path", "val_split", "precision")}
    assert about == {
        "step": 2, "recorded_val_loss": qlora.val_loss, "data_path": str(DATA), "val_split": 30, "precision": "32-true",
    }  # fmt: skip
    heading, *lines = qlora.table.splitlines()
    assert heading.split() == ["val", "loss", "perplexity", "difference"]
    for line, (name, loss) in zip(lines, qlora.losses.items(), strict=True):
        assert line.startswith(f"{name} ")
        cells = line.removeprefix(name).split()
        assert cells[:2] == [f"{loss:.5f}", f"{np.exp(loss):.4f}"]
        assert cells[2:] == ([] if line == lines[0] else [f"{loss - qlora.val_loss:+.5f}"])


@pytest.fixture(scope="module")
def merged(qlora: Qlora) -> dict[str, Path]:
    """The models that merge_lora writes, by the name of the variant."""
    found = {"merged into bf16": None, "merged onto bnb.nf4-rounded bf16": "bnb.nf4"}
    for name, base_rounding in found.items():
        flags = {"checkpoint_dir": TINY, "lora_path": qlora.out, "out_dir": qlora.out.parent / name}
        assert call(["merge_lora", *words({**flags, "base_rounding": base_rounding})]) == 0
    return {name: qlora.out.parent / name for name in found}


def test_the_variants_are_what_the_commands_give_one_by_one(
    qlora: Qlora, merged: dict[str, Path], capsys: Capture
) -> None:
    """The adapter over the unquantized base; and both kinds of merged model, written and opened again."""
    data = {key: RUN[key] for key in DATA_FLAGS}
    measured = {name: validate(capsys, checkpoint_dir=path, **data) for name, path in merged.items()}
    measured["adapter on bf16"] = validate(capsys, lora_path=qlora.out, quantize="null")
    for name, loss in measured.items():
        assert loss == pytest.approx(qlora.losses[name], rel=0, abs=1e-5), name


@dataclass(frozen=True)
class InMemory:
    """Tensors by name."""

    config: ModelConfig
    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_is_w_plus_delta_rounded_in_memory(
    dtype: torch.dtype, qlora: Qlora, merged: dict[str, Path], capsys: Capture
) -> None:
    """W + alpha/r · B A in fp32, rounded to the base's bf16: written down here, without the merge's own code. Computed
    in fp32 and in bf16."""
    tensors, factors = load_file(TINY / "model.safetensors"), load_file(qlora.out / "adapter_model.safetensors")
    for key in [key for key in factors if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        delta = 16 / 8 * factors[key.replace("lora_A", "lora_B")].float() @ factors[key].float()
        tensors[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
    base = Base.open(TINY, weights=False)
    rows = load_rows("alpaca", DATA)
    held = [rows[i] for i in split(len(rows), 30, 1337)[1]]
    style = PromptStyle.load("alpaca", base.tokenizer)
    dataset = prepare(held, base.tokenizer, style, mask_prompt=True, max_seq_length=512)
    model = load_model(InMemory(base.config, tensors), Dense(dtype), dtype=dtype, device="cpu")
    loss = validation_loss(CausalLoss(model), validation_batches(dataset, range(30)), torch.device("cpu"))
    flags = {key: RUN[key] for key in DATA_FLAGS} | {"checkpoint_dir": merged["merged into bf16"]}
    flags["precision"] = "32-true" if dtype == torch.float32 else "bf16-true"
    assert validate(capsys, **flags) == pytest.approx(loss, rel=0, abs=1e-5)


def test_rounding_of_a_run_that_was_not_quantized(tmp_path: Path, capsys: Capture) -> None:
    inside = trained(tmp_path / "run", precision="32-true", lora_head="true")
    assert call(["validate", *words({"checkpoint_dir": TINY, "lora_path": tmp_path / "run", "rounding": "true"})]) == 0
    variants = json.loads((tmp_path / "run" / "rounding.json").read_text())["variants"]
    assert [variant["name"] for variant in variants] == ["adapter on bf16", "merged into bf16"]
    assert variants[0]["val_loss"] == pytest.approx(inside, rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_path": None}, "--rounding is about one adapter"),
        ({"quantize": "bnb.fp4"}, "--rounding measures the adapter as it was trained\n  got:    --quantize\n"),
        ({"weights": "0.5"}, "got:    --weights\n"),
        ({"quantize": "bnb.nf4", "data_path": "none.json"}, "the data file does not exist"),
    ],
    ids=str,
)
def test_rounding_refuses(flags: dict[str, str], said: str, qlora: Qlora, capsys: Capture) -> None:
    line = {"checkpoint_dir": TINY, "lora_path": qlora.out, "rounding": "true", **flags}
    assert call(["validate", *words(line)]) == 2
    assert said in capsys.readouterr().err


def test_rounding_wants_an_adapter_that_says_what_it_is(
    bases: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    make_peft_adapter(tmp_path / "adapter", bases("llama"))
    line = {"checkpoint_dir": bases("llama"), "lora_path": tmp_path / "adapter", "rounding": "true"}
    assert call(["validate", *words(line)]) == 2
    assert "does not say what it was trained over" in capsys.readouterr().err


# The run's data flags


def test_data_flags_are_the_runs_unless_given(qlora: Qlora, tmp_path: Path, capsys: Capture) -> None:
    def rows(**flags: Any) -> tuple[int, int, str]:
        capsys.readouterr()
        line = {"checkpoint_dir": TINY, "lora_path": qlora.out, "accelerator": "cpu", **flags}
        assert call(["validate", *words(line)]) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        return found["rows"], found["trained_tokens"], err

    count, masked, said = rows()
    assert count == 30
    assert f"data flags as in {qlora.out / 'hyperparameters.yaml'}: --data_path {DATA} --val_split 30 " in said
    assert rows(mask_prompt="false")[1] > 2 * masked
    assert rows(val_split=7)[0] == 7
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(DATA.read_text())[:9]))
    assert rows(val_path=few)[0] == 9
    # a run that was validated on a file of its own; another file given by hand is split again
    copy = tmp_path / "run"
    shutil.copytree(qlora.out, copy)
    raw = yaml.safe_load((copy / "hyperparameters.yaml").read_text())
    (copy / "hyperparameters.yaml").write_text(yaml.safe_dump({**raw, "val_path": str(few)}))
    assert rows(lora_path=copy)[0] == 9
    assert rows(lora_path=copy, data_path=DATA)[0] == 30
    for content, message in (
        (yaml.safe_dump({**raw, "seed": "one"}), "settings that litlora did not write"),
        (yaml.safe_dump({**raw, "data": ["alpaca"]}), "settings that litlora did not write"),
        ("seed: [1", "the run's settings cannot be read"),
    ):
        (copy / "hyperparameters.yaml").write_text(content)
        assert call(["validate", *words({"checkpoint_dir": TINY, "lora_path": copy})]) == 2
        assert message in capsys.readouterr().err


# Batches and neighbours

SHAPE = ModelConfig(
    model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope=Rope(10000.0), sliding_windows=(None, 6),
)  # fmt: skip


@pytest.fixture(scope="module")
def exact() -> CausalLoss:
    """A model in fp64: what depends on nothing is equal to the last digits."""
    weights = RandomWeights(SHAPE, torch.float64)
    model = load_model(weights, Dense(torch.float64), dtype=torch.float64, device="cpu")
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.dim() == 2 else 1)  # so that attention is not all but even
    return CausalLoss(model).eval()


def dataset_of(rows: list[list[int]], trained: list[list[bool]]) -> Dataset:
    offsets = np.cumsum([0, *map(len, rows)])
    flat = np.array([flag for row in trained for flag in row], dtype=np.bool_)
    flat[offsets[:-1]] = False
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    return Dataset(ids, flat, offsets, np.arange(1, len(rows) + 1), Counts(rows=len(rows)))


row = st.lists(st.tuples(st.integers(0, 39), st.booleans()), min_size=1, max_size=20)
datasets = st.lists(row, min_size=1, max_size=12).map(
    lambda rows: dataset_of([[i for i, _ in row] for row in rows], [[flag for _, flag in row] for row in rows])
)


@given(datasets, st.integers(1, 60), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_validation_loss_does_not_depend_on_batches(
    exact: CausalLoss, dataset: Dataset, tokens: int, rows: int
) -> None:
    everything = range(len(dataset))
    cuts = [
        micro_batches(dataset, everything),
        micro_batches(dataset, everything, max_tokens=tokens),
        micro_batches(dataset, everything, max_rows=rows),
        micro_batches(dataset, list(everything)[::-1], max_rows=1),
        validation_batches(dataset, everything),
    ]
    losses = [validation_loss(exact, batches, torch.device("cpu")) for batches in cuts]
    if dataset.flat_trained.any():
        assert losses == pytest.approx([losses[0]] * len(cuts), rel=1e-10)
    else:
        assert np.isnan(losses).all()


@given(datasets, st.data())
@settings(deadline=None, max_examples=30)
def test_a_rows_loss_does_not_depend_on_its_neighbours(
    exact: CausalLoss, dataset: Dataset, data: st.DataObject
) -> None:
    """In a pack, in any order, beside rows that say something else: the losses of its tokens are those it has alone."""
    order = data.draw(st.permutations(range(len(dataset))))
    place = data.draw(st.integers(0, len(order) - 1))
    changed = Dataset((dataset.flat_ids + 1) % 40, dataset.flat_trained, dataset.offsets, dataset.rows, dataset.counts)
    changed.ids(order[place])[:] = dataset.ids(order[place])
    alone = loss_of(exact, dataset, [order[place]], 0)
    for pack in (dataset, changed):
        assert loss_of(exact, pack, order, place) == pytest.approx(alone, rel=1e-10, abs=1e-12)


@torch.no_grad()
def loss_of(model: CausalLoss, dataset: Dataset, indices: Sequence[int], place: int) -> float:
    """Of one row in a pack of `indices`: the labels of the others are masked."""
    batch = collate(dataset, indices)
    begin, end = batch.cu_seqlens[place : place + 2].tolist()
    positions = torch.arange(len(batch.labels))
    inside = (positions >= begin) & (positions < end)
    return model(replace(batch, labels=torch.where(inside, batch.labels, IGNORED))).item()
