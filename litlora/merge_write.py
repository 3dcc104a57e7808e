"""A merge written as a Hugging Face directory: the base's shards under the base's names, and what belongs to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from litlora.checkpoint import INDEX, Shard, atomic_directory, read_json, require_disk, write_json, write_shard
from litlora.merge import EMBEDDING, HEAD, Merge, few_threads
from litlora.peft_format import RECORD

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
                write_shard(file, headers[file.name], _told(merge, shard, advance))
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


def _told(merge: Merge, shard: Shard, advance: Callable[[int], object]) -> Iterator[Tensor]:
    for name in merge.names(shard):
        for block in merge.blocks(name):
            yield block
            advance(block.nbytes)


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
