"""README.md of an adapter: what it is, what made it, how it did, and commands that use it. The header is the Hub's and
PEFT's. It says nothing of the machine but its card's name, and paths only as they were given."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from litlora.lora import LoRA
from litlora.markdown import block, inline, table
from litlora.metrics import duration
from litlora.peft_format import Record

# Asked in the examples: a row of the data may be nobody's to publish.
INSTRUCTION = "Give three tips for staying healthy."
SETTINGS = """learning_rate lr_schedule warmup_steps optimizer weight_decay max_norm batch_size epochs max_steps
    precision quantize quantize_head max_seq_length mask_prompt seed""".split()
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be


@dataclass(frozen=True)
class Card:
    """What a card tells of."""

    directory: Path  # of the adapter
    record: Record
    lora: LoRA
    settings: Mapping[str, Any]  # hyperparameters.yaml
    summary: Mapping[str, Any]  # summary.json
    rows: tuple[int, int]  # to train and to validate on
    tokens: int  # of the rows to train on
    instruction: str  # what the examples ask
    prompt: str | None  # as the model sees it; None: through its own chat template
    hub_name: str | None  # the base's on the Hub, where litlora downloaded it

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def base(self) -> str:
        return self.record.base_name

    def text(self) -> str:
        """The whole file."""
        parts = [self._header(), f"# {inline(self.name)}", self._about()]
        parts += ["## Training", self._data(), self._settings(), self._figures(), "## How to use it", self._litlora()]
        parts += [*self._transformers(), *self._vllm(), *self._llama_cpp()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _header(self) -> str:
        base = self.hub_name or self.base
        header: dict[str, Any] = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation"}
        header["tags"] = [f"base_model:adapter:{base}", "lora", "transformers", "litlora"]
        return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=10_000)}---"

    def _about(self) -> str:
        """Whose adapter it is, and which files are which."""
        over = f", over weights in {self.record.quantize}" if self.record.quantize else ""
        text = f"A LoRA adapter for {inline(self.hub_name or self.base)}, trained with litlora "
        text += f"{self.record.litlora_version}{over}. This directory holds the adapter "
        if self.summary.get("best_step") is None:
            text += "of the last step."
        else:
            text += f"with the best validation loss, of step {self.summary['best_step']:,}; `last/` holds the last one."
        text += " Paths are as they were given."
        if self.hub_name is None:
            text += (
                "\n\nBefore you publish it: `base_model` above and `base_model_name_or_path` in adapter_config.json "
                "name a directory; put the base's name on the Hub there."
            )
        return text

    def _data(self) -> str:
        source = self.settings.get("data_path")
        text = f"Data: {inline(str(self.settings.get('data')))}" + (f" from {inline(str(source))}" if source else "")
        validation = self.settings.get("val_path")
        text += f", {self.rows[0]:,} rows of {self.tokens:,} tokens; validation on {self.rows[1]:,} rows"
        text += f" of {inline(str(validation))}" if validation else ""
        return f"{text}. Prompt style: {inline(self.record.prompt_style)}."

    def _settings(self) -> str:
        lora = self.lora
        rows = [["LoRA rank", str(lora.r)], ["LoRA alpha", f"{lora.alpha:g}" + (", rsLoRA" if lora.rslora else "")]]
        rows += [["LoRA dropout", f"{lora.dropout:g}"], ["adapted", ", ".join(lora.targets)]]
        rows += [[key, str(self.settings[key])] for key in SETTINGS if self.settings.get(key) not in (None, False)]
        return table(["setting", "value"], [[inline(cell) for cell in row] for row in rows])

    def _figures(self) -> str:
        """Of the whole run."""
        summary = self.summary
        rows = [["optimizer steps", f"{summary['steps']:,}"], ["tokens", f"{summary['tokens']:,}"]]
        for key, name in (
            ("best_val_loss", "best validation loss"),
            ("val_loss", "last validation loss"),
            ("train_loss", "last training loss"),
        ):
            rows += [[name, f"{summary[key]:.4f}"]] if summary.get(key) is not None else []
        rows += [["trainable parameters", f"{summary['trainable_parameters']:,}"]]
        rows += [["training time", duration(summary["training_seconds"])]]
        rows += [["tokens a second", f"{summary['tokens_per_second']:,.0f}"]]
        rows += [["peak memory", f"{summary['peak_memory_gb']:.2f} GB"], ["device", summary["device"]]]
        return table(["figure", "value"], [[inline(cell) for cell in row] for row in rows])

    def _litlora(self) -> str:
        style = " --prompt_style none" if self.prompt == self.instruction and self.record.prompt_style != "none" else ""
        return "With litlora:\n\n" + block(
            f"litlora generate --checkpoint_dir {_word(self.base)} --lora_path {_word(self.directory)}{style} "
            f"--prompt {_word(self.instruction)}",
            "bash",
        )

    def _transformers(self) -> list[str]:
        if self.prompt is None:
            messages = [{"role": "user", "content": self.instruction}]
            encode = [
                f"messages = {messages!r}",
                "inputs = tokenizer.apply_chat_template(",
                '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
                ").to(device)",
            ]
        else:
            encode = [f"prompt = {self.prompt!r}", 'inputs = tokenizer(prompt, return_tensors="pt").to(device)']
        lines = [
            "# pip install torch transformers peft sentencepiece protobuf",
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'device = "cuda" if torch.cuda.is_available() else "cpu"',
            f"tokenizer = AutoTokenizer.from_pretrained({self.base!r})",
            f'base = AutoModelForCausalLM.from_pretrained({self.base!r}, dtype="auto").to(device)',
            f"model = PeftModel.from_pretrained(base, {str(self.directory)!r})",
            *encode,
            "output = model.generate(**inputs, max_new_tokens=128, do_sample=False)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
        return ["With transformers and PEFT:", block("\n".join(lines), "python")]

    def _vllm(self) -> list[str]:
        name = re.sub(r"[^\w.-]+", "-", self.name, flags=re.ASCII).strip("-") or "adapter"
        if "lm_head" in self.lora.targets or self.lora.rank_pattern or self.lora.alpha_pattern:
            serve = [*self._merge(), f"vllm serve {_word(self._merged)} --served-model-name {name}"]
        else:
            rank = next((rank for rank in MAX_RANKS if rank >= self.lora.r), self.lora.r)
            serve = [
                f"vllm serve {_word(self.base)} --enable-lora --max-lora-rank {rank} \\",
                f"    --lora-modules {_word(f'{name}={self.directory}')}",
            ]
        return ["With vLLM:", block("\n".join([*serve, *self._request(8000, name)]), "bash")]

    def _llama_cpp(self) -> list[str]:
        """Its adapters know one alpha and no rsLoRA, and none on the head of a tied model: then merged."""
        lora, convert = self.lora, "python llama.cpp/convert_hf_to_gguf.py"
        if lora.rslora or "lm_head" in lora.targets or lora.rank_pattern or lora.alpha_pattern:
            lines = [*self._merge(), f"{convert} {_word(self._merged)} --outfile model.gguf"]
            lines.append("llama-server -m model.gguf")
        else:
            lines = [f"{convert} {_word(self.base)} --outfile base.gguf"]
            lines.append(
                f"python llama.cpp/convert_lora_to_gguf.py {_word(self.directory)} --base {_word(self.base)} "
                "--outfile adapter.gguf"
            )
            lines.append("llama-server -m base.gguf --lora adapter.gguf")
        return ["With llama.cpp:", block("\n".join([*lines, *self._request(8080, None)]), "bash")]

    @property
    def _merged(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}-merged")

    def _merge(self) -> list[str]:
        return [
            f"litlora merge_lora --checkpoint_dir {_word(self.base)} --lora_path {_word(self.directory)} "
            f"--out_dir {_word(self._merged)}"
        ]

    def _request(self, port: int, model: str | None) -> list[str]:
        """Asks the server, which takes the first terminal, from another one."""
        body: dict[str, Any] = {"model": model} if model else {}
        if self.prompt is None:
            path, body = "chat/completions", body | {"messages": [{"role": "user", "content": self.instruction}]}
        else:
            path, body = "completions", body | {"prompt": self.prompt}
        body |= {"max_tokens": 128, "temperature": 0}
        url = f"http://localhost:{port}/v1/{path}"
        return ["# and then, in another terminal:", f"curl {url} -H 'Content-Type: application/json' \\",
                f"    -d {_word(json.dumps(body))}"]  # fmt: skip


def _word(value: object) -> str:
    return shlex.quote(str(value))
