"""Text to ids and back, as the model's own tokenizer does it."""

from litlora.tokenizer.boundaries import Bounded
from litlora.tokenizer.stream import Stream
from litlora.tokenizer.tokenizer import Tokenizer

__all__ = ["Bounded", "Stream", "Tokenizer"]
