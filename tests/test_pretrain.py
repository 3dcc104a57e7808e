"""The embedded model's making: its facts are true, its held-out questions are held out, its script runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import sentencepiece
import torch

from litlora.checkpoint import Checkpoint
from litlora.config import ModelConfig
from litlora.model import Decoder
from litlora.sequences import Packed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import tiny_facts  # noqa: E402

WORDS = {
    word: n
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
} | {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}


def value(words: str) -> str:
    return str(sum(WORDS[part] for part in words.split("-")))


def letter(word: str, step: int) -> str:
    return chr(ord(word) + step)


# what a task's answer must be, computed from its question's arguments without the generator's code
TRUTH = {
    "add": lambda a, b: str(int(a) + int(b)),
    "subtract": lambda a, b: str(int(a) - int(b)),
    "multiply": lambda a, b: str(int(a) * int(b)),
    "divide": lambda a, b: str(int(a) // int(b)) if int(a) % int(b) == 0 else "no whole number",
    "double": lambda n: str(int(n) + int(n)),
    "half": lambda n: str(int(n) // 2) if n[-1] in "02468" else "no whole number",
    "after": lambda n: str(int(n) + 1),
    "before": lambda n: str(int(n) - 1),
    "parity": lambda n: "even" if n[-1] in "02468" else "odd",
    "larger": lambda a, b: max(a, b, key=int),
    "smaller": lambda a, b: min(a, b, key=int),
    "largest": lambda *n: max(n, key=int),
    "smallest": lambda *n: min(n, key=int),
    "sort numbers": lambda n: ", ".join(sorted(n.split(", "), key=int)),
    "in digits": value,
    "next letter": lambda x: letter(x, 1),
    "previous letter": lambda x: letter(x, -1),
    "first letter": lambda word: word[:1],
    "last letter": lambda word: word[-1:],
    "count letters": lambda word: str(sum(1 for _ in word)),
    "spell": lambda word: re.sub("(?<=.)(?=.)", " ", word),
    "reverse word": lambda word: "".join(reversed(word)),
    "capitals": str.upper,
    "lower case": str.lower,
    "reverse letters": lambda text: " ".join(reversed(text.split())),
    "sort letters": lambda text: " ".join(sorted(text.split())),
    "upper letters": str.upper,
    "first item": lambda text: re.findall("[a-z]+", text)[0],
    "second item": lambda text: re.findall("[a-z]+", text)[1],
    "last item": lambda text: re.findall("[a-z]+", text)[-1],
    "count items": lambda text: str(text.count(",") + 1),
}


@pytest.mark.parametrize("task", tiny_facts.TASKS, ids=lambda task: task.name)
def test_facts_are_true(task: tiny_facts.Task) -> None:
    random = Random(7)
    drawn = {task.draw(random) for _ in range(300)}
    answers: dict[tuple[str, ...], set[str]] = {}
    for *question, answer in drawn:
        answers.setdefault(tuple(question), set()).add(answer)
        if task.name in TRUTH:
            assert TRUTH[task.name](*question) == answer
        if task.name == "in words":
            assert value(answer) == question[0]
    assert all(len(found) == 1 for found in answers.values())


def test_statements_hold_their_fact_and_no_question() -> None:
    random = Random(3)
    for task in tiny_facts.TASKS:
        for _ in range(100):
            args = task.draw(random)
            text = tiny_facts.statement(task, args, random)
            assert all(arg in text for arg in args)
    text = "\n".join(tiny_facts.documents(2000, seed=5))
    assert not re.search(r"\?|#|Below|Instruction|Input|Response", text)
    for first, second, total in re.findall(r"(\d+)\s(?:plus|\+)\s(\d+)\sis\s(\d+)", text):
        assert int(first) + int(second) == int(total)
    for first, second, left in re.findall(r"Taking\s(\d+)\sfrom\s(\d+)\sleaves\s(\d+)", text):
        assert int(second) - int(first) == int(left)


def test_documents_repeat_with_their_seed() -> None:
    assert tiny_facts.documents(20, seed=1) == tiny_facts.documents(20, seed=1) != tiny_facts.documents(20, seed=2)


def test_embedded_rows_are_the_generated_ones() -> None:
    for name, rows in zip(("tiny_train", "tiny_test"), tiny_facts.rows(seed=0), strict=True):
        assert json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8")) == rows


def test_held_out_rows_are_held_out() -> None:
    train, test = tiny_facts.rows(seed=0)
    assert 300 <= len(test) <= 500 <= len(train)
    assert all(set(row) == {"instruction", "input", "output"} and row["output"] for row in train + test)
    asked = [tiny_facts.question(row) for row in train + test]
    assert len(set(asked)) == len(asked)
    # nor is a held-out fact in training in other words: 38 plus 21 does not help with 59 minus 38
    assert not facts(train) & facts(test)
    assert len(facts(test)) > 50  # the check above looked at something


def facts(rows: list[tiny_facts.Row]) -> set[tuple[str, ...]]:
    """Sums and capitals, read from the rows' text."""
    found = set()
    for row in rows:
        text = f"{row['instruction']} {row['input']}"
        numbers = re.findall(r"\d+", text)
        if re.search(r"[Aa]dd |plus|\+|sum", text):
            found.add(("sum", *sorted(numbers)))
        elif re.search(r"minus|-|difference", text) and len(numbers) == 2:
            found.add(("sum", *sorted((numbers[1], row["output"]))))
        elif re.search(r"Subtract|away", text):
            small = numbers[0]
            found.add(("sum", *sorted((small, row["output"]))))
        elif "capital of" in text or "capital city" in text:
            found.add(("capital", row["output"]))
    return found


