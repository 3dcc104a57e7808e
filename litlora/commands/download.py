"""litlora download: the files of a model that are needed, from the Hugging Face hub, resumed where they stopped.

huggingface_hub finds the files, signs in and streams them; which files, where they lie and when they count as there is
decided here. Its own snapshot_download (since 1.x) throws a half-loaded file away when the process ends, which for a
shard of 5 GB is minutes; here a file grows under a hidden name of its own, the next run asks for the rest (Range), and
it takes its real name once its hash is the hub's. config.json takes its name last: what is interrupted does not open.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.checkpoint import INDEX, SINGLE, Checkpoint, read_json, require_disk, require_writable, write_json
from litlora.config import ModelConfig
from litlora.errors import InputError

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SMALL = (
    CONFIG, "generation_config.json", *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
SHARD = re.compile(r"(?!consolidated)[^/]+-\d+-of-\d+\.safetensors")
RECORD = ".litlora-download.json"
HTTP_LIMIT = 50_000_000_000  # bytes: the hub serves larger files through another protocol only
TIMEOUT = 30.0  # seconds until the hub counts as out of reach
MARGIN = 16_000_000  # bytes on top of the files: the record, and what the file system itself needs


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


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: `size` in bytes; `digest` is its sha256, or git's blob hash (sha1) if it is small."""

    name: str
    size: int
    digest: str

    def matches(self, path: Path) -> bool:
        """Reads the file and compares its hash with the hub's."""
        if path.stat().st_size != self.size:
            return False
        if len(self.digest) == 64:
            digest = hashlib.sha256()
        else:  # git hashes a header in front of the content
            digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest() == self.digest


def run(args: Args) -> None:
    """Downloads, checks that the result opens, and prints its directory on stdout. Raises InputError."""
    directory = args.checkpoint_dir or Path("checkpoints", *args.repo_id.split("/"))
    try:
        with _hub_errors(args):
            commit, listing = _list_files(args)
    except _Unreachable as error:
        _accept_offline(args, directory, error)
        return
    files = _select(listing, args)
    require_writable(directory, overwrite=True)
    record = _record(directory, args)
    present = {file.name for file in files if _is_present(file, directory, record)}
    _refuse_strangers(directory, files)
    missing = [file for file in files if file.name not in present]
    partial = {file.name: _partial(directory, file) for file in missing}
    have = {name: path.stat().st_size if path.exists() else 0 for name, path in partial.items()}
    rest = sum(max(0, file.size - have[file.name]) for file in missing)
    if present:
        print(f"{len(present)} of {len(files)} files are there already: {directory}", file=sys.stderr)
    if missing:
        require_disk(directory, rest + MARGIN)
        begun = sum(1 for count in have.values() if count)
        resumed = f", {begun} of them begun by an earlier run" if begun else ""
        size = f"{rest / 1e6:,.1f} MB"
        print(
            f"downloading {len(missing)} files{resumed}: {size} from {args.repo_id} at {commit[:12]}", file=sys.stderr
        )
    directory.mkdir(parents=True, exist_ok=True)
    record |= {"repo_id": args.repo_id, "revision": args.revision, "commit": commit}
    with _lock(directory), _hub_errors(args):
        _download(args, commit, missing, directory)
    record["files"] = {file.name: _stamp(directory, file) for file in files}
    write_json(directory / RECORD, record)
    _report(directory)
    print(directory)


class _Unreachable(InputError):
    """The hub does not answer."""


