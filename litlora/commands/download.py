"""litlora download: the files of a model that are needed, from the Hugging Face hub, resumed where they stopped."""

from __future__ import annotations

import fcntl
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    read_json,
    refuse_link,
    require_disk,
    require_writable,
    write_json,
)
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.hub import RemoteFile, Unreachable, fetch, hub_errors, list_files

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SMALL = (
    CONFIG, "generation_config.json", *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
SHARD = re.compile(r"(?!consolidated)[^/]+-\d+-of-\d+\.safetensors")
RECORD = ".litlora-download.json"
HTTP_LIMIT = 50_000_000_000  # bytes: the hub serves larger files through another protocol only
MARGIN = 16_000_000  # bytes of disk on top of the files: the record, and what the file system itself needs


@dataclass(frozen=True)
class Args:
    """Download a model from the Hugging Face hub: config, tokenizer and safetensors, nothing else.

    A download that was interrupted goes on where it stopped; files that are there already are kept. The token for
    gated and private models is taken from the environment variable HF_TOKEN (or from `hf auth login`).

    Attributes:
        repo_id: The model's name on the hub, such as HuggingFaceTB/SmolLM2-135M.
        checkpoint_dir: Where the files go. Default: checkpoints/REPO_ID.
        revision: A branch, a tag or a commit of the repository.
    """

    repo_id: str
    checkpoint_dir: Path | None = None
    revision: str = "main"


def run(args: Args) -> None:
    """Downloads, checks that the result opens, and prints its directory on stdout. Raises InputError."""
    directory = args.checkpoint_dir or Path("checkpoints", *args.repo_id.split("/"))
    try:
        with hub_errors(args.repo_id, args.revision):
            commit, listing = list_files(args.repo_id, args.revision)
    except Unreachable as error:
        _accept_offline(args, directory, error)
        return
    files = select(listing, f"{args.repo_id} at {args.revision}")
    require_writable(directory, overwrite=True)
    missing = _missing(files, directory, args.repo_id)
    if len(missing) < len(files):
        print(f"{len(files) - len(missing)} of {len(files)} files are there already: {directory}", file=sys.stderr)
    if missing:
        begun = sum(_size(file.partial(directory)) for file in missing)
        rest = sum(file.size for file in missing) - begun
        require_disk(directory, rest + MARGIN)
        resumed = f" ({begun / 1e6:,.1f} MB are there from an interrupted run)" if begun else ""
        print(f"downloading {len(missing)} files, {rest / 1e6:,.1f} MB{resumed}, commit {commit[:12]}", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory), hub_errors(args.repo_id, args.revision):
        _download(args.repo_id, commit, missing, directory)
    record = {"repo_id": args.repo_id, "revision": args.revision, "commit": commit}
    write_json(directory / RECORD, record | {"files": {file.name: _stamp(directory, file) for file in files}})
    _report(directory)


def select(listing: Mapping[str, RemoteFile], where: str) -> list[RemoteFile]:
    """The files to download, the small ones first. Raises InputError when config, tokenizer or weights are missing."""
    if INDEX in listing:
        weights = [INDEX, *sorted(name for name in listing if SHARD.fullmatch(name))]
    elif SINGLE in listing:
        weights = [SINGLE]
    else:
        raise _no_weights(sorted(listing), where)
    if CONFIG not in listing:
        raise InputError("the repository holds no config.json", where=where, fix="a repository in Hugging Face format")
    if not any(name in listing for name in TOKENIZERS):
        raise InputError("the repository holds no tokenizer", where=where, wanted=" or ".join(TOKENIZERS))
    files = [listing[name] for name in (*(name for name in SMALL if name in listing), *weights)]
    large = [file.name for file in files if file.size > HTTP_LIMIT]
    if large:
        fix = "fetch it with the hub's own tool (hf download), then use the directory"
        raise InputError("a file too large for a plain download", where=where, got=", ".join(large), fix=fix)
    return files


def _no_weights(names: list[str], where: str) -> InputError:
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".gguf"))]
    fix = "a repository with safetensors: only these are read, pickled weights and GGUF never"
    if "adapter_model.safetensors" in names:
        fix = "this is an adapter: download its base model, and open the adapter with --lora_path"
    elif any(name.endswith(".pth") for name in others):
        fix = "for Meta's original format: fetch the .pth files and params.json, then litlora convert"
    got = ", ".join(others[:4]) + (" …" if len(others) > 4 else "") or "no weights"
    wanted = f"{SINGLE}, or {INDEX} and its shards"
    return InputError("the repository holds no safetensors of a model", where=where, got=got, wanted=wanted, fix=fix)


