"""Tokenized examples, flat in memory and on disk."""

from __future__ import annotations

import json
import logging
import os
import struct
import tempfile
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# what zipfile raises for damage, beside Python's own
_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, struct.error)
_LOG = logging.getLogger("litlora")


@dataclass(frozen=True)
class Counts:
    """What became of the rows. Token counts are after truncation; `trained_tokens` are labels."""

    rows: int = 0  # in the data
    truncated: int = 0
    dropped: int = 0
    straddling: int = 0  # a token would have crossed from prompt to response: tokenized in two parts
    masked: int = 0  # no label left
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens of the longest row before truncation


def _no_rows() -> npt.NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples side by side: example i is `flat_ids[offsets[i]:offsets[i + 1]]`.

    `flat_trained` marks tokens that are labels, by position (never the first one of an example: nothing predicts it).
    `rows[i]` is the row or line number of example i in the data file; `truncated` and `straddling` hold such numbers.
    """

    flat_ids: npt.NDArray[np.int32]  # (T,)
    flat_trained: npt.NDArray[np.bool_]  # (T,)
    offsets: npt.NDArray[np.int64]  # (examples + 1,)
    rows: npt.NDArray[np.int64]  # (examples,)
    counts: Counts
    truncated: npt.NDArray[np.int64] = field(default_factory=_no_rows)  # rows that were cut
    straddling: npt.NDArray[np.int64] = field(default_factory=_no_rows)  # rows that were tokenized in two parts

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def ids(self, index: int) -> npt.NDArray[np.int32]:
        return self.flat_ids[self.offsets[index] : self.offsets[index + 1]]

    def trained(self, index: int) -> npt.NDArray[np.bool_]:
        return self.flat_trained[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)


def default_cache_dir() -> Path:
    """$LITLORA_CACHE, or ~/.cache/litlora."""
    return Path(os.environ.get("LITLORA_CACHE") or Path.home() / ".cache" / "litlora")


def save(dataset: Dataset, path: Path) -> None:
    """Write atomically: whoever reads finds all of it or nothing. A cache that cannot be written is only logged."""
    arrays: dict[str, Any] = {
        "ids": dataset.flat_ids,
        "trained": dataset.flat_trained,
        "offsets": dataset.offsets,
        "rows": dataset.rows,
        "truncated": dataset.truncated,
        "straddling": dataset.straddling,
        "counts": np.frombuffer(json.dumps(asdict(dataset.counts)).encode(), dtype=np.uint8),
    }
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        _LOG.warning("the tokenized data could not be cached in %s: %s", path.parent, error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def load(path: Path) -> Dataset | None:
    """What `save` wrote; None where there is nothing, or something else. The format's checksums find damage."""
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            counts = Counts(**json.loads(file["counts"].tobytes()))
            ids, trained, offsets, rows = (file[name] for name in ("ids", "trained", "offsets", "rows"))
            dataset = Dataset(ids, trained, offsets, rows, counts, file["truncated"], file["straddling"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, *_DAMAGED) as error:
        _LOG.warning("the cached data in %s are damaged and made again: %s", path, error)
        return None
    fits = len(dataset.flat_ids) == len(dataset.flat_trained) == dataset.offsets[-1]
    return dataset if fits and len(dataset.rows) == len(dataset) else None
