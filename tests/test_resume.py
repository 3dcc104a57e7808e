"""A run that is interrupted and started again is, bit for bit, the run that was not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litlora import run_files, train
from litlora.checkpoint import Shard, write_shard
from litlora.cli import call
from litlora.commands import finetune_job, finetune_lora, finetune_training
from litlora.memory import MicroBatch
from litlora.model import CausalLoss
from litlora.resume import find_checkpoint

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import kill  # noqa: E402

STEPS = 8
FAST = kill.FLAGS | {"max_steps": STEPS, "precision": "32-true"}


def finetune(out_dir: Path, **flags: object) -> int:
    values = {**FAST, "out_dir": out_dir, **flags}
    return call(["finetune_lora", *(w for flag, value in values.items() for w in (f"--{flag}", str(value)))])


@pytest.fixture(autouse=True)
def no_answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample answers take most of a short run's time."""
    if "disturb" not in request.node.name:
        monkeypatch.setattr(finetune_training.Training, "sample", lambda _: "")


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """`at_step(5, act)`: acts once, when the fifth step of a run is done and nothing of it is written yet."""

    def plan(number: int, act: Callable[[], object]) -> None:
        steps, acts = finetune_lora.train, [act]

        def watched(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for step in steps(*args, **kwargs):
                if step.number == number and acts:
                    acts.pop()()
                yield step

        monkeypatch.setattr(finetune_lora, "train", watched)

    return plan


def die() -> None:
    """Nothing of the run goes on, as after SIGKILL: neither saves nor messages."""
    raise KeyboardInterrupt


def settings(out_dir: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((out_dir / "hyperparameters.yaml").read_text()))


def steps_of(out_dir: Path) -> list[int]:
    return [int(row[0]) for row in kill.rows(out_dir)]


def checkpoints(out_dir: Path) -> list[str]:
    return sorted(path.name for path in (out_dir / "checkpoints").iterdir())


def differences_but_checkpoints(whole: Path, out_dir: Path) -> list[str]:
    return [name for name in kill.differences(whole, out_dir) if "step-" not in name]


# --- exact ------------------------------------------------------------------------------------------------------------


def test_killed_runs_go_on_bit_for_bit() -> None:
    """The small part of the campaign in benchmarks/RESULTS.md: real kills from outside and at writes, micro-batches and
    validation batches, each run in a process of its own."""
    line = [sys.executable, str(ROOT / "benchmarks" / "kill.py"), "--runs", "3", "--seed", "1", "--fork"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost 0, differing 0" in done.stdout


@pytest.mark.parametrize(
    "flags",
    [
        {"precision": "bf16-true", "lora_mlp": "false", "batch_size": 2, "micro_batch_size": 1},
        {"quantize": "bnb.nf4", "optimizer": "sgd", "lora_mlp": "false", "batch_size": 2, "micro_batch_size": 1},
        {"optimizer": "adamw_8bit", "lora_r": 32, "lora_dtype": "bfloat16"},  # r 32: large enough for 8 bit
        {"activation_checkpointing": "full", "micro_batch_size": "null", "micro_batch_tokens": 100, "epochs": 2},
    ],
    ids=lambda flags: " ".join(f"{key}={value}" for key, value in flags.items()),
)
def test_every_setting_goes_on_bit_for_bit(flags: dict[str, Any], tmp_path: Path, at_step: Any) -> None:
    assert finetune(tmp_path / "whole", **flags) == 0
    at_step(5, die)
    assert finetune(tmp_path / "run", **flags) == 130
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    assert finetune(tmp_path / "run", **flags) == 0
    assert not kill.differences(tmp_path / "whole", tmp_path / "run")


def test_validation_does_not_disturb_the_training(tmp_path: Path) -> None:
    for interval in (1, 100):
        assert finetune(tmp_path / str(interval), eval_interval=interval, max_steps=4) == 0
    often, seldom = ([row[2] for row in kill.rows(tmp_path / name)] for name in ("1", "100"))
    assert often == seldom


def test_deterministic_is_taken_and_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    try:
        for name in ("false", "true"):
            assert finetune(tmp_path / name, deterministic=name, max_steps=3) == 0
            assert torch.are_deterministic_algorithms_enabled() == (name == "true")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not kill.differences(tmp_path / "true", tmp_path / "false")


def test_a_checkpoint_holds_adapter_optimizer_and_little_more(tmp_path: Path) -> None:
    assert finetune(tmp_path / "run", lora_dtype="bfloat16", save_dtype="float32", keep_last=1) == 0
    assert checkpoints(tmp_path / "run") == ["step-00000008"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000008"
    shard = find_checkpoint(str(checkpoint), tmp_path).tensors.values()  # type: ignore[union-attr]
    assert {info.dtype for info in shard if info.name.startswith("adapter.")} == {torch.bfloat16}  # not as it is saved
    parameters = json.loads((tmp_path / "run" / "summary.json").read_text())["trainable_parameters"]
    assert sum(info.nbytes for info in shard) < parameters * 2 * 3 + 100_000  # itself and two moments
    for file in (checkpoint / "best").iterdir():
        assert file.samefile(tmp_path / "run" / file.name)  # no second copy on the disk


def test_what_was_fitted_to_the_free_memory_is_kept(
    tmp_path: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free: dict[str, object] = {"micro_batch_size": "null"}
    monkeypatch.setattr(finetune_job, "choose_micro_batch", lambda *_: MicroBatch(90, "full", 1))
    assert finetune(tmp_path / "whole", **free) == 0
    at_step(5, die)
    assert finetune(tmp_path / "run", **free) == 130
    monkeypatch.setattr(finetune_job, "choose_micro_batch", lambda *_: MicroBatch(2000))
    assert finetune(tmp_path / "run", **free) == 0
    assert not kill.differences(tmp_path / "whole", tmp_path / "run")
    found = settings(tmp_path / "run")
    assert (found["micro_batch_tokens"], found["activation_checkpointing"]) == (90, "full:1")


def test_how_micro_batches_are_launched_does_not_depend_on_where_it_goes_on(
    tmp_path: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured or not, and so padded or not, is chosen by the length of the run's first micro-batches."""
    lengths: list[int] = []
    fastest = train.fastest_micro_step

    def watched(fabric: Any, model: Any, parameters: Any, tokens: int) -> Any:
        lengths.append(tokens)
        return fastest(fabric, model, parameters, tokens)

    monkeypatch.setattr(train, "fastest_micro_step", watched)
    at_step(5, die)
    assert finetune(tmp_path / "run") == 130
    assert finetune(tmp_path / "run") == 0
    assert len(lengths) == 2
    assert lengths[0] == lengths[1]


# --- where to go on ---------------------------------------------------------------------------------------------------


def test_auto_starts_where_there_is_nothing_and_where_a_run_was_killed_before_its_first(
    tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(2, die)
    assert finetune(tmp_path / "run") == 130
    assert checkpoints(tmp_path / "run") == []
    assert finetune(tmp_path / "run", resume="null") == 2  # without --resume as ever: not empty
    assert "--overwrite true" in capsys.readouterr().err
    assert finetune(tmp_path / "run", max_steps=4) == 0
    assert "resuming" not in capsys.readouterr().err
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_auto_takes_nobody_elses_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert finetune(tmp_path) == 2
    assert "not empty" in capsys.readouterr().err
    assert finetune(tmp_path / "run", max_steps=3) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # to save space: the adapter is still wanted
    (tmp_path / "run" / "checkpoints").mkdir()
    assert finetune(tmp_path / "run", max_steps=3) == 2


def test_a_finished_run_has_nothing_to_do_and_can_be_made_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "whole") == 0
    assert finetune(tmp_path / "run", max_steps=5, eval_interval=100) == 0
    capsys.readouterr()
    assert finetune(tmp_path / "run", max_steps=5, eval_interval=100) == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert finetune(tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "resuming with other flags: " in said
    assert "max_steps was 5, now 8" in said
    assert [row[2] for row in kill.rows(tmp_path / "run")] == [row[2] for row in kill.rows(tmp_path / "whole")]


def test_killed_between_the_last_checkpoint_and_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finetune(tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(finetune_training.Training, "finish", lambda _: die())
        assert finetune(tmp_path / "run") == 130
    assert finetune(tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == STEPS
    assert not kill.differences(tmp_path / "whole", tmp_path / "run")


def test_from_a_directory_into_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best adapter and the metrics up to there come along, though the run they are of is far away."""
    whole, first = tmp_path / "whole", tmp_path / "first"
    assert finetune(whole, keep_last=9) == 0
    assert checkpoints(whole) == ["step-00000003", "step-00000006", "step-00000008"]
    shutil.copytree(whole / "checkpoints" / "step-00000006", first)  # alone
    assert finetune(tmp_path / "run", resume=first) == 0
    assert not differences_but_checkpoints(whole, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "litlora.json").read_text())["step"] == 4  # before the checkpoint
    capsys.readouterr()
    assert finetune(whole, resume=whole / "checkpoints" / "step-00000003", keep_last=9) == 2
    assert "resuming would take later checkpoints away" in capsys.readouterr().err
    assert len(checkpoints(whole)) == 3
    assert finetune(whole, resume=whole / "checkpoints" / "step-00000003", keep_last=9, overwrite="true") == 0
    assert not differences_but_checkpoints(whole, tmp_path / "run")
    assert finetune(tmp_path / "none", resume=tmp_path) == 2
    assert "no checkpoint to resume from" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000008"
    whole = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert finetune(tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "not a valid safetensors file" in said
    assert "resuming after step 6 of 8" in said
    assert not kill.differences(tmp_path / "whole", tmp_path / "run")


NAN = float("nan")
DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda state: state.update(format=99),
    "no totals": lambda state: state.pop("totals"),
    "a step that is text": lambda state: state["totals"].update(step="8"),
    "a step before the first": lambda state: state["totals"].update(step=-1),
    "a total too many": lambda state: state["totals"].update(more=1),
    "a choice of text": lambda state: state["conditions"]["chosen"].update(policy=1),
    "a micro-batch of no tokens": lambda state: state["conditions"]["chosen"].update(tokens=0),
    "fewer blocks than none": lambda state: state["conditions"]["chosen"].update(blocks=-1),
    "conditions that are a list": lambda state: state.update(conditions=[1]),
    "a choice that is none": lambda state: state["conditions"].update(chosen={"tokens": "many"}),
    "a choice too many": lambda state: state["conditions"].update(
        chosen={"tokens": 1, "policy": "none", "blocks": 0, "x": 1}
    ),
    "a policy that is none": lambda state: state["conditions"]["chosen"].update(policy="lean"),
    "settings of no kind": lambda state: state["conditions"].update(settings={"lora_r": [8]}),
    "no optimizer": lambda state: state.pop("optimizer"),
    "other tensors": lambda state: state.update(tensors="0" * 32),
    "an optimizer of other parameters": lambda state: state.update(optimizer={"nothing.step": 3}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_state_that_is_none_is_refused(name: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "checkpoints" / "step-00000003" / "state.json"
    state = json.loads(file.read_text())
    DAMAGES[name](state)
    file.write_text(json.dumps(state))
    before = (finished / "metrics.csv").read_text()
    capsys.readouterr()
    assert finetune(finished, max_steps=4, save_interval=9) == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert "internal error" not in said
    assert (finished / "metrics.csv").read_text() == before


def put(checkpoint: Path, name: str, value: float) -> None:
    """Into the first place of one of the checkpoint's tensors."""
    shard = Shard.open(checkpoint / "state.safetensors")
    tensors = {info.name: info.read() for info in shard.tensors}
    tensors[name].view(-1)[0] = value
    write_shard(checkpoint / "state.safetensors", shard.header, tensors.values())


def test_a_last_step_that_leaves_no_numbers_fails(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The root of a negative second moment."""
    checkpoint = finished / "checkpoints" / "step-00000003"
    names = [info.name for info in Shard.open(checkpoint / "state.safetensors").tensors]
    put(checkpoint, next(name for name in names if name.endswith("lora_B.weight.exp_avg_sq")), -1e9)
    capsys.readouterr()
    assert finetune(finished, max_steps=4, eval_interval=100, val_split=6) == 1
    said = capsys.readouterr().err
    assert "error: the last step has left values in the adapter that are not finite" in said
    assert not (finished / "summary.json").exists()


@pytest.mark.parametrize("part", ["adapter.", "optimizer."])
def test_tensors_without_a_number_are_refused(part: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = finished / "checkpoints" / "step-00000003"
    names = [info.name for info in Shard.open(checkpoint / "state.safetensors").tensors]
    name = next(name for name in names if name.startswith(part) and not name.endswith(".step"))
    put(checkpoint, name, NAN)
    capsys.readouterr()
    assert finetune(finished, max_steps=4) == 2
    assert f"{name} holds NaN" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, made once."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert finetune(out, max_steps=3) == 0
    return out


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_once, tmp_path / "finished"))


# --- other flags ------------------------------------------------------------------------------------------------------


def test_flags_that_change_the_maths_are_refused_one_by_one_or_taken(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer: dict[str, object] = {"max_steps": 4, "warmup_steps": 5, "learning_rate": 1e-4, "log_interval": 3}
    capsys.readouterr()
    assert finetune(finished, **longer) == 2
    said = capsys.readouterr().err
    assert "learning_rate was 0.05, now 0.0001; warmup_steps was 12, now 5" in said
    assert "log_interval" not in said
    assert "--resume_override true" in said
    assert finetune(finished, **longer, resume_override="true") == 0
    said = capsys.readouterr().err
    for text in ("log_interval was 10, now 3", "max_steps was 3, now 4", "learning_rate was 0.05, now 0.0001"):
        assert text in said
    assert steps_of(finished) == [1, 2, 3, 4]
    assert settings(finished)["resume_override"] is False  # not for the next time
    assert settings(finished)["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_r": 4}, "lora_r was 8, now 4"),
        ({"lora_query": "false"}, "lora_query was True, now False"),
        ({"optimizer": "sgd"}, "optimizer was adamw, now sgd"),
        ({"seed": 5}, "the data are not those of the checkpoint"),
        ({"max_seq_length": 30}, "max_seq_length was None, now 30"),
        ({"data_path": ROOT / "data" / "tiny_train.json"}, "other rows, or another split"),
        ({"max_steps": 4, "lr_schedule": "linear"}, "lr_schedule was constant, now linear"),
    ],
    ids=str,
)
def test_what_would_be_another_run(
    flags: dict[str, object], said: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    override = {} if "lr_schedule" in flags else {"resume_override": "true"}  # does not help the others
    capsys.readouterr()
    assert finetune(finished, **override, **flags) == 2
    assert said in capsys.readouterr().err


def test_another_base_is_refused_and_the_same_one_elsewhere_taken(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(ROOT / "checkpoints" / "tiny", tmp_path / "base"))
    assert finetune(finished, checkpoint_dir=base, max_steps=4) == 0
    assert f"checkpoint_dir was {ROOT / 'checkpoints' / 'tiny'}, now {base}" in capsys.readouterr().err
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[8 + int.from_bytes(weights[:8], "little")] ^= 1  # the first tensor's first byte
    (base / "model.safetensors").write_bytes(weights)
    assert finetune(finished, checkpoint_dir=base, max_steps=5) == 2
    assert "another base model" in capsys.readouterr().err


# --- saves that fail --------------------------------------------------------------------------------------------------


def test_a_full_disk_during_a_save_leaves_the_last_good_checkpoint_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full from the second save on, in the middle of the large file; free again before the third."""
    assert finetune(tmp_path / "whole") == 0
    fsync, full = os.fsync, [False]

    def no_space(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if full[0] and "safetensors" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    save = finetune_training.Training.save

    def watched(training: finetune_training.Training, *, final: bool = False) -> None:
        full[0] = training.totals.step == 6
        save(training, final=final)
        full[0] = False
        if training.totals.step == 6:
            assert checkpoints(tmp_path / "run") == ["step-00000003"]  # whole, and nothing half beside it
            assert not list((tmp_path / "run").rglob("*.tmp"))

    monkeypatch.setattr(os, "fsync", no_space)
    monkeypatch.setattr(finetune_training.Training, "save", watched)
    capsys.readouterr()
    assert finetune(tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be saved\n  got:    No space left on device" in said
    assert "kept:   " + str(tmp_path / "run" / "checkpoints" / "step-00000003") in said
    assert checkpoints(tmp_path / "run") == ["step-00000003", "step-00000008"]
    assert not differences_but_checkpoints(tmp_path / "whole", tmp_path / "run")


def test_a_disk_that_stays_full_ends_the_run_with_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = os.replace

    def no_space(source: Any, target: Any) -> None:
        if "step-00000008" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        assert finetune(tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert said.count("the run goes on") == 0  # after its last step it does not
    assert "the end of the run, step 8, could not be saved" in said
    assert "--resume auto" in said
    assert checkpoints(tmp_path / "run") == ["step-00000003", "step-00000006"]
    assert finetune(tmp_path / "run") == 0
    assert steps_of(tmp_path / "run") == list(range(1, 9))


def test_a_metrics_row_that_cannot_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: str) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            self.write("")

    log = finetune_training.Training.log

    def watched(training: finetune_training.Training, step: Any, val_loss: float | None) -> None:
        if step.number == 2:
            training.metrics.close()
            training.metrics.stream = Full()  # type: ignore[assignment]
        log(training, step, val_loss)

    monkeypatch.setattr(finetune_training.Training, "log", watched)
    assert finetune(tmp_path / "run", max_steps=4) == 0
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_a_directory_that_vanishes_comes_back_whole(
    tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(5, lambda: shutil.rmtree(tmp_path / "run"))
    assert finetune(tmp_path / "run") == 0
    assert steps_of(tmp_path / "run") == list(range(1, 9))
    assert (tmp_path / "run" / "hyperparameters.yaml").is_file()
    assert json.loads((tmp_path / "run" / "last" / "litlora.json").read_text())["step"] == 8


def test_a_directory_that_turns_read_only(tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """For real: not even root may write where the rights of another user hold."""
    out, root = tmp_path / "run", os.geteuid() == 0
    directories = [out, out / "checkpoints", out / "last"]
    if root:
        for path in (tmp_path, *tmp_path.parents):
            if path != path.parent and path.stat().st_uid == 0:
                path.chmod(path.stat().st_mode | 0o055)

    def lock() -> None:
        for directory in directories:
            directory.chmod(0o555)
        if root:
            os.seteuid(65534)

    def unlock() -> None:
        if root:
            os.seteuid(0)
        for directory in directories:
            directory.chmod(0o755)

    at_step(4, lock)
    at_step(7, unlock)
    try:
        assert finetune(out, eval_interval=100) == 0
    finally:
        unlock()
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be saved" in said
    assert "Permission denied" in said or "not writable" in said
    assert checkpoints(out) == ["step-00000003", "step-00000008"]
    assert steps_of(out) == list(range(1, 9))


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    number: signal.Signals, code: int, tmp_path: Path, at_step: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    assert finetune(tmp_path / "whole") == 0
    at_step(5, lambda: os.kill(os.getpid(), number))
    assert finetune(tmp_path / "run") == code
    said = capfd.readouterr().err
    assert f"stopped by {number.name} after step 5 of 8" in said
    assert checkpoints(tmp_path / "run")[-1] == "step-00000005"
    assert signal.getsignal(number) == before
    line = said.partition("To go on: litlora ")[2].splitlines()[0]
    assert line == f"finetune_lora --config {tmp_path / 'run' / 'hyperparameters.yaml'} --resume auto"
    assert call(line.split()) == 0
    assert not differences_but_checkpoints(tmp_path / "whole", tmp_path / "run")


def test_a_second_interrupt_stops_at_once(tmp_path: Path, at_step: Any, capfd: pytest.CaptureFixture[str]) -> None:
    at_step(5, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert finetune(tmp_path / "run") == 130
    assert "once more stops at once" in capfd.readouterr().err
    assert checkpoints(tmp_path / "run") == ["step-00000003"]


def test_max_time_saves_and_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first step of so many is over after a second, or a later one."""
    assert finetune(tmp_path / "run", max_time="1s", max_steps=10_000, epochs=1000) == 0
    said = capsys.readouterr().err
    assert "stopped by --max_time after step " in said
    assert len(steps_of(tmp_path / "run")) == int(checkpoints(tmp_path / "run")[-1][5:]) < 1000


@pytest.mark.parametrize("text", ["90", "1:30:00", "1h30", "0m", ""])
def test_a_time_that_could_mean_anything_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(tmp_path / "run", max_time=text) == 2
    assert "such as 90m, 1h30m or 45s" in capsys.readouterr().err


def test_early_stopping_keeps_the_best_apart_and_can_be_taken_up_again(
    tmp_path: Path, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, object] = {"eval_interval": 1, "max_steps": 40, "warmup_steps": 20}
    assert finetune(tmp_path / "run", early_stopping_patience=2, **flags) == 0
    losses = [float(row[3]) for row in kill.rows(tmp_path / "run")]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 40
    assert "early stopping: 2 validations in a row" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "litlora.json").read_text())["step"] == best
    assert json.loads((tmp_path / "run" / "last" / "litlora.json").read_text())["step"] == best + 2
    assert finetune(tmp_path / "run", early_stopping_patience=2, **flags) == 0
    assert "nothing left to do" in capsys.readouterr().err
    at_step(best + 1, die)  # its count goes on too
    assert finetune(tmp_path / "again", early_stopping_patience=2, save_interval=best, **flags) == 130
    assert finetune(tmp_path / "again", early_stopping_patience=2, save_interval=best, **flags) == 0
    assert steps_of(tmp_path / "again") == steps_of(tmp_path / "run")


def test_early_stopping_needs_validation_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(tmp_path / "run", early_stopping_patience=2, val_split=0) == 2
    assert "--early_stopping_patience" in capsys.readouterr().err


# --- steps that give no number ----------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`poison(rows, value, factor)`: the loss of a training micro-batch that holds one of the examples is multiplied by
    `factor`, its gradient by `slope`."""

    def spoil(rows: Callable[[tuple[int, ...]], bool], factor: float, slope: float) -> None:
        class Spoil(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                return loss * factor

            @staticmethod
            def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                return gradient * slope

        forward = CausalLoss.forward

        def spoiled(self: CausalLoss, batch: Any) -> torch.Tensor:
            loss = forward(self, batch)
            return Spoil.apply(loss) if self.training and rows(batch.rows) else loss  # type: ignore[no-untyped-call,no-any-return]

        monkeypatch.setattr(CausalLoss, "forward", spoiled)

    return spoil


@pytest.mark.parametrize(("factor", "slope"), [(NAN, NAN), (float("inf"), 1.0), (1.0, float("inf")), (1.0, NAN)])
def test_a_step_without_a_number_is_not_applied_and_its_rows_are_named(
    factor: float, slope: float, tmp_path: Path, poison: Any, at_step: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without shuffling, example 8 is in step 2, the second of its three micro-batches, with example 9."""
    poison(lambda rows: 8 in rows, factor, slope)
    flags: dict[str, object] = {"shuffle": "false", "val_split": 0}
    assert finetune(tmp_path / "run", **flags) == 0
    said = capsys.readouterr().err
    assert "the step was not taken\n  where:  step 2, rows [9]\n  count:  1 in a row, 5 end the run" in said
    rows = kill.rows(tmp_path / "run")
    assert len(rows) == STEPS
    assert all(float(row[2]) < 100 and float(row[5]) < 1e6 for row in rows if row[0] != "2")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_steps"] == 1
    at_step(5, die)
    assert finetune(tmp_path / "again", **flags) == 130
    assert finetune(tmp_path / "again", **flags) == 0
    assert not kill.differences(tmp_path / "run", tmp_path / "again")


def test_a_bad_step_leaves_adapter_and_optimizer_as_they_were(tmp_path: Path, poison: Any) -> None:
    poison(lambda rows: True, NAN, NAN)
    assert finetune(tmp_path / "run", max_steps=3, max_bad_steps=9, save_interval=1) == 0
    found = find_checkpoint("auto", tmp_path / "run")
    assert found is not None
    assert not [name for name in found.tensors if name.startswith("optimizer.")]
    assert not any(info.read().any() for name, info in found.tensors.items() if name.endswith("lora_B.weight"))
    assert (found.totals.bad_steps, found.totals.bad_steps_in_a_row, found.totals.loss) == (3, 3, None)


def test_too_many_bad_steps_in_a_row_end_the_run_with_the_last_good_adapter(
    tmp_path: Path, poison: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(lambda rows: min(rows) >= 12, NAN, NAN)  # from step 3 on
    flags: dict[str, object] = {"shuffle": "false", "val_split": 0, "max_bad_steps": 2}
    assert finetune(tmp_path / "good", **(flags | {"max_steps": 2})) == 0
    assert finetune(tmp_path / "run", **flags) == 1
    said = capsys.readouterr().err
    assert "error: 2 steps in a row gave no finite loss or gradient" in said
    assert f"kept:   the last good adapter, in {tmp_path / 'run' / 'last'}" in said
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]
    for name in ("last", "."):
        weights = [(tmp_path / run / name / "adapter_model.safetensors").read_bytes() for run in ("good", "run")]
        assert weights[0] == weights[1]


def test_norm_and_clipping_are_logged(tmp_path: Path) -> None:
    assert finetune(tmp_path / "clipped", max_norm=1e-3, max_steps=2) == 0
    assert finetune(tmp_path / "free", max_norm=1e6, max_steps=2) == 0
    assert [row[6] for row in kill.rows(tmp_path / "clipped")] == ["1", "1"]
    assert [row[6] for row in kill.rows(tmp_path / "free")] == ["0", "0"]
    assert all(float(row[5]) > 1e-3 for row in kill.rows(tmp_path / "clipped"))  # before clipping
    assert json.loads((tmp_path / "clipped" / "summary.json").read_text())["clipped_steps"] == 2


def test_the_metrics_of_another_version_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished / "checkpoints" / "step-00000003" / run_files.METRICS
    file.write_text(file.read_text().replace("grad_norm", "norm"))
    assert finetune(finished, max_steps=4) == 2
    assert "columns" in capsys.readouterr().err


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"quantize": "bnb.nf4-dq", "optimizer": "adamw_8bit", "lora_r": 32},
        {"precision": "32-true", "activation_checkpointing": "full"},
        {"precision": "bf16-mixed", "quantize": "bnb.nf4"},
    ],
    ids=str,
)
def test_deterministic_runs_on_a_gpu_are_the_same_twice_and_go_on_bit_for_bit(
    flags: dict[str, Any], tmp_path: Path, at_step: Any
) -> None:
    flags = {"accelerator": "cuda", "deterministic": "true", "precision": "bf16-true", **flags}
    try:
        for name in ("whole", "twice"):
            assert finetune(tmp_path / name, **flags) == 0
        assert not kill.differences(tmp_path / "whole", tmp_path / "twice")
        at_step(5, die)
        assert finetune(tmp_path / "run", **flags) == 130
        assert finetune(tmp_path / "run", **flags) == 0
        assert not kill.differences(tmp_path / "whole", tmp_path / "run")
    finally:
        torch.use_deterministic_algorithms(False)
