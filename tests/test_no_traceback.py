"""Whatever a command ends with is one message; --debug shows the traceback, and nothing else does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from litlora import cli
from litlora.cli import call
from litlora.commands import validate
from litlora.errors import InputError

ROOT = Path(__file__).parents[1]
LINE = ["validate", "--checkpoint_dir", "x"]


class PanicException(BaseException):
    """As the tokenizers library raises it."""


def deep(depth: int = 0) -> None:
    deep(depth + 1)


def raising(error: BaseException) -> Callable[[object], None]:
    def run(args: object) -> None:
        try:
            raise LookupError("the first")
        except LookupError:
            raise error  # noqa: B904 (a chain of two)

    return run


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        (raising(KeyboardInterrupt()), 130, "interrupted\n"),
        (raising(MemoryError()), 1, "error: out of memory on the host\n"),
        (raising(RuntimeError("deep inside\nframe #0: c10::Error\nTraceback")), 1, "RuntimeError: deep inside\n  fix:"),
        (raising(PanicException("index out of bounds")), 1, "internal error: PanicException: index out of bounds\n"),
        (raising(AssertionError()), 1, "internal error: AssertionError: \n"),
        (raising(OSError("no number")), 1, "internal error: OSError: no number\n"),
        (raising(FileNotFoundError(2, "No such file", "a/b")), 2, "error: No such file\n  where:  a/b\n"),
        (raising(InputError("bad", got="\x1b[2J" + "x" * 9999)), 2, "\\x1b[2Jxxx"),
        (raising(SystemExit("a library gives up")), 1, "error: a library gives up\n"),
        (lambda args: deep(), 1, "internal error: RecursionError: maximum recursion depth exceeded"),
    ],
)
def test_one_message_and_a_code(
    run: Callable[[object], None],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(validate, "run", run)
    assert call(LINE) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert len(err) < 3000
    assert "internal" not in err or "--debug" in err
    assert call([*LINE, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def litlora(command: str) -> subprocess.CompletedProcess[str]:
    line = command.replace("litlora", f"{sys.executable} -m litlora", 1)
    return subprocess.run(["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("litlora help | true", (0, 141)),  # whether the pipe is closed in time is not in our hands
        ("litlora help | sleep 0", (0, 141)),
        ("litlora help >&-", (0,)),
        ("litlora nothing 2>&-", (2,)),
        ("litlora nothing 2>&1 | true", (2, 141)),
        ("litlora help > /dev/full", (1,)),
    ],
)
def test_nobody_listens(command: str, code: tuple[int, ...]) -> None:
    done = litlora(command)
    assert done.returncode in code
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_pipe_that_is_closed_for_sure(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self) -> None:
            raise BrokenPipeError(32, "Broken pipe")

        def fileno(self) -> int:
            return spare.fileno()

    with open("/dev/null", "w") as spare:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert call(["help"]) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.7, 1.5])
def test_interrupted_at_any_time(delay: float, tmp_path: Path) -> None:
    """While the libraries are imported, while the command waits for its stdin."""
    code = "import litlora.cli as c, sys; print('ready', flush=True); c.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "generate", "--checkpoint_dir", str(ROOT / "checkpoints" / "tiny")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    # an import may swallow it (then stdin ends, which is bad input), or say in its own way that it was interrupted
    assert process.returncode in (130, 1, 2, -signal.SIGINT), err


def test_what_threads_and_destructors_end_with_is_not_shown() -> None:
    code = (
        "import litlora.cli as c, sys, threading\n"
        "class D:\n    def __del__(self): raise ValueError('late')\n"
        "def command(arguments):\n"
        "    t = threading.Thread(target=lambda: 1 / 0); t.start(); t.join(); D(); return 0\n"
        "c._dispatch = command; c.main()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([*command, "--debug"], capture_output=True, text=True, cwd=ROOT)
    assert "ZeroDivisionError" in done.stderr
    assert "late" in done.stderr


def test_the_eyes_are_open() -> None:
    """A bug that is not caught would show."""
    code = "import litlora.cli as c; c.call = lambda argv: 1 / 0; c.main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" in done.stderr
    assert cli.call is call
