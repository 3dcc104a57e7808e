"""`litlora generate`: prompts -> text, from a base, base + adapters unmerged, or a merged model. Read top to bottom."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from litlora.answers import Piece, answers, in_order
from litlora.commands.models import ModelArgs, OpenModel, explained_memory, open_model
from litlora.commands.prompts import Prompt, read_prompts
from litlora.decode import check_prompts
from litlora.errors import InputError
from litlora.metrics import Progress, peak_memory, reset_peak_memory, say
from litlora.model import Decoder


@dataclass(frozen=True)
class Args(ModelArgs):
    """Generate text from a base model, a base and adapters, or a merged model.

    Args:
        prompt: what to answer or continue; without it and --prompt_file, text is read from stdin
        input: alpaca's second field, the material that the instruction is about
        prompt_file: .txt (a prompt a line) or .jsonl (prompt, or instruction and input, or messages)
        out_file: write answers here, one JSON object a line (the row's own fields, prompt, text, tokens, end), instead
            of to stdout
        overwrite: replace an out_file that is there
        batch_size: prompts answered side by side
        num_samples: answers to each prompt, which differ unless the temperature is 0
    """

    prompt: str | None = None
    input: str = ""
    prompt_file: Path | None = None
    out_file: Path | None = None
    overwrite: bool = False
    batch_size: int = 16
    num_samples: int = 1


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: sample number `sample` of `prompt`."""

    prompt: Prompt
    ids: list[int]
    sample: int
    stream: int  # numbers its random draws


def run(args: Args) -> None:
    """Raises InputError, before the weights are read for whatever can be known by then."""
    # 1. everything that can be wrong is found before the long work starts
    args.check()
    for name in ("batch_size", "num_samples"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is out of range", got=getattr(args, name), wanted="at least 1")
    check_out_file(args.out_file, args.overwrite)
    if args.out_file and args.prompt_file and args.out_file.resolve() == args.prompt_file.resolve():
        raise InputError("the answers would replace --prompt_file", where=args.out_file, fix="another --out_file")
    prompts = read_prompts(args.prompt, args.input, args.prompt_file)
    opened = open_model(args, otherwise="none")
    requests = make_requests(prompts, opened, args)

    # 2. the model
    reset_peak_memory(opened.precision.device)
    model = opened.load()

    # 3. the answers, as they come
    start = time.perf_counter()
    pieces = all_answers(model, opened, requests, args)
    if args.out_file is None:
        tokens = show(pieces, requests)
    else:
        tokens = write(pieces, requests, args.out_file, args.num_samples)
    seconds = time.perf_counter() - start

    # 4. the articles' two lines
    say(f"Time for inference: {seconds:.2f} sec total, {tokens / seconds:.2f} tokens/sec")
    say(f"Memory used: {peak_memory(opened.precision.device):.2f} GB")


def make_requests(prompts: Sequence[Prompt], opened: OpenModel, args: Args) -> list[Request]:
    """Ids of all prompts, in order, each `num_samples` times. Raises InputError for one that does not fit."""
    ids = [opened.encode(prompt.render(opened.style), prompt.where) for prompt in prompts]
    names = [prompt.where for prompt in prompts]
    limits = check_prompts(ids, args.max_new_tokens, opened.context, opened.base.config.vocab_size, names)
    cut = sum(limit < args.max_new_tokens for limit in limits)
    if cut:
        which = f"{cut} of {len(prompts)} answers end" if len(prompts) > 1 else "the answer ends"
        say(f"note: {which} before --max_new_tokens {args.max_new_tokens}, at the model's context of {opened.context}")
    return [
        # a prompt's draws depend on its place in the file and the sample's number, on nothing else
        Request(prompt, prompt_ids, sample, stream=(sample << 32) + number)
        for number, (prompt, prompt_ids) in enumerate(zip(prompts, ids, strict=True))
        for sample in range(args.num_samples)
    ]


def all_answers(model: Decoder, opened: OpenModel, requests: Sequence[Request], args: Args) -> Iterator[Piece]:
    """Batch after batch; `row` of a piece counts through all requests."""
    rows = min(args.batch_size, len(requests))
    smaller = f"--batch_size {rows // 2}" if rows > 1 else "--quantize bnb.nf4-dq, or a smaller --max_new_tokens"
    what = f"keys and values of {rows} rows"
    with explained_memory(what, smaller), opened.precision.forward_context():
        for first in range(0, len(requests), args.batch_size):
            batch = requests[first : first + args.batch_size]
            for piece in answers(
                model,
                opened.tokenizer,
                [request.ids for request in batch],
                args.sampling(),
                max_new_tokens=args.max_new_tokens,
                stop=args.stop,
                streams=[request.stream for request in batch],
            ):
                yield Piece(first + piece.row, piece.text, piece.tokens, piece.end)


def show(pieces: Iterable[Piece], requests: Sequence[Request]) -> int:
    """Text to stdout, the first unfinished answer live; which one it is, where there are several, to stderr. Returns
    the number of tokens."""
    tokens, shown = 0, -1
    for piece in in_order(pieces, len(requests)):
        if piece.row != shown and len(requests) > 1:
            say(f"\n[{piece.row + 1}/{len(requests)}] {shortened(requests[piece.row].prompt.instruction)}")
        shown = piece.row
        print(piece.text, end="\n" if piece.end else "", flush=True)
        tokens += piece.tokens if piece.end else 0
    return tokens


def shortened(text: str, width: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def check_out_file(file: Path | None, overwrite: bool) -> None:
    """Raises InputError for one that is there already, or that cannot be written."""
    if file is None:
        return
    if file.exists() and (file.is_dir() or not overwrite):
        fix = "another --out_file" + ("" if file.is_dir() else ", or --overwrite true")
        raise InputError("the output file exists", where=file, fix=fix)
    parent = file.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(file if file.exists() else parent, os.W_OK):
        raise InputError("the output file cannot be written", where=file, fix="another --out_file")


def write(pieces: Iterable[Piece], requests: Sequence[Request], file: Path, num_samples: int) -> int:
    """A line an answer, in the order of the prompts, each on the disk as soon as those before it are; whatever is
    finished when this is interrupted is written too. Returns the number of tokens."""
    texts = [""] * len(requests)
    finished: dict[int, str] = {}
    tokens = written = done = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    count = len(requests)
    with file.open("w", encoding="utf-8") as stream, Progress(count, count // 10, "answers") as progress:
        try:
            for piece in pieces:
                texts[piece.row] += piece.text
                if piece.end is None:
                    continue
                finished[piece.row] = line_of(requests[piece.row], texts[piece.row], piece, num_samples)
                done, tokens = done + 1, tokens + piece.tokens
                while written in finished:
                    _write_line(stream, finished.pop(written))
                    written += 1
                seconds = time.perf_counter() - start
                rest = seconds / done * (count - done)
                progress.step(done, {"tokens/s": f"{tokens / seconds:.1f}"}, rest)
        finally:
            for row in sorted(finished):
                _write_line(stream, finished[row])
            os.fsync(stream.fileno())
            say(f"{done} of {count} answers in {file}")
    return tokens


def line_of(request: Request, text: str, last: Piece, num_samples: int) -> str:
    """The row's own fields, then ours, which win where the names are the same."""
    ours = {"text": text, "tokens": last.tokens, "end": last.end}
    if num_samples > 1:
        ours["sample"] = request.sample
    return json.dumps({"prompt": request.prompt.instruction, **request.prompt.row, **ours}, ensure_ascii=False)


def _write_line(stream: TextIO, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()
