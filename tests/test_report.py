"""litlora report, and what a run writes for people: README.md, samples.jsonl, the loggers."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from litlora.cli import call
from litlora.errors import InputError
from litlora.loggers import Loggers, require_loggers
from litlora.lora import LoRA
from litlora.markdown import block, clean, code, inline, table
from litlora.model_card import Card
from litlora.peft_format import Record
from litlora.report import read_run
from litlora.report.plots import _deltas, smooth
from litlora.run_files import COLUMNS

ROOT = Path(__file__).parents[1]
BASE = ROOT / "checkpoints" / "tiny"
DATA = ROOT / "data" / "tiny_test.json"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>|\\|`` ``` $x$ _\x1b[31m\u202e\ud800\n# h\n![i](http://e/x.png)"


def finetune(out_dir: Path, **flags: Any) -> int:
    fast = {
        "checkpoint_dir": BASE, "data_path": DATA, "precision": "32-true", "accelerator": "cpu", "max_steps": 4,
        "batch_size": 4, "warmup_steps": 0, "learning_rate": 3e-3, "val_split": 4, "eval_interval": 1,
        "save_interval": 2, "lora_mlp": True,
    }  # fmt: skip
    words = [w for flag, value in {**fast, "out_dir": out_dir, **flags}.items() for w in (f"--{flag}", str(value))]
    return call(["finetune_lora", *words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A real run of 4 steps and what it said. Not to be changed."""
    out, said = tmp_path_factory.mktemp("trained") / "run", io.StringIO()
    with contextlib.redirect_stderr(said):
        assert finetune(out, quiet=True, sample_prompt="What is 2 + 2?", logger="csv, tensorboard") == 0
    return out, said.getvalue()


def make_run(directory: Path, *, steps: int = 20, finished: bool = True, **settings: Any) -> Path:
    """A run as finetune_lora leaves it, with made-up figures."""
    directory.mkdir(parents=True)
    flags = {"checkpoint_dir": "base", "out_dir": str(directory), "learning_rate": 3e-4, "lora_r": 8, "quantize": None}
    (directory / "hyperparameters.yaml").write_text(yaml.safe_dump(flags | settings))
    with (directory / "metrics.csv").open("w", newline="") as stream:
        rows = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        rows.writeheader()
        for step in range(1, steps + 1):
            row = {"step": step, "loss": 3 / step, "lr": 3e-4, "total_tokens": 100 * step, "total_seconds": 2.0 * step}
            row |= {"memory_gb": 1.5 + step / 100}
            row |= {"val_loss": 2 + 1 / step, "delta_q_proj": step / 1000} if step % 10 == 0 else {}
            rows.writerow(row)
    if finished:
        summary = {"training_seconds": 3725.0, "tokens_per_second": 50.0, "peak_memory_gb": 1.7, "best_val_loss": 2.05}
        summary |= {"trainable_parameters": 4194304, "val_loss": 2.05, "train_loss": 0.15, "steps": steps}
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """`report(words…)`: (stdout, stderr) of the command, which goes well."""

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert call(["report", *map(str, words)]) == code
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    return run


def cells(markdown: str, title: str) -> list[list[str]]:
    """The rows of the first table under a title, its head first."""
    lines = markdown.partition(f"## {title}\n\n")[2].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if "---" not in line]


Report = Callable[..., tuple[str, str]]


