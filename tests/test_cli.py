"""The command line itself: help, unknown names, exit codes, configs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from litlora.cli import COMMANDS, call
from litlora.errors import InputError

ROOT = Path(__file__).parents[1]


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command line that is refused: exit code 2, no traceback, nothing on stdout."""
    code = call([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


def test_help_names_every_command_and_does_not_import_torch() -> None:
    code = "import sys; from litlora.cli import call; call(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


def test_a_mistyped_flag_or_file_does_not_wait_for_lightning(tmp_path: Path) -> None:
    code = "import sys; from litlora.cli import call; code = call(sys.argv[1:]); "
    code += "sys.exit('lightning_fabric' in sys.modules or code)"
    words = ["finetune_lora", "--checkpoint_dir", str(tmp_path / "no"), "--data", "alpaca", "--out_dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "the checkpoint directory does not exist" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_documents_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses
    import importlib

    from litlora.cli import make_parser

    assert call([name, "--help"]) == 0
    text = capsys.readouterr().out
    parser = make_parser(name, importlib.import_module(f"litlora.commands.{name}"))
    helps = {action.dest: action.help for action in parser._actions}
    for field in dataclasses.fields(importlib.import_module(f"litlora.commands.{name}").Args):
        assert field.name in text
        assert helps[field.name], f"--{field.name} has no help"


@pytest.mark.parametrize("script", ["finetune_lora", "generate", "merge_lora"])
def test_scripts_are_the_commands(script: str) -> None:
    command = [sys.executable, f"scripts/{script}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert f"litlora {script}" in done.stdout


def test_unknown_names_get_the_nearest_right_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean `litlora merge_lora`?" in failure(capsys, "merge_lra")
    assert "did you mean --learning_rate?" in failure(capsys, "finetune_lora", "--learning_rat", 1)
    config = tmp_path / "c.yaml"
    config.write_text("checkpoint_dir: x\nlora_rr: 8\n")
    message = failure(capsys, "finetune_lora", "--config", config)
    assert "lora_rr" in message
    assert "did you mean --lora_r?" in message


def test_values_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "finetune_lora", "--checkpoint_dir", tmp_path, "--lora_r", "many")
    assert "--lora_r" in message
    assert "many" in message
    message = failure(capsys, "finetune_lora", "--checkpoint_dir", tmp_path, "--optimizer", "adan")
    assert "--optimizer" in message
    assert "adamw_8bit" in message
    assert "--checkpoint_dir" in failure(capsys, "finetune_lora")
    assert "none.yaml" in failure(capsys, "finetune_lora", "--config", tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("lora_r: [1\n")
    assert "line 2" in failure(capsys, "finetune_lora", "--config", tmp_path / "bad.yaml")


def test_flags_override_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("checkpoint_dir: a\nlora_r: 4\nlora_alpha: 9\n")
    assert call(["finetune_lora", "--config", str(config), "--lora_r", "6", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "lora_r: 6" in printed
    assert "lora_alpha: 9" in printed


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from litlora.commands import validate

    def failing(error: BaseException) -> None:
        def run(args: object) -> None:
            raise error

        monkeypatch.setattr(validate, "run", run)

    line = ["validate", "--checkpoint_dir", "x"]
    failing(InputError("bad thing", where="here", got=1, wanted=2, fix="do so"))
    assert call(line) == 2
    assert capsys.readouterr().err == ("error: bad thing\n  where:  here\n  got:    1\n  wanted: 2\n  fix:    do so\n")
    failing(KeyError("bug"))
    assert call(line) == 1
    assert "Traceback" not in capsys.readouterr().err
    failing(KeyboardInterrupt())
    assert call(line) == 130
    failing(InputError("bad thing"))
    assert call([*line, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_completion_in_bash(capsys: pytest.CaptureFixture[str]) -> None:
    """The script is run by a real bash, as it does when somebody presses the tabulator."""
    assert call(["completion"]) == 0
    script = capsys.readouterr().out

    def complete(*words: str) -> list[str]:
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _litlora; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", f"{script}\n{line}"], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("litlora", "merge") == ["merge_lora"]
    assert complete("litlora", "finetune_lora", "--lora_pr") == ["--lora_projection"]
    assert {"--temperature", "--prompt_file", "--lora_path"} <= set(complete("litlora", "generate", "--"))
    assert complete("litlora", "generate", "nothing-like-it") == []
    assert complete("litlora", "download", "--re") == ["--revision"]  # its repo_id has no flag


def test_help_of_a_command_in_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["help", "download"]) == 0
    assert "usage: litlora download" in capsys.readouterr().out
    assert call(["help", "completion"]) == 0
    assert "usage: litlora completion" in capsys.readouterr().out
    assert call(["help", "downlod"]) == 2
    assert "litlora download" in capsys.readouterr().err
    assert call(["completion", "zsh"]) == 2
    assert "takes no flags" in capsys.readouterr().err
