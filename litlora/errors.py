"""The one exception for bad input: what is wrong, where, what was found, what was wanted, and the way out."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user (a flag, a file, a machine that cannot). The CLI prints it and exits with code 2.

    Anything else that is raised is a bug of ours and exits with code 1.
    """

    def __init__(
        self, what: str, *, where: object = None, got: object = None, wanted: object = None, fix: str | None = None
    ) -> None:
        lines = [what]
        for label, value in (("where", where), ("got", got), ("wanted", wanted), ("fix", fix)):
            if value is not None:
                lines.append(f"  {label + ':':<8}{value}")
        super().__init__("\n".join(lines))
