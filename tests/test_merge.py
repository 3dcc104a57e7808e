"""merge_lora: against PEFT, bitsandbytes and fp64; what it refuses, what it survives, what its verification catches."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litlora import merge_write
from litlora.checkpoint import INDEX, Checkpoint, Shard, make_header, write_checkpoint, write_shard
from litlora.commands.merge_lora import Args, open_merge, run
from litlora.config import ModelConfig
from litlora.errors import InputError
from litlora.frozen import FOUR_BIT, Dense
from litlora.load import Directory, expected_shapes, load_model
from litlora.merge import Merge, VerifyError
from litlora.merge_verify import check_tensors, compare_models, ulp
from litlora.merge_write import merge_directory
from litlora.peft_format import PREFIX, RECORD, Adapter, Record
from litlora.sequences import Packed

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint by family and dtype, made once; tests read it only."""
    made: dict[Any, Path] = {}

    def base(family: str = "llama3", dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            directory = tmp_path_factory.mktemp("base") / family
            made[family, dtype] = tiny_models.make_family(
                directory, family, dtype=dtype, shards=f"{5 * dtype.itemsize}KB"
            )
            _add_tokenizer(directory)
        return made[family, dtype]

    return base


def _add_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = (
        "<unk> <s> </s> Below is an instruction that describes a task . Write response ### : Give three tips".split()
    )
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(directory / "tokenizer.json"))


def make_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    """An adapter that PEFT itself wrote."""
    tiny_models.make_peft_adapter(directory, base, **settings)
    return directory


