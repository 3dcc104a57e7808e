"""What `litlora inspect` found, as text for people."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from litlora.data.inspection import Check

HEAD, TAIL = 200, 100  # tokens that are shown of a row that is longer
NUMBERS = 10  # rows that a warning names
BAR = 40  # letters
GREEN, YELLOW = 32, 33
Paint = Callable[[str, int], str]


def report(
    about: Mapping[str, Any],
    checks: Mapping[str, Sequence[Check]],
    examples: Iterable[Mapping[str, Any]],
    *,
    colours: bool,
    whole: bool,
) -> Iterator[str]:
    """Lines. `colours`: a terminal's; without them trained tokens stand in brackets. `whole`: no row is shortened."""

    def paint(text: str, code: int) -> str:
        return f"\033[{code}m{text}\033[0m" if colours else text

    def mark(text: str) -> str:
        return paint(text, GREEN) if colours else f"⟦{text}⟧"

    yield f"trained tokens are {mark('so')}"
    for example in examples:
        yield from ("", *_example(example, mark, whole))
    yield from ("", *_settings(about))
    for part in ("training", "validation"):
        if about[part]:
            yield from ("", *_lengths(part, about[part], bars=part == "training"))
    yield ""
    yield "checks (rows by number, from 1: the element of a .json list, the line of .jsonl and .csv)"
    for file, found in checks.items():
        yield f"  {file}"
        yield from (f"    {line}" for check in found for line in _check(check, paint))
    count = sum(bool(check.rows) and check.warning for found in checks.values() for check in found)
    yield paint(f"{count} warning{'s' * (count != 1)}", YELLOW) + "; --row N shows a row" if count else "no warnings"


def visible(text: str) -> str:
    """Control characters but for newlines and tabs written out: data do not get to command a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def _example(example: Mapping[str, Any], mark: Callable[[str], str], whole: bool) -> Iterator[str]:
    """Text and ids of one row, trained parts marked, the middle of a long one left out."""
    tokens, trained = len(example["ids"]), sum(example["trained"])
    of = f", the first of {example['sequences']} sequences" if example["sequences"] > 1 else ""
    yield f"row {example['row']} ({example['part']}{of}): {tokens:,} tokens, {trained:,} trained"
    parts = [slice(None)]
    if not whole and tokens > HEAD + TAIL:
        parts = [slice(HEAD), slice(tokens - TAIL, None)]
    gap = f" … {tokens - HEAD - TAIL:,} tokens … "
    texts = [visible(text) for text in example["texts"]]
    ids = [str(token) for token in example["ids"]]
    yield gap.join(_marked(texts[part], example["trained"][part], "", mark) for part in parts)
    yield "ids: " + " … ".join(_marked(ids[part], example["trained"][part], " ", mark) for part in parts)


def _marked(pieces: Sequence[str], trained: Sequence[bool], between: str, mark: Callable[[str], str]) -> str:
    """The pieces of tokens in a row, each run of trained ones marked as one."""
    runs = itertools.groupby(zip(trained, pieces, strict=True), key=lambda pair: pair[0])
    texts = [(flag, between.join(piece for _, piece in run)) for flag, run in runs]
    return between.join(mark(text) if flag else text for flag, text in texts)


def _settings(about: Mapping[str, Any]) -> Iterator[str]:
    trained = "the response only" if about["mask_prompt"] else "prompt and response (--mask_prompt true: response only)"
    yield f"base: {about['checkpoint_dir']} ({about['model_type']}, context {about['context']:,})"
    yield f"rows: at most {about['max_seq_length']:,} tokens, longer ones: {about['on_overlong']}; trained: {trained}"
    yield f"prompt style: {about['prompt_style']}; what generation will write before an answer:"
    yield from (f"    {line}" for line in visible(about["template"]).split("\n"))
    before = " ".join(map(_token, about["added_before"]))
    yield f"the tokenizer adds {before or 'nothing'} before a text"
    yield "rows end with " + ", ".join(f"{_token(end)} {end['rows']:,}×" for end in about["ends"])
    yield f"generation stops at {', '.join(map(_token, about['stop_tokens']))}"


def _token(token: Mapping[str, Any]) -> str:
    return f"{visible(token['text'])!r} ({token['id']})"


def _lengths(part: str, found: Mapping[str, Any], bars: bool) -> Iterator[str]:
    share = found["trained_tokens"] / found["tokens"]
    counts = f"{found['sequences']:,} sequences, {found['tokens']:,} tokens, {found['trained_tokens']:,} ({share:.1%})"
    yield f"{part}: {counts} trained"
    lengths = ", ".join(f"{name} {value:,.0f}" for name, value in found["lengths"].items())
    yield f"  tokens a sequence: {lengths}"
    most = max(entry["sequences"] for entry in found["histogram"])
    for entry in found["histogram"] if bars else ():
        span, bar = f"{entry['from']:,}–{entry['to']:,}", "█" * -(-BAR * entry["sequences"] // most)
        yield f"  {span:>15}  {bar:<{BAR}}  {entry['sequences']:>7,}"


def _check(check: Check, paint: Paint) -> Iterator[str]:
    word = "ok" if not check.rows else "warning" if check.warning else "note"
    state = f"{word:<8}{len(check.rows):>7,}"
    yield f"{paint(state, YELLOW) if word == 'warning' else state}  {check.meaning}"
    if check.rows:
        same = check.same_as or [0] * len(check.rows)
        pairs = list(zip(check.rows, same, strict=True))[:NUMBERS]
        more = f", and {len(check.rows) - NUMBERS:,} more" if len(check.rows) > NUMBERS else ""
        yield f"{'':17}rows {', '.join(f'{a} (as {b})' if b else str(a) for a, b in pairs)}{more}"
