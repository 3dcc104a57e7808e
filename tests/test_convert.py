"""Meta's original checkpoints converted: logits equal transformers', shards joined, bad input named."""

from __future__ import annotations

import base64
import json
import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litlora.checkpoint import INDEX, Checkpoint
from litlora.commands.convert import Args, run
from litlora.errors import InputError
from litlora.meta_format import context_length, rope_scaling
from litlora.meta_tokenizer import MetaTokenizer

DIM, HEADS, LAYERS, FFN, VOCAB = 64, 8, 2, 96, 320
LLAMA2 = {"dim": DIM, "multiple_of": 32, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": 1e-5, "vocab_size": -1}
LLAMA3 = LLAMA2 | {"n_kv_heads": 2, "rope_theta": 500000.0, "vocab_size": VOCAB, "ffn_dim_multiplier": 1.3}
LLAMA31 = LLAMA3 | {"use_scaled_rope": True}


# --- Meta's model, written from its description: rotary pairs are (2i, 2i+1), as complex numbers


def angles(params: dict, positions: Tensor) -> Tensor:
    """(N, D/2) complex."""
    head_dim = params["dim"] // params["n_heads"]
    frequencies = []
    for index in range(head_dim // 2):
        frequency = params.get("rope_theta", 10000.0) ** (-2 * index / head_dim)
        wavelength = 2 * math.pi / frequency
        if params.get("use_scaled_rope") and wavelength > 8192:
            frequency /= 8
        elif params.get("use_scaled_rope") and wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        frequencies.append(frequency)
    turns = positions.float()[:, None] * torch.tensor(frequencies)  # fp32 as in Meta's, far positions round alike
    return torch.polar(torch.ones_like(turns), turns)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """(N, H, D), pairs adjacent."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def meta_logits(params: dict, state: dict[str, Tensor], ids: Tensor, positions: Tensor) -> Tensor:
    """(N,) -> (N, V) by Meta's keys and order of rows."""
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    turns, eps = angles(params, positions), params["norm_eps"]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    h = state["tok_embeddings.weight"][ids]
    for layer in range(params["n_layers"]):
        w = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"layers.{layer}.")}
        x = norm(h, w["attention_norm.weight"], eps)
        q = rotate((x @ w["attention.wq.weight"].T).unflatten(-1, (heads, -1)), turns)
        k = rotate((x @ w["attention.wk.weight"].T).unflatten(-1, (kv_heads, -1)), turns)
        v = (x @ w["attention.wv.weight"].T).unflatten(-1, (kv_heads, -1))
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1]) + mask
        h = h + torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1) @ w["attention.wo.weight"].T
        x = norm(h, w["ffn_norm.weight"], eps)
        gate, up = x @ w["feed_forward.w1.weight"].T, x @ w["feed_forward.w3.weight"].T
        h = h + (torch.nn.functional.silu(gate) * up) @ w["feed_forward.w2.weight"].T
    head = state.get("output.weight", state["tok_embeddings.weight"])
    return norm(h, state["norm.weight"], eps) @ head.T


# --- tiny checkpoints


def random_state(params: dict, vocab: int = VOCAB) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kv_dim = DIM // HEADS * (params.get("n_kv_heads") or HEADS)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * (0.2 if len(shape) == 2 else 0.1) + (len(shape) == 1)

    state = {"tok_embeddings.weight": weight(vocab, DIM) * 5, "norm.weight": weight(DIM)}
    state["output.weight"] = weight(vocab, DIM)
    for layer in range(LAYERS):
        for key, *shape in (
            ("attention.wq", DIM, DIM), ("attention.wk", kv_dim, DIM), ("attention.wv", kv_dim, DIM),
            ("attention.wo", DIM, DIM), ("feed_forward.w1", FFN, DIM), ("feed_forward.w2", DIM, FFN),
            ("feed_forward.w3", FFN, DIM), ("attention_norm", DIM), ("ffn_norm", DIM),
        ):  # fmt: skip
            state[f"layers.{layer}.{key}.weight"] = weight(*shape)
    return state


