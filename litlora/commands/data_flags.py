"""The flags of base and data that finetune_lora, validate and inspect share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataArgs:
    """What is trained or validated on, and how it becomes ids.

    Args:
        checkpoint_dir: the base model's Hugging Face directory
        data: the kind of data; json has instruction columns, messages or conversations, text is plain text
        data_path: the data file; alpaca, lima and dolly are fetched from the hub without it
        val_path: validation data of the same kind, instead of a split
        val_split: validation rows as a count or a share, 0 for none; 2000, or 5 % where there are fewer than 20000 rows
        multiturn: all turns of LIMA's conversations instead of the first
        prompt_style: alpaca, chat (the model's own template), none, or a template file
        mask_prompt: train on the response only
        max_seq_length: tokens a row may have; the model's context without it
        on_overlong: what to do with rows that are longer
        seed: of the split, and in training of the adapter's start, dropout and the order of the rows
    """

    checkpoint_dir: Path
    data: Literal["alpaca", "lima", "dolly", "json", "text"] = "alpaca"
    data_path: Path | None = None
    val_path: Path | None = None
    val_split: float | None = None
    multiturn: bool = False
    prompt_style: str | None = None
    mask_prompt: bool = False
    max_seq_length: int | None = None
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    seed: int = 1337