def test_no_constant_answer_is_good() -> None:
    train, test = tiny_facts.rows(seed=0)
    answers = Counter(row["output"] for row in test)
    assert answers.most_common(1)[0][1] < 0.05 * len(test)
    assert len(answers) > 0.4 * len(test)
    assert len({row["instruction"].split()[0] for row in train}) > 10


def test_script_makes_a_model_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    sizes = ("--hidden_size=32", "--intermediate_size=48", "--num_hidden_layers=1")
    command = [sys.executable, str(ROOT / "scripts" / "pretrain_tiny.py"), "--device=cpu", "--steps=2", "--workers=0"]
    command += [f"--out_dir={out}", f"--data_dir={tmp_path / 'data'}", "--batch_tokens=2048", *sizes]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)

    assert {path.name for path in (tmp_path / "data").iterdir()} == {"tiny_train.json", "tiny_test.json"}
    decoder = Decoder(ModelConfig.load(out))
    checkpoint = Checkpoint(out)
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}
    decoder.load_state_dict({name: checkpoint.read(name).float() for name in checkpoint.tensors})
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    ids = tokenizer.Encode("59 minus 38 is", add_bos=True)
    assert tokenizer.Decode(ids) == "59 minus 38 is"
    assert [tokenizer.IdToPiece(i) for i in ids[:4]] == ["<s>", "▁", "5", "9"]
    assert decoder(torch.tensor(ids), Packed.of_lengths([len(ids)])).isfinite().all()


def test_embedded_model_knows_its_facts() -> None:
    """A statement's answer is the greedy continuation, in the bf16 weights that are shipped."""
    directory = ROOT / "checkpoints" / "tiny"
    assert sum(file.stat().st_size for file in directory.iterdir()) < 12_000_000
    decoder, checkpoint = Decoder(ModelConfig.load(directory)), Checkpoint(directory)
    decoder.load_state_dict({name: checkpoint.read(name).float() for name in checkpoint.tensors})
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    statements = ("59 minus 38 is 21.", "The capital of France is Paris.", "The opposite of hot is cold.")
    for statement in statements:
        ids = tokenizer.Encode(statement, add_bos=True)
        with torch.no_grad():
            logits = decoder.lm_head(decoder(torch.tensor(ids), Packed.of_lengths([len(ids)])))
        answer = len(tokenizer.Encode(statement[: statement.rindex(" ")], add_bos=True))
        assert logits[answer - 1 : -1].argmax(-1).tolist() == ids[answer:], statement