def test_a_real_runs_figures_are_those_of_its_files(trained: tuple[Path, str], report: Report) -> None:
    out, _ = trained
    text, _ = report(out)
    summary = json.loads((out / "summary.json").read_text())
    head, row = cells(text, "Figures")
    shown = dict(zip(head, row, strict=True))
    assert shown["run"] == "run"
    assert shown["state"] == "finished"
    assert shown["best validation loss"] == f"{summary['best_val_loss']:.4f}"
    assert shown["trainable parameters"] == f"{summary['trainable_parameters']:,}"
    assert "matmul share" not in shown  # a CPU has none
    assert [row[0] for row in cells(text, "Change of the weights, ‖ΔW‖ / ‖W‖ at the end")[1:]] == [
        "q_proj", "v_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert cells(text, "Sample answers")[0] == ["run", "step", "What is 2 + 2?"]
    assert ["lora_r", "8"] in cells(text, "Settings")


def test_side_by_side_only_what_differs(tmp_path: Path, report: Report) -> None:
    make_run(tmp_path / "out" / "a")
    make_run(tmp_path / "out" / "b", learning_rate=1e-4, lora_r=16, seed=2)
    text, _ = report(tmp_path / "out" / "a", tmp_path / "out" / "b")
    assert [row[0] for row in cells(text, "Figures")] == ["run", "a", "b"]
    assert cells(text, "Figures")[1][1:] == [
        "finished", "20", "2.0500", "2.0500", "0.1500", "1:02:05", "50", "1.70 GB", "4,194,304",
    ]  # fmt: skip
    assert cells(text, "What differs in their settings") == [
        ["setting", "a", "b"],
        ["learning_rate", "0.0003", "0.0001"],
        ["lora_r", "8", "16"],
        ["seed", "–", "2"],
    ]
    assert "2 other settings are the same" in text
    make_run(tmp_path / "out" / "c")
    assert "All settings are the same." in report(tmp_path / "out" / "a", tmp_path / "out" / "c")[0]


def test_what_rounding_costs(tmp_path: Path, report: Report) -> None:
    run = make_run(tmp_path / "a")
    variants = [{"name": "adapter on bnb.nf4", "val_loss": 2.05}, {"name": "merged into bf16", "val_loss": 2.0}]
    (run / "rounding.json").write_text(json.dumps({"variants": variants}))
    assert cells(report(run)[0], "What rounding costs (validation loss)")[1:] == [
        ["adapter on bnb.nf4", "2.05000"],
        ["merged into bf16", "2.00000 (-0.05000)"],
    ]


def test_a_run_that_was_killed_is_told_from_its_metrics(tmp_path: Path, report: Report) -> None:
    run = make_run(tmp_path / "killed", steps=7, finished=False)
    with (run / "metrics.csv").open("a") as stream:
        stream.write("7,1,0.5" + "," * (len(COLUMNS) - 3) + "\n8,1,0.123")
    text, _ = report(run)
    shown = dict(zip(*cells(text, "Figures"), strict=True))
    assert (shown["state"], shown["steps"], shown["last training loss"]) == ("not finished", "7", "0.5000")
    remarks = [row[1] for row in cells(text, "Remarks")[1:]]
    assert remarks == [
        "the last line of metrics.csv is cut off, and left out",
        "metrics.csv has 1 step twice: the later row is shown",
        "no validation",
    ]


@pytest.mark.parametrize(
    ("name", "content", "remark"),
    [
        ("metrics.csv", "", "metrics.csv cannot be read: it has no column named step"),
        ("metrics.csv", "step,loss\n", "no step is in its metrics.csv"),
        ("metrics.csv", "step,loss\n1,nan\n2,3.5\n", "1 of its steps has no finite loss"),
        ("metrics.csv", "step,loss\nx,1\n1\n2,3.5\n", "2 lines of metrics.csv cannot be read"),
        ("metrics.csv", "step,loss\n1," + "9" * 200_000 + "\n", "metrics.csv cannot be read: field larger than field"),
        ("metrics.csv", "\0\xff", "metrics.csv cannot be read"),
        ("summary.json", "[", "summary.json cannot be read"),
        ("summary.json", "1" * 5000, "summary.json cannot be read"),
        ("summary.json", '{"val_loss": ' + "9" * 400 + ', "training_seconds": -1, "steps": "x"}', ""),
        ("hyperparameters.yaml", "a: [", "hyperparameters.yaml cannot be read"),
        ("hyperparameters.yaml", "- 1", "hyperparameters.yaml cannot be read: the config is not a table of flags"),
        ("hyperparameters.yaml", "!!python/object/apply:os.system [touch evil]", "hyperparameters.yaml cannot be read"),
        ("hyperparameters.yaml", "a: 2001-99-99", "hyperparameters.yaml cannot be read"),
        ("hyperparameters.yaml", "[" * 20_000, "hyperparameters.yaml cannot be read"),
        (
            "hyperparameters.yaml",
            "a: &a [x]\nb: [*a, *a]",
            "hyperparameters.yaml cannot be read: the config is not flat",
        ),
        ("hyperparameters.yaml", "a" * 200_000, "hyperparameters.yaml cannot be read: the config is too large"),
        ("rounding.json", '{"variants": 3}', "rounding.json cannot be read: it has no list of variants"),
        ("samples.jsonl", '{"step": 1, "prompt": 2, "answer": "x"}\n[]\n', "2 lines of samples.jsonl cannot be read"),
    ],
)
def test_damaged_files_are_said_and_end_nothing(
    tmp_path: Path, report: Report, name: str, content: str, remark: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content.encode("latin-1"))
    text, _ = report(run)
    assert remark in text
    assert cells(text, "Figures")[1][0] == "run"
    if name != "metrics.csv":
        assert cells(text, "Figures")[1][2] == "20"


def test_what_is_no_run(tmp_path: Path, report: Report) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    run, around = make_run(tmp_path / "run"), tmp_path / "around"
    inside = make_run(around / "inside")
    text, said = report(tmp_path / "notes.txt", tmp_path / "empty", around, run, f"{run}/")
    assert len(cells(text, "Figures")) == 2  # once, however often it is named
    assert f"not a finetuning run, left out: {tmp_path / 'empty'}\n" in said
    assert f"not a finetuning run, left out: {around} ({inside} is one)\n" in said
    assert "none of these is a finetuning run" in report(tmp_path / "empty", code=2)[1]
    assert "does not exist" in report(tmp_path / "nothing", code=2)[1]
    assert "litlora report out/*" in report(code=2)[1]


def test_a_directory_without_overwrite_stays_as_it_is(tmp_path: Path, report: Report) -> None:
    run = make_run(tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    assert "not empty" in report(run, "--out_dir", run, code=2)[1]
    assert sorted(path.name for path in run.iterdir()) == before


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def evil_run(parent: Path) -> Path:
    """A run whose every text is hostile."""
    name = EVIL.encode("utf-8", "replace").decode().replace("/", "∕")
    run = make_run(parent / name, **{"evil": EVIL.replace("\ud800", ""), EVIL.replace("\ud800", ""): "x"})
    (run / "samples.jsonl").write_text(json.dumps({"step": 3, "prompt": EVIL, "answer": EVIL}) + "\n")
    (run / "rounding.json").write_text(json.dumps({"variants": [{"name": EVIL, "val_loss": 1.5}]}))
    text = (run / "metrics.csv").read_text().replace("delta_lm_head", "delta_<b>x</b>")
    (run / "metrics.csv").write_text(text)
    return run


def test_hostile_texts_start_nothing(tmp_path: Path, report: Report) -> None:
    """On a terminal, in Markdown and in a browser."""
    make_run(tmp_path / "out" / "_fine")
    evil_run(tmp_path / "out")
    text, _ = report(*sorted((tmp_path / "out").iterdir()))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", text)
    for title in ("Figures", "What differs in their settings"):
        assert len({len(row) for row in cells(text, title)}) == 1  # no text has made a cell of its own
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    assert "<" not in outside
    assert "![" not in outside
    report(*sorted((tmp_path / "out").iterdir()), "--out_dir", tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text()
    tags = Tags(page).tags
    assert {tag for tag, _ in tags} <= set(
        "html head meta title style body h1 h2 p div table thead tbody tr th td figure picture source img "
        "figcaption details summary".split()
    )
    assert {name for _, attributes in tags for name in attributes} <= set(
        "lang charset http-equiv content name class alt src srcset media".split()
    )
    loaded = [a.get("src") or a.get("srcset") for tag, a in tags if tag in ("img", "source")]
    assert all(str(url).startswith("data:image/png;base64,") for url in loaded)
    assert "url(" not in page


def test_the_page_holds_its_plots_and_they_lie_beside_it(tmp_path: Path, report: Report) -> None:
    pytest.importorskip("matplotlib")
    runs = [make_run(tmp_path / name, steps=40) for name in "ab"]
    printed, _ = report(*runs, "--out_dir", tmp_path / "page")
    assert printed == f"{tmp_path / 'page' / 'report.html'}\n"
    names = ["delta.png", "learning_rate.png", "loss.png"]
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == [*names, "report.html", "report.md"]
    assert all((tmp_path / "page" / name).read_bytes()[:4] == b"\x89PNG" for name in names)
    tags = Tags((tmp_path / "page" / "report.html").read_text()).tags
    assert [tag for tag, _ in tags if tag in ("img", "source")] == ["source", "img"] * 3  # dark and light
    assert "](loss.png)" in (tmp_path / "page" / "report.md").read_text()


def test_without_matplotlib_the_report_says_what_is_missing(
    tmp_path: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, said = report(make_run(tmp_path / "run"), "--out_dir", tmp_path / "page")
    assert "pip install matplotlib" in said
    assert "pip install matplotlib" in (tmp_path / "page" / "report.md").read_text()
    assert "pip install matplotlib" in (tmp_path / "page" / "report.html").read_text()
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["report.html", "report.md"]


def test_no_point_lies_outside_its_plot(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    small, large = make_run(tmp_path / "small", steps=20), make_run(tmp_path / "large", steps=200)
    text = (small / "metrics.csv").read_text()
    (small / "metrics.csv").write_text(text.replace("delta_q_proj", "delta_x"))
    assert _deltas(figure, [read_run(large), read_run(small)])
    values = [(axes.get_ylim(), y) for axes in figure.axes for line in axes.lines for y in line.get_ydata()]
    assert len(values) == 22
    assert all(low <= y <= high for (low, high), y in values)


def test_smoothing_keeps_length_and_means() -> None:
    import numpy as np

    values = np.random.default_rng(0).normal(size=200)
    smoothed = smooth(values)
    assert len(smoothed) == 200
    assert smoothed[100] == pytest.approx(values[96:105].mean())
    assert smoothed[0] == pytest.approx(values[:5].mean())
    assert smooth(np.array([2.0])).tolist() == [2.0]


@given(st.text(max_size=40))
@example("a\\|b`` |")
@example("`")
@example(" ` ")
@example("https://example.org")
@example("_0_")
def test_any_text_comes_back_from_markdown_as_it_is(text: str) -> None:
    """Through another program's reader of Markdown, in a table's cell and in a block."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"linkify": False}).enable("table")
    found = markdown.parse(table(["head"], [[code(text)], [inline(text)]]))
    shown = [token for token in found if token.type == "inline"][1:]
    assert len(shown) == 2
    wanted = re.sub(r"\\\|", r"\\ |", clean(text)).strip()
    for token in shown:
        assert {child.type for child in token.children} <= {"code_inline", "text"}
        assert "".join(child.content for child in token.children).strip() == wanted
    fences = [token for token in markdown.parse(block(text.replace("\r", ""))) if token.type == "fence"]
    assert len(fences) == 1


# -- what a run writes ------------------------------------------------------------------------------------------------


def test_quiet_says_the_closing_figures_only(trained: tuple[Path, str]) -> None:
    said = trained[1]
    assert "training step" not in said
    assert "step 4: validation loss" not in said
    assert "model: " not in said
    assert "data: " not in said
    assert "Training time: " in said
    assert "Validation loss: " in said


def test_weight_changes_stand_in_the_rows_of_validations(tmp_path: Path) -> None:
    assert finetune(tmp_path / "run", eval_interval=2, max_steps=3, val_split=0) == 0
    with (tmp_path / "run" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [bool(row["delta_q_proj"]) for row in rows] == [False, True, True]
    assert 0 < float(rows[1]["delta_q_proj"]) < float(rows[2]["delta_q_proj"]) < 1
    assert not any(row["delta_lm_head"] or row["matmul_share"] for row in rows)


def test_a_resumed_run_answers_each_step_once(trained: tuple[Path, str], tmp_path: Path) -> None:
    """Killed after step 3 with a checkpoint of step 2: its files end as the uninterrupted run's."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    for name in ("summary.json", "README.md"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    flags = {"quiet": True, "sample_prompt": "What is 2 + 2?", "logger": "tensorboard", "resume": "auto"}
    assert finetune(run, **flags) == 0
    assert (run / "samples.jsonl").read_bytes() == (trained[0] / "samples.jsonl").read_bytes()
    assert (run / "README.md").is_file()
    accumulator = event_accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4]
    with (run / "metrics.csv").open() as stream:
        losses = [float(row["val_loss"]) for row in csv.DictReader(stream)]
    assert [event.value for event in accumulator.Scalars("val_loss")] == pytest.approx(losses)


def test_an_overwritten_run_leaves_nothing_behind(trained: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    (run / "rounding.json").write_text("{}")
    assert finetune(run, max_steps=1, val_split=0, overwrite=True) == 0
    assert not (run / "tensorboard").exists()
    assert not (run / "rounding.json").exists()
    assert not (run / "samples.jsonl").exists()  # without validation nothing is asked
    assert "with the best validation loss" not in (run / "README.md").read_text()


def test_loggers_are_known_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune(tmp_path / "run", logger="csv,tensorbord") == 2
    assert "csv, tensorboard, wandb" in capsys.readouterr().err
    monkeypatch.setattr("litlora.loggers.importlib.util.find_spec", lambda name: None)
    assert finetune(tmp_path / "run", logger="wandb") == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert require_loggers("csv") == ["csv"]
    with pytest.raises(InputError):
        require_loggers("")


def test_a_logger_that_fails_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        calls = 0

        def log_metrics(self, values: object, step: int) -> None:
            self.calls += 1
            raise OSError("disk full")

    loggers = Loggers("csv", tmp_path, {}, 0)
    failing = Failing()
    loggers.loggers = [failing]
    loggers.write({"loss": 1.0}, 1)
    loggers.write({"loss": 1.0}, 2)
    assert failing.calls == 1
    assert "Failing failed, and is left out from here on: disk full" in capsys.readouterr().err


def test_weights_and_biases_offline_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for done in (0, 2):
        loggers = Loggers("wandb", tmp_path / "run", {"lora_r": 8, "path": Path("x")}, done)
        ids.append(loggers.loggers[0].run.id)
        for step in range(done + 1, done + 4):
            loggers.write({"step": step, "loss": 1 / step, "val_loss": None}, step)
        loggers.close("success")
    assert ids[0] == ids[1] == (tmp_path / "run" / "wandb" / "id.txt").read_text().strip()
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 2


# -- the model card ---------------------------------------------------------------------------------------------------


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)


def test_the_cards_header_is_the_hubs_and_pefts(trained: tuple[Path, str]) -> None:
    text = (trained[0] / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == str(BASE)
    assert header["library_name"] == "peft"
    summary = json.loads((trained[0] / "summary.json").read_text())
    assert f"| best validation loss | {summary['best_val_loss']:.4f} |" in text
    assert "| LoRA rank | 8 |" in text
    assert f"from {DATA}, 448 rows" in text


@pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's, of each other
def test_the_cards_python_answers_as_litlora_does(
    trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers and PEFT, as the card says it, and litlora, as the card says it."""
    pytest.importorskip("google.protobuf")  # transformers reads tokenizer.model with it
    text = (trained[0] / "README.md").read_text()
    (python,) = fences(text, "python")
    assert 'dtype="auto"' in python
    python = python.replace('dtype="auto"', 'dtype="float32"')  # in bf16 two programs may round to different words
    capsys.readouterr()
    exec(compile(python, "README.md", "exec"), {})
    theirs = capsys.readouterr().out.strip()
    command = shlex.split(fences(text, "bash")[0])
    assert command[:2] == ["litlora", "generate"]
    assert call([*command[1:], "--max_new_tokens", "128", "--temperature", "0", "--precision", "32-true"]) == 0
    assert capsys.readouterr().out.strip() == theirs
    assert theirs


def card(directory: Path = Path("out/run"), lora: LoRA | None = None, **changes: Any) -> str:
    record = Record("base", "f", None, False, "32-true", "alpaca", None, "t", 0, None, "0.1.0")
    summary = {
        "steps": 2, "tokens": 5, "trainable_parameters": 9, "training_seconds": 1.0, "tokens_per_second": 5.0,
        "peak_memory_gb": 1.0, "device": "cpu", "val_loss": 2.0, "best_val_loss": 1.5, "best_step": 1,
        "train_loss": 3.0,
    }  # fmt: skip
    facts: dict[str, Any] = {
        "directory": directory, "record": record, "lora": lora or LoRA(), "settings": {"data": "alpaca"},
        "summary": summary, "rows": (10, 2), "tokens": 100, "instruction": "Hi?", "prompt": "Q: Hi?\n",
        "hub_name": None,
    }  # fmt: skip
    return Card(**facts | changes).text()


def test_the_cards_commands_hold_any_path_and_prompt() -> None:
    directory = Path("out/a b'$(touch evil)`")
    text = card(directory, instruction="it's $HOME\n`x`", prompt="it's $HOME\n```\n`x`")
    blocks = re.findall(r"^(`{3,})bash\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for _, lines in blocks:
        subprocess.run(["bash", "-n"], input=lines, text=True, check=True)
    words = shlex.split(blocks[0][1])
    assert words[words.index("--lora_path") + 1] == str(directory)
    assert words[words.index("--prompt") + 1] == "it's $HOME\n`x`"
    body = shlex.split(blocks[1][1], comments=True)[-1]
    assert json.loads(body)["prompt"] == "it's $HOME\n```\n`x`"
    python = re.findall(r"^(`{3,})python\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)[0][1]
    compile(python, "README.md", "exec")
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "peft"


def test_the_card_merges_what_servers_cannot_load() -> None:
    """llama.cpp scales by alpha / r and has no head of a tied model; vLLM knows rsLoRA but one rank and alpha."""
    plain, rslora, head = card(), card(lora=LoRA(r=300, rslora=True)), card(lora=LoRA(targets=("q_proj", "lm_head")))
    assert "merge_lora" not in plain
    assert "--max-lora-rank 8 " in plain
    assert rslora.count("merge_lora") == 1
    assert "--max-lora-rank 320" in rslora
    assert head.count("merge_lora") == 2
    assert card(lora=LoRA(rank_pattern={"q_proj": 4})).count("merge_lora") == 2


def test_a_chat_models_card_asks_through_its_template() -> None:
    text = card(prompt=None)
    assert "apply_chat_template" in text
    assert text.count("/v1/chat/completions") == 2


def test_the_card_names_the_base_as_the_hub_does() -> None:
    text = card(hub_name="meta-llama/Llama-2-7b-hf")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert "Before you publish" not in text
    assert "Before you publish" in card()
