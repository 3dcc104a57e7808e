"""`litlora generate`: prompts -> text, from a base, base + adapters unmerged, or a merged model. Read top to bottom."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litlora.answers import Piece, answers, in_order
from litlora.commands.answers_file import AnswersFile, check_out_file
from litlora.commands.models import ModelArgs, OpenModel, explained_memory, open_model
from litlora.commands.prompts import Prompt, read_prompts
from litlora.decode import check_prompts
from litlora.errors import InputError
from litlora.metrics import Progress, peak_memory, reset_peak_memory, say
from litlora.model import Decoder
from litlora.ops import fastest
from litlora.peft_format import WEIGHTS

BATCH_SIZES = {"cuda": 512, "cpu": 16}


@dataclass(frozen=True)
class Args(ModelArgs):
    """Generate text from a base model, a base and adapters, or a merged model.

    Args:
        prompt: what to answer or continue; without it and --prompt_file, text is read from stdin
        input: alpaca's second field, the material that the instruction is about
        prompt_file: .txt (a prompt a line) or .jsonl (prompt, or instruction and input, or messages)
        out_file: write answers here, one JSON object a line (the row's own fields, prompt, text, tokens, end), instead
            of to stdout; a run that was interrupted goes on where it was when it is started again
        overwrite: replace an out_file that is there, and start anew
        batch_size: prompts answered side by side at most; without it 512 on a GPU (fewer where their keys and values
            do not fit), 16 on a CPU
        num_samples: answers to each prompt, which differ unless the temperature is 0
    """

    prompt: str | None = None
    input: str = ""
    prompt_file: Path | None = None
    out_file: Path | None = None
    overwrite: bool = False
    batch_size: int | None = None
    num_samples: int = 1


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: sample number `sample` of `prompt`."""

    number: int
    prompt: Prompt
    ids: list[int]
    sample: int
    stream: int  # numbers its random draws


def run(args: Args) -> None:
    """Raises InputError, before the weights are read for whatever can be known by then."""
    # 1. everything that can be wrong is found before the long work starts
    args.check()
    for name, value in (("batch_size", args.batch_size), ("num_samples", args.num_samples)):
        if value is not None and value < 1:
            raise InputError(f"--{name} is out of range", got=value, wanted="at least 1")
    if args.out_file:
        check_out_file(args.out_file, args.overwrite)
    if args.out_file and args.prompt_file and args.out_file.resolve() == args.prompt_file.resolve():
        raise InputError("the answers would replace --prompt_file", where=args.out_file, fix="another --out_file")
    prompts = read_prompts(args.prompt, args.input, args.prompt_file)
    opened = open_model(args, otherwise="none")
    requests = make_requests(prompts, opened, args)
    target = None
    if args.out_file:
        question = asked(args, opened, requests)
        target = AnswersFile(args.out_file, question, len(requests), overwrite=args.overwrite)
        requests = [request for request in requests if request.number not in target.done]
        if not requests:
            target.close()
            return

    # 2. the model
    reset_peak_memory(opened.precision.device)
    model = opened.load(fastest(opened.precision.device)[0])

    # 3. the answers, as they come
    start = time.perf_counter()
    pieces = all_answers(model, opened, requests, args)
    tokens = show(pieces, requests) if target is None else write(pieces, requests, target, args.num_samples)
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
    samples = args.num_samples
    return [
        # a prompt's draws depend on its place in the file and the sample's number, on nothing else
        Request(place * samples + sample, prompt, prompt_ids, sample, stream=(sample << 32) + place)
        for place, (prompt, prompt_ids) in enumerate(zip(prompts, ids, strict=True))
        for sample in range(samples)
    ]


def asked(args: Args, opened: OpenModel, requests: Sequence[Request]) -> dict[str, Any]:
    """All that decides the answers, by the names that users know."""
    flags = (
        "weights quantize quantize_head max_new_tokens temperature top_k top_p repetition_penalty seed stop num_samples"
    )
    assert opened.base.weights is not None
    prompts = hashlib.sha256()
    for request in requests:
        prompts.update(json.dumps([request.prompt.instruction, request.prompt.row, request.ids]).encode())
    return {
        "checkpoint_dir": opened.base.weights.checkpoint.fingerprint,
        "lora_path": [digest(adapter.directory / WEIGHTS) for adapter in opened.adapters],
        "precision": opened.precision.precision,
        "prompts": prompts.hexdigest(),
        **{name: getattr(args, name) for name in flags.split()},
    }


def digest(file: Path) -> str:
    whole = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            whole.update(block)
    return whole.hexdigest()


def all_answers(model: Decoder, opened: OpenModel, requests: Sequence[Request], args: Args) -> Iterator[Piece]:
    """`row` of a piece is the place in `requests`."""
    rows = min(args.batch_size or BATCH_SIZES[opened.precision.device.type], len(requests))
    smaller = f"--batch_size {rows // 2}" if rows > 1 else "--quantize bnb.nf4-dq, or a smaller --max_new_tokens"
    what = f"keys and values of {rows} rows"
    with explained_memory(what, smaller), opened.precision.forward_context():
        yield from answers(
            model,
            opened.tokenizer,
            [request.ids for request in requests],
            args.sampling(),
            max_new_tokens=args.max_new_tokens,
            stop=args.stop,
            streams=[request.stream for request in requests],
            side_by_side=rows,
        )


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


def write(pieces: Iterable[Piece], requests: Sequence[Request], target: AnswersFile, num_samples: int) -> int:
    """Answers to the file as they finish; whatever is finished when this is interrupted is kept. Returns the number of
    tokens."""
    texts, tokens = [""] * len(requests), [0] * len(requests)
    total = done = 0
    start, count, before = time.perf_counter(), len(requests), len(target.done)
    with Progress(target.count, target.count // 10, "answers") as progress:
        try:
            for piece in pieces:
                texts[piece.row] += piece.text
                total += piece.tokens - tokens[piece.row]
                tokens[piece.row] = piece.tokens
                if piece.end is None:
                    continue
                request = requests[piece.row]
                target.add(request.number, line_of(request, texts[piece.row], piece, num_samples))
                done += 1
                seconds = time.perf_counter() - start
                rest = seconds / done * (count - done)
                progress.step(before + done, {"tokens/s": f"{total / seconds:.1f}"}, rest)
        finally:
            target.close()
    return total


def line_of(request: Request, text: str, last: Piece, num_samples: int) -> str:
    """The row's own fields, then ours, which win where the names are the same."""
    ours = {"text": text, "tokens": last.tokens, "end": last.end}
    if num_samples > 1:
        ours["sample"] = request.sample
    return json.dumps({"prompt": request.prompt.instruction, **request.prompt.row, **ours}, ensure_ascii=False)
