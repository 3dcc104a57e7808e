"""Training data: files to rows, rows to prompts, prompts to ids and label masks."""

from litlora.data.dataset import Counts, Dataset, default_cache_dir
from litlora.data.examples import prepare
from litlora.data.hub import HUB_FILES
from litlora.data.prompts import STYLES, PromptStyle, Rendered
from litlora.data.rows import Conversation, Document, Instruction, Row
from litlora.data.sources import load_rows
from litlora.data.split import split

__all__ = [
    "HUB_FILES",
    "STYLES",
    "Conversation",
    "Counts",
    "Dataset",
    "Document",
    "Instruction",
    "PromptStyle",
    "Rendered",
    "Row",
    "default_cache_dir",
    "load_rows",
    "prepare",
    "split",
]
