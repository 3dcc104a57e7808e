"""Shell completion of commands and flags, without a library: `litlora completion` prints the script."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable


def completion(commands: Iterable[str]) -> str:
    """A bash script (zsh takes it after `bashcompinit`) that completes commands, their flags, and files."""
    lines = ["_litlora() {", '    local current=${COMP_WORDS[COMP_CWORD]} words=""', "    case ${COMP_WORDS[1]} in"]
    for name in commands:
        fields = dataclasses.fields(importlib.import_module(f"litlora.commands.{name}").Args)
        flags = [field.name for field in fields if field.default is not dataclasses.MISSING or name != "download"]
        names = [*flags, "config", "print_config", "help", "debug"]
        lines.append(f'        {name}) words="{" ".join(f"--{flag}" for flag in names)}" ;;')
    lines.append("    esac")
    lines.append(f'    [ "$COMP_CWORD" = 1 ] && words="{" ".join(commands)}"')
    lines += ['    COMPREPLY=($(compgen -W "$words" -- "$current"))', "}"]
    return "\n".join([*lines, "complete -o default -F _litlora litlora"])
