"""Files of a repository on the Hugging Face hub: listed with their hashes, streamed so that a later run can go on.

huggingface_hub signs in, asks and streams; where a file lies and when it counts as there is decided here. Its own
snapshot_download (since 1.x) throws a half-loaded file away when the process ends, which for a shard of 5 GB is
minutes; here a file grows under a hidden name and the next run asks for the rest only (Range).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from litlora.errors import InputError

TIMEOUT = 30.0  # seconds until the hub counts as out of reach
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO)


class Unreachable(InputError):
    """The hub does not answer, or not to the end."""


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

    def partial(self, directory: Path) -> Path:
        """Where the file grows. Its hash is in the name, so that another revision's beginning is never gone on with."""
        return directory / f".{self.name}.{self.digest[:16]}.incomplete"


def list_files(repo_id: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
    """The commit that `revision` stands for, and the files in the root of a model repository."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=constants.ENDPOINT)
    info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT)
    if info.sha is None:
        raise InputError("the hub does not name the repository's commit", where=repo_id)
    files = {}
    for sibling in info.siblings or ():
        name, digest = sibling.rfilename, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if "/" in name:
            continue
        if sibling.size is None or digest is None:
            raise InputError("the hub does not give a file's size and hash", where=f"{repo_id}: {name}")
        files[name] = RemoteFile(name, sibling.size, digest)
    return info.sha, files


def fetch(repo_id: str, commit: str, file: RemoteFile, directory: Path) -> Path:
    """Streams what is missing of `file` to its partial name in `directory` and checks the hash. Returns that name."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    partial = file.partial(directory)
    if partial.exists() and partial.stat().st_size > file.size:
        partial.unlink()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # a Range of packed bytes would be another range
    url = hf_hub_url(repo_id, file.name, revision=commit, endpoint=constants.ENDPOINT)
    with partial.open("ab") as stream:
        begun = stream.tell()
        http_get(url, stream, resume_size=begun, headers=headers, expected_size=file.size, displayed_filename=file.name)
        stream.flush()
        os.fsync(stream.fileno())
    if not file.matches(partial):
        partial.unlink()
        raise InputError("a downloaded file does not have the hub's hash", where=file.name, fix="download it again")
    return partial


@contextmanager
def hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """huggingface_hub's errors as InputErrors that say what to do."""
    from huggingface_hub import constants, errors, get_token

    # the HTTP client's own family of errors: that of requests, httpx or httpx2, by huggingface_hub's version
    network: tuple[type[BaseException], ...] = (OSError, *errors.HfHubHTTPError.__bases__)
    where, page = f"{repo_id} at {revision}", f"{constants.ENDPOINT}/{repo_id}"
    signed_in = get_token() is not None
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError:
        got = "the account of your token has no access yet" if signed_in else "no token: HF_TOKEN is not set"
        fix = f"accept the licence on {page}, then set HF_TOKEN to a token of that account that may read gated models"
        raise InputError("this model is gated", where=where, got=got, fix=fix) from None
    except errors.RevisionNotFoundError:
        raise InputError("no such revision on the hub", where=where, fix=f"see the branches on {page}") from None
    except errors.RepositoryNotFoundError:
        fix = "check its spelling (OWNER/NAME)" + ("" if signed_in else "; for a private one, set HF_TOKEN")
        raise InputError("no such model on the hub, or a private one", where=where, fix=fix) from None
    except errors.HFValidationError:
        raise InputError("not a repository's name", got=repo_id, wanted="OWNER/NAME") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        fix = "HF_TOKEN is not valid, or may not read this model" if status in (401, 403) else "try again later"
        raise InputError("the hub refused", where=where, got=f"HTTP {status}", fix=fix) from None
    except network as error:
        raise _broken(error, constants.ENDPOINT) from None


def _broken(error: BaseException, endpoint: str) -> InputError:
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        fix = "free some space, or another directory; what was downloaded is kept"
        return InputError("the files cannot be written", where=error.filename, got=error.strerror, fix=fix)
    reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no answer'])[0]}"
    fix = "check the connection and HF_HUB_OFFLINE, then run it again: it goes on where it stopped"
    return Unreachable("the hub is out of reach", where=endpoint, got=reason, fix=fix)