def _select(listing: Mapping[str, RemoteFile], args: Args) -> list[RemoteFile]:
    """The files to download, the small ones first. Raises InputError when config, tokenizer or weights are missing."""
    where = f"{args.repo_id} at {args.revision}"
    if INDEX in listing:
        weights = [INDEX, *sorted(name for name in listing if SHARD.fullmatch(name))]
    else:
        weights = [SINGLE]
    if INDEX not in listing and SINGLE not in listing:
        others = [name for name in sorted(listing) if name.endswith((".safetensors", ".bin", ".pth", ".pt", ".gguf"))]
        fix = "a repository with safetensors: only these are read, pickled weights and GGUF never"
        if "adapter_model.safetensors" in listing:
            fix = "this is an adapter: download its base model and open the adapter with --lora_path"
        elif any(name.endswith(".pth") for name in others):
            fix = "for Meta's original format: fetch the .pth files and params.json, then litlora convert"
        got = ", ".join(others[:4]) + (" …" if len(others) > 4 else "") or "no weights"
        wanted = f"{SINGLE}, or {INDEX} and its shards"
        raise InputError("the repository holds no safetensors of a model", where=where, got=got, wanted=wanted, fix=fix)
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


def _list_files(args: Args) -> tuple[str, dict[str, RemoteFile]]:
    """The commit that `revision` stands for, and the files in the repository's root."""
    from huggingface_hub import HfApi, constants

    info = HfApi(endpoint=constants.ENDPOINT).model_info(
        args.repo_id, revision=args.revision, files_metadata=True, timeout=TIMEOUT
    )
    files = {}
    for sibling in info.siblings or ():
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if "/" in sibling.rfilename:
            continue
        if sibling.size is None or digest is None:
            raise InputError(
                "the hub does not give a file's size and hash", where=f"{args.repo_id}: {sibling.rfilename}"
            )
        files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size, digest)
    if info.sha is None:
        raise InputError("the hub does not name the repository's commit", where=args.repo_id)
    return info.sha, files


def _download(args: Args, commit: str, missing: list[RemoteFile], directory: Path) -> None:
    """Each missing file under a hidden name, then under its own. config.json comes first, so that a model that is not
    supported is refused before its weights are fetched, and is named last."""
    config = next((file for file in missing if file.name == CONFIG), None)
    if config is not None:
        partial = _fetch(args, commit, config, directory)
        ModelConfig.from_dict(read_json(partial), f"{args.repo_id}: {CONFIG}")
    for file in missing:
        if file is not config:
            os.replace(_fetch(args, commit, file, directory), directory / file.name)
    if config is not None:
        os.replace(_partial(directory, config), directory / CONFIG)


def _partial(directory: Path, file: RemoteFile) -> Path:
    """Where a file grows; its hash is in the name, so that another revision's beginning is never gone on with."""
    return directory / f".{file.name}.{file.digest[:16]}.incomplete"


def _fetch(args: Args, commit: str, file: RemoteFile, directory: Path) -> Path:
    """Streams what is missing of `file` to its hidden name and checks its hash. Returns the hidden name."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    partial = _partial(directory, file)
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # a Range of packed bytes would be another range
    url = hf_hub_url(args.repo_id, file.name, revision=commit, endpoint=constants.ENDPOINT)
    with partial.open("ab") as stream:
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.name,
        )
        stream.flush()
        os.fsync(stream.fileno())
    if not file.matches(partial):
        partial.unlink()
        raise InputError("a downloaded file does not have the hub's hash", where=file.name, fix="download it again")
    return partial


def _record(directory: Path, args: Args) -> dict[str, Any]:
    """What the last download into `directory` noted. Raises InputError when that was another model."""
    record = read_json(directory / RECORD) if (directory / RECORD).is_file() else {}
    if record.get("repo_id", args.repo_id) != args.repo_id:
        fix = "another --checkpoint_dir"
        raise InputError(
            "the directory holds another model", where=directory, got=record["repo_id"], wanted=args.repo_id, fix=fix
        )
    return record


def _stamp(directory: Path, file: RemoteFile) -> dict[str, Any]:
    """Tells without reading a file that it is still the one whose hash was checked."""
    status = (directory / file.name).stat()
    return {"digest": file.digest, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_present(file: RemoteFile, directory: Path, record: Mapping[str, Any]) -> bool:
    """Raises InputError when a file of this name is there and is not the hub's: nothing is overwritten."""
    path = directory / file.name
    if not path.exists():
        return False
    if record.get("files", {}).get(file.name) == _stamp(directory, file) or file.matches(path):
        return True
    raise InputError(
        "a file that is there already differs from the hub's",
        where=path,
        got=f"{path.stat().st_size} bytes",
        wanted=f"{file.size} bytes with hash {file.digest[:16]}…",
        fix="another --checkpoint_dir; or remove the file, and it is downloaded again",
    )


