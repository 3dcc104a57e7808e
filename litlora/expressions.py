"""Regular expressions that a file brings. Some take longer than the universe will last, on names of 30 characters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from litlora.errors import InputError

CPU_SECONDS = 1
PLAIN = 100_000  # so many matches of expressions without a repeat or a choice are not tried out
_PROGRAM = f"""
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
except ImportError:
    pass
job = json.load(sys.stdin)
for how, expression in job["expressions"]:
    search = getattr(re.compile(expression), how)
    for name in job["names"]:
        search(name)
"""


def require_quick(expressions: Sequence[tuple[str, str]], names: Sequence[str], where: object) -> None:
    """Matches every expression (how, text) with every name; `how` is match or fullmatch.

    They are tried in a process of their own, because nothing stops Python's `re` but the end of its process. Raises
    InputError for one that is not valid, or when all together take more than CPU_SECONDS.
    """
    for _, expression in expressions:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError("not a regular expression", where=where, got=expression, wanted=str(error)) from None
    plain = not any(re.search(r"[*+?{|(]", expression) for _, expression in expressions)
    if plain and len(expressions) * len(names) < PLAIN:
        return
    job = json.dumps({"expressions": expressions, "names": names})
    try:
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM]
        done = subprocess.run(command, input=job, text=True, capture_output=True, timeout=20 * CPU_SECONDS, check=False)
        quick = done.returncode == 0
    except subprocess.TimeoutExpired:
        quick = False
    if not quick:
        raise InputError(
            "regular expressions that take too long",
            where=where,
            got=", ".join(expression for _, expression in expressions),
            wanted="names of modules, or expressions without repeats in repeats",
        )
