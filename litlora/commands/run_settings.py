"""The data flags of the run that made an adapter, so that it is measured on what it was measured on."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from litlora.checkpoint import refuse_link
from litlora.commands.data_flags import DataArgs
from litlora.errors import InputError
from litlora.flat_yaml import read_flat_yaml
from litlora.metrics import say
from litlora.run_files import SETTINGS

SOURCE = frozenset(["data", "data_path", "val_path"])  # one of them given: none is taken
OTHERS = frozenset(["checkpoint_dir", "prompt_style"])  # flags of their own, and the adapter's record
Args = TypeVar("Args", bound=DataArgs)


def as_in_the_run(args: Args, directory: Path, given: frozenset[str]) -> Args:
    """`args` with the data flags of the run that left its settings in `directory`, where they were not `given` by hand;
    says which. Raises InputError for settings that litlora did not write."""
    file = directory / SETTINGS
    if not file.is_file():
        return args
    refuse_link(file)
    kept = given | OTHERS | (SOURCE if given & SOURCE else frozenset())
    defaults = {field.name: field.default for field in fields(DataArgs) if field.name not in kept}
    settings = read_settings(file, list(defaults))
    changed = [
        f"--{name} {value:g}" if type(value) is float else f"--{name} {value}".replace(" True", " true")
        for name, value in settings.items()
        if value != defaults[name]
    ]
    say(f"data flags as in {file}: {' '.join(changed) or 'the defaults'}")
    return replace(args, **settings)


def read_settings(file: Path, names: list[str]) -> dict[str, Any]:
    """The values of data flags in a run's settings. Raises InputError."""
    try:
        raw = read_flat_yaml(file)
    except InputError as error:
        raise InputError("the run's settings cannot be read", where=file, got=str(error).splitlines()[0]) from None
    hints = get_type_hints(DataArgs)
    found = {name: raw[name] for name in names if name in raw}
    wrong = [f"{name}: {str(value)[:40]}" for name, value in found.items() if not _fits(hints[name], value)]
    if wrong:
        raise InputError("settings that litlora did not write", where=file, got="; ".join(wrong))
    return {name: Path(value) if name.endswith("_path") and value else value for name, value in found.items()}


def _fits(hint: Any, value: object) -> bool:
    """Whether a value of YAML is of a flag's type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_args(hint):
        return any(_fits(one, value) for one in get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (str if hint is Path else hint)
