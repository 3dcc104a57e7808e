"""A fuzz campaign over every file that litlora reads: damaged, lying and hostile inputs through the commands' own code.

An input may only succeed or end with a clean message (InputError): no other exception, no death of the process, nothing
over 10 s, no more memory than 50 x the file + 64 MB, nothing outside the directory opened or written, no code of the
file run. What is read and how it is mutated is in tests/fuzzing. Linux only: peak memory comes from the kernel.

A forked worker reads a batch of inputs; its parent sees it hang or die, and goes on behind that input. Opened paths,
processes and sockets are seen by an audit hook.

    python benchmarks/fuzz.py --inputs 1000 --seed 1
    python benchmarks/fuzz.py --target tokenizer.json --only 17     # one input again, with its traceback
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

SECONDS = 10.0
TIMES, EXTRA = 50, 64_000_000  # memory: so many times the file, and so many bytes
ROOM = 4 << 30  # of address space beyond what a worker begins with: a larger allocation fails, and shows
BATCH = 200
FINE = ("well", "refused")
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "os.putenv")
SEEDS = (b"PL_GLOBAL_SEED", b"PL_SEED_WORKERS")  # Fabric's, where a run begins
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
IMPORTED = (
    *(f"litlora.commands.{name}" for name in ("convert", "download", "finetune_lora", "generate", "inspect")),
    *(f"litlora.commands.{name}" for name in ("merge_lora", "plan", "report", "validate")),
    "fuzzing.desk", "sentencepiece", "tokenizers",
)  # fmt: skip


@dataclass
class Result:
    """One input's outcome: "well", "refused" (InputError), or what went wrong. Bytes and seconds."""

    number: int
    outcome: str
    seconds: float = 0.0
    memory: int = 0
    size: int = 0


# --- in the worker


