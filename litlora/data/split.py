"""Which rows train and which validate."""

from __future__ import annotations

import math

import torch

from litlora.errors import InputError

_DEFAULT_COUNT = 2_000
_SMALL = 20_000
_SMALL_SHARE = 0.05


def split(n_rows: int, val_split: float | int | None = None, seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices (train, validation), each ascending; the same for the same seed on every machine.

    Args:
        val_split: a share (0 < x < 1), a count, 0 for none, or None: 2,000 rows, 5 % where there are fewer than 20,000.

    Raises InputError: not a share or a count, or no training row is left.
    """
    if not 0 <= seed < 2**63:
        raise InputError("a flag out of range", where="--seed", got=seed, wanted="0 to 2**63 - 1")
    count = _count(n_rows, val_split)
    if count >= n_rows:
        raise InputError(
            "the validation split leaves no row to train on",
            where="--val_split",
            got=f"{count} of {n_rows} rows",
            wanted=f"fewer than {n_rows} rows",
        )
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[count:]), sorted(order[:count])


def _count(n_rows: int, val_split: float | int | None) -> int:
    if val_split is None:
        few = min(max(1, round(n_rows * _SMALL_SHARE)), max(n_rows - 1, 0))
        return _DEFAULT_COUNT if n_rows >= _SMALL else few
    if 0 < val_split < 1:
        return max(1, round(n_rows * val_split))
    if not 0 <= val_split < math.inf or val_split != int(val_split):
        wanted = "a share between 0 and 1, or a number of rows"
        raise InputError("not a validation split", where="--val_split", got=val_split, wanted=wanted)
    return int(val_split)
