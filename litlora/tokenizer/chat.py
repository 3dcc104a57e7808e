"""Chat templates: jinja2 in a sandbox, set up as transformers sets it up, so that templates render alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from litlora.errors import InputError


class _Generation(Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's text for other tools: its content, as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own shape)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own tojson escapes for HTML, which would show in the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(**options: Any) -> ImmutableSandboxedEnvironment:
    """A sandbox for templates that others wrote."""
    made = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols], **options)
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made


class ChatTemplate:
    """A compiled chat template and the special tokens that it may name."""

    def __init__(self, source: str, tokens: Mapping[str, Any], where: object) -> None:
        self.source = source
        self._tokens = dict(tokens)
        self._where = where
        try:
            self._template = environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
        except jinja2.TemplateError as error:
            raise InputError("the chat template is not valid jinja2", where=where, got=error) from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation's text. Raises InputError where the template refuses the messages (order of roles, …)."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise InputError(
                f"the model's chat template refuses these messages: {error}", where=self._where, got=f"roles {roles}"
            ) from error
