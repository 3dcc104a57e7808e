"""Meta's original Llama checkpoints: consolidated.*.pth (model-parallel shards) and params.json.

Meta's layout, from its llama and llama-models repositories: column-parallel linears (wq wk wv w1 w3 output) are split
over the shards along dim 0, row-parallel ones (wo w2) along dim 1, norms are replicated, the embedding is split along
dim 1 (Llama 1 and 2) or dim 0 (Llama 3). A rotary pair is rows (2i, 2i+1) of a head; in Hugging Face's layout it is
rows (i, i + D/2), so the rows of q and k are reordered.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litlora.checkpoint import read_json, require_directory
from litlora.config import LIMITS
from litlora.errors import InputError
from litlora.meta_tokenizer import MetaTokenizer

MAPPED = 128_000_000  # bytes; opening the shards takes 50 ms each, so not for every tensor
# All that a pickle of plain tensors names.
MADE_OF = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
# What zipfile and pickletools raise for files that are damaged.
ARCHIVE = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error, zlib.error, OverflowError)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class MetaTensor:
    """Where a Hugging Face tensor of `shape` comes from: Meta's key, the dim its shards are joined along (None: each
    shard has all of it), and the number of heads whose rotary rows are reordered (0: none are)."""

    key: str
    shape: tuple[int, ...]
    split: int | None
    rotary_heads: int = 0

    def shard_shape(self, shards: int) -> tuple[int, ...]:
        return tuple(size // shards if dim == self.split else size for dim, size in enumerate(self.shape))


# multiple_of and ffn_dim_multiplier tell what the shapes tell, the max_ ones size Meta's buffers; the rest is used
KNOWN_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_batch_size", "max_seq_len",
}  # fmt: skip


class MetaCheckpoint:
    """The shards and params.json of Meta's directory. Only shapes are read before a tensor is asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises InputError when a file is missing or does not hold what it should."""
        require_directory(directory)
        self.directory = directory
        self._mapped: list[dict[str, Tensor]] = []
        self._touched = 0  # bytes read through these mappings
        self.files = self._find_shards()
        self.params = self._read_params()
        self.shards = [
            {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in _load(file).items()} for file in self.files
        ]

    def _find_shards(self) -> list[Path]:
        found = {
            int(match[1]): path
            for path in self.directory.iterdir()
            if (match := re.fullmatch(r"consolidated\.(\d{1,3})\.pth", path.name)) and path.is_file()
        }
        if not found:
            fix = "give the directory of Meta's original download; a Hugging Face directory is used as it is"
            raise InputError("no consolidated.*.pth in the directory", where=self.directory, fix=fix)
        missing = [f"consolidated.{number:02d}.pth" for number in range(max(found)) if number not in found]
        if missing:
            raise InputError("shards are missing", where=self.directory, got=f"no {', '.join(missing)}")
        return [found[number] for number in range(len(found))]

    def _read_params(self) -> dict[str, Any]:
        file = self.directory / "params.json"
        params = read_json(file)
        unknown = sorted(params.keys() - KNOWN_PARAMS)
        if unknown:
            got = ", ".join(f"{key} = {params[key]!r}" for key in unknown)
            fix = "only Llama's text models are converted, and none that are quantized"
            raise InputError("params.json has keys that are not supported", where=file, got=got, fix=fix)
        numbers: dict[str, tuple[type, ...]] = dict.fromkeys(("dim", "n_layers", "n_heads"), (int,))
        numbers["norm_eps"] = (int, float)
        optional: dict[str, tuple[type, ...]] = {"n_kv_heads": (int,), "rope_theta": (int, float)}
        kinds = numbers | {key: kind for key, kind in optional.items() if params.get(key) is not None}
        wrong = [
            key for key, kind in kinds.items() if not (isinstance(params.get(key), kind) and 0 < params[key] < 2**31)
        ]
        if not wrong and params["n_layers"] >= LIMITS["num_hidden_layers"]:
            wrong = ["n_layers"]
        if not wrong and (params["dim"] % params["n_heads"] or params["n_heads"] % (params.get("n_kv_heads") or 1)):
            wrong = ["dim", "n_heads", "n_kv_heads"]
        if wrong:
            got = ", ".join(f"{key} = {params.get(key)!r}" for key in wrong)
            wanted = "positive numbers, not too large; dim a multiple of n_heads, n_heads of n_kv_heads"
            raise InputError("sizes in params.json that cannot be", where=file, got=got, wanted=wanted)
        return params

    @cached_property
    def dtype(self) -> torch.dtype:
        """The one dtype of all tensors. Raises InputError when they differ or are not floating-point."""
        dtypes = {dtype for shard in self.shards for key, (_, dtype) in shard.items() if not _is_buffer(key)}
        if len(dtypes) != 1 or not dtypes <= set(DTYPES.values()):
            got = ", ".join(sorted(map(str, dtypes)))
            raise InputError(
                "weights of an unsupported dtype", where=self.directory, got=got, wanted="one floating-point"
            )
        return next(iter(dtypes))

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding: equal in every shard, or left out (Llama 3.2 1B and 3B, which have scaled
        rotary frequencies; in an older family a missing head is a fault)."""
        if self.params.get("use_scaled_rope") and not any("output.weight" in shard for shard in self.shards):
            return True
        if any(shard.get("output.weight") != shard.get("tok_embeddings.weight") for shard in self.shards):
            return False
        return all(_equal(_load(file), "output.weight", "tok_embeddings.weight") for file in self.files)

    def tensors(self) -> dict[str, MetaTensor]:
        """The model's tensors by Hugging Face's names. One InputError names all that is missing or does not fit."""
        params, shards = self.params, len(self.shards)
        dim, heads = params["dim"], params["n_heads"]
        kv_heads = params.get("n_kv_heads") or heads
        self._require(["tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"])
        rows = self._shape("layers.0.attention.wq.weight")[0]
        if rows and dim % rows == 0 and dim // rows != shards:
            raise InputError("shards are missing", where=self.directory, got=shards, wanted=f"{dim // rows} .pth files")
        ffn = self._shape("layers.0.feed_forward.w1.weight")[0] * shards
        embedding = self._shape("tok_embeddings.weight")
        split = 0 if embedding[-1] == dim else 1
        vocab = embedding[0] * (shards if split == 0 else 1)
        kv_dim = dim // heads * kv_heads
        tensors = {"model.embed_tokens.weight": MetaTensor("tok_embeddings.weight", (vocab, dim), split)}
        for layer in range(params["n_layers"]):
            for name, key, shape, along, rotary in (
                ("input_layernorm", "attention_norm", (dim,), None, 0),
                ("self_attn.q_proj", "attention.wq", (dim, dim), 0, heads),
                ("self_attn.k_proj", "attention.wk", (kv_dim, dim), 0, kv_heads),
                ("self_attn.v_proj", "attention.wv", (kv_dim, dim), 0, 0),
                ("self_attn.o_proj", "attention.wo", (dim, dim), 1, 0),
                ("post_attention_layernorm", "ffn_norm", (dim,), None, 0),
                ("mlp.gate_proj", "feed_forward.w1", (ffn, dim), 0, 0),
                ("mlp.up_proj", "feed_forward.w3", (ffn, dim), 0, 0),
                ("mlp.down_proj", "feed_forward.w2", (dim, ffn), 1, 0),
            ):
                meta = MetaTensor(f"layers.{layer}.{key}.weight", shape, along, rotary)
                tensors[f"model.layers.{layer}.{name}.weight"] = meta
        tensors["model.norm.weight"] = MetaTensor("norm.weight", (dim,), None)
        if not self.tied:
            tensors["lm_head.weight"] = MetaTensor("output.weight", (vocab, dim), 0)
        self._check(tensors)
        return tensors

    def _shape(self, key: str) -> tuple[int, ...]:
        return self.shards[0][key][0] or (0,)

    def _require(self, keys: list[str]) -> None:
        missing = [key for key in keys if key not in self.shards[0]]
        if missing:
            raise InputError("tensors are missing", where=self.files[0], got=f"no {', '.join(missing)}")

    def _check(self, tensors: Mapping[str, MetaTensor]) -> None:
        problems = []
        known = {tensor.key for tensor in tensors.values()} | ({"output.weight"} if self.tied else set())
        for file, shard in zip(self.files, self.shards, strict=True):
            problems += [f"{file.name}: extra {key}" for key in shard if key not in known and not _is_buffer(key)]
            for tensor in tensors.values():
                wanted = tensor.shard_shape(len(self.files))
                if tensor.key not in shard:
                    problems.append(f"{file.name}: no {tensor.key}")
                elif shard[tensor.key][0] != wanted:
                    got = list(shard[tensor.key][0])
                    problems.append(f"{file.name}: {tensor.key} is {got}, not {list(wanted)}")
        if problems:
            more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
            fix = "params.json and all .pth files of one download belong together"
            raise InputError(
                "tensors that do not fit params.json", where=self.directory, got="; ".join(problems[:4]) + more, fix=fix
            )

    def read(self, tensor: MetaTensor) -> Tensor:
        """The joined tensor in Hugging Face's order of rows.

        The files are mapped anew after every MAPPED bytes: a mapped page counts as resident until its mapping goes, and
        one mapping kept for all would grow to the size of the model.
        """
        if not self._mapped or self._touched > MAPPED:
            self._mapped, self._touched = [], 0  # the old mappings go before the new ones come
            self._mapped = [_load(file) for file in self.files]
        parts = [state[tensor.key] for state in self._mapped]
        self._touched += sum(part.nbytes for part in parts)
        if tensor.split is None:
            if any(not torch.equal(part, parts[0]) for part in parts[1:]):
                raise InputError(
                    "the shards are of different models", where=self.directory, got=f"{tensor.key} differs"
                )
            return parts[0]
        joined = torch.cat(parts, tensor.split) if len(parts) > 1 else parts[0]
        if not tensor.rotary_heads:
            return joined
        rows, columns = tensor.shape  # (H, D/2, 2, C) -> (H, 2, D/2, C): pairs to halves
        pairs = joined.reshape(tensor.rotary_heads, rows // tensor.rotary_heads // 2, 2, columns)
        return pairs.transpose(1, 2).reshape(rows, columns)


def config_json(source: MetaCheckpoint, tokenizer: MetaTokenizer, max_positions: int | None = None) -> dict[str, Any]:
    """config.json. Raises InputError when params.json, embedding and tokenizer disagree about the vocabulary."""
    params, tensors = source.params, source.tensors()
    vocab = tensors["model.embed_tokens.weight"].shape[0]
    if params.get("vocab_size", -1) not in (-1, vocab) or tokenizer.size > vocab:
        got = f"embedding {vocab} rows, tokenizer {tokenizer.size}, params.json {params.get('vocab_size', -1)}"
        raise InputError("vocabulary sizes that do not fit each other", where=source.directory, got=got)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": params["dim"],
        "intermediate_size": tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": params["dim"] // params["n_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": float(params.get("rope_theta") or 10000.0),
        "max_position_embeddings": context_length(params) if max_positions is None else max_positions,
        "tie_word_embeddings": source.tied,
        **tokenizer.special_ids(),
    }
    return config | ({"rope_scaling": rope_scaling(params)} if params.get("use_scaled_rope") else {})


def context_length(params: Mapping[str, Any]) -> int:
    """Tokens the model was trained for, told by the rotary base and, between Llama 1 and 2, by what differs in their
    params.json: norm_eps 1e-6, or the sizes of the 65B, which alone of Llama 1 has Llama 2's 1e-5."""
    theta = params.get("rope_theta") or 10000.0
    if params.get("use_scaled_rope"):
        return 131072
    if theta == 500000.0:
        return 8192
    if theta == 1000000.0:
        return 16384
    first = params["norm_eps"] < 5e-6 or (params["dim"] == 8192 and not params.get("n_kv_heads"))
    return 2048 if first else 4096


