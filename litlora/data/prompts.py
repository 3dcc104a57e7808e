"""The one renderer: training and generation get their prompts here, so that they are the same text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path

import jinja2

from litlora.data.rows import Conversation, Document, Instruction, Row
from litlora.errors import InputError
from litlora.tokenizer import Tokenizer
from litlora.tokenizer.sandbox import Template

# Stanford Alpaca's two prompts; {instruction} and {input} are filled in.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def _alpaca(instruction: str, input: str) -> str:
    return (_WITH_INPUT if input else _WITHOUT_INPUT).format(instruction=instruction, input=input)


def _none(instruction: str, input: str) -> str:
    return f"{instruction}\n{input}" if input else instruction


_BUILT_IN: dict[str, Callable[[str, str], str]] = {"alpaca": _alpaca, "none": _none}
STYLES = (*_BUILT_IN, "chat")


@dataclass(frozen=True)
class Rendered:
    """A row as text: segments in order, each trained or not; `add_eos`: the eos id follows the last segment.

    `masked`: only trained segments are labels, whatever --mask_prompt says (conversations).
    `chunked`: what exceeds the longest sequence goes on in a next one (raw text), and is not cut off.
    """

    segments: tuple[tuple[str, bool], ...]
    add_eos: bool
    masked: bool = False
    chunked: bool = False


class PromptStyle:
    """How an instruction becomes a prompt.

    `alpaca`: Stanford's text. `chat`: the model's own chat template. `none`: the instruction, its input on the next
    line. A file: a jinja2 template of `{{ instruction }}` and `{{ input }}` (empty where a row has none), whose text is
    taken as it is, the last newline included. Conversations (`messages`) always take the chat template.
    """

    def __init__(self, name: str, source: str | None, tokenizer: Tokenizer) -> None:
        """`source`: a template's text; None for the styles known by name."""
        self.name = name
        self.source = source
        self._tokenizer = tokenizer
        fill = _BUILT_IN.get(name)
        self._fill = fill if source is None else _template(source, name)  # None: the model's chat template

    @classmethod
    def load(cls, name: str, tokenizer: Tokenizer) -> PromptStyle:
        """A style by its name, or from a template file. Raises InputError: unknown, unreadable, no chat template."""
        if name == "chat":
            tokenizer.require_chat_template()
        if name in STYLES:
            return cls(name, None, tokenizer)
        path = Path(name)
        if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
            wanted = f"{', '.join(STYLES)}, or a template file"
            raise InputError("unknown prompt style", where="--prompt_style", got=name, wanted=wanted)
        try:
            # newline="": the file's text as it is.
            with path.open(encoding="utf-8", newline="") as file:
                return cls(name, file.read(), tokenizer)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("the prompt template cannot be read", where=path, got=error) from error

    @classmethod
    def from_source(cls, name: str, source: str | None, tokenizer: Tokenizer) -> PromptStyle:
        """The style that `name` and `source` of an earlier one describe (an adapter's, whose template file is gone).
        A record that names a file is not followed. Raises InputError."""
        if not name.isprintable() or (source is None and name not in STYLES):
            wanted = f"{', '.join(STYLES)}, or the text of a template"
            raise InputError("a record of an unknown prompt style", got=name, wanted=wanted, fix="--prompt_style")
        return cls.load(name, tokenizer) if source is None else cls(name, source, tokenizer)

    @cached_property
    def key(self) -> str:
        """What changes the prompts besides the rows: part of the cache's key."""
        dated = "strftime_now" in (self._tokenizer.chat_template or "")
        return repr(
            (self.name, self.source, self._tokenizer.chat_template, date.today().isoformat() if dated else None)
        )

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text in front of a response."""
        if self._fill is None:
            return self._tokenizer.apply_chat_template(_as_messages(instruction, input), add_generation_prompt=True)
        return self._fill(instruction, input)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text in front of the next assistant turn of a conversation that ends with a user's turn."""
        if self._fill is None:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return "".join(text for text, _ in self._turns(messages))

    def render(self, row: Row) -> Rendered:
        """A training row as text. Raises InputError where the chat template is missing or refuses the messages."""
        if isinstance(row, Document):
            return Rendered(((row.text, True),), add_eos=True, chunked=True)
        if isinstance(row, Conversation):
            if row.own_template or self._fill is None:
                return replace(self._with_template(row.messages), masked=row.own_template)
            # The last eos comes as an id, as after every other response.
            *turns, (last, _) = self._turns(row.messages)
            return Rendered((*turns, (last.removesuffix(self._eos_text), True)), add_eos=True)
        if self._fill is None:
            return self._with_template([*_as_messages(row.instruction, row.input), _assistant(row)])
        return Rendered(((self.prompt(row.instruction, row.input), False), (row.output, True)), add_eos=True)

    def segments(self, row: Row) -> list[tuple[str, bool]]:
        """A training row's text in parts, each trained or not (the eos id that may follow is not in it)."""
        return list(self.render(row).segments)

    @cached_property
    def _eos_text(self) -> str:
        return self._tokenizer.token_text(self._tokenizer.eos_id)

    @cached_property
    def _turn_end(self) -> re.Pattern[str]:
        texts = (self._tokenizer.token_text(token_id) for token_id in self._tokenizer.stop_ids)
        return re.compile(r"\s*(?:" + "|".join(re.escape(text) for text in texts if text) + ")")

    def _turns(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, bool]]:
        """Turns in a style that knows only single ones: prompt, response, eos, prompt, …; a system text goes first."""
        system = ""
        turns: list[tuple[str, bool]] = []
        for message in messages:
            if message["role"] == "system":
                system += message["content"] + "\n\n"
            elif message["role"] == "assistant":
                turns.append((message["content"] + self._eos_text, True))
            else:
                turns.append((self.prompt(system + message["content"]), False))
                system = ""
        return turns

    def _with_template(self, messages: Sequence[Mapping[str, str]]) -> Rendered:
        """The conversation as the chat template writes it, cut into assistant turns (with the token that ends them,
        so that the model learns to stop) and the rest. What follows the last assistant turn trains nothing: left out.
        """
        template = self._tokenizer.apply_chat_template
        text = template(messages, add_generation_prompt=False)
        segments: list[tuple[str, bool]] = []
        done, ended = 0, False
        for position, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = template(messages[:position], add_generation_prompt=True) if position else ""
            start = len(prompt) if text.startswith(prompt) and len(prompt) >= done else None
            begin, end = _find(text, message["content"], done if start is None else start)
            # A template may write earlier turns otherwise than it prompts for them (reasoning left out): then only
            # the turn's own text is trained. Without a prompt before it, a first turn's header is not trained either.
            start = begin if start is None or not position else start
            match = self._turn_end.match(text, end)
            end, ended = (match.end(), True) if match else (end, False)
            segments += [(text[done:start], False), (text[start:end], True)]
            done = end
        return Rendered(tuple(segments), add_eos=not ended)


def _template(source: str, where: str) -> Callable[[str, str], str]:
    """A template's text as a function of instruction and input, tried once."""
    if "instruction" not in source:
        raise InputError("the prompt template never names the instruction", where=where, wanted="{{ instruction }}")
    try:
        template = Template(source, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
        template.render(instruction="", input="")
    except jinja2.TemplateError as error:
        raise InputError("the prompt template is not valid", where=where, got=error) from error

    def fill(instruction: str, input: str) -> str:
        try:
            return template.render(instruction=instruction, input=input)
        except jinja2.TemplateError as error:
            raise InputError("the prompt template cannot be filled in", where=where, got=error) from error

    return fill


def _as_messages(instruction: str, input: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}]


def _assistant(row: Instruction) -> dict[str, str]:
    return {"role": "assistant", "content": row.output}


def _find(text: str, content: str, start: int) -> tuple[int, int]:
    """Where a turn's text stands in the rendered conversation; templates may strip it."""
    for wanted in (content, content.strip()):
        begin = text.find(wanted, start)
        if begin >= 0:
            return begin, begin + len(wanted)
    raise InputError("the model's chat template changes the assistant's text, so it cannot be trained on", got=content)