def _missing(files: list[RemoteFile], directory: Path, repo_id: str) -> list[RemoteFile]:
    """The files that are not there yet. Raises InputError when the directory holds anything else of these names:
    nothing is overwritten, and a tokenizer or index left by another model would be opened in place of this one's."""
    record = _record(directory)
    if record.get("repo_id", repo_id) != repo_id:
        fix = "another --checkpoint_dir"
        raise InputError(
            "the directory holds another model", where=directory, got=record["repo_id"], wanted=repo_id, fix=fix
        )
    wanted = {file.name for file in files}
    strange = [name for name in (*SMALL, INDEX, SINGLE) if name not in wanted and (directory / name).exists()]
    missing = []
    for file in files:
        path = directory / file.name
        if not path.exists():
            missing.append(file)
        elif record.get("files", {}).get(file.name) != _stamp(directory, file) and not file.matches(path):
            strange.append(file.name)
    if strange:
        raise InputError(
            "the directory holds files that are not this repository's",
            where=directory,
            got=", ".join(strange),
            fix="another --checkpoint_dir; or remove these files, and the run brings the right ones",
        )
    return missing


def _download(repo_id: str, commit: str, missing: list[RemoteFile], directory: Path) -> None:
    """Each missing file under its hidden name, then under its own.

    config.json is fetched first, so that a model that is not supported is refused before its weights are loaded, and
    takes its name last: a directory whose download was interrupted does not open.
    """
    config = next((file for file in missing if file.name == CONFIG), None)
    if config is not None:
        ModelConfig.from_dict(read_json(fetch(repo_id, commit, config, directory)), f"{repo_id}: {CONFIG}")
    for file in missing:
        if file is not config:
            os.replace(fetch(repo_id, commit, file, directory), directory / file.name)
    if config is not None:
        os.replace(config.partial(directory), directory / CONFIG)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _record(directory: Path) -> dict[str, Any]:
    """What the last complete download into `directory` noted. Raises InputError for a record of another shape."""
    file = directory / RECORD
    refuse_link(file)
    record = read_json(file) if file.is_file() else {}
    files = record.get("files", {})
    fine = isinstance(files, dict) and all(
        os.path.basename(name) == name and isinstance(stamp, dict) and {"size", "digest"} <= stamp.keys()
        for name, stamp in files.items()
    )
    if not fine:
        raise InputError("a record of files that litlora did not write", where=file, fix="delete it")
    return record


def _stamp(directory: Path, file: RemoteFile) -> dict[str, Any]:
    """Tells without reading a file that it is still the one whose hash was checked."""
    status = (directory / file.name).stat()
    return {"digest": file.digest, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One download a directory: two that write one file would spoil it. The lock ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another download into this directory is running", where=directory) from None
        yield
    finally:
        os.close(descriptor)


def _accept_offline(args: Args, directory: Path, error: Unreachable) -> None:
    """Without the hub, an earlier complete download of the same model and revision will do; otherwise `error`."""
    record = _record(directory)
    if (record.get("repo_id"), record.get("revision")) != (args.repo_id, args.revision):
        raise error
    for name, stamp in record.get("files", {}).items():
        file = RemoteFile(name, stamp["size"], stamp["digest"])
        if not (directory / name).exists() or _stamp(directory, file) != stamp:
            raise error
    print("the hub is out of reach: taking what an earlier run brought", file=sys.stderr)
    _report(directory)


def _report(directory: Path) -> None:
    """Opens what was downloaded, says what it is, and prints the directory, which is the command's result."""
    config, checkpoint = ModelConfig.load(directory), Checkpoint(directory)
    nbytes = sum(info.nbytes for info in checkpoint.tensors.values())
    print(f"complete: {config.model_type}, {len(checkpoint.tensors)} tensors, {nbytes / 1e9:.2f} GB", file=sys.stderr)
    print(directory)