def write_adapter(
    directory: Path, base: Path, modules: Sequence[str], *, r: int = 3, seed: int = 0, **raw: Any
) -> Path:
    """A random PEFT adapter over full module names, without PEFT: quick."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module in modules:
        info = Directory.open(base).checkpoint.tensors
        name = f"{module}.weight" if f"{module}.weight" in info else "model.embed_tokens.weight"
        out_features, in_features = info[name].shape
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(r, in_features, generator=generator) * 0.2
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(out_features, r, generator=generator) * 0.2
    directory.mkdir(parents=True, exist_ok=True)
    header = make_header([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()], {"format": "pt"})
    write_shard(directory / "adapter_model.safetensors", header, tensors.values())
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": list(modules), **raw}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def add_record(adapter: Path, base: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {"base_name": "the base", "base_fingerprint": Checkpoint(base).fingerprint}
    settings |= {"quantize": None, "quantize_head": False, "precision": "32-true", "prompt_style": "alpaca"}
    settings |= {"prompt_template": None, "tokenizer_fingerprint": "", "step": 1, "val_loss": None}
    record = Record(**{**settings, "litlora_version": "0", **changes})
    (adapter / RECORD).write_text(json.dumps(record.__dict__))
    return adapter


def merged(base: Path, adapter: Path | list[Path], out: Path, **flags: Any) -> Checkpoint:
    run(Args(base, adapter if isinstance(adapter, list) else [adapter], out, **flags))
    return Checkpoint(out)


def logits(directory: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        model = load_model(Directory.open(directory), Dense(torch.float32), dtype=torch.float32, device="cpu")
        return model.lm_head(model(ids, Packed.of_lengths([len(ids)])))  # type: ignore[no-any-return]


def same_bytes(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    return a.tensors[name].piece(0, 1 << 40) == b.tensors[name].piece(0, 1 << 40)


LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    **{target: ("llama3", {"target_modules": [target]}) for target in ALL},
    "all": ("llama3", {"target_modules": ALL}),
    "patterns": ("qwen2", {"target_modules": ALL, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
                           "alpha_pattern": {"v_proj": 3, "lm_head": 5}}),
    "rslora": ("mistral", {"target_modules": ALL[:7], "use_rslora": True, "r": 6}),
    "qwen3-tied": ("qwen3-tied", {"target_modules": ALL[:7]}),
    "biases": ("llama-biases", {"target_modules": "all-linear"}),
}  # fmt: skip


@pytest.mark.parametrize("case", LORAS)
def test_equals_pefts_merge_and_unload(case: str, bases: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    family, lora = LORAS[case]
    base = bases(family)
    adapter = make_adapter(base, tmp_path / "adapter", **lora)
    out = merged(base, adapter, tmp_path / "out")
    theirs = tiny_models.open_in_peft(adapter, base)
    ids = tiny_models.sequences_of([11])[0]
    unmerged = tiny_models.reference_logits(theirs, [ids])
    wanted = theirs.merge_and_unload().state_dict()
    original, changed = Checkpoint(base), 0
    assert list(out.tensors) == list(original.tensors)
    for name in out.tensors:
        torch.testing.assert_close(out.read(name), wanted[name], rtol=1e-6, atol=1e-6)
        changed += not same_bytes(out, original, name)
    assert changed == len(Adapter.open(adapter, Directory.open(base).config, original).modules)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(tiny_models.reference_logits(opened, [ids]), unmerged, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(tmp_path / "out", ids), unmerged, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["smollm2", "qwen2-tied"])
def test_a_head_lora_on_a_tied_model_gives_an_untied_model(family: str, bases: Any, tmp_path: Path) -> None:
    base = bases(family)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    out = merged(base, adapter, tmp_path / "out", verify=True)
    original, embedding = Checkpoint(base), "model.embed_tokens.weight"
    assert same_bytes(out, original, embedding)
    assert "lm_head.weight" not in original.tensors
    factors = Adapter.open(adapter, Directory.open(base).config, original).factors("lm_head")
    torch.testing.assert_close(out.read("lm_head.weight"), original.read(embedding) + factors.delta())
    assert out.tensors["lm_head.weight"].file.name == original.tensors[embedding].file.name
    assert original.index is not None
    assert out.index is not None
    added = out.tensors["lm_head.weight"].nbytes
    assert out.index["metadata"]["total_size"] == original.index["metadata"]["total_size"] + added
    assert out.index["weight_map"].items() > original.index["weight_map"].items()
    before, after = (json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out"))
    assert after == {**before, "tie_word_embeddings": False}
    ids = tiny_models.sequences_of([9])[0]
    theirs = tiny_models.reference_logits(tiny_models.reference(tmp_path / "out"), [ids])
    torch.testing.assert_close(theirs, logits(tmp_path / "out", ids), rtol=0, atol=1e-4)
    assert (theirs - logits(base, ids)).abs().max() > 0.1


def test_shards_headers_and_untouched_tensors_stay_byte_for_byte(bases: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases("llama3", torch.bfloat16), tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "LICENSE").write_text("do as you like")
    for strange in ("adapter_config.json", RECORD, ".cache", "pytorch_model.bin", "other.safetensors", "tf.h5",
                    "pytorch_model.bin.index.json", "optimizer.pt"):  # fmt: skip
        (base / strange).write_text("{}")
    adapter = write_adapter(tmp_path / "adapter", base, ["model.layers.1.self_attn.q_proj"])
    out = merged(base, adapter, tmp_path / "out")
    original = Checkpoint(base)
    assert len(original.shards) > 2
    for ours, theirs in zip(out.shards, original.shards, strict=True):
        assert (ours.file.name, ours.header) == (theirs.file.name, theirs.header)
    touched = [name for name in out.tensors if not same_bytes(out, original, name)]
    assert touched == ["model.layers.1.self_attn.q_proj.weight"]
    for name in (INDEX, "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    shards = {shard.file.name for shard in original.shards}
    small = {INDEX, "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", RECORD}
    assert {path.name for path in (tmp_path / "out").iterdir()} == shards | small
    assert json.loads((tmp_path / "out" / RECORD).read_text())["merged_from"] == str(base)


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The next numbers of x's dtype away from and towards zero, in fp64 (for a zero: the smallest, twice)."""
    bits = x.view({4: torch.int32, 2: torch.int16}[x.itemsize])
    up, down = (bits + 1).view(x.dtype), torch.where(x == 0, bits + 1, bits - 1).view(x.dtype)
    return up.double(), down.double()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@settings(max_examples=15, deadline=None, database=None)
