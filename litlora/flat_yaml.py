"""YAML files of names and plain values: --config, and a run's hyperparameters.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from litlora.errors import InputError

LARGEST = 100_000  # bytes
MOST = 3000  # names, values and brackets: each takes up to 100 µs to read, and there are a hundred flags


def read_flat_yaml(file: Path) -> dict[str, Any]:
    """The values by name; a value is a text, a number, true, false, null or a list of these.

    Raises InputError, with the line: missing, too large, not YAML, or more than flat. A few lines of YAML can name
    themselves a billion times over (anchors and aliases), so these are refused before anything is made of them.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise InputError("the config is too large", where=file, wanted=f"at most {LARGEST:,} bytes")
        text = content.decode("utf-8-sig")
        _require_flat(text, file)
        value = yaml.safe_load(text)
    except InputError:
        raise
    except OSError as error:
        raise InputError("the config cannot be read", where=file, got=error.strerror, fix="check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        where: object = f"{file}, line {mark.line + 1}" if mark else file
        problem = getattr(error, "problem", None) or error
        raise InputError("the config is not valid YAML", where=where, got=problem) from None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        got = "nothing" if value is None else type(value).__name__
        got = "a name that is no text" if isinstance(value, dict) else got
        raise InputError("the config is not a table of flags", where=file, got=got, wanted="lines such as lora_r: 8")
    for name, item in value.items():
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise InputError("a number out of range", where=f"{file}: {name}", wanted="64 bits")
    return value


def _require_flat(text: str, file: Path) -> None:
    depth = 0
    for number, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
        if number > MOST:
            raise InputError("the config is too large", where=file, got=f"more than {MOST} names and values")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        alias, tag = isinstance(event, yaml.AliasEvent), getattr(event, "tag", None)
        if depth > 2 or alias or tag:
            got = "an alias" if alias else f"the tag {tag}" if tag else "values inside a list or a table of values"
            where = f"{file}, line {event.start_mark.line + 1}" if event.start_mark else file
            raise InputError("the config is not flat", where=where, got=got, wanted="lines such as lora_r: 8")
