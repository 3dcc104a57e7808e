"""Mutations of .pth files: zip archives of a pickle and raw storages."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import subprocess
import zipfile
from random import Random
from typing import Any

import torch

from fuzzing.mutations import damage_bytes


class Call:
    """What a pickle calls when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


PAYLOADS = (
    Call(os.system, "touch canary"), Call(eval, "open('canary', 'w')"), Call(subprocess.call, ["touch", "canary"]),
    Call(os.putenv, "CANARY", "1"), Call(bytearray, 10**11), Call(__import__, "antigravity"), Call(print, "x"),
    Call(getattr, os.path.join, "__globals__"), Call(torch.empty, 10**12), Call(torch.load, "canary"), Call(complex, 1),
    Call(io.open, "canary", "w"), [b"x" * 10**6] * 3, {"norm.weight": Call(bytearray, 10**12)}, {1: 2}, "text", None,
    {"norm.weight": torch.zeros(2).expand(10**9, 2)}, {"norm.weight": torch.zeros(4, device="meta")},
    {f"{i}": torch.zeros(4).to_sparse() for i in range(3)}, {"norm.weight": torch.nn.Linear(2, 2)},
)  # fmt: skip


def payload(random: Random, content: bytes) -> bytes:
    """A pickle that would run code or take the memory, in torch's zip format or bare."""
    chosen = random.choice(PAYLOADS)
    if isinstance(chosen, dict) and any(
        isinstance(value, (torch.Tensor, torch.nn.Module)) for value in chosen.values()
    ):
        stream = io.BytesIO()
        torch.save(chosen, stream)
        return stream.getvalue()
    pickled = pickle.dumps(chosen, protocol=random.choice((0, 2, 4)))
    return pickled if random.random() < 0.2 else _rezipped(content, {"data.pkl": pickled})


def _rezipped(content: bytes, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w", compression) as target:
        for info in source.infolist():
            target.writestr(info.filename, changes.get(info.filename.partition("/")[2], source.read(info)))
    return out.getvalue()


def damage_pth(random: Random, content: bytes) -> bytes:
    """Parts that do not fit each other, or that are far larger inside than outside."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        parts = {info.filename.partition("/")[2]: source.read(info) for info in source.infolist()}
    storage = random.choice([name for name in parts if name.startswith("data/")])
    pickled, zeros = parts["data.pkl"], b"\0" * 50_000_000
    kind = random.randrange(7)
    if kind == 0:
        return _rezipped(content, {"data.pkl": damage_bytes(random, pickled)})
    if kind == 1:
        body = parts[storage]
        return _rezipped(content, {storage: random.choice((b"", body[:3], body * 2, b"\xff" * len(body)))})
    if kind == 2:
        return _rezipped(content, {storage: zeros}, zipfile.ZIP_DEFLATED)
    if kind == 3:
        return _rezipped(content, {"data.pkl": pickled + zeros}, zipfile.ZIP_DEFLATED)
    if kind == 4:
        return _rezipped(content, {}, random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    if kind == 5:
        name = random.choice(sorted(parts))
        return _rezipped(content, {name: damage_bytes(random, parts[name])})
    return _rezipped(content, {"data.pkl": _larger(random, pickled)})


def _larger(random: Random, pickled: bytes) -> bytes:
    """A size, stride or offset (BININT1, BININT2) of the pickle made huge or negative."""
    numbers = [match.start() for match in re.finditer(rb"[KM]..?", pickled, re.DOTALL)]
    at = random.choice(numbers)
    width = 2 if pickled[at : at + 1] == b"K" else 3
    small = b"J" + struct.pack("<i", random.choice((-1, 2**31 - 1, 65536)))
    large = b"\x8a\x08" + struct.pack("<q", random.choice((2**40, 2**62, -1)))
    return pickled[:at] + random.choice((small, large)) + pickled[at + width :]
