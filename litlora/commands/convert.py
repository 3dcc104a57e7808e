"""litlora convert: Meta's original checkpoint to a Hugging Face directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from torch import Tensor

from litlora.checkpoint import (
    Checkpoint,
    atomic_directory,
    require_disk,
    require_writable,
    write_checkpoint,
    write_json,
)
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.meta_format import DTYPES, MetaCheckpoint, config_json
from litlora.meta_tokenizer import MetaTokenizer

MARGIN = 64_000_000  # bytes of disk on top of the tensors: tokenizer and JSON files


@dataclass(frozen=True)
class Args:
    """Convert Meta's original checkpoint (consolidated.*.pth and params.json) to a Hugging Face directory.

    Llama 1, 2, 3, 3.1, 3.2 (text), 3.3 and Code Llama. Model-parallel shards are joined, one tensor at a time.

    Attributes:
        checkpoint_dir: The directory with consolidated.*.pth and params.json (tokenizer.model there or one level up).
        out_dir: Where the Hugging Face directory is written.
        dtype: Dtype of the written weights. Default: as they are.
        max_position_embeddings: The context length in tokens, which Meta's files do not give. Default: that of the
            family, told by rope_theta, use_scaled_rope and norm_eps: 2048 Llama 1, 4096 Llama 2, 8192 Llama 3,
            16384 Code Llama, 131072 Llama 3.1 and later.
        overwrite: Replace an out_dir that is not empty.
    """

    checkpoint_dir: Path
    out_dir: Path
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    max_position_embeddings: int | None = None
    overwrite: bool = False


def run(args: Args) -> None:
    """Converts, checks that the result opens, and prints its directory on stdout. Raises InputError."""
    from tqdm import tqdm

    source = MetaCheckpoint(args.checkpoint_dir)
    inside = args.checkpoint_dir.resolve()
    if args.out_dir.resolve() in (inside, *inside.parents):
        raise InputError("the output would replace its own source", where=args.out_dir, fix="another --out_dir")
    require_writable(args.out_dir, overwrite=args.overwrite)
    tokenizer = MetaTokenizer.find(args.checkpoint_dir, newer=bool(source.params.get("use_scaled_rope")))
    tensors = source.tensors()
    config = config_json(source, tokenizer, args.max_position_embeddings)
    dtype = DTYPES[args.dtype] if args.dtype else source.dtype
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    ModelConfig.from_dict(config, args.checkpoint_dir / "params.json")
    entries = [(name, dtype, tensor.shape) for name, tensor in tensors.items()]
    nbytes = sum(prod(shape) for _, _, shape in entries) * dtype.itemsize
    require_disk(args.out_dir, nbytes + MARGIN)
    with (
        atomic_directory(args.out_dir, overwrite=args.overwrite) as directory,
        tqdm(total=nbytes, unit="B", unit_scale=True, desc="converting") as bar,
    ):

        def read(name: str) -> Tensor:
            tensor = source.read(tensors[name]).to(dtype)
            bar.update(tensor.nbytes)
            return tensor

        write_checkpoint(directory, entries, read)
        write_json(directory / "config.json", config)
        write_json(directory / "generation_config.json", tokenizer.special_ids())
        tokenizer.write(directory, config["max_position_embeddings"])
    ModelConfig.load(args.out_dir)
    Checkpoint(args.out_dir)
    print(f"{len(entries)} tensors, {nbytes / 1e9:.2f} GB, {config['torch_dtype']}", file=sys.stderr)
    print(args.out_dir)
