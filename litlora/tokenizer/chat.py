"""Chat templates: rendered with the variables that transformers gives them, so that they render alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from litlora.errors import InputError
from litlora.tokenizer.sandbox import Template


class ChatTemplate:
    """A compiled chat template and the special tokens that it may name."""

    def __init__(self, source: str, tokens: Mapping[str, Any], where: object) -> None:
        self.source = source
        self._tokens = dict(tokens)
        self._where = where
        try:
            self._template = Template(source, trim_blocks=True, lstrip_blocks=True)
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
        except jinja2.TemplateError as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise InputError(
                f"the model's chat template refuses these messages: {error}", where=self._where, got=f"roles {roles}"
            ) from error
