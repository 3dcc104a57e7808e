"""--out_file: answers in the order of the prompts. Until all are there they are kept beside it, in FILE.part: a line
that says what was asked, then a line an answer as they finish. The same command goes on from there after any end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litlora.checkpoint import write_text
from litlora.errors import InputError
from litlora.metrics import say

Row = dict[str, Any]


def part_of(file: Path) -> Path:
    return file.with_name(file.name + ".part")


def check_out_file(file: Path, overwrite: bool) -> None:
    """Raises InputError for one that is there already, unless it is unfinished, or that cannot be written."""
    unfinished = part_of(file).is_file()
    if file.is_dir() or (file.exists() and not overwrite and not unfinished):
        fix = "another --out_file" + ("" if file.is_dir() else ", or --overwrite true")
        raise InputError("the output file exists", where=file, fix=fix)
    parent = file.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(file if file.exists() else parent, os.W_OK):
        raise InputError("the output file cannot be written", where=file, fix="another --out_file")


class AnswersFile:
    """What was answered so far, by the number of the request, and where the rest goes."""

    def __init__(self, file: Path, asked: Mapping[str, Any], count: int, *, overwrite: bool) -> None:
        """`asked`: all that decides the answers; `count`: how many there will be. Raises InputError where what is there
        was asked otherwise, or is no such file."""
        self.file, self.part, self.count = file, part_of(file), count
        self.done: dict[int, str] = {}  # finished lines
        asked = json.loads(json.dumps(asked))
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.part.is_file() and not overwrite:
            self._read(asked)
            if self.done:
                say(f"going on: {len(self.done)} of {count} answers are in {self.part}")
        lines = [json.dumps({"asked": asked})]
        lines += [json.dumps({"number": n, "line": line}) for n, line in self.done.items()]
        write_text(self.part, "\n".join(lines) + "\n")  # without what an interrupted line left
        self.stream = self.part.open("a", encoding="utf-8")

    def _read(self, asked: Mapping[str, Any]) -> None:
        lines = self.part.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        fix = "--overwrite true to start anew, or another --out_file"
        try:
            was = json.loads(lines[0])["asked"]
            found = [json.loads(line) for line in lines[1:]]
            self.done = {answer["number"]: answer["line"] for answer in found}
            sound = isinstance(was, dict) and all(type(n) is int and isinstance(t, str) for n, t in self.done.items())
            "".join(self.done.values()).encode()  # a lone surrogate is no text: it could not be written at the end
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            sound = False
        if not sound:
            raise InputError("not the unfinished answers of an earlier run", where=self.part, fix=fix)
        changed = [name for name in {**was, **asked} if was.get(name) != asked.get(name)]
        if changed:
            differences = [f"{name} {shown(asked.get(name))} (was {shown(was.get(name))})" for name in changed]
            raise InputError(
                "the unfinished answers were asked otherwise",
                where=self.part,
                got="; ".join(differences),
                wanted="the command that began them",
                fix=fix,
            )
        self.done = {number: line for number, line in self.done.items() if 0 <= number < self.count}

    def add(self, number: int, line: str) -> None:
        """On the disk at once, as far as this process can say."""
        self.done[number] = line
        self.stream.write(json.dumps({"number": number, "line": line}) + "\n")
        self.stream.flush()

    def close(self) -> None:
        """What is finished, in order, under the file's own name; with all of it there, nothing else is left."""
        os.fsync(self.stream.fileno())
        self.stream.close()
        write_text(self.file, "".join(self.done[number] + "\n" for number in sorted(self.done)))
        if len(self.done) == self.count:
            self.part.unlink()
        more = "" if len(self.done) == self.count else "; the same command goes on from there"
        say(f"{len(self.done)} of {self.count} answers in {self.file}{more}")


def shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"
