"""What a finetuning run leaves in its out_dir: the best adapter, the last one in last/, settings, metrics, summary."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from litlora.checkpoint import require_writable, write_json, write_text
from litlora.config import ModelConfig
from litlora.lora import LoRA, LoRALinear
from litlora.metrics import MetricsFile
from litlora.peft_format import CONFIG, RECORD, WEIGHTS, Adapter, Record, save_adapter

COLUMNS = (
    "step", "epoch", "loss", "val_loss", "lr", "grad_norm", "tokens", "trained_tokens", "seconds",
    "total_tokens", "total_seconds", "tokens_per_second", "memory_gb",
)  # fmt: skip
SETTINGS, METRICS, SUMMARY = "hyperparameters.yaml", "metrics.csv", "summary.json"


@dataclass(frozen=True)
class RunFiles:
    """The files of one run."""

    out_dir: Path

    @property
    def last(self) -> Path:
        return self.out_dir / "last"

    @property
    def has_adapter(self) -> bool:
        """Whether this run has saved one already."""
        return (self.out_dir / RECORD).is_file()

    def check(self, overwrite: bool) -> None:
        """Raises InputError when out_dir cannot be written, or holds something that would be lost."""
        require_writable(self.out_dir, overwrite=overwrite)

    def start(self, settings: Mapping[str, object]) -> MetricsFile:
        """Makes the directory, takes away what an overwritten run left, and writes the settings."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS, RECORD, SETTINGS, METRICS, SUMMARY):
            (self.out_dir / name).unlink(missing_ok=True)
        shutil.rmtree(self.last, ignore_errors=True)
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        write_text(self.out_dir / SETTINGS, yaml.safe_dump(plain, sort_keys=False))
        return MetricsFile(self.out_dir / METRICS, COLUMNS)

    def save(
        self, modules: Mapping[str, LoRALinear], lora: LoRA, record: Record, dtype: torch.dtype, *, best: bool
    ) -> None:
        """Writes the adapter as the last one, and as the best one too when it is."""
        for directory in (self.last, self.out_dir) if best else (self.last,):
            directory.mkdir(exist_ok=True)
            save_adapter(directory, modules, lora, record, dtype)
            if directory == self.last:
                write_text(directory / SETTINGS, (self.out_dir / SETTINGS).read_text())

    def check_saved(self, modules: Mapping[str, LoRALinear], config: ModelConfig, dtype: torch.dtype) -> None:
        """Opens what was saved, once, as anybody would. Raises RuntimeError when it is not what is in memory."""
        Adapter.open(self.out_dir, config)
        adapter = Adapter.open(self.last, config)
        for name, module in modules.items():
            factors = adapter.factors(name)
            pairs = ((factors.A, module.lora_A.weight), (factors.B, module.lora_B.weight))
            if not all(torch.equal(saved, live.detach().cpu().to(dtype)) for saved, live in pairs):
                raise RuntimeError(f"the saved adapter differs from the trained one at {name} ({self.last})")

    def summarize(self, summary: Mapping[str, object]) -> None:
        write_json(self.out_dir / SUMMARY, summary)
