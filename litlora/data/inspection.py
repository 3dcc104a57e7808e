"""What is to be known of the data before training: every check that can be made on rows and ids, with row numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from litlora.data.dataset import Dataset
from litlora.data.prompts import PromptStyle
from litlora.data.rows import Conversation, Document, Row
from litlora.tokenizer import Tokenizer

PROMPTS = 2_000  # rows whose prompts are tokenized a second time


@dataclass(frozen=True)
class Check:
    """One thing that was looked for. `rows` are the numbers, as in the file, of those that have it; `same_as` the rows
    that they repeat, where that is what is wrong. What is no warning is told for information."""

    name: str
    meaning: str
    rows: list[int]
    same_as: list[int] | None = None
    warning: bool = True


@dataclass(frozen=True)
class Inspected:
    """One file of data: `rows` as read, `dataset` what `prepare` made of them."""

    rows: Sequence[Row]
    dataset: Dataset
    tokenizer: Tokenizer
    style: PromptStyle
    max_seq_length: int

    def checks(self) -> list[Check]:
        rows, dataset = self.rows, self.dataset
        repeats = _repeats(rows)
        kept = set(dataset.rows.tolist())
        labels = np.add.reduceat(dataset.flat_trained, dataset.offsets[:-1], dtype=np.int64)
        blank = [row.number for row in rows if any(not text.strip() for text in row.questions)]
        mute = [row.number for row in rows if any(not text.strip() for text in row.responses)]
        overlong = f"longer than {self.max_seq_length} tokens"
        asked = "the prompt that generation will write"
        asked += f" ({PROMPTS:,} rows looked at)" if len(rows) > PROMPTS else ""
        cut, split = dataset.truncated.tolist(), dataset.straddling.tolist()
        return [
            Check("empty_prompt", "no text in an instruction or a user's turn", blank),
            Check("empty_response", "no text in a response: it teaches to answer nothing", mute),
            Check("duplicate", "word for word an earlier row", [a for a, _ in repeats], [b for _, b in repeats]),
            Check("truncated", f"{overlong}: cut, and without eos", cut),
            Check("dropped", f"{overlong}: dropped", [row.number for row in rows if row.number not in kept]),
            Check("masked", "no token of it is trained", sorted(set(dataset.rows[labels == 0].tolist()))),
            Check("bos", "bos is missing, doubled, or inside the text", self.wrong_bos()),
            Check("eos", "eos is missing, doubled, or inside the text", self.wrong_eos()),
            Check("special_text", "its text holds what the tokenizer takes for a special token", self.special_texts()),
            Check("boundary", f"does not begin with {asked}", self.wrong_prompts()),
            Check("straddling", "tokenized in two parts: a token would cross the prompt's end", split, warning=False),
        ]

    def wrong_bos(self) -> list[int]:
        """Rows that do not begin as the tokenizer begins every text, with bos once or, where it adds none, never."""
        bos, prefix, dataset = self.tokenizer.bos_id, self.tokenizer.prefix, self.dataset
        if bos is None:
            return []
        numbers, first = np.unique(dataset.rows, return_index=True)  # a document is several examples
        is_bos = dataset.flat_ids == bos
        counted = np.add.reduceat(is_bos, dataset.offsets[:-1], dtype=np.int64)[first]
        wrong = (self._turns(numbers) >= 0) & (counted != prefix.count(bos))
        for place, example in enumerate(first.tolist()):
            ids = dataset.ids(example)[: len(prefix) + 2].tolist()
            doubled = ids[max(len(prefix) - 1, 0) :][:2] == [bos, bos]  # a template that writes one more
            wrong[place] |= ids[: len(prefix)] != prefix or doubled
        return _numbers(numbers[wrong])

    def wrong_eos(self) -> list[int]:
        """Rows that do not end with a token that ends a text, or have more or fewer than responses; those that were
        cut are not asked."""
        dataset = self.dataset
        stops = np.isin(dataset.flat_ids, self.tokenizer.stop_ids)
        numbers, behind = np.unique(dataset.rows[::-1], return_index=True)
        last = len(dataset) - 1 - behind  # each row's last example
        ends = stops[dataset.offsets[1:][last] - 1]
        counted, turns = np.add.reduceat(stops, dataset.offsets[:-1], dtype=np.int64)[last], self._turns(numbers)
        wrong = ~ends | ((turns >= 0) & (counted != turns))
        return _numbers(numbers[wrong & ~np.isin(numbers, dataset.truncated)])

    def _turns(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Responses of each row; -1 where its special tokens are not ours alone: a template's, a document's."""
        plain = self.style.source is None and self.style.name != "chat"
        turns = {
            row.number: len(row.responses)
            for row in self.rows
            if plain and not isinstance(row, Document) and not (isinstance(row, Conversation) and row.own_template)
        }
        return np.array([turns.get(number, -1) for number in numbers.tolist()], dtype=np.int64)

    def special_texts(self) -> list[int]:
        """Rows in whose text, written as plain letters, the tokenizer sees a special token."""
        texts = ["\0".join(row.content) for row in self.rows]
        together = "\0".join(texts)
        found = [token for token in self.tokenizer.special_texts if token in together]
        special = re.compile("|".join(map(re.escape, found)))
        return [row.number for row, text in zip(self.rows, texts, strict=True) if found and special.search(text)]

    def wrong_prompts(self) -> list[int]:
        """Rows whose first ids are not those of the prompt that generation writes for their last response. Some rows,
        spread over the file: what can differ is the style, and `prepare` has looked at each row's own boundary."""
        numbers, first = np.unique(self.dataset.rows, return_index=True)
        place = dict(zip(numbers.tolist(), first.tolist(), strict=True))
        some = self.rows[:: -(-len(self.rows) // PROMPTS)]
        asked = [(row.number, text) for row in some if row.number in place and (text := self._prompt(row))]
        found = self.tokenizer.encode_batch([text for _, text in asked], special=False)
        wrong = []
        for (number, _), prompt in zip(asked, found, strict=True):
            ids = self.dataset.ids(place[number])
            prompt = self.tokenizer.lead(prompt) + prompt
            if ids[: len(prompt)].tolist() != prompt[: len(ids)]:
                wrong.append(number)
        return wrong

    def _prompt(self, row: Row) -> str:
        """What generation writes before the row's last response; "" where it would not be asked for one."""
        if isinstance(row, Document):
            return ""
        if not isinstance(row, Conversation):
            return self.style.prompt(row.instruction, row.input)
        last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        return self.style.chat(row.messages[:last]) if last and row.messages[last - 1]["role"] == "user" else ""


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each id adds, special tokens too: joined, it is the text of all. Of a character in several tokens
    the last one has it."""
    stream = tokenizer.stream(skip_special=False)
    texts = [stream.push(token) for token in ids]
    texts[-1] += stream.flush()
    return texts


def check_split(train: Sequence[Row], validation: Sequence[Row]) -> list[Check]:
    """Rows to validate on that are trained on too: numbers of validation rows, and the training rows they repeat."""
    seen: dict[tuple[str, ...], int] = {}
    asked: dict[tuple[str, ...], int] = {}
    for row in train:
        seen.setdefault(row.content, row.number)
        asked.setdefault(row.content[:-1], row.number)
    both = [(row.number, seen[row.content]) for row in validation if row.content in seen]
    prompts = [
        (row.number, asked[prompt])
        for row in validation
        if (prompt := row.content[:-1]) and prompt in asked and row.content not in seen
    ]
    return [
        Check("in_both", "a validation row that is trained on too", [a for a, _ in both], [b for _, b in both]),
        Check(
            "prompt_in_both",
            "a validation row whose prompt is trained on, with another response",
            [a for a, _ in prompts],
            [b for _, b in prompts],
        ),
    ]


def _repeats(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(row, the first one that says the same)."""
    first: dict[tuple[str, ...], int] = {}
    pairs = [(row.number, first.setdefault(row.content, row.number)) for row in rows]
    return [pair for pair in pairs if pair[0] != pair[1]]


def _numbers(rows: npt.NDArray[np.int64]) -> list[int]:
    return [int(number) for number in rows]