@given(seed=st.integers(0, 2**20), base=st.sampled_from([-24, -14, -3, 0, 6]), update=st.sampled_from([-20, -9, -2, 1]))
def test_rounding_is_to_the_nearest_of_the_fp64_sum(
    out_dtype: torch.dtype, seed: int, base: int, update: int, bases: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Subnormal halves, updates far below and far above the weights."""
    source, name = bases("llama3", torch.float32), "model.layers.0.mlp.up_proj"
    opened = Directory.open(source)
    w = opened.read(f"{name}.weight") * 2.0**base
    directory = tmp_path_factory.mktemp("rounding")
    tensors = [(f"{name}.weight", w.dtype, tuple(w.shape))]
    write_checkpoint(directory, tensors, lambda _: w)
    part = Checkpoint(directory)
    weights = replace(opened, checkpoint=part)
    adapter = Adapter.open(write_adapter(directory, source, [name], seed=seed), opened.config)
    merge = Merge(weights, [adapter], [2.0**update], dtype=out_dtype)
    out = merge.read(f"{name}.weight")
    factors = adapter.factors(name)
    a, b, scale = factors.A.double(), factors.B.double(), factors.scale * 2.0**update
    exact = w.double() + scale * (b @ a)
    slack = 7 * 2.0**-24 * (w.double().abs() + scale * (b.abs() @ a.abs()))  # fp32 sums of rank 3
    assert out.dtype == out_dtype
    distance = (out.double() - exact).abs()
    for neighbour in neighbours(out):
        assert (distance <= (neighbour - exact).abs() + 2 * slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    x = (torch.randn(500) * 2.0 ** torch.randint(-30, 15, (500,))).to(dtype)
    x = x[x != 0]
    assert torch.equal(ulp(x.double(), dtype), (neighbours(x)[0] - x.double()).abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters_with_weights_are_summed_exactly(dtype: torch.dtype, bases: Any, tmp_path: Path) -> None:
    base = bases("llama3", dtype)
    adapters = [
        make_adapter(base, tmp_path / "a", target_modules=["q_proj", "lm_head"], r=2),
        make_adapter(base, tmp_path / "b", target_modules=["q_proj", "up_proj"], r=5, use_rslora=True,
                                      rank_pattern={"up_proj": 3}, seed=1),
        make_adapter(base, tmp_path / "c", alpha_pattern={"q_proj": 1}, seed=2),
    ]  # fmt: skip
    weights = (0.7, -0.3, 1.5)
    out, original = merged(base, adapters, tmp_path / "out", weights="0.7,-0.3,1.5"), Checkpoint(base)
    config = Directory.open(base).config
    for name in original.tensors:
        exact, module = original.read(name).double(), name.removesuffix(".weight")
        for path, weight in zip(adapters, weights, strict=True):
            opened = Adapter.open(path, config, original)
            if module in opened.modules:
                factors = opened.factors(module)
                exact += weight * factors.scale * factors.B.double() @ factors.A.double()
        assert (
            (out.read(name).double() - exact).abs() <= 0.5001 * ulp(exact, dtype) + 2e-6 * (dtype == DTYPES[0])
        ).all()


@pytest.mark.parametrize(
    ("name", "quantize_head"), [("bnb.nf4", True), ("bnb.nf4-dq", False), ("bnb.fp4", False), ("bnb.fp4-dq", True)]
)
def test_base_rounding_is_bitsandbytes_own_round_trip(
    name: str, quantize_head: bool, bases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import bitsandbytes.functional as bnb

    base = bases("smollm2", torch.bfloat16)  # tied: a head quantized in training is not the embedding any more
    adapter = write_adapter(tmp_path / "adapter", base, ["model.layers.0.self_attn.q_proj"])
    add_record(adapter, base, quantize=name, quantize_head=quantize_head)
    out, original = (
        merged(base, adapter, tmp_path / "out", base_rounding=name, verify=name == "bnb.nf4"),
        Checkpoint(base),
    )
    assert "warning" not in capsys.readouterr().err
    assert ("lm_head.weight" in out.tensors) == quantize_head
    assert Directory.open(tmp_path / "out").config.tie_word_embeddings != quantize_head
    delta = Adapter.open(adapter, Directory.open(base).config).factors("model.layers.0.self_attn.q_proj").delta()
    kind, nested = FOUR_BIT[name]
    for tensor in out.tensors:
        w = original.read("model.embed_tokens.weight" if tensor == "lm_head.weight" else tensor)
        if "_proj" in tensor or tensor == "lm_head.weight":
            packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
            w = bnb.dequantize_4bit(packed, state)
        if tensor == "model.layers.0.self_attn.q_proj.weight":
            w = (w.float() + delta).bfloat16()
        assert torch.equal(out.read(tensor), w), tensor


def test_a_quantized_adapter_gets_a_plain_word(bases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = bases()
    adapter = write_adapter(tmp_path / "adapter", base, ["model.layers.0.self_attn.q_proj"])
    add_record(adapter, base, quantize="bnb.nf4")
    merged(base, adapter, tmp_path / "a")
    assert "note:" in (said := capsys.readouterr().err)
    assert "--base_rounding bnb.nf4" in said
    merged(base, adapter, tmp_path / "b", base_rounding="bnb.fp4")
    assert "warning:" in capsys.readouterr().err
    merged(base, add_record(adapter, base), tmp_path / "c", base_rounding="bnb.fp4")
    assert "unrounded weights, not over bnb.fp4" in capsys.readouterr().err


def test_dtype_converts_all_tensors_and_the_config(bases: Any, tmp_path: Path) -> None:
    base = bases("llama3", torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base, ["model.layers.0.self_attn.q_proj", "lm_head"])
    out, original = merged(base, adapter, tmp_path / "out", dtype="float32", verify=True), Checkpoint(base)
    opened = Adapter.open(adapter, Directory.open(base).config)
    for name, info in out.tensors.items():
        module, wanted = name.removesuffix(".weight"), original.read(name).float()
        if module in opened.modules:
            wanted += opened.factors(module).delta()
        assert info.dtype == torch.float32
        torch.testing.assert_close(out.read(name), wanted, rtol=1e-6, atol=1e-7)
    before, after = (json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "out"))
    assert after == {**before, "dtype": "float32"}
    assert out.index is not None
    assert out.index["metadata"]["total_size"] == 2 * sum(info.nbytes for info in original.tensors.values())
    ids = tiny_models.sequences_of([9])[0]
    theirs = tiny_models.reference_logits(tiny_models.reference(tmp_path / "out"), [ids])
    torch.testing.assert_close(theirs, logits(tmp_path / "out", ids), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="do not fit"):
        merged(base, adapter, tmp_path / "half", dtype="float16", weights="1e7")
    assert not (tmp_path / "half").exists()


@pytest.fixture
def job(bases: Any, tmp_path: Path) -> Args:
    base = Path(shutil.copytree(bases("llama3", torch.bfloat16), tmp_path / "base"))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    return Args(base, [write_adapter(tmp_path / "adapter", base, names)], tmp_path / "out")


def test_paths_that_would_do_harm_are_refused(job: Args, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(job.checkpoint_dir)
    for out in (job.checkpoint_dir, job.checkpoint_dir / "new", job.lora_path[0] / "a/b", tmp_path, tmp_path / "link"):
        with pytest.raises(InputError, match="output"):
            run(replace(job, out_dir=out, overwrite=True))
    with pytest.raises(InputError, match="no adapter"):
        run(replace(job, lora_path=[]))
    for weights in ("1,2", "a", "nan"):
        with pytest.raises(InputError, match="--weights"):
            run(replace(job, weights=weights))
    assert len(Checkpoint(job.checkpoint_dir).tensors) == 21
    assert not job.out_dir.exists()


def test_free_disk_is_checked_before_the_first_byte(job: Args, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(info.nbytes for info in Checkpoint(job.checkpoint_dir).tensors.values())
    real, free = shutil.disk_usage(job.checkpoint_dir), 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=free))
    monkeypatch.setattr(merge_write, "atomic_directory", lambda *_, **__: pytest.fail("something was written"))
    for free in (0, needed):  # noqa: B007 (the lambda reads it)
        with pytest.raises(InputError, match="too little free disk"):
            run(job)


def test_a_directory_in_use_is_kept_until_the_new_one_is_whole(job: Args, monkeypatch: pytest.MonkeyPatch) -> None:
    job.out_dir.mkdir()
    (job.out_dir / "precious").write_text("kept")
    with pytest.raises(InputError, match="not empty"):
        run(job)
    with monkeypatch.context() as patch:
        patch.setattr(merge_write, "_write_config", lambda *_: (_ for _ in ()).throw(OSError("the disk failed")))
        with pytest.raises(OSError, match="the disk failed"):
            run(replace(job, overwrite=True))
    assert [path.name for path in job.out_dir.iterdir()] == ["precious"]
    run(replace(job, overwrite=True))
    assert not (job.out_dir / "precious").exists()
    assert Directory.open(job.out_dir)
    assert sorted(path.name for path in job.out_dir.parent.iterdir()) == ["adapter", "base", "out"]


KILLED = """
import sys, time
from pathlib import Path
import litlora.merge_write as merge_write
from litlora.commands.merge_lora import Args, run
written = []
def slowly(*arguments, real=merge_write._write_shard):
    real(*arguments)
    written.append(arguments)
    if len(written) == 3:
        print("written", flush=True)
        time.sleep(600)
merge_write._write_shard = slowly
run(Args(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3])))
"""


def test_a_killed_merge_leaves_nothing_that_looks_complete(job: Args, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", KILLED, str(job.checkpoint_dir), str(job.lora_path[0]), str(job.out_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert not job.out_dir.exists()
    left = [path for path in job.out_dir.parent.iterdir() if path.name.startswith(".out.")]
    assert len(list(left[0].glob("*.safetensors"))) == 3
    with pytest.raises(InputError):
        Directory.open(left[0])
    run(job)
    assert f"{left[0]} is left from a run" in capsys.readouterr().err
    assert Directory.open(job.out_dir)


def flip(shard: Path, offset: int) -> None:
    with shard.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_verify_catches_one_flipped_bit(dtype: torch.dtype, name: str, bases: Any, tmp_path: Path) -> None:
    base = bases("llama3", dtype)
    adapter = write_adapter(tmp_path / "adapter", base, ["model.layers.1.mlp.down_proj"])
    args = Args(base, [adapter], tmp_path / "out")
    run(args)
    merge = open_merge(args)
    check_tensors(merge, args.out_dir)
    info = Checkpoint(args.out_dir).tensors[name]
    flip(info.file, info.offset + 4 * 9)  # the last bit of a value: the machine is little-endian
    with pytest.raises(VerifyError, match=name.replace(".", r"\.")):
        check_tensors(merge, args.out_dir)


def test_verify_catches_a_wrong_sum_wherever_it_comes_from(job: Args, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fp64 sum is computed by itself: a merge that is wrong in the same way on both sides does not pass."""
    from litlora import merge as module

    real = module.combine
    monkeypatch.setattr(
        module, "combine", lambda a, w, name: (f := real(a, w, name)) and replace(f, scale=f.scale * 1.02)
    )
    with pytest.raises(VerifyError, match=r"q_proj\.weight at (.|\n)*fp64"):
        run(replace(job, verify=True))
    assert not job.out_dir.exists()  # what fails takes no name


