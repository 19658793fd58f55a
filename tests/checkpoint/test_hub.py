"""A hub id: downloaded from whatever HF_ENDPOINT names, resumed after an interruption, and used offline afterwards.

A small server on 127.0.0.1 imitates the four answers of the hub that a download needs: model info, file tree, HEAD and
(ranged) GET of a file.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from karakoram.checkpoint import hf, open_checkpoint
from karakoram.errors import CheckpointError
from tests.checkpoint import tiny

COMMIT = "c0ffee00" * 5
HUB_ID = "someone/tiny-k2"
UNREACHABLE = "http://127.0.0.1:9"  # the discard port: nothing listens


class Hub(ThreadingHTTPServer):
    """Serves one repository.

    `break_after` cuts every answer after that many bytes of a safetensors file; the file `hold` stalls on its first
    request, after 1000 bytes, until `released`.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = files
        self.break_after: int | None = None
        self.hold: str | None = None
        self.released = threading.Event()
        self.gets: list[tuple[str, str | None]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    """What the hub answers."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if path in (f"/api/models/{HUB_ID}", f"/api/models/{HUB_ID}/revision/main"):
            info = {"id": HUB_ID, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.server.files]}
            self._send(json.dumps({**info, "private": False, "tags": [], "downloads": 0, "likes": 0}).encode(), body)
        elif re.fullmatch(rf"/api/models/{HUB_ID}/tree/{COMMIT}", path):
            self._send(json.dumps([self._tree(name) for name in self.server.files]).encode(), body)
        elif (name := path.removeprefix(f"/{HUB_ID}/resolve/{COMMIT}/")) in self.server.files:
            self._send_file(name, body)
        else:
            self.send_response(404)
            known = path.startswith(f"/api/models/{HUB_ID}/revision/")
            self.send_header("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _tree(self, name: str) -> dict:
        content = self.server.files[name]
        digest = hashlib.sha256(content).hexdigest()
        entry = {"type": "file", "path": name, "size": len(content), "oid": digest[:40]}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def _send_file(self, name: str, body: bool) -> None:
        content = self.server.files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if body:
            self.server.gets.append((name, self.headers.get("Range")))
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "ETag": f'"{digest if name.endswith(".safetensors") else digest[:40]}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
            "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}",
        }
        cut = self.server.break_after if body and name.endswith(".safetensors") else None
        if body and name == self.server.hold and not self.server.released.is_set():
            cut = 1000
        self._send(content[start:], body, 206 if start else 200, headers, cut)

    def _send(
        self, content: bytes, body: bool, status: int = 200, headers: dict | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and cut is not None:
            self.wfile.write(content[:cut])
            self.wfile.flush()
            if self.server.hold:
                self.server.released.wait(60)
            self.close_connection = cut < len(content)
        elif body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the repository: a checkpoint in three shards, and things that must not be fetched."""
    source = tiny.save(tmp_path_factory.mktemp("hub"), hidden_size=256, vocab_size=24_000, max_shard_size="1MB")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    files["tiktoken.model"] = b"AA== 0\n"
    files["chat_template.jinja"] = b"{{ messages }}"
    unwanted = ("modeling_kimi.py", "pytorch_model.bin", "original/model.safetensors", "README.md")
    return {**files, **dict.fromkeys(unwanted, b"never")}


@pytest.fixture
def hub(served: dict[str, bytes]) -> Iterator[Hub]:
    server = Hub(served)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


OPEN = "import sys\nfrom karakoram.checkpoint import open_checkpoint\nprint(open_checkpoint(sys.argv[1]).dir)"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this process; huggingface_hub reads HF_HOME only once, so its constant is set as well."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    for key in [key for key in os.environ if key.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    return tmp_path / "cache"


def start(project_root: Path) -> subprocess.Popen[str]:
    """The same in a process of its own, which can be killed and reads its own environment."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", OPEN, HUB_ID], cwd=project_root, stdout=pipe, stderr=pipe, text=True)


def test_a_killed_download_is_taken_up_again_and_then_used_offline(
    hub: Hub,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    project_root: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    held = sorted(name for name in hub.files if name.startswith("model-"))[0]
    wanted = {name for name in hub.files if "/" not in name and name.rsplit(".", 1)[-1] not in ("py", "bin", "md")}
    snapshot = cache / "hub" / "models--someone--tiny-k2" / "snapshots" / COMMIT

    def arrived() -> set[str]:
        return {path.name for path in snapshot.rglob("*")} if snapshot.exists() else set()

    hub.hold = held
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    process = start(project_root)
    for _ in range(7500):  # until all but the held file have arrived: at most 150 s
        if arrived() == wanted - {held} or process.poll() is not None:
            break
        hub.released.wait(0.02)
    process.kill()
    hub.released.set()
    process.communicate()
    assert arrived() == wanted - {held}

    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE)
    with pytest.raises(CheckpointError, match="not complete in the cache"):
        open_checkpoint(HUB_ID)

    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    hub.gets.clear()
    checkpoint = open_checkpoint(HUB_ID)
    checkpoint.check()
    assert "Fetching" in capfd.readouterr().err  # the progress bar
    assert hub.gets == [(held, None)]
    assert checkpoint.dir == snapshot
    assert arrived() == wanted
    assert all((snapshot / name).read_bytes() == hub.files[name] for name in wanted)

    hub.gets.clear()
    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE)
    assert open_checkpoint(HUB_ID).dir == snapshot
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output, errors = start(project_root).communicate(timeout=120)
    assert output.strip() == str(snapshot), errors
    assert hub.gets == []


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub keeps whole chunks of 10 MiB, so the embedding here is larger than that."""
    large = max(hub.files, key=lambda name: len(hub.files[name]))
    hub.break_after = 11_000_000
    assert len(hub.files[large]) > hub.break_after
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    open_checkpoint(HUB_ID).check()
    assert (large, f"bytes={10 << 20}-") in hub.gets


def test_ids_that_the_hub_does_not_know(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    with pytest.raises(CheckpointError, match="someone/else is neither a directory here nor a model on the hub"):
        open_checkpoint("someone/else")
    with pytest.raises(CheckpointError, match="has no revision 'nightly'"):
        open_checkpoint(HUB_ID, revision="nightly")


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hf.resolve("org/name") == Path("org/name")
    for text in ("org/name/..evil/x", "../x", "org//other", "a b/c", "-a/b", "", "a\0b/c", "x" * 5000):
        with pytest.raises(CheckpointError, match=r"does not exist|is no path"):
            hf.resolve(text)
