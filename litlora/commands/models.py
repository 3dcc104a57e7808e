"""What the commands that run a model do alike: open base and adapters, choose the prompt style, load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from litlora.answers import StopStrings
from litlora.checkpoint import read_json
from litlora.commands.adapters import parse_weights
from litlora.commands.common import Base
from litlora.data import PromptStyle
from litlora.errors import InputError
from litlora.load import load_model
from litlora.metrics import say
from litlora.model import Decoder
from litlora.ops import Ops
from litlora.peft_format import RECORD, Adapter, attach
from litlora.precision import RunPrecision, default_precision, pick_device
from litlora.sampling import Sampling
from litlora.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelArgs:
    """The flags that generate and chat share.

    Args:
        checkpoint_dir: the model's Hugging Face directory: a base or a merged model
        lora_path: an adapter directory, ours or PEFT's, used unmerged; may be given several times
        weights: how much of each adapter, in the order of --lora_path, for example 0.7,0.3; 1 each without it
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or fp8
        quantize_head: also quantize lm_head
        precision: bf16-true, bf16-mixed or 32-true; bf16-true on a GPU that has it, else 32-true
        accelerator: auto, cpu or cuda
        prompt_style: alpaca, chat (the model's own template), none (the text as it is), or a template file; without
            it what the adapter (or the merged model) was trained with, else chat where the model has a template
        max_new_tokens: tokens of an answer at most
        temperature: 0 always takes the likeliest token (greedy); higher is more varied
        top_k: choose among the k likeliest tokens only; 0 for all
        top_p: choose among the likeliest tokens that together have this probability; 1 for all
        repetition_penalty: above 1 makes tokens that were there already less likely
        seed: of the random choices; the same seed gives the same text
        stop: end the answer before this text; may be given several times
    """

    checkpoint_dir: Path
    lora_path: tuple[Path, ...] = ()
    weights: str | None = None
    quantize: str | None = None
    quantize_head: bool = False
    precision: str | None = None
    accelerator: str = "auto"
    prompt_style: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1234
    stop: tuple[str, ...] = ()

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty, self.seed)

    def check(self) -> None:
        """Raises InputError for values out of range."""
        self.sampling()
        StopStrings(self.stop)
        if self.max_new_tokens < 1:
            raise InputError("--max_new_tokens is out of range", got=self.max_new_tokens, wanted="at least 1")


@dataclass(frozen=True)
class OpenModel:
    """A model that is checked but not loaded yet."""

    base: Base
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    style: PromptStyle
    precision: RunPrecision
    quantize_head: bool

    @property
    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer

    @property
    def context(self) -> int:
        """Tokens, prompt and answer together."""
        return self.base.config.max_position_embeddings

    def encode(self, prompt: str, where: str) -> list[int]:
        """A rendered prompt's ids; of an empty one bos, where the model has one. Raises InputError."""
        ids = self.tokenizer.encode_prompt(prompt)
        if not ids and self.tokenizer.bos_id is None:
            raise InputError(
                "an empty prompt, and the model has no bos token to begin from", where=where, fix="write something"
            )
        return ids or [int(self.tokenizer.bos_id or 0)]

    def load(self, ops: Ops | None = None) -> Decoder:
        """The model on its device, adapters unmerged over it; `ops` are the plain ones without it."""
        assert self.base.weights is not None
        precision = self.precision
        fix = "--accelerator cpu" if precision.quantizer.name else "--quantize bnb.nf4-dq, or --accelerator cpu"
        with explained_memory(f"the weights of {self.base.path}", fix):
            model = load_model(
                self.base.weights,
                precision.quantizer,
                dtype=precision.dtype,
                device=precision.device,
                ops=ops,
                quantize_head=self.quantize_head,
            )
            if self.adapters:
                attach(model, self.adapters, self.weights)
        return model.eval()


def open_model(args: ModelArgs, *, otherwise: str) -> OpenModel:
    """Checks all that the flags name. `otherwise`: the prompt style of a model without record and chat template.

    Raises InputError: a bad directory, an adapter of another base, an unknown style, a machine that cannot.
    """
    device = pick_device(args.accelerator)
    weights = parse_weights(args.weights, len(args.lora_path))
    base = Base.open(args.checkpoint_dir)
    assert base.weights is not None
    adapters = tuple(Adapter.open(path, base.config, base.weights.checkpoint) for path in args.lora_path)
    style = _choose_style(args, base, adapters, otherwise)
    _note_differences(args, base, adapters)
    precision = RunPrecision(args.precision or default_precision(device), args.quantize, device)
    return OpenModel(base, adapters, weights, style, precision, args.quantize_head)


def _choose_style(args: ModelArgs, base: Base, adapters: Sequence[Adapter], otherwise: str) -> PromptStyle:
    """The flag, else what an adapter's record says, else a merged model's record, else the model's chat template."""
    if args.prompt_style is not None:
        return PromptStyle.load(args.prompt_style, base.tokenizer)
    records = {(a.record.prompt_style, a.record.prompt_template): a.directory for a in adapters if a.record}
    merged = base.path / RECORD
    if not records and merged.is_file():
        raw = read_json(merged)
        style, template = raw.get("prompt_style"), raw.get("prompt_template")
        if not isinstance(template, (str, type(None))):
            raise InputError("a record that litlora did not write", where=merged, got=f"prompt_template {template!r}")
        if isinstance(style, str):
            records[style, template] = base.path
    if len(records) > 1:
        raise InputError(
            "the adapters were trained with different prompt styles",
            got="; ".join(f"{directory}: {name}" for (name, _), directory in records.items()),
            fix="choose one with --prompt_style",
        )
    for (name, template), directory in records.items():
        style = PromptStyle.from_source(name, template, base.tokenizer)
        say(f"prompt style: {name} (as {directory} was trained)")
        return style
    name = "chat" if base.tokenizer.chat_template is not None else otherwise
    hint = " (the model's own template; --prompt_style none for plain text)" if name == "chat" else ""
    say(f"prompt style: {name}{hint}")
    return PromptStyle.load(name, base.tokenizer)


def _note_differences(args: ModelArgs, base: Base, adapters: Sequence[Adapter]) -> None:
    """What an adapter saw in training and does not see now: allowed, and said."""
    for adapter in adapters:
        record = adapter.record
        if record is None:
            continue
        if record.quantize != args.quantize:
            now = f"this runs on {args.quantize or 'unquantized'} ones"
            say(f"note: {adapter.directory} was trained on {record.quantize or 'unquantized'} weights, {now}")
        if record.tokenizer_fingerprint != base.tokenizer.fingerprint:
            say(f"note: {adapter.directory} was trained with another tokenizer than that of {base.path}")


@contextmanager
def explained_memory(what: str, fix: str) -> Iterator[None]:
    """Turns the GPU's out-of-memory into a message that names what did not fit and the way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(0).total_memory
        held = torch.cuda.memory_allocated(0)
        raise InputError(
            "out of memory on the GPU",
            where=f"a card of {total / 1e9:.1f} GB",
            got=f"{what}, with {held / 1e9:.2f} GB held already",
            fix=fix,
        ) from error
