"""Hugging Face checkpoints as named tensors: read one at a time with pread, write shards atomically.

safetensors layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, the bytes. Read by pread, not mapped: a mapped page counts as resident
memory, and a merge that maps its shards shows the size of a shard instead of the size of a tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from litlora.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHAT_TEMPLATES = "additional_chat_templates"  # a directory
MAX_HEADER = 100_000_000  # the format's own limit, bytes
PIECE = 2**22  # bytes of two tensors that are compared
READ = 2**24  # bytes that a thread reads at a time: one alone copies out of the page cache at a fraction of its speed
READERS = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` in bytes from the start of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor on `device`, in a buffer of its own."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        read_into = self._send_into if buffer.is_cuda else self._read_into
        if self.nbytes <= READ:
            read_into(buffer, 0)
        else:
            with ThreadPoolExecutor(READERS) as readers:
                for _ in readers.map(read_into, buffer.split(READ), range(0, self.nbytes, READ)):
                    pass
        return buffer.view(self.dtype).view(self.shape)

    def _read_into(self, part: Tensor, start: int) -> None:
        if len(part):
            _pread_into(self.file, part.numpy().data, self.offset + start)

    def _send_into(self, part: Tensor, start: int) -> None:
        """By way of pinned memory, which torch gives out again once the card has it: a card fetches from there by
        itself, and pages that were used before are not asked of the system again."""
        pinned = torch.empty(len(part), dtype=torch.uint8, pin_memory=True)
        self._read_into(pinned, start)
        part.copy_(pinned, non_blocking=True)

    def same(self, other: TensorInfo) -> bool:
        """Whether the two hold the same, byte for byte; neither is read as a whole."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        starts = range(0, self.nbytes, PIECE)
        return all(self.piece(start, PIECE) == other.piece(start, PIECE) for start in starts)

    def piece(self, start: int, nbytes: int) -> bytes:
        """As many bytes from `start` on, or as there are."""
        out = bytearray(min(nbytes, self.nbytes - start))
        _pread_into(self.file, memoryview(out), self.offset + start)
        return bytes(out)


def _pread_into(file: Path, view: memoryview, offset: int) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise InputError("a safetensors file ends early", where=file, fix="download the file again")
            done += count
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header as it stands (for a byte-faithful copy) and its tensors, in the file's order."""

    file: Path
    header: bytes
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, file: Path) -> Shard:
        """Reads and checks the header only. Raises InputError when the file is not a whole safetensors file."""
        if not os.path.isfile(file):  # unlike Path.is_file, False for a name that no file can have
            raise InputError("a weights file is missing", where=file, fix="download the checkpoint again")
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise _corrupt(file, f"{size} bytes, of which the header claims {length}", "a whole safetensors file")
            header = stream.read(length)
        try:
            parsed = json.loads(header.decode())
            metadata = parsed.pop("__metadata__", None) or {}
            if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
                raise _corrupt(file, f"__metadata__ {metadata!r}"[:200], "text by name")
            tensors = sorted((_info(file, name, entry, 8 + length) for name, entry in parsed.items()), key=_offset)
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _corrupt(file, f"a header that does not parse ({type(error).__name__})", "JSON") from None
        end = 8 + length
        for info in tensors:
            if info.offset != end:
                raise _corrupt(file, f"{info.name} at byte {info.offset}", f"byte {end}: no gap and no overlap")
            end += info.nbytes
        if end != size:
            raise _corrupt(file, f"{size} bytes", f"{end} bytes, as its header says")
        return cls(file, header, tuple(tensors), metadata)


def _offset(info: TensorInfo) -> tuple[int, int]:
    return info.offset, info.nbytes


def _corrupt(file: Path, got: str, wanted: str) -> InputError:
    fix = "the file is truncated or corrupt: download or copy it again"
    return InputError("not a valid safetensors file", where=file, got=got, wanted=wanted, fix=fix)


