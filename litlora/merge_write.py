"""A merge written as a Hugging Face directory: the base's shards under the base's names, and what belongs to them."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import torch

from litlora.checkpoint import (
    INDEX,
    Shard,
    TensorInfo,
    atomic_directory,
    atomic_file,
    read_json,
    require_disk,
    write_json,
)
from litlora.errors import InputError
from litlora.merge import EMBEDDING, HEAD, Merge, few_threads
from litlora.peft_format import RECORD

FLUSH = 128 * 2**20  # bytes after which the disk is told to begin, so that it works while the next ones are made
PIECE = 16 * 2**20  # bytes copied at a time
MARGIN = 16_000_000  # bytes of disk on top of the files, for what the file system itself needs
CONFIG = "config.json"

# What belongs to a Hugging Face directory besides its weights: texts, configs, tokenizers, a licence without a suffix.
SUFFIXES = ("", ".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken", ".spm", ".pdf")
NEVER = ("adapter_config.json", RECORD)  # an adapter's settings, and what made the base


def companions(directory: Path) -> list[Path]:
    """The files of a Hugging Face directory besides its weights and their index: config, tokenizer, chat template,
    licence. Never hidden files, adapters or other weights."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file()]
    templates = directory / "additional_chat_templates"
    files += sorted(templates.glob("*.jinja")) if templates.is_dir() else []
    return [
        path
        for path in files
        if not path.name.startswith(".")
        and (path.suffix in SUFFIXES or path.name.startswith("tokenizer."))
        and not path.name.endswith(".index.json")
        and path.name not in NEVER
    ]


def merge_directory(
    merge: Merge,
    out_dir: Path,
    *,
    overwrite: bool,
    record: dict[str, Any],
    advance: Callable[[int], object] = lambda nbytes: None,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Writes the result to `out_dir`, which takes its name only when it is whole and `check` (given the directory under
    its temporary name) has not raised. `record` becomes litlora.json; `advance` is told the bytes written.

    Raises InputError before anything is written where the disk is too small.
    """
    source = merge.base.checkpoint.directory
    copied = companions(source)
    headers = {shard.file.name: merge.header(shard) for shard in merge.base.checkpoint.shards}
    small = sum(len(header) + 8 for header in headers.values()) + sum(path.stat().st_size for path in copied)
    require_disk(out_dir, merge.tensor_bytes + small + MARGIN)
    with atomic_directory(out_dir, overwrite=overwrite) as directory:
        for shard in merge.base.checkpoint.shards:
            file = directory / shard.file.name
            # rounding the base is work for all threads
            with nullcontext() if merge.base_rounding else few_threads(merge.rank):
                _write_shard(merge, shard, file, headers[file.name], advance)
        if merge.base.checkpoint.index is not None:
            _write_index(merge, directory)
        for path in copied:
            target = directory / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            if path.name != CONFIG:
                shutil.copyfile(path, target)
        write_json(directory / RECORD, record)
        _write_config(merge, directory)  # last: without it nothing opens the directory
        if check:
            check(directory)


def _write_shard(merge: Merge, shard: Shard, file: Path, header: bytes, advance: Callable[[int], object]) -> None:
    """What no adapter touches goes from file to file without passing through this process, where the system can."""
    with atomic_file(file) as stream, _Output(stream.fileno()) as output:
        output.write(memoryview(struct.pack("<Q", len(header)) + header))
        for name in merge.names(shard):
            if merge.touched(name):
                for block in merge.blocks(name):
                    output.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)
                    advance(block.nbytes)
            else:
                for count in output.copy(merge.source(name)):
                    advance(count)


class _Output:
    """A file that is written from its beginning on, and brought to the disk meanwhile by a thread."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.waiting = descriptor, 0
        self.thread = ThreadPoolExecutor(1)
        self.flushing: Future[None] | None = None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown()  # before the descriptor is closed; the file's own fsync follows, and tells of errors

    def write(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self.descriptor, view[done:])
        self._count(len(view))

    def copy(self, info: TensorInfo) -> Iterator[int]:
        """A tensor's bytes as they are; yields how many at a time."""
        with info.file.open("rb") as source:
            done = 0
            while done < info.nbytes:
                count = self._copy(source.fileno(), info.offset + done, min(PIECE, info.nbytes - done))
                self._count(count)
                yield count
                done += count

    def _copy(self, source: int, offset: int, count: int) -> int:
        if hasattr(os, "copy_file_range"):
            try:
                copied = os.copy_file_range(source, self.descriptor, count, offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
            else:
                if copied:
                    return copied
        data = os.pread(source, count, offset)
        if not data:
            raise InputError("a safetensors file ends early", fix="download the checkpoint again")
        return os.write(self.descriptor, data)

    def _count(self, count: int) -> None:
        self.waiting += count
        if self.waiting >= FLUSH and (self.flushing is None or self.flushing.done()):
            self.waiting = 0
            self.flushing = self.thread.submit(os.fdatasync if hasattr(os, "fdatasync") else os.fsync, self.descriptor)


def _write_index(merge: Merge, directory: Path) -> None:
    """The base's index; its map and its totals follow an added head and another dtype."""
    index = dict(merge.base.checkpoint.index or {})
    before = dict(index)
    for shard in merge.base.checkpoint.shards:
        if len(merge.names(shard)) > len(shard.tensors):
            index["weight_map"] = {**index["weight_map"], f"{HEAD}.weight": shard.file.name}
    totals = dict(index.get("metadata") or {})
    if "total_size" in totals and (merge.dtype or index != before):
        totals["total_size"] = merge.tensor_bytes
    if "total_parameters" in totals and index != before:
        totals["total_parameters"] += prod(merge.source(EMBEDDING).shape)
    if totals != (index.get("metadata") or {}):
        index["metadata"] = totals
    if index == before:
        shutil.copyfile(merge.base.checkpoint.directory / INDEX, directory / INDEX)
    else:
        write_json(directory / INDEX, index)


def _write_config(merge: Merge, directory: Path) -> None:
    """The base's config.json; only what the merge changes is changed."""
    source = merge.base.checkpoint.directory / CONFIG
    config = read_json(source)
    if merge.unties:
        config["tie_word_embeddings"] = False
    if merge.dtype:
        keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
        config.update(dict.fromkeys(keys, str(merge.dtype).removeprefix("torch.")))
    if config == read_json(source):
        shutil.copyfile(source, directory / CONFIG)
    else:
        write_json(directory / CONFIG, config)
