"""The one exception for bad input: what is wrong, where, what was found, what was wanted, and the way out."""

from __future__ import annotations

LONGEST = 2000  # characters of one line of a message


class InputError(ValueError):
    """Bad input from the user (a flag, a file, a machine that cannot). The CLI prints it and exits with code 2.

    Anything else that is raised is a bug of ours and exits with code 1.
    """

    def __init__(
        self, what: str, *, where: object = None, got: object = None, wanted: object = None, fix: str | None = None
    ) -> None:
        lines = [_shown(what, 4 * LONGEST)]
        for label, value in (("where", where), ("got", got), ("wanted", wanted), ("fix", fix)):
            if value is not None:
                lines.append(f"  {label + ':':<8}{_shown(value, LONGEST)}")
        super().__init__("\n".join(lines))


def _shown(value: object, longest: int) -> str:
    """What a file says may be a megabyte long, or tell the terminal to do things."""
    text = str(value)
    if len(text) > longest:
        text = f"{text[:longest]}… ({len(text):,} characters)"
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