def rope_scaling(params: Mapping[str, Any]) -> dict[str, Any]:
    """What use_scaled_rope means. params.json does not give the factor: it is 8 in Llama 3.1 and 3.3, and 32 in the two
    text models of Llama 3.2, known by their sizes (1B: 2048 x 16 layers, 3B: 3072 x 28 layers)."""
    small = (params["dim"], params["n_layers"]) in ((2048, 16), (3072, 28))
    return {
        "rope_type": "llama3",
        "factor": 32.0 if small else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _load(file: Path) -> dict[str, Tensor]:
    """A shard, mapped. Raises InputError when it is not a zip file of tensors by name."""
    try:
        _check_archive(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of pickles that torch did not write
            state: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        fix = "only tensors are read; a pickle can run code, and this one names more than tensors"
        raise InputError("a .pth file holds other things than tensors", where=file, fix=fix) from None
    except InputError:
        raise
    except (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, *ARCHIVE) as error:
        fix = "the file is truncated or corrupt, or of a torch before 1.6: download it again"
        raise InputError("a .pth file cannot be read", where=file, got=str(error).split("\n")[0], fix=fix) from None
    wrong = (
        [key for key, value in state.items() if not isinstance(value, Tensor)]
        if isinstance(state, dict)
        else [f"a {type(state).__name__}"]
    )
    if wrong or not state:
        got = f"{', '.join(map(str, wrong[:4]))} is no tensor" if wrong else "nothing"
        raise InputError("a .pth file holds other things than tensors", where=file, got=got, wanted="tensors by name")
    tensors: dict[str, Tensor] = state
    dense = all(t.layout == torch.strided and t.device.type == "cpu" for t in tensors.values())
    # a view may show a few bytes as many, and many names may show the same bytes (two do, where the head is tied)
    if (
        not dense
        or any(t.nbytes > t.untyped_storage().nbytes() for t in tensors.values())
        or sum(t.nbytes for t in tensors.values()) > 2 * file.stat().st_size
    ):
        raise InputError("a .pth file holds tensors that are larger than their data", where=file)
    return tensors


def _check_archive(file: Path) -> None:
    """Raises InputError, or one of ARCHIVE, unless the zip file is as torch.save writes it: nothing compressed, nothing
    twice, and a pickle that names what tensors are made of, and nothing else."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if (
            any(e.compress_type != zipfile.ZIP_STORED for e in entries)
            or sum(e.file_size for e in entries) > file.stat().st_size
        ):
            raise InputError("a .pth file that is compressed, or larger inside than outside", where=file)
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_pickle(archive.read(entry), file)


def _check_pickle(pickled: bytes, file: Path) -> None:
    for opcode, argument, _ in pickletools.genops(pickled):
        named = opcode.name in ("GLOBAL", "INST")
        if (named and not MADE_OF.fullmatch(str(argument))) or opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            got = str(argument) if named else "a name that is put together"
            fix = "only tensors are read; a pickle can run code, and this one names more than tensors"
            raise InputError("a .pth file holds other things than tensors", where=file, got=got, fix=fix)


def _is_buffer(key: str) -> bool:
    """Rotary frequencies, which are computed from rope_theta and not read."""
    return key.endswith("rope.freqs")


def _equal(state: Mapping[str, Tensor], one: str, other: str) -> bool:
    """Whether two (V, C) tensors are equal; the first rows are asked first, since those of most models differ."""
    a, b = state[one], state[other]
    return torch.equal(a[:16], b[:16]) and torch.equal(a, b)
