"""What one row of training data is, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass

Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One question and its answer. `number` is the row (or line) in the file, from 1."""

    number: int
    instruction: str
    input: str
    output: str

    def key(self) -> object:
        """What makes this row's ids: the cache is found by it."""
        return (self.number, *self.content)

    @property
    def content(self) -> tuple[str, ...]:
        """All of its texts, the response last: rows of the same content are duplicates."""
        return (self.instruction, self.input, self.output)

    @property
    def questions(self) -> tuple[str, ...]:
        return (self.instruction + self.input,)

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.output,)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns as {"role": …, "content": …}; every assistant turn is trained.

    `own_template`: rendered with the model's chat template whatever the prompt style (False: LIMA's turns, which
    follow the prompt style as its single-turn rows do).
    """

    number: int
    messages: Messages
    own_template: bool = True

    def key(self) -> object:
        return (self.number, self.own_template, *self.content)

    @property
    def content(self) -> tuple[str, ...]:
        return tuple(text for message in self.messages for text in (message["role"], message["content"]))

    @property
    def questions(self) -> tuple[str, ...]:
        return tuple(message["content"] for message in self.messages if message["role"] == "user")

    @property
    def responses(self) -> tuple[str, ...]:
        return tuple(message["content"] for message in self.messages if message["role"] == "assistant")


@dataclass(frozen=True, slots=True)
class Document:
    """Raw text for continued pretraining; every token is trained."""

    number: int
    text: str

    def key(self) -> object:
        return (self.number, *self.content)

    @property
    def content(self) -> tuple[str, ...]:
        return (self.text,)

    @property
    def questions(self) -> tuple[str, ...]:
        return ()

    @property
    def responses(self) -> tuple[str, ...]:
        return (self.text,)


Row = Instruction | Conversation | Document
