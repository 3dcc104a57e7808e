"""litlora download against a local stand-in of the hub's HTTP interface: what is asked for, resumed, refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from litlora.checkpoint import INDEX, Checkpoint, write_checkpoint
from litlora.commands.download import RECORD, Args, run, select
from litlora.errors import InputError
from litlora.hub import RemoteFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 1 << 16  # bytes the client writes at a time here; the library's 10 MB would hold a tiny shard as a whole
CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
NEEDED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
}  # fmt: skip
BIG = "model-00001-of-00002.safetensors"


class Hub:
    """What the handler serves, and what it saw: (method, path without query, Range, Authorization)."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.gated = False
        self.cut: dict[str, int] = {}  # file: bytes after which the connection breaks, once
        self.stall: dict[str, int] = {}  # file: bytes after which the server waits for `release`, once
        self.release = threading.Event()
        self.port = 0

    @property
    def asked(self) -> list[str]:
        """The files asked for, in order, each as often as it was."""
        found = (re.search(r"/resolve/[^/]+/(.+)", path) for _, path, _, _ in self.requests)
        return [match[1] for match in found if match]

    @property
    def ranges(self) -> list[str]:
        return [requested for _, path, requested, _ in self.requests if requested and path.startswith("/cdn/")]


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            authorization = self.headers.get("Authorization")
            hub.requests.append(("GET", path, self.headers.get("Range"), authorization))
            if match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
                self.info(match[1], match[2])
            elif path.startswith("/cdn/"):
                self.content(path.removeprefix("/cdn/"))
            elif match := re.fullmatch(rf"/acme/tiny/resolve/{COMMIT}/(.+)", path):
                if hub.gated and authorization != "Bearer good":
                    self.reply(401 if authorization is None else 403, {"X-Error-Code": "GatedRepo"})
                elif match[1].endswith(".safetensors"):  # large files lie on another host
                    self.reply(302, {"Location": f"http://localhost:{hub.port}/cdn/{match[1]}"})
                else:
                    self.content(match[1])
            else:
                self.reply(404, {})

        def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def info(self, repo: str, revision: str) -> None:
            if self.headers.get("Authorization") == "Bearer wrong":
                message = {"X-Error-Message": "Invalid credentials in Authorization header"}
                self.reply(401, message)
            elif repo != "acme/tiny":
                self.reply(404, {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", COMMIT):
                self.reply(404, {"X-Error-Code": "RevisionNotFound"})
            else:
                siblings = [sibling(name, content) for name, content in hub.files.items()]
                body = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self.reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

        def content(self, name: str) -> None:
            data, requested = hub.files[name], self.headers.get("Range")
            start = int(re.fullmatch(r"bytes=(\d+)-", requested)[1]) if requested else 0  # type: ignore[index]
            self.send_response(206 if requested else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if requested:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if name in hub.cut:
                self.wfile.write(data[start : hub.cut.pop(name)])
                self.close_connection = True
            elif name in hub.stall:
                self.wfile.write(data[start : hub.stall.pop(name)])
                self.wfile.flush()
                hub.release.wait(60)
                self.close_connection = True
            else:
                self.wfile.write(data[start:])

    return Handler


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file of the listing, as the hub gives it with blobs=true."""
    entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
    if name.endswith((".safetensors", ".bin")):  # in LFS: the blob is a pointer, the sha256 the content's
        sha256 = hashlib.sha256(content).hexdigest()
        entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256, "size": len(content), "pointerSize": 134}}
    return entry


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sharded model with everything around it that is not needed."""
    directory = tmp_path_factory.mktemp("repository")
    tensors = {
        "model.embed_tokens.weight": torch.randn(512, 256, generator=torch.Generator().manual_seed(0)),
        "model.norm.weight": torch.ones(256),
    }
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_checkpoint(directory, entries, tensors.__getitem__, shard_bytes=525_000)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    for name in NEEDED - {"config.json"}:
        if not name.startswith("model"):
            (directory / name).write_text(json.dumps({"of": name}))
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert set(files) == NEEDED
    junk = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "model.gguf",
            "vocab.json", "onnx/model.onnx", "original/consolidated.00.pth", "model.fp16.safetensors", ".gitattributes",
            "consolidated-00001-of-00001.safetensors")  # fmt: skip
    return files | dict.fromkeys(junk, b"not needed")


@pytest.fixture
def hub(repository: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(dict(repository))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    server.daemon_threads = True
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    # what the library makes of HF_ENDPOINT when it is imported; only the test with a process of its own sets that
    endpoint, template = f"http://127.0.0.1:{hub.port}", "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + template)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.release.set()
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


def assert_complete(directory: Path, hub: Hub) -> None:
    there = {path.name: path.read_bytes() for path in directory.iterdir() if path.name != RECORD}
    assert there == {name: hub.files[name] for name in NEEDED}
    assert set(Checkpoint(directory).tensors) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_only_what_is_needed_then_nothing(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    run(Args("acme/tiny", out))
    assert sorted(hub.asked) == sorted(NEEDED)  # each once
    assert_complete(out, hub)
    assert capsys.readouterr().out == f"{out}\n"
    hub.requests.clear()
    run(Args("acme/tiny", out))
    assert hub.asked == []
    assert "9 of 9 files are there already" in capsys.readouterr().err
    assert_complete(out, hub)


def test_default_directory_and_commit(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(Args("acme/tiny", revision=COMMIT))
    assert_complete(tmp_path / "checkpoints/acme/tiny", hub)


def test_what_is_there_without_a_record_is_checked_and_kept(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / BIG).write_bytes(hub.files[BIG])
    run(Args("acme/tiny", tmp_path))
    assert sorted(hub.asked) == sorted(NEEDED - {BIG})
    assert_complete(tmp_path, hub)


def test_broken_connection_goes_on_in_the_same_run(hub: Hub, tmp_path: Path) -> None:
    hub.cut[BIG] = 3 * CHUNK + 100
    run(Args("acme/tiny", tmp_path))
    assert hub.ranges == [f"bytes={3 * CHUNK}-"]
    assert_complete(tmp_path, hub)


SCRIPT = """
import sys
from pathlib import Path
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = int(sys.argv[2])
from litlora.commands.download import Args, run
run(Args("acme/tiny", Path(sys.argv[1])))
"""


def test_killed_process_goes_on_in_the_next(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    hub.stall[BIG] = 4 * CHUNK + 100
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "HF_HUB_DISABLE_TELEMETRY": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), str(CHUNK)], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120  # against hanging only
        partial = out / f".{BIG}.{hashlib.sha256(hub.files[BIG]).hexdigest()[:16]}.incomplete"
        while not (partial.exists() and partial.stat().st_size >= 4 * CHUNK):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    hub.release.set()
    with pytest.raises(InputError):
        Checkpoint(out)
    assert not (out / "config.json").exists()  # what is interrupted does not look complete
    hub.requests.clear()
    run(Args("acme/tiny", out))
    assert hub.ranges == [f"bytes={4 * CHUNK}-"]
    assert "are there from an interrupted run" in capsys.readouterr().err
    had = {name for name in NEEDED if not name.endswith(".safetensors")}  # config.json too, under its hidden name
    assert set(hub.asked) == NEEDED - had
    assert_complete(out, hub)


def test_spoiled_beginning_is_noticed(hub: Hub, tmp_path: Path) -> None:
    digest = hashlib.sha256(hub.files[BIG]).hexdigest()
    (tmp_path / f".{BIG}.{digest[:16]}.incomplete").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match=f"(?s)hub's hash.*{BIG}"):
        run(Args("acme/tiny", tmp_path))
    assert not (tmp_path / BIG).exists()
    run(Args("acme/tiny", tmp_path))  # and the next run is not troubled by it
    assert_complete(tmp_path, hub)


def test_token_goes_to_the_hub_and_no_further(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.gated = True
    run(Args("acme/tiny", tmp_path))
    sent = {path.startswith("/cdn/"): token for _, path, _, token in hub.requests}
    assert sent == {False: "Bearer good", True: None}


@pytest.mark.parametrize(
    ("token", "words"), [(None, ["HF_TOKEN is not set", "accept the licence"]), ("other", ["no access yet"])]
)
def test_gated(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, words: list[str]) -> None:
    hub.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match="gated") as raised:
        run(Args("acme/tiny", tmp_path / "model"))
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize(
    ("args", "token", "words"),
    [
        (Args("acme/other"), None, "no such model.*acme/other.*set HF_TOKEN"),
        (Args("acme/tiny", revision="v9"), None, "no such revision.*acme/tiny at v9"),
        (Args("a/b/c/d"), None, "not a repository's name.*a/b/c/d"),
        (Args("acme/tiny"), "wrong", "HTTP 401.*HF_TOKEN is not valid"),
    ],
)
def test_refused_by_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: Args, token: str | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=f"(?s){words}"):
        run(args)
    assert list(tmp_path.iterdir()) == []


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(Args("acme/tiny", tmp_path / "model"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")  # nothing listens there
    with pytest.raises(InputError, match=r"(?s)out of reach.*127\.0\.0\.1:1"):
        run(Args("acme/tiny", tmp_path / "other"))
    with pytest.raises(InputError, match="out of reach"):
        run(Args("acme/tiny", tmp_path / "model", revision=COMMIT))  # another revision than was downloaded
    capsys.readouterr()
    run(Args("acme/tiny", tmp_path / "model"))
    assert "taking what an earlier run brought" in capsys.readouterr().err
    (tmp_path / "model" / BIG).write_bytes(b"changed")
    with pytest.raises(InputError, match="out of reach"):
        run(Args("acme/tiny", tmp_path / "model"))


def test_disk_is_checked_before_the_first_byte(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litlora.checkpoint.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="too little free disk"):
        run(Args("acme/tiny", tmp_path / "model"))
    assert hub.asked == []
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("without", "extra", "words"),
    [
        ("safetensors", (), "no safetensors of a model.*pytorch_model.bin.*a repository with safetensors"),
        ("safetensors", ("adapter_model.safetensors",), "--lora_path"),
        ("config.json", (), "no config.json"),
        ("tokenizer.json", (), "no tokenizer"),
    ],
)
def test_incomplete_repository(hub: Hub, tmp_path: Path, without: str, extra: tuple[str, ...], words: str) -> None:
    hub.files = {name: data for name, data in hub.files.items() if without not in name} | dict.fromkeys(extra, b"x")
    hub.files.pop("consolidated.00.pth")
    with pytest.raises(InputError, match=f"(?s){words}"):
        run(Args("acme/tiny", tmp_path / "model"))
    assert hub.asked == []


def test_unsupported_family_is_refused_before_its_weights(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = json.dumps(CONFIG | {"model_type": "mamba"}).encode()
    with pytest.raises(InputError, match=r"(?s)not supported.*mamba"):
        run(Args("acme/tiny", tmp_path / "model"))
    assert hub.asked == ["config.json"]


def test_single_file_wins_over_consolidated() -> None:
    names = ("config.json", "tokenizer.model", "model.safetensors", "consolidated.safetensors", "params.json")
    listing = {name: RemoteFile(name, 1, "0" * 40) for name in names}
    assert [file.name for file in select(listing, "here")] == ["config.json", "tokenizer.model", "model.safetensors"]


def test_nothing_is_overwritten(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("another's")  # would stay and be wrong
    (tmp_path / BIG).write_text("changed")
    with pytest.raises(InputError, match=rf"(?s)tokenizer\.model, {BIG}.*--checkpoint_dir"):
        run(Args("acme/tiny", tmp_path))
    assert ((tmp_path / BIG).read_text(), hub.asked) == ("changed", [])
    other = tmp_path / "other"
    run(Args("acme/tiny", other))
    (other / RECORD).write_text((other / RECORD).read_text().replace("acme/tiny", "acme/elder"))
    with pytest.raises(InputError, match=r"(?s)another model.*acme/elder.*acme/tiny"):
        run(Args("acme/tiny", other))