def write_meta(directory: Path, params: dict, state: dict[str, Tensor], shards: int = 1) -> Path:
    """As Meta writes it, with rope.freqs, which is to be ignored."""
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(params))
    embedding_dim = 0 if params.get("rope_theta") == 500000.0 else 1
    for shard in range(shards):
        part = {"rope.freqs": torch.ones(DIM // HEADS // 2)}
        for key, tensor in state.items():
            dim = 1 if key.endswith(("wo.weight", "w2.weight")) else 0
            dim = embedding_dim if key.startswith("tok_embeddings") else dim
            replicated = "norm" in key
            part[key] = tensor.clone() if replicated else tensor.chunk(shards, dim)[shard].clone()
        torch.save(part, directory / f"consolidated.{shard:02d}.pth")
    return directory


@dataclass(frozen=True)
class FakeTokenizer(MetaTokenizer):
    """Where the tokenizer is not what is tested."""

    size: int = VOCAB

    def special_ids(self) -> dict[str, int]:
        return {"bos_token_id": 1, "eos_token_id": 2}

    def write(self, directory: Path, max_length: int) -> None:
        pass


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetaTokenizer, "find", lambda directory, newer: FakeTokenizer())


def transformers_logits(directory: Path, ids: Tensor, positions: Tensor) -> Tensor:
    from transformers import LlamaForCausalLM

    model, report = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    mask = torch.ones(1, len(ids), dtype=torch.long)  # given, so that jumps in the positions start no new sequence
    with torch.no_grad():
        return model(ids[None], attention_mask=mask, position_ids=positions[None]).logits[0]


IDS = torch.arange(0, 24) * 13 % VOCAB
NEAR, FAR = torch.arange(24), torch.arange(24) * 400  # FAR ends at 9,200, beyond the scaling's boundary of 8,192


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("params", [LLAMA2, LLAMA3, LLAMA31], ids=["llama2", "llama3-gqa", "llama3.1"])
def test_logits_equal_transformers(tmp_path: Path, no_tokenizer: None, params: dict, shards: int) -> None:
    state = random_state(params)
    run(Args(write_meta(tmp_path / "meta", params, state, shards), tmp_path / "hf"))
    positions = FAR if params is LLAMA31 else NEAR
    expected = meta_logits(params, state, IDS, positions)
    assert expected.std() > 0.1  # otherwise the bound below proves nothing
    assert (transformers_logits(tmp_path / "hf", IDS, positions) - expected).abs().max() < 1e-4


def test_the_proof_can_fail(tmp_path: Path, no_tokenizer: None) -> None:
    """The bound notices unscaled frequencies and rows that were left in pairs."""
    state = random_state(LLAMA31)
    expected = meta_logits(LLAMA31, state, IDS, FAR)
    assert (meta_logits(LLAMA3, state, IDS, FAR) - expected).abs().max() > 1e-2
    run(Args(write_meta(tmp_path / "meta", LLAMA31, state), tmp_path / "hf"))
    q = Checkpoint(tmp_path / "hf").read("model.layers.0.self_attn.q_proj.weight")
    assert not torch.equal(q, state["layers.0.attention.wq.weight"])
    assert torch.equal(q.sort(0).values, state["layers.0.attention.wq.weight"].sort(0).values)  # the same rows


def test_shards_and_single_give_the_same_bytes(tmp_path: Path, no_tokenizer: None) -> None:
    state = {key: tensor.bfloat16() for key, tensor in random_state(LLAMA3).items()}
    for shards in (1, 2):
        run(Args(write_meta(tmp_path / f"meta{shards}", LLAMA3, state, shards), tmp_path / f"hf{shards}"))
    one, two = ((tmp_path / f"hf{shards}" / "model.safetensors").read_bytes() for shards in (1, 2))
    assert one == two
    assert {info.dtype for info in Checkpoint(tmp_path / "hf1").tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf1/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("head", ["absent", "equal"])
def test_tied_head(tmp_path: Path, no_tokenizer: None, head: str) -> None:
    state = random_state(LLAMA31)
    state["output.weight"] = state["tok_embeddings.weight"]
    expected = meta_logits(LLAMA31, state, IDS, NEAR)
    if head == "absent":
        del state["output.weight"]
    run(Args(write_meta(tmp_path / "meta", LLAMA31, state, 2), tmp_path / "hf"))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "hf").tensors
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"] is True
    assert (transformers_logits(tmp_path / "hf", IDS, NEAR) - expected).abs().max() < 1e-4


def test_dtype_and_context_flags(tmp_path: Path, no_tokenizer: None) -> None:
    state = random_state(LLAMA2)
    meta = write_meta(tmp_path / "meta", LLAMA2, state)
    run(Args(meta, tmp_path / "hf", dtype="float16", max_position_embeddings=1000))
    written = Checkpoint(tmp_path / "hf").read("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(written, state["layers.1.feed_forward.w2.weight"].half())
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["torch_dtype"], config["max_position_embeddings"]) == ("float16", 1000)
    assert not (tmp_path / "hf" / INDEX).exists()


def test_what_params_json_does_not_say() -> None:
    base = {"norm_eps": 1e-5, "dim": 4096, "n_layers": 32}
    assert context_length(base) == 4096
    assert context_length(base | {"norm_eps": 1e-6}) == 2048
    assert context_length(base | {"dim": 8192}) == 2048  # Llama 1 65B
    assert context_length(base | {"dim": 8192, "n_kv_heads": 8}) == 4096  # Llama 2 70B
    assert context_length(base | {"rope_theta": 1000000}) == 16384
    assert context_length(base | {"rope_theta": 500000.0}) == 8192
    assert context_length(base | {"rope_theta": 500000.0, "use_scaled_rope": True}) == 131072
    factors = [rope_scaling(base | sizes)["factor"] for sizes in ({}, {"dim": 2048, "n_layers": 16})]
    assert factors == [8.0, 32.0]
    assert rope_scaling({"dim": 3072, "n_layers": 28})["factor"] == 32.0


# --- bad input


def break_missing_shard(meta: Path) -> None:
    (meta / "consolidated.00.pth").unlink()


def break_last_shard(meta: Path) -> None:
    (meta / "consolidated.01.pth").unlink()


def break_no_params(meta: Path) -> None:
    (meta / "params.json").unlink()


def break_unknown_param(meta: Path) -> None:
    (meta / "params.json").write_text(json.dumps(LLAMA3 | {"vision_num_layers": 4}))


def break_heads(meta: Path) -> None:
    (meta / "params.json").write_text(json.dumps(LLAMA3 | {"n_heads": 7}))


def break_vocab(meta: Path) -> None:
    (meta / "params.json").write_text(json.dumps(LLAMA3 | {"vocab_size": 999}))


def break_pickle(meta: Path) -> None:
    torch.save({"tok_embeddings.weight": Path("x")}, meta / "consolidated.01.pth")


def break_nested(meta: Path) -> None:
    torch.save({"model": {"tok_embeddings.weight": torch.ones(2)}}, meta / "consolidated.01.pth")


def break_truncated(meta: Path) -> None:
    file = meta / "consolidated.01.pth"
    file.write_bytes(file.read_bytes()[:5000])


def change(meta: Path, key: str, tensor: Tensor | None) -> None:
    file = meta / "consolidated.01.pth"
    state = torch.load(file, weights_only=True)
    state.pop(key, None)
    torch.save(state | ({} if tensor is None else {key: tensor}), file)


def break_missing_key(meta: Path) -> None:
    change(meta, "layers.1.feed_forward.w3.weight", None)


def break_extra_key(meta: Path) -> None:
    change(meta, "layers.2.feed_forward.w3.weight", torch.ones(3))


def break_shape(meta: Path) -> None:
    change(meta, "layers.1.attention.wk.weight", torch.ones(5, DIM))


def break_norm(meta: Path) -> None:
    change(meta, "norm.weight", torch.zeros(DIM))


def break_dtype(meta: Path) -> None:
    change(meta, "norm.weight", torch.zeros(DIM, dtype=torch.int8))


BROKEN = [
    (break_missing_shard, ["shards are missing", "consolidated.00.pth"]),
    (break_last_shard, ["shards are missing", "2 .pth files"]),
    (break_no_params, ["a file is missing", "params.json"]),
    (break_unknown_param, ["vision_num_layers = 4"]),
    (break_heads, ["n_heads = 7"]),
    (break_vocab, ["vocabulary sizes", "999", str(VOCAB)]),
    (break_pickle, ["other things than tensors", "consolidated.01.pth"]),
    (break_nested, ["other things than tensors", "model is no tensor"]),
    (break_truncated, ["cannot be read", "consolidated.01.pth"]),
    (break_missing_key, ["consolidated.01.pth: no layers.1.feed_forward.w3.weight"]),
    (break_extra_key, ["consolidated.01.pth: extra layers.2.feed_forward.w3.weight"]),
    (break_shape, ["layers.1.attention.wk.weight is [5, 64], not [8, 64]"]),
    (break_norm, ["different models", "norm.weight differs"]),
    (break_dtype, ["unsupported dtype", "torch.int8"]),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN, ids=[damage.__name__ for damage, _ in BROKEN])
def test_bad_input_is_named_and_writes_nothing(tmp_path: Path, no_tokenizer: None, damage, words: list[str]) -> None:
    meta = write_meta(tmp_path / "meta", LLAMA3, random_state(LLAMA3), 2)
    damage(meta)
    with pytest.raises(InputError) as raised:
        run(Args(meta, tmp_path / "hf"))
    assert [word for word in words if word not in str(raised.value)] == []
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_missing_head_is_no_tie_in_an_older_family(tmp_path: Path, no_tokenizer: None) -> None:
    state = random_state(LLAMA3)
    del state["output.weight"]
    with pytest.raises(InputError, match=r"no output\.weight"):
        run(Args(write_meta(tmp_path / "meta", LLAMA3, state), tmp_path / "hf"))


def test_output_directory(tmp_path: Path, no_tokenizer: None) -> None:
    meta = write_meta(tmp_path / "meta", LLAMA3, random_state(LLAMA3))
    out = tmp_path / "hf"
    out.mkdir()
    (out / "precious").write_text("")
    with pytest.raises(InputError, match="not empty"):
        run(Args(meta, out))
    assert [path.name for path in out.iterdir()] == ["precious"]
    run(Args(meta, out, overwrite=True))
    assert not (out / "precious").exists()
    for place in (meta, tmp_path):
        with pytest.raises(InputError, match="its own source"):
            run(Args(meta, place, overwrite=True))
    assert (meta / "consolidated.00.pth").exists()


def test_disk_is_checked_first(tmp_path: Path, no_tokenizer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = write_meta(tmp_path / "meta", LLAMA3, random_state(LLAMA3))
    monkeypatch.setattr("litlora.checkpoint.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="too little free disk"):
        run(Args(meta, tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


# --- tokenizers

TEXTS = [
    "Hello world", " leading and  double  spaces ", "line\n\n\nbreaks\r\n \n", "it's 12345 o'clock, isn't IT'S?",
    "naïve café, 中文字, 🙂🙂", "", "aaaaaaaaaaaaaa ababababa", "a\tb\x00c",
]  # fmt: skip


def train_ranks(merges: int) -> dict[bytes, int]:
    """A byte-level BPE vocabulary of at most this many merges, learned greedily from few words."""
    words = [
        "the",
        "theme",
        "hello",
        "world",
        "banana",
        "aaaa",
        "aaaaaaaaaa",
        "abababab",
        " the",
        " hello",
        "été",
        "--",
    ] * 3
    pieces = [[bytes([byte]) for byte in word.encode()] for word in words]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 256 + merges:
        counts: dict[bytes, int] = {}
        for piece in pieces:
            for pair in pairwise(piece):
                counts[b"".join(pair)] = counts.get(b"".join(pair), 0) + 1
        fresh = {token: count for token, count in counts.items() if token not in ranks}
        if not fresh:
            return ranks
        best = max(fresh, key=lambda token: (fresh[token], token))
        ranks[best] = len(ranks)
        pieces = [merge(piece, ranks) for piece in pieces]
    return ranks


def merge(piece: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's rule: the adjacent pair of the lowest rank, the leftmost first."""
    while True:
        found = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(piece)) if a + b in ranks]
        if not found:
            return piece
        at = min(found)[1]
        piece = [*piece[:at], piece[at] + piece[at + 1], *piece[at + 2 :]]


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    from litlora.meta_tokenizer import PATTERN

    ids = []
    for piece, _ in Split(Regex(PATTERN), behavior="isolated").pre_tokenize_str(text):
        whole = piece.encode()
        tokens = [whole] if whole in ranks else merge([bytes([byte]) for byte in whole], ranks)
        ids += [ranks[token] for token in tokens]
    return ids


def write_tiktoken(file: Path, ranks: dict[bytes, int]) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    file.write_text("".join(lines))


def test_tiktoken_becomes_tokenizer_json(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    ranks = train_ranks(40)
    vocab = len(ranks) + 256
    params = LLAMA31 | {"vocab_size": vocab}
    meta = write_meta(tmp_path / "meta", params, random_state(params, vocab))
    write_tiktoken(meta / "tokenizer.model", ranks)
    run(Args(meta, tmp_path / "hf"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    generator = random.Random(0)
    alphabet = ["a", "b", "h", "e", "t", "n", "the", " ", "ban", "é", "-", "1", "'s", "\n", "字"]
    drawn = ["".join(generator.choices(alphabet, k=generator.randint(1, 30))) for _ in range(2000)]
    bos = len(ranks)
    for text in TEXTS + drawn:
        assert tokenizer.encode(text).ids == [bos, *tiktoken_ids(text, ranks)], text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert any(len(tiktoken_ids(text, ranks)) < len(text) for text in drawn)  # something was merged
    assert tokenizer.get_vocab_size() == vocab
    names = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10}
    assert {name: tokenizer.token_to_id(name) - bos for name in names} == names
    assert tokenizer.token_to_id("<|reserved_special_token_247|>") == vocab - 1
    assert tokenizer.encode("a<|eot_id|>").ids == [bos, ranks[b"a"], bos + 9]
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (bos, [bos + 1, bos + 8, bos + 9])
    auto = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert auto("the hello")["input_ids"] == [bos, *tiktoken_ids("the hello", ranks)]
    assert (auto.bos_token_id, auto.eos_token_id) == (bos, bos + 1)


def test_llama3_names_of_special_tokens(tmp_path: Path) -> None:
    write_tiktoken(tmp_path / "tokenizer.model", train_ranks(4))
    special = MetaTokenizer.find(tmp_path, newer=False).special  # type: ignore[attr-defined]
    assert (len(special), special[8:10], special[255]) == (
        256, ["<|reserved_special_token_4|>", "<|eot_id|>"], "<|reserved_special_token_250|>",
    )  # fmt: skip


def test_sentencepiece_is_copied(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(TEXTS * 20 + ["the quick brown fox jumps over a lazy dog"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    meta = write_meta(tmp_path / "meta", LLAMA2, random_state(LLAMA2))  # one level up, where Llama 1 has it
    run(Args(meta, tmp_path / "hf"))
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    tokenizer = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    tokens = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.items() >= tokens.items()
    for file in ("config.json", "generation_config.json"):
        config = json.loads((tmp_path / "hf" / file).read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert json.loads((tmp_path / "hf/config.json").read_text())["max_position_embeddings"] == 4096
    assert not (tmp_path / "hf/tokenizer.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no tokenizer.model"),
        (b"neither one nor the other", "cannot be read"),
        (b"YQ== 0\nYg== 1\n", "lacks tokens"),
        (b"YQ== 0\nYg=! 1\n", "line 2"),
    ],
)
def test_bad_tokenizer(tmp_path: Path, content: bytes | None, words: str) -> None:
    meta = write_meta(tmp_path / "meta", LLAMA2, random_state(LLAMA2))
    if content is not None:
        (meta / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match=words):
        run(Args(meta, tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()