def _info(file: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        wanted = ", ".join(DTYPES)
        raise InputError("a tensor of an unsupported dtype", where=f"{file}: {name}", got=entry["dtype"], wanted=wanted)
    name.encode()  # a lone surrogate is a ValueError here rather than in whoever prints or hashes the name
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    numbers = (*shape, start, stop)
    if not all(map(_is_size, numbers)) or prod(size or 1 for size in shape) >= 2**63:
        raise _corrupt(file, f"{name} with shape {shape} and data_offsets {[start, stop]}"[:200], "sizes from 0 up")
    if stop - start != prod(shape) * dtype.itemsize:
        wanted = f"{prod(shape) * dtype.itemsize} bytes for {list(shape)}"
        raise _corrupt(file, f"{name} with data_offsets {[start, stop]}", wanted)
    return TensorInfo(name, dtype, shape, file, data_start + start, stop - start)


def _is_size(n: object) -> bool:
    return type(n) is int and 0 <= n < 2**63


class Checkpoint:
    """The tensors of a Hugging Face directory, sharded or not, by name; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises InputError when the directory, its index or one of its shards is missing or corrupt."""
        self.directory = directory
        require_directory(directory)
        self.index: dict[str, Any] | None = None
        if (directory / INDEX).is_file():
            self.index = read_json(directory / INDEX)
            weight_map = self.index.get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError("the weights index has no weight_map", where=directory / INDEX)
            metadata = self.index.get("metadata") or {}
            if not isinstance(metadata, dict) or not isinstance(metadata.get("total_parameters", 0), (int, float)):
                got = f"metadata {metadata!r}"
                raise InputError("the weights index has metadata that are no totals", where=directory / INDEX, got=got)
            files = list(dict.fromkeys(str(name) for name in weight_map.values()))
            for name in files:
                if Path(name).name != name:
                    what = "the weights index points outside its directory"
                    raise InputError(what, where=directory / INDEX, got=name)
        elif (directory / SINGLE).is_file():
            weight_map, files = None, [SINGLE]
        else:
            raise self._no_weights()
        self.shards = tuple(Shard.open(directory / name) for name in sorted(files))
        self.tensors = {info.name: info for shard in self.shards for info in shard.tensors}
        if weight_map is not None:
            self._check_map(weight_map)

    def _no_weights(self) -> InputError:
        pickled = sorted(path.name for path in self.directory.glob("*.bin")) + sorted(
            path.name for path in self.directory.glob("consolidated.*.pth")
        )
        fix = "litlora download REPO_ID brings a whole checkpoint"
        if any(name.endswith(".pth") for name in pickled):
            fix = "this looks like Meta's original format: litlora convert makes a Hugging Face directory of it"
        elif pickled:
            fix = "only safetensors are read, pickled weights never: take the repository's safetensors files"
        wanted = f"{SINGLE}, or {INDEX} and its shards"
        got = ", ".join(pickled) or "neither"
        what = "no weights in the checkpoint directory"
        return InputError(what, where=self.directory, got=got, wanted=wanted, fix=fix)

    def _check_map(self, weight_map: Mapping[str, str]) -> None:
        problems = [
            f"{name} (index: {file}, found: {self.tensors[name].file.name if name in self.tensors else 'nowhere'})"
            for name, file in weight_map.items()
            if name not in self.tensors or self.tensors[name].file.name != file
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(
                "the weights index names tensors that its shards do not hold",
                where=self.directory / INDEX,
                got="; ".join(problems[:3]) + more,
                fix="download the checkpoint again",
            )

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        return self.tensors[name].read(device)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over names, dtypes, shapes and the first 4 KiB of every tensor: tells two bases of one shape apart
        (Llama-2-7b and its chat sibling) in milliseconds, and does not change when the same weights are resharded."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {DTYPE_NAMES[info.dtype]} {list(info.shape)}\n".encode())
            digest.update(info.piece(0, 4096))
        return digest.hexdigest()


def require_directory(directory: Path) -> None:
    """Raises InputError unless `directory` is a directory with something in it."""
    if not directory.exists():
        raise InputError("the checkpoint directory does not exist", where=directory, fix="check --checkpoint_dir")
    if not directory.is_dir():
        raise InputError("not a directory", where=directory, wanted="a Hugging Face checkpoint directory")
    if not any(directory.iterdir()):
        raise InputError("the checkpoint directory is empty", where=directory, fix="litlora download REPO_ID")
    refuse_links(directory)


def refuse_links(directory: Path) -> None:
    """Raises InputError for a file in `directory` that is a link out of it: it could be any file of this machine, and a
    merge copies what lies beside the weights."""
    templates = directory / CHAT_TEMPLATES
    refuse_link(templates)
    for path in (*directory.iterdir(), *(templates.iterdir() if templates.is_dir() else ())):
        if path.is_file():
            refuse_link(path)


def refuse_link(path: Path) -> None:
    """Raises InputError for a link that leads out of its directory. In the hub's cache, links to its blobs are what the
    files are: snapshots/REVISION/FILE -> ../../blobs/HASH."""
    if path.is_symlink():
        root, target = path.parent.resolve(), Path(os.path.realpath(path))  # resolve() raises for a link to itself
        cached = [above.parents[1] / "blobs" for above in (root, root.parent) if above.parent.name == "snapshots"]
        if not any(home in target.parents for home in (root, *cached)):
            fix = "put the file itself in its place (cp or ln, not ln -s)"
            raise InputError("a link that leads out of its directory", where=path, got=target, fix=fix)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError with the line when it is missing or malformed."""
    if not os.path.isfile(file):  # a device has no end
        raise InputError("a file is missing", where=file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError("malformed JSON", where=f"{file}, line {error.lineno}", got=error.msg) from None
    except UnicodeDecodeError:
        raise InputError("not a JSON text file", where=file) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets in brackets
        raise InputError("malformed JSON", where=file, got=error) from None
    if not isinstance(value, dict):
        raise InputError("malformed JSON", where=file, got=type(value).__name__, wanted="an object")
    return value


def fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(file: Path) -> Iterator[BinaryIO]:
    """A binary stream that becomes `file` only when the block ends well: temporary name, fsync, rename, fsync."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        fsync_directory(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Atomically."""
    with atomic_file(file) as stream:
        stream.write(text.encode())


def write_json(file: Path, value: object) -> None:
    """Atomically, indented, with a newline at the end."""
    write_text(file, json.dumps(value, indent=2) + "\n")


@contextmanager
def atomic_directory(directory: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `directory` that takes its name only when the block ends well.

    An interrupted or failed write leaves nothing that looks complete, and what was there stays until the new one is
    whole. Raises InputError when `directory` holds something and `overwrite` is false.
    """
    require_writable(directory, overwrite=overwrite)
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        fsync_directory(temporary)
        old = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.old")
        if directory.exists():
            os.replace(directory, old)
        try:
            os.replace(temporary, directory)
        except BaseException:
            if old.exists():
                os.replace(old, directory)
            raise
        fsync_directory(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_writable(directory: Path, *, overwrite: bool, fix: str = "another directory, or --overwrite true") -> None:
    """Raises InputError when `directory` cannot be made or written, or is not empty and `overwrite` is false."""
    parent = directory
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError("the output path lies under a file", where=directory, got=f"{parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError("the output directory is not writable", where=parent, fix="another directory, or its rights")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise InputError("the output directory is not empty", where=directory, fix=fix)


def require_disk(directory: Path, nbytes: int) -> None:
    """Raises InputError when the file system of `directory` has less than `nbytes` free."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise InputError(
            "too little free disk",
            where=directory,
            got=f"{free / 1e9:.2f} GB free",
            wanted=f"{nbytes / 1e9:.2f} GB",
            fix="free some space, or another directory",
        )


def make_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header (without its length prefix) for tensors written one after the other in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the data begins on a multiple of 8, as the format recommends


def write_shard(file: Path, header: bytes, tensors: Iterable[Tensor]) -> None:
    """Writes a safetensors file atomically, one tensor at a time, in the header's order of offsets."""
    with atomic_file(file) as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors:
            flat = tensor.detach().contiguous().cpu().view(-1)
            stream.write(flat.view(torch.uint8).numpy().data)


def write_checkpoint(
    directory: Path,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    *,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` and their index, asking `read` for one tensor at a
    time. `directory` exists; each file is written atomically."""
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    size = total = 0
    for entry in tensors:
        nbytes = prod(entry[2]) * entry[1].itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size, total = size + nbytes, total + nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / name, make_header(shard, {"format": "pt"}), (read(entry[0]) for entry in shard))
        weight_map |= {entry[0]: name for entry in shard}
    if len(shards) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