class Watch:
    """Sees what is opened, changed and started while an input is read."""

    def __init__(self, desk: Path) -> None:
        readable = (
            sys.prefix,
            sys.base_prefix,
            ROOT,
            "/proc",
            "/sys",
            "/usr/share/zoneinfo",
            "/etc/localtime",
            *sys.path,
        )
        self.writable = [os.path.realpath(str(path)) for path in (desk, "/dev/null")]
        self.readable = [*self.writable, *(os.path.realpath(str(path)) for path in readable if path)]
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event == "open" or event in STARTS or event in CHANGES):
            self.on = False
            try:
                self.look(event, arguments)
            finally:
                self.on = True

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.putenv" and arguments[0] in SEEDS:
            return
        if event in STARTS:
            # litlora.expressions tries out regular expressions in a process of its own
            if event != "subprocess.Popen" or arguments[1][:4] != [sys.executable, "-I", "-S", "-c"]:
                self.seen.append(f"{event} {arguments!r}"[:200])
            return
        if not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return  # an open file
        path = os.fsdecode(arguments[0])
        if event != "open" and isinstance(arguments[-1], int) and arguments[-1] > 0:  # relative to an open directory
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[-1]}"), path)
        path = os.path.realpath(path)
        if os.path.basename(path) == "<template>":
            return  # Python looks for the line of a template's SyntaxError in a file of that name
        writes = event != "open" or bool(set(arguments[1] or "") & set("wax+"))
        writes = writes or bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        allowed = self.writable if writes else self.readable
        if not any(path == root or path.startswith(root + os.sep) for root in allowed):
            self.seen.append(f"{event} {path}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.seen.clear()
        self.on = True
        try:
            yield
        finally:
            self.on = False


def memory(key: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Everything but out/: size and time of last change."""
    found = {}
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name != "out"]
        for name in files:
            stat = os.lstat(os.path.join(directory, name))
            found[os.path.join(directory, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


def outcome_of(read: Any, desk: Path, verbose: TextIO | None) -> str:
    from litlora.errors import InputError
    from litlora.merge import VerifyError
    from litlora.train import TrainingError

    try:
        read(desk)
        return "well"
    except (InputError, VerifyError, TrainingError) as error:
        if verbose:
            print(f"{type(error).__name__}: {error}", file=verbose)
        text = str(error)
        return f"a message of {len(text):,} characters" if len(text) > 20_000 or "Traceback" in text else "refused"
    except BaseException as error:
        if verbose:
            traceback.print_exc(file=verbose)
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{ROOT}/litlora" in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
        return f"{type(error).__name__} in {where}: {str(error)[:160]}"


def one(name: str, number: int, seed: int, desk: Path, watch: Watch, verbose: TextIO | None = None) -> Result:
    """Mutates the target's file, has it read, and puts it back."""
    from fuzzing.targets import TARGETS, place

    target = TARGETS[name]
    file = target.find(desk)
    original = file.read_bytes() if file.exists() else None
    content = target.input(Random(f"{seed} {name} {number}"), desk, original or b"")
    place(file, content)
    if verbose:
        print(f"{file}: {content[:3000]!r}", file=verbose)
    size, before = len(content), tree(desk.parent)
    del content
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins anew
    held, start = memory("VmRSS"), time.perf_counter()
    with watch.watching():
        outcome = outcome_of(target.readers[number % len(target.readers)], desk, verbose)
    seconds, used = time.perf_counter() - start, memory("VmHWM") - held
    after = tree(desk.parent)
    if (desk.parent / "canary").exists() or os.environ.pop("CANARY", ""):
        outcome = "code of the file was run"
        (desk.parent / "canary").unlink(missing_ok=True)
    elif watch.seen:
        outcome = f"outside: {watch.seen[0]}"
    elif outcome in FINE and after != before:
        changed = sorted(path for path in after.keys() | before.keys() if after.get(path) != before.get(path))
        outcome = f"changed: {changed[0]}"
    elif used > TIMES * size + EXTRA:
        outcome = f"memory: {outcome[:60]}"
    shutil.rmtree(desk / "out", ignore_errors=True)
    place(file, original)
    return Result(number, outcome, round(seconds, 3), used, size)


def work(name: str, numbers: range, seed: int, desk: Path, report: TextIO) -> None:
    """A batch, in a process of its own: each number is announced, then its result."""
    from fuzzing.targets import TARGETS

    from litlora.errors import InputError

    null = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
    os.dup2(null.fileno(), 1)
    os.dup2(null.fileno(), 2)
    sys.stdout = sys.stderr = null
    os.chdir(desk.parent)  # where the canary would appear
    watch, target = Watch(desk), TARGETS[name]
    for read in target.readers:  # what is imported and cached once is nobody's memory
        with contextlib.suppress(InputError):
            read(desk)
        shutil.rmtree(desk / "out", ignore_errors=True)
    limit = memory("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        print(number, file=report, flush=True)
        print(json.dumps(asdict(one(name, number, seed, desk, watch))), file=report, flush=True)


# --- in the parent


def batch(name: str, numbers: range, seed: int, desk: Path) -> Iterator[Result]:
    """Results of a batch; a hang or a death ends it early, with the input that caused it as the last."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        report = open(writing, "w")  # noqa: SIM115
        try:
            os.close(reading)
            os.setsid()
            work(name, numbers, seed, desk, report)
            code = 0
        except BaseException:
            print(repr(traceback.format_exc()[-3000:]), file=report, flush=True)
        finally:
            os._exit(code)
    os.close(writing)
    try:
        current = yield from _results(reading, numbers)
        if current is not None:
            os.killpg(child, signal.SIGKILL)  # a hang; one that is dead already stays as it died
            status = os.waitpid(child, 0)[1]
            child = 0
            how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
            yield Result(current, f"hang: over {SECONDS:g} s" if how == "SIGKILL" else f"died: {how}", SECONDS)
    finally:
        os.close(reading)
        if child:
            os.waitpid(child, 0)


def _results(reading: int, numbers: range) -> Generator[Result, None, int | None]:
    """Gives the results as they come; returns the number that no result came for, if any."""
    current, text, began, patience = numbers.start, b"", time.perf_counter(), 120.0  # until the first is announced
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, began + patience - time.perf_counter()))
        chunk = os.read(reading, 65536) if ready else b""
        if not chunk:
            return current if current < numbers.stop else None
        *lines, text = (text + chunk).split(b"\n")
        for line in lines:
            if line.isdigit():
                current, began, patience = int(line), time.perf_counter(), SECONDS
            elif line.startswith(b"{"):
                yield Result(**json.loads(line))
                current += 1
            elif line:
                raise RuntimeError(line.decode())


def campaign(name: str, inputs: int, seed: int, desk: Path) -> list[Result]:
    """All inputs of a target, from 0 on."""
    from fuzzing.targets import TARGETS, place

    file = TARGETS[name].find(desk)
    original = file.read_bytes() if file.exists() else None
    found: list[Result] = []
    while len(found) < inputs:
        found += batch(name, range(len(found), min(len(found) + BATCH, inputs)), seed, desk)
        shutil.rmtree(desk / "out", ignore_errors=True)  # a worker that hung or died leaves its input
        place(file, original)
    return found


def make_desk(root: Path) -> Path:
    """In a process of its own: what makes the desk starts threads, which do not survive a fork."""
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
                from fuzzing.desk import make_desk

                make_desk(root)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)
    return root / "desk"


def show(name: str, results: list[Result]) -> None:
    outcomes = collections.Counter(result.outcome for result in results)
    findings = [result for result in results if result.outcome not in FINE]
    slowest, most = max(result.seconds for result in results), max(result.memory for result in results) / 1e6
    figures = (len(results), outcomes["well"], outcomes["refused"], len(findings), f"{slowest:.1f}", f"{most:.0f}")
    print(f"| {name} | " + " | ".join(map(str, figures)) + " |", flush=True)
    for outcome, count in outcomes.most_common():
        if outcome not in FINE:
            numbers = [str(result.number) for result in findings if result.outcome == outcome][:5]
            print(f"    {count} x {outcome} (inputs {', '.join(numbers)})", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, help="mutated inputs of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", nargs="+", help="only these")
    parser.add_argument("--only", type=int, help="one input, in this process, with its content and its traceback")
    parser.add_argument("--json", type=Path, help="write every result here")
    args = parser.parse_args()
    for name in IMPORTED:
        importlib.import_module(name)
    from fuzzing.targets import TARGETS

    start, everything = time.perf_counter(), {}
    with tempfile.TemporaryDirectory(prefix="litlora-fuzz-") as temporary:
        desk = make_desk(Path(temporary))
        os.environ["LITLORA_CACHE"] = str(desk / "out" / "cache")
        if args.only is not None:
            print(one(args.target[0], args.only, args.seed, desk, Watch(desk), sys.stderr))
            return 0
        print("| file | inputs | read well | refused | findings | slowest, s | most memory, MB |")
        print("|---|---|---|---|---|---|---|")
        for name in args.target or TARGETS:
            everything[name] = campaign(name, max(1, round(args.inputs * TARGETS[name].share)), args.seed, desk)
            show(name, everything[name])
    results = [result for found in everything.values() for result in found]
    bad = sum(result.outcome not in FINE for result in results)
    print(f"\n{len(results)} inputs, {bad} findings, {time.perf_counter() - start:.0f} s, seed {args.seed}")
    versions = {name: importlib.import_module(name).__version__ for name in ("torch", "tokenizers", "sentencepiece")}
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {text}" for name, text in versions.items()))
    if args.json:
        args.json.write_text(json.dumps({name: [asdict(r) for r in found] for name, found in everything.items()}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
