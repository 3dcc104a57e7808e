"""Reading safetensors without the library, the index, the fingerprint, and writes that are whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora import checkpoint
from litlora.checkpoint import (
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    Shard,
    atomic_directory,
    atomic_file,
    make_header,
    read_json,
    require_directory,
    require_disk,
    require_writable,
    write_checkpoint,
    write_json,
    write_shard,
)
from litlora.errors import InputError


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Every bit pattern matters, so random bytes (0 or 1 for bool)."""
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """NaN payloads included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


def sample_tensors() -> dict[str, Tensor]:
    shapes: list[tuple[int, ...]] = [(), (1,), (3, 5), (2, 0, 4), (0,), (2, 3, 4)]
    return {f"{name}.{i}": tensor_of(dtype, shape) for name, dtype in DTYPES.items() for i, shape in enumerate(shapes)}


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, stop: int, shape: list[Any] | None = None, dtype: object = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


# Reading


@pytest.mark.parametrize("read", [checkpoint.READ, 7])  # 7: all are read by several threads, in uneven pieces
def test_every_dtype_and_shape_is_read_as_the_library_reads_it(
    tmp_path: Path, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "READ", read)
    tensors = sample_tensors()
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt", "ü": "é"})
    opened = Checkpoint(tmp_path)
    theirs = load_file(tmp_path / SINGLE)
    assert set(opened.tensors) == set(theirs)
    assert all(same_bytes(opened.read(name), theirs[name]) for name in theirs)
    assert opened.shards[0].metadata == {"format": "pt", "ü": "é"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_card_reads_the_same_bytes(tmp_path: Path) -> None:
    """More pieces than there are pinned buffers of other pieces to mistake them for."""
    tensors = sample_tensors() | {"large": torch.randint(0, 256, (40 * checkpoint.READ + 3,), dtype=torch.uint8)}
    save_file(tensors, tmp_path / SINGLE)
    opened = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        read = opened.read(name, "cuda")
        assert read.is_cuda
        assert same_bytes(read.cpu(), tensor), name


def test_a_read_tensor_owns_its_memory(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / SINGLE)
    opened = Checkpoint(tmp_path)
    opened.read("a").fill_(1)
    assert opened.read("a").eq(0).all()
    assert opened.read("b").untyped_storage().nbytes() == 16


def test_opening_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / SINGLE)
    monkeypatch.setattr(checkpoint, "_pread_into", lambda *_: pytest.fail("a tensor was read"))
    Checkpoint(tmp_path)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = sample_tensors()
    header = make_header([(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], {"format": "pt"})
    write_shard(tmp_path / SINGLE, header, tensors.values())
    with safe_open(tmp_path / SINGLE, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert all(same_bytes(opened.get_tensor(name), tensor) for name, tensor in tensors.items())
    with (tmp_path / SINGLE).open("rb") as stream:
        assert struct.unpack("<Q", stream.read(8))[0] % 8 == 0


def test_a_tensor_that_is_not_contiguous_is_written_by_value(tmp_path: Path) -> None:
    wanted = torch.arange(6.0).view(2, 3).t()
    write_shard(tmp_path / SINGLE, make_header([("a", torch.float32, (3, 2))], {}), [wanted])
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], wanted)


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1], ids=["one file", "several", "a tensor a file"])
def test_write_checkpoint_opens_in_the_library_and_here(tmp_path: Path, shard_bytes: int) -> None:
    tensors = {f"t{i}": torch.randn(3, i + 1) for i in range(6)}
    entries = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    write_checkpoint(tmp_path, entries, tensors.__getitem__, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    opened = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor)
        assert torch.equal(opened.read(name), tensor)
    assert len(files) == {10**9: 1, 100: 4, 1: 6}[shard_bytes]
    assert (tmp_path / INDEX).exists() == (len(files) > 1)
    if len(files) > 1:
        assert read_json(tmp_path / INDEX)["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert all(file.stat().st_size - 8 - len(Shard.open(file).header) <= max(shard_bytes, 72) for file in files)


# What is not a whole safetensors file

VALID = {"a": entry(0, 8), "b": entry(8, 12)}
BROKEN: dict[str, tuple[object, bytes]] = {
    "a gap": ({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)),
    "an overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "an overlap and a gap": ({"a": entry(0, 8), "b": entry(4, 8)}, bytes(12)),
    "bytes beyond the end": ({"a": entry(0, 8), "b": entry(100, 104)}, bytes(12)),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a start after 0": ({"a": entry(4, 8)}, bytes(8)),
    "bytes at the end": (VALID, bytes(13)),
    "bytes missing": (VALID, bytes(11)),
    "a shape of another size": ({"a": entry(0, 8, [3])}, bytes(8)),
    "a negative shape": ({"a": entry(0, 8, [-1, -2])}, bytes(8)),
    "a shape of floats": ({"a": entry(0, 8, [2.0])}, bytes(8)),
    "a shape of booleans": ({"a": entry(0, 4, [True])}, bytes(4)),
    "a shape of strings": ({"a": entry(0, 8, ["2"])}, bytes(8)),
    "a shape beyond 64 bits": ({"a": entry(0, 0, [0, 10**30])}, b""),
    "a shape whose strides overflow": ({"a": entry(0, 0, [2**62, 2**62, 0])}, b""),
    "offsets backwards": ({"a": entry(8, 0, [2])}, bytes(8)),
    "negative offsets": ({"a": entry(-8, 0, [2])}, bytes(8)),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8)),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "a list for a dtype": ({"a": entry(0, 8, [2], ["F32"])}, bytes(8)),
    "an unknown dtype": ({"a": entry(0, 8, [2], "F8_E9M9")}, bytes(8)),
    "a tensor that is no object": ({"a": 3}, b""),
    "a list for a header": ([1, 2], b""),
    "no JSON": (b'{"a": {', b""),
    "metadata that is no object": ({"__metadata__": "x", **VALID}, bytes(12)),
    "metadata of numbers": ({"__metadata__": {"x": 1}, **VALID}, bytes(12)),
    "a name that is no text": (b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4)),
    "deep nesting": (b"[" * 200_000 + b"]" * 200_000, b""),
    "UTF-16": (json.dumps(VALID).encode("utf-16"), bytes(12)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, what: str) -> None:
    header, data = BROKEN[what]
    file = raw_file(tmp_path / SINGLE, header, data)
    with pytest.raises(InputError) as caught:
        Shard.open(file)
    assert str(file) in str(caught.value)


def test_the_unbroken_one_is_accepted(tmp_path: Path) -> None:
    assert [t.name for t in Shard.open(raw_file(tmp_path / SINGLE, VALID, bytes(12))).tensors] == ["a", "b"]


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_allocates_nothing(tmp_path: Path, length: int) -> None:
    file = raw_file(tmp_path / SINGLE, VALID, bytes(12), length)
    with pytest.raises(InputError, match="header claims"):
        Shard.open(file)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40, -1])
def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path: Path, size: int) -> None:
    save_file({"a": torch.randn(100)}, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).stat().st_size
    os.truncate(tmp_path / SINGLE, size % whole)
    with pytest.raises(InputError, match="truncated or corrupt"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("read", [checkpoint.READ, 7])
def test_a_file_that_shrinks_after_it_was_opened_is_an_input_error(
    tmp_path: Path, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "READ", read)
    save_file({"a": torch.randn(100)}, tmp_path / SINGLE)
    opened = Checkpoint(tmp_path)
    os.truncate(tmp_path / SINGLE, 200)
    with pytest.raises(InputError, match="ends early"):
        opened.read("a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["F32", "U8", "dtype"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
FIELD = st.fixed_dictionaries(
    {},
    optional={
        "dtype": JSON | st.sampled_from(list(DTYPES)),
        "shape": JSON | st.lists(st.integers(-2, 4) | st.integers(), max_size=4),
        "data_offsets": JSON | st.lists(st.integers(0, 20) | st.integers(), min_size=2, max_size=2),
    },
)
HEADERS = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), FIELD | JSON, max_size=4)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def open_and_read(file: Path) -> None:
    """Whatever is in it: read, or refused by InputError; no third way."""
    with contextlib.suppress(InputError):
        shard = Shard.open(file)
        for info in shard.tensors:
            assert info.nbytes <= file.stat().st_size
            info.read()
        assert all(isinstance(k, str) and isinstance(v, str) for k, v in shard.metadata.items())


@FUZZ
@given(header=HEADERS, data=st.binary(max_size=20))
def test_any_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    open_and_read(raw_file(tmp_path / SINGLE, header, data))


@FUZZ
@given(cut=st.integers(0, 400), at=st.integers(0, 400), byte=st.integers(0, 255))
@example(cut=400, at=0, byte=255)
def test_any_flipped_byte_is_read_or_refused(tmp_path: Path, cut: int, at: int, byte: int) -> None:
    file = tmp_path / SINGLE
    save_file({"a": torch.ones(8), "b": torch.ones(2, 3, dtype=torch.int64)}, file, metadata={"format": "pt"})
    content = bytearray(file.read_bytes())
    content[at % len(content)] = byte
    file.write_bytes(content[: len(content) - max(0, cut - 300)])
    open_and_read(file)


# The directory and its index


def sharded(directory: Path, tensors: dict[str, Tensor], files: int) -> Path:
    directory.mkdir(exist_ok=True)
    weight_map = {name: f"part-{i % files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, directory / file)
    write_json(directory / INDEX, {"metadata": {}, "weight_map": weight_map})
    return directory


def edit_index(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = read_json(directory / INDEX)
    change(index)
    write_json(directory / INDEX, index)


TENSORS = {f"t{i}": torch.full((4,), float(i)) for i in range(5)}


def test_sharded_reads_as_unsharded(tmp_path: Path) -> None:
    opened = Checkpoint(sharded(tmp_path, TENSORS, 3))
    assert len(opened.shards) == 3
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in TENSORS.items())


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path, TENSORS, 3)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(InputError, match="part-1"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "x" * 300, "", "..", ".", "\0", "part-0.safetensors\0"])
def test_an_index_that_names_no_file(tmp_path: Path, name: str) -> None:
    sharded(tmp_path, TENSORS, 2)
    edit_index(tmp_path, lambda index: index["weight_map"].update(t0=name))
    with pytest.raises(InputError):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "inner/part-0.safetensors"])
def test_an_index_that_points_out_of_its_directory(tmp_path: Path, name: str) -> None:
    directory = sharded(tmp_path / "base", TENSORS, 2)
    shutil.copy(directory / "part-0.safetensors", tmp_path / "outside.safetensors")
    edit_index(directory, lambda index: index["weight_map"].update(t0=name, t2=name, t4=name))
    with pytest.raises(InputError, match="outside its directory"):
        Checkpoint(directory)


def test_an_index_that_names_tensors_in_the_wrong_place(tmp_path: Path) -> None:
    sharded(tmp_path, TENSORS, 2)
    edit_index(tmp_path, lambda index: index["weight_map"].update(t0="part-1.safetensors", t9="part-1.safetensors"))
    with pytest.raises(InputError) as caught:
        Checkpoint(tmp_path)
    assert "t0 (index: part-1.safetensors, found: part-0.safetensors)" in str(caught.value)
    assert "t9 (index: part-1.safetensors, found: nowhere)" in str(caught.value)


def test_shards_that_both_hold_a_tensor_are_refused(tmp_path: Path) -> None:
    """Else which of the two is used would be chance."""
    sharded(tmp_path, TENSORS, 2)
    save_file({"t1": TENSORS["t1"], "t3": TENSORS["t3"], "t0": torch.zeros(4)}, tmp_path / "part-1.safetensors")
    with pytest.raises(InputError, match="t0"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}, []])
def test_an_index_without_a_map(tmp_path: Path, index: object) -> None:
    write_json(tmp_path / INDEX, index)
    with pytest.raises(InputError, match="index"):
        Checkpoint(tmp_path)


def test_missing_and_empty_directories(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in (("nowhere", "does not exist"), ("empty", "is empty"), ("file", "not a directory")):
        with pytest.raises(InputError, match=message):
            require_directory(tmp_path / name)
        with pytest.raises(InputError, match=message):
            Checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "message"),
    [("pytorch_model.bin", "only safetensors"), ("consolidated.00.pth", "litlora convert"), ("config.json", "neither")],
)
def test_directories_without_safetensors_say_the_way_out(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1,\n"b": }', "line 2"), (b"\xff\xfe\x00", "not a JSON"), (b"[1]", "an object"), (b"[" * 200_000, "JSON")],
)
def test_read_json_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "x.json")


# The fingerprint


def test_the_fingerprint_survives_resharding_and_nothing_else(tmp_path: Path) -> None:
    tensors = {name: torch.randn(64, 64) for name in "abc"}
    prints = [Checkpoint(sharded(tmp_path / str(n), tensors, n)).fingerprint for n in (1, 2, 3)]
    assert len(set(prints)) == 1
    others = [
        {**tensors, "b": tensors["b"] + 1},  # a sibling of the same shape
        {**tensors, "b": tensors["b"].view(32, 128)},
        {**tensors, "b": tensors["b"].view(torch.int32)},
        {"a": tensors["b"], "b": tensors["a"], "c": tensors["c"]},
        {"a": tensors["a"], "b": tensors["b"]},
    ]
    found = [Checkpoint(sharded(tmp_path / f"other{i}", other, 1)).fingerprint for i, other in enumerate(others)]
    assert len({prints[0], *found}) == 1 + len(others)


# Writes


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def test_atomic_file_replaces_only_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"old")
    with atomic_file(file) as stream:
        stream.write(b"new")
        stream.flush()
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_file_that_fails_leaves_the_old(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"old")
    with pytest.raises(error), atomic_file(file) as stream:  # noqa: PT012
        stream.write(b"half")
        raise error
    assert file.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_write_shard_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def tensors():  # type: ignore[no-untyped-def]
        yield torch.zeros(2)
        raise InputError("the base went away")

    header = make_header([("a", torch.float32, (2,)), ("b", torch.float32, (2,))], {})
    with pytest.raises(InputError):
        write_shard(tmp_path / SINGLE, header, tensors())
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_takes_its_name_only_at_the_end(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "out"
    with atomic_directory(directory, overwrite=False) as temporary:
        (temporary / "f").write_text("new")
        assert not directory.exists()
    assert (directory / "f").read_text() == "new"
    assert leftovers(directory.parent) == []


def filled(directory: Path) -> Path:
    directory.mkdir()
    (directory / "f").write_text("old")
    (directory / "g").write_text("old")
    return directory


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_directory_that_fails_leaves_the_old(tmp_path: Path, error: type[BaseException]) -> None:
    directory = filled(tmp_path / "out")
    with pytest.raises(error), atomic_directory(directory, overwrite=True) as temporary:  # noqa: PT012
        (temporary / "f").write_text("half")
        raise error
    assert (directory / "f").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_atomic_directory_that_cannot_take_its_name_puts_the_old_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, real = filled(tmp_path / "out"), os.replace

    def replace(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no"), atomic_directory(directory, overwrite=True) as temporary:
        (temporary / "f").write_text("new")
    assert (directory / "f").read_text() == "old"
    assert leftovers(tmp_path) == []


def test_atomic_directory_replaces_the_whole(tmp_path: Path) -> None:
    directory = filled(tmp_path / "out")
    with atomic_directory(directory, overwrite=True) as temporary:
        (temporary / "f").write_text("new")
    assert sorted(path.name for path in directory.iterdir()) == ["f"]
    assert leftovers(tmp_path) == []


def test_a_filled_directory_is_refused_without_overwrite(tmp_path: Path) -> None:
    directory = filled(tmp_path / "out")
    with pytest.raises(InputError, match="overwrite"), atomic_directory(directory, overwrite=False):
        pytest.fail("written over")
    assert (directory / "f").read_text() == "old"


def test_an_empty_directory_may_be_filled_and_a_path_under_a_file_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out", overwrite=False) as temporary:
        (temporary / "f").write_text("new")
    assert (tmp_path / "out" / "f").exists()
    with pytest.raises(InputError, match="under a file"):
        require_writable(tmp_path / "out" / "f" / "deeper", overwrite=True)
    with pytest.raises(InputError, match="a file"):
        require_writable(tmp_path / "out" / "f", overwrite=True)


def test_a_directory_without_rights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, as in many containers, may write everywhere
    with pytest.raises(InputError, match="not writable"):
        require_writable(tmp_path / "out", overwrite=False)


def test_a_relative_out_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic_directory(Path("a") / "b", overwrite=False) as temporary:
        (temporary / "f").write_text("new")
    assert (tmp_path / "a" / "b" / "f").exists()


def test_the_disk_is_measured_where_the_output_will_lie(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_disk(tmp_path / "not" / "yet", 1000)
    with pytest.raises(InputError, match="too little free disk"):
        require_disk(tmp_path / "not" / "yet", 2 * free + 10**12)


def test_links_stay_in_their_directory(tmp_path: Path) -> None:
    """In the hub's cache every file is a link to a blob; a link anywhere else is refused before anything is read."""
    hub = tmp_path / "models--a--b"
    snapshot, blobs = hub / "snapshots" / "0123", hub / "blobs"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "hash")
    (blobs / "text").write_text("x")
    (snapshot / SINGLE).symlink_to("../../blobs/hash")
    (snapshot / "additional_chat_templates" / "t.jinja").symlink_to("../../../blobs/text")
    (snapshot / "latest").symlink_to(tmp_path)  # a directory, which nobody reads
    assert list(Checkpoint(snapshot).tensors) == ["a"]
    (tmp_path / "link").symlink_to(snapshot)  # the directory itself may be one
    assert list(Checkpoint(tmp_path / "link").tensors) == ["a"]
    (snapshot / "b").symlink_to(SINGLE)
    Checkpoint(snapshot)
    (tmp_path / "private").write_text("x")
    for place, to in (("notes.txt", "../../../private"), ("additional_chat_templates/x.jinja", "/etc/passwd")):
        (snapshot / place).symlink_to(to)
        with pytest.raises(InputError, match="a link that leads out of its directory"):
            Checkpoint(snapshot)
        (snapshot / place).unlink()
    Checkpoint(snapshot)


def test_a_device_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="a file is missing"):
        read_json(tmp_path / "x.json")
