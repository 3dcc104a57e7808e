"""Adapter flags, read without importing what a merge does not need (Lightning alone is 100 MB of memory)."""

from __future__ import annotations

import math

from litlora.errors import InputError


def parse_weights(text: str | None, count: int) -> tuple[float, ...]:
    """`0.7,0.3` as numbers, one for each of `count` adapters; 1 each without. Raises InputError."""
    if text is None:
        return (1.0,) * count
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError("--weights that are no numbers", got=text, wanted="for example 0.7,0.3") from None
    if not all(map(math.isfinite, weights)):
        raise InputError("--weights that are not finite", got=text, wanted="for example 0.7,0.3")
    if len(weights) != count:
        raise InputError(
            "--weights do not fit --lora_path",
            got=f"{len(weights)} weights, {count} adapters",
            wanted="one weight for each adapter, in the same order",
        )
    return weights
