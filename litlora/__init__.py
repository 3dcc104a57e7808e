"""litlora: LoRA and QLoRA finetuning of Llama-style language models on one GPU."""

__version__ = "0.1.0"