def test_verify_catches_other_logits(job: Args) -> None:
    run(job)
    tiny_models.edit_config(job.out_dir, rms_norm_eps=1e-3)
    with pytest.raises(VerifyError, match="other logits"):
        compare_models(open_merge(job), job.out_dir, [[1, 5, 9]])


def test_verify_says_what_rounding_cost(job: Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"instruction": "Give three tips", "input": "a task"}, {"prompt": "Write three ### : a b c d e"}]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    run(replace(job, verify=True, verify_prompts=prompts))
    said = capsys.readouterr()
    assert "rounding to bfloat16 cost" in said.err
    assert "in 2 prompts" in said.err
    assert said.out == f"{job.out_dir}\n"
    verified = json.loads((job.out_dir / RECORD).read_text())["verified"]
    # by hand: ‖(merged − W) − ΔW‖ / ‖ΔW‖
    base, out, lost, total = Checkpoint(job.checkpoint_dir), Checkpoint(job.out_dir), 0.0, 0.0
    adapter = Adapter.open(job.lora_path[0], Directory.open(job.checkpoint_dir).config)
    for module in adapter.modules:
        delta = adapter.factors(module).delta().double()
        change = out.read(f"{module}.weight").double() - base.read(f"{module}.weight").double()
        lost, total = lost + float((change - delta).square().sum()), total + float(delta.square().sum())
    assert verified["swallowed"]["overall"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert 0 < verified["cost"]["kl_mean"] < 0.1
    assert verified["cost"]["logits_difference"] == 0


def test_kl_and_agreement_are_those_of_the_unmerged_model(job: Args, tmp_path: Path) -> None:
    """Against PEFT unmerged in fp32; the adapter is so small that bf16 swallows much of it."""
    ids = tiny_models.sequences_of([40])[0]
    merge = open_merge(job)
    merge_directory(merge, job.out_dir, overwrite=False, record={})
    cost = compare_models(merge, job.out_dir, [ids.tolist()])
    theirs = tiny_models.open_in_peft(job.lora_path[0], job.checkpoint_dir)
    p = tiny_models.reference_logits(theirs, [ids]).double().log_softmax(-1)
    q = tiny_models.reference_logits(tiny_models.reference(job.out_dir), [ids]).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert cost.kl_mean == pytest.approx(float(kl.mean()), rel=0.01)
    assert cost.kl_max == pytest.approx(float(kl.max()), rel=0.01)
    assert cost.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert (cost.positions, cost.prompts) == (40, 1)


MEASURED = """
import sys
from pathlib import Path
import litlora.commands.merge_lora as command
if sys.argv[4] != "None":
    import bitsandbytes.functional
def peak():  # not ru_maxrss, which begins at that of the process that started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
imported = peak()
rounding = None if sys.argv[4] == "None" else sys.argv[4]
command.run(command.Args(Path(sys.argv[1]), [Path(sys.argv[2])], Path(sys.argv[3]), base_rounding=rounding))
print(imported, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured through /proc")
@pytest.mark.parametrize("rounding", [None, "bnb.nf4-dq"])
def test_peak_memory_is_below_the_promise(rounding: str | None, bases: Any, tmp_path: Path) -> None:
    """The largest tensor × 4 + the adapter + 300 MB is promised; without rounding not even one fp32 copy is held."""
    config = json.loads((bases() / "config.json").read_text())
    config |= {"vocab_size": 64, "hidden_size": 1024, "intermediate_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 1024}  # q and o: 64 MB each
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    tensors = [(name, torch.bfloat16, shape) for name, shape in expected_shapes(ModelConfig.load(base)).items()]
    shapes = {name: shape for name, _, shape in tensors}
    write_checkpoint(base, tensors, lambda name: torch.full(shapes[name], 0.01, dtype=torch.bfloat16))
    modules = [f"model.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "o_proj")]
    adapter = write_adapter(tmp_path / "adapter", base, modules)
    paths = [str(base), str(adapter), str(tmp_path / "out")]
    command = [sys.executable, "-c", MEASURED, *paths, str(rounding)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other are slow on a busy machine
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    imported, peak = map(int, done.stdout.split()[-2:])
    largest = max(info.nbytes for info in Checkpoint(base).tensors.values())
    assert largest == 2 * 1024 * 32768
    assert peak <= 4 * largest + os.path.getsize(adapter / "adapter_model.safetensors") + 300e6
    assert peak - imported < (4 if rounding else 2) * largest


def test_an_adapter_of_another_base_is_refused(bases: Any, tmp_path: Path) -> None:
    base, other = bases(), tiny_models.make_family(tmp_path / "other", "llama3", rms_norm_eps=1e-4)
    info = Checkpoint(other).tensors["model.norm.weight"]
    flip(info.file, info.offset)
    adapter = write_adapter(tmp_path / "adapter", base, ["model.layers.0.self_attn.q_proj"])
    add_record(adapter, base, base_name="the right base")
    with pytest.raises(InputError, match="another base model") as caught:
        merged(other, adapter, tmp_path / "out")
    assert "the right base" in str(caught.value)
    assert str(other) in str(caught.value)
    shutil.copyfile(Shard.open(adapter / "adapter_model.safetensors").file, adapter / "copy")
    qwen = bases("qwen3")
    (adapter / RECORD).unlink()
    with pytest.raises(InputError, match="do not fit"):
        merged(qwen, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_diverged_run_is_refused(job: Args) -> None:
    file = job.lora_path[0] / "adapter_model.safetensors"
    info = Shard.open(file).tensors[0]
    with file.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(torch.tensor([float("nan")]).view(torch.uint8).numpy().tobytes())
    with pytest.raises(InputError, match="not finite"):
        run(job)
    assert not job.out_dir.exists()