def _refuse_strangers(directory: Path, files: list[RemoteFile]) -> None:
    """A tokenizer or index left by something else would be opened in place of the model's own."""
    wanted = {file.name for file in files}
    found = [name for name in (*SMALL, INDEX, SINGLE) if name not in wanted and (directory / name).exists()]
    if found:
        got = ", ".join(found)
        raise InputError(
            "the directory holds files of another model", where=directory, got=got, fix="another --checkpoint_dir"
        )


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One download a directory: two that write one file would spoil it. The lock ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError("another download into this directory is running", where=directory) from None
    finally:
        os.close(descriptor)


def _accept_offline(args: Args, directory: Path, error: _Unreachable) -> None:
    """Without the hub, an earlier complete download of the same model and revision will do; otherwise `error`."""
    record = read_json(directory / RECORD) if (directory / RECORD).is_file() else {}
    if (record.get("repo_id"), record.get("revision")) != (args.repo_id, args.revision) or "files" not in record:
        raise error
    for name, stamp in record["files"].items():
        path = directory / name
        if not path.exists() or path.stat().st_size != stamp["size"] or path.stat().st_mtime_ns != stamp["mtime_ns"]:
            raise error
    print(f"the hub is out of reach; taking what an earlier download brought: {directory}", file=sys.stderr)
    _report(directory)
    print(directory)


def _report(directory: Path) -> None:
    """Opens what was downloaded and says what it is. Raises InputError when it does not open."""
    config, checkpoint = ModelConfig.load(directory), Checkpoint(directory)
    nbytes = sum(info.nbytes for info in checkpoint.tensors.values())
    print(
        f"complete: {config.model_type}, {len(checkpoint.tensors)} tensors, {nbytes / 1e9:.2f} GB in {directory}",
        file=sys.stderr,
    )


@contextmanager
def _hub_errors(args: Args) -> Iterator[None]:
    """huggingface_hub's errors as InputErrors that say what to do."""
    from huggingface_hub import constants, errors, get_token

    # the HTTP client's own family of errors: requests, httpx or httpx2, by huggingface_hub's version
    network = (OSError, *errors.HfHubHTTPError.__bases__)
    where = f"{args.repo_id} at {args.revision}"
    page = f"{constants.ENDPOINT}/{args.repo_id}"
    signed_in = get_token() is not None
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        token = "the account of your token has no access yet" if signed_in else "no token: HF_TOKEN is not set"
        fix = f"accept the licence on {page}, then set HF_TOKEN to a token of that account that may read gated models"
        raise InputError("this model is gated", where=where, got=token, fix=fix) from None
    except errors.RevisionNotFoundError:
        raise InputError("no such revision on the hub", where=where, fix=f"see the branches on {page}") from None
    except errors.RepositoryNotFoundError:
        fix = "check its spelling (OWNER/NAME)" + ("" if signed_in else "; for a private one, set HF_TOKEN")
        raise InputError("no such model on the hub, or a private one", where=where, fix=fix) from None
    except errors.HFValidationError as error:
        raise InputError("not a repository name", got=args.repo_id, wanted="OWNER/NAME", where=str(error)) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        fix = "HF_TOKEN is not valid or may not read this model" if status in (401, 403) else "try again later"
        raise InputError("the hub refused", where=where, got=f"HTTP {status}", fix=fix) from None
    except network as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            fix = "free some space, or another directory; what was downloaded is kept"
            raise InputError("the files cannot be written", where=error.filename, got=error.strerror, fix=fix) from None
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}"
        fix = "check the connection and HF_HUB_OFFLINE, then run it again: it goes on where it stopped"
        raise _Unreachable("the hub is out of reach", where=constants.ENDPOINT, got=reason, fix=fix) from None
