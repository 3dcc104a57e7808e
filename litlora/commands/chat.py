"""`litlora chat`: a conversation in the terminal. Read top to bottom."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from litlora.answers import Piece, answers
from litlora.commands.models import ModelArgs, OpenModel, explained_memory, open_model
from litlora.errors import InputError
from litlora.metrics import peak_memory, reset_peak_memory, say
from litlora.model import Decoder
from litlora.ops import fastest

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Args(ModelArgs):
    """Hold a conversation with a model in the terminal.

    The model's own chat template is used, or what the adapter was trained with; a model without template is asked in
    alpaca's form. /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer. When the
    conversation grows longer than the model's context, the oldest turns are left out.

    Args:
        system: a text in front of the conversation that says how to behave
    """

    system: str | None = None


def run(args: Args) -> None:
    """Reads questions from stdin until it ends; answers go to stdout, all else to stderr. Raises InputError."""
    args.check()
    opened = open_model(args, otherwise="alpaca")
    start: Messages = [{"role": "system", "content": args.system}] if args.system else []
    fit([*start, {"role": "user", "content": "Hi"}], opened, args.max_new_tokens)  # a system text too long: known now
    reset_peak_memory(opened.precision.device)
    model = opened.load(fastest(opened.precision.device)[0])
    say(HELP)
    messages, number = list(start), 0
    while (question := ask()) is not None:
        if question == "/exit":
            break
        if question in ("/reset", "/help"):
            messages = list(start) if question == "/reset" else messages
            say("a new conversation" if question == "/reset" else HELP)
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                messages, ids = fit(messages, opened, args.max_new_tokens)
            except InputError as error:  # this question alone is too long: the conversation goes on without it
                say(str(error))
                messages.pop()
                continue
            text = answer(model, opened, ids, args, number)
            messages.append({"role": "assistant", "content": text})
            number += 1
    say(f"Memory used: {peak_memory(opened.precision.device):.2f} GB")


def ask() -> str | None:
    """The next line a user writes, None at the end of input."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import readline  # noqa: F401 - gives input() history and editing
    while True:
        try:
            if terminal:
                return input("> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except KeyboardInterrupt:
            say("\n(/exit or Ctrl-D leaves)")
        except EOFError:
            print()
            return None


def fit(messages: Messages, opened: OpenModel, max_new_tokens: int) -> tuple[Messages, list[int]]:
    """The conversation and its prompt's ids; the oldest turns are left out, and this is said, while they leave no room
    for an answer. Raises InputError when the last question alone leaves none."""
    room = min(max_new_tokens, opened.context // 2)
    kept = list(messages)
    while True:
        ids = opened.encode(opened.style.chat(kept), "the conversation")
        if len(ids) + room <= opened.context:
            break
        shorter = without_oldest(kept)
        if shorter is None:
            if len(ids) < opened.context:
                break  # a short answer is better than none
            raise InputError(
                "the question is longer than the model's context",
                got=f"{len(ids)} tokens",
                wanted=f"at most {opened.context - 1}",
                fix="ask a shorter one",
            )
        kept = shorter
    if len(kept) < len(messages):
        say(f"note: the conversation is longer than the context of {opened.context} tokens: oldest turns left out")
    return kept, ids


def without_oldest(messages: Sequence[dict[str, str]]) -> Messages | None:
    """Without the oldest question and its answer, the system text kept; None where only the last question is left."""
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(questions) < 2:
        return None
    return [*messages[: questions[0]], *messages[questions[1] :]]


def answer(model: Decoder, opened: OpenModel, ids: list[int], args: Args, number: int) -> str:
    """Streams one answer to stdout and returns it, up to where Ctrl-C stopped it."""
    text, last, start, first = "", Piece(0, "", 0), time.perf_counter(), 0.0
    fix = "/reset, a smaller --max_new_tokens, or --quantize bnb.nf4-dq"
    try:
        with explained_memory("the conversation", fix), opened.precision.forward_context():
            for last in answers(
                model,
                opened.tokenizer,
                [ids],
                args.sampling(),
                max_new_tokens=args.max_new_tokens,
                stop=args.stop,
                streams=[number],  # the same question asked again is answered anew
            ):
                first = first or time.perf_counter() - start
                text += last.text
                print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        print("…", end="")
    print(flush=True)
    seconds = time.perf_counter() - start
    ending = {"length": ", ended by --max_new_tokens", "context": ", the context is full"}.get(last.end or "", "")
    say(f"[{last.tokens} tokens, the first after {first:.2f} s, {last.tokens / seconds:.1f} tokens/sec{ending}]")
    return text
