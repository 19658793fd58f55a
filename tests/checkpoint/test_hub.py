"""A hub id: downloaded from whatever HF_ENDPOINT names, resumed after an interruption, and used offline afterwards.

A small server on 127.0.0.1 imitates the four answers of the hub that a download needs: model info, file tree, HEAD and
(ranged) GET of a file. Each run is a process of its own, since huggingface_hub reads its environment once.
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

from karakoram.checkpoint import hf
from karakoram.errors import CheckpointError
from tests.checkpoint import tiny

COMMIT = "c0ffee00" * 5
HUB_ID = "someone/tiny-k2"


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
            self.send_header("X-Error-Code", "RepoNotFound")
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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    source = tiny.save(tmp_path / "source", hidden_size=256, vocab_size=24_000, max_shard_size="1MB")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    files["tiktoken.model"] = b"AA== 0\n"
    files["chat_template.jinja"] = b"{{ messages }}"
    unwanted = ("modeling_kimi.py", "pytorch_model.bin", "original/model.safetensors", "README.md")
    server = Hub({**files, **dict.fromkeys(unwanted, b"never")})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


OPEN = (
    "import sys\nfrom karakoram.checkpoint import open_checkpoint\nfrom karakoram.errors import CheckpointError\n"
    "try:\n    c = open_checkpoint(sys.argv[1])\n    c.check()\n    print(c.dir)\n"
    "except CheckpointError as error:\n    print(error, file=sys.stderr)\n    sys.exit(2)"
)


@pytest.fixture
def start(tmp_path: Path, project_root: Path):
    def begin(endpoint: str, hub_id: str, **extra: str) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "0", "HF_HUB_OFFLINE": "0", **extra}
        command = [sys.executable, "-c", OPEN, hub_id]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, cwd=project_root, stdout=pipe, stderr=pipe, text=True)

    return begin


@pytest.fixture
def run(start):
    def finish(endpoint: str, hub_id: str = HUB_ID, **extra: str) -> subprocess.CompletedProcess[str]:
        process = start(endpoint, hub_id, **extra)
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return finish


def test_a_killed_download_is_taken_up_again_and_then_used_offline(hub: Hub, run, start, tmp_path: Path) -> None:
    held = sorted(name for name in hub.files if name.startswith("model-"))[0]
    wanted = {name for name in hub.files if "/" not in name and name.rsplit(".", 1)[-1] not in ("py", "bin", "md")}
    snapshot = tmp_path / "cache" / "hub" / "models--someone--tiny-k2" / "snapshots" / COMMIT

    def arrived() -> set[str]:
        return {path.name for path in snapshot.rglob("*")} if snapshot.exists() else set()

    hub.hold = held
    process = start(hub.address, HUB_ID)
    for _ in range(3000):  # until all but the held file have arrived: at most 60 s
        if arrived() == wanted - {held} or process.poll() is not None:
            break
        hub.released.wait(0.02)
    process.kill()
    hub.released.set()
    process.communicate()
    assert arrived() == wanted - {held}

    incomplete = run("http://127.0.0.1:9")
    assert incomplete.returncode == 2
    assert "not complete in the cache" in incomplete.stderr

    hub.gets.clear()
    done = run(hub.address)
    assert done.returncode == 0, done.stderr
    assert "Fetching" in done.stderr  # the progress bar
    assert hub.gets == [(held, None)]
    assert Path(done.stdout.strip()) == snapshot
    assert arrived() == wanted
    assert all((snapshot / name).read_bytes() == hub.files[name] for name in wanted)

    hub.gets.clear()
    offline = run("http://127.0.0.1:9")
    assert offline.returncode == 0, offline.stderr
    assert Path(offline.stdout.strip()) == snapshot
    assert hub.gets == []


def test_a_broken_connection_is_taken_up_where_it_broke(hub: Hub, run) -> None:
    """huggingface_hub keeps whole chunks of 10 MiB, so the embedding here is larger than that."""
    large = max(hub.files, key=lambda name: len(hub.files[name]))
    hub.break_after = 11_000_000
    assert len(hub.files[large]) > hub.break_after
    done = run(hub.address)
    assert done.returncode == 0, done.stderr
    again = run(hub.address, HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout
    assert (large, f"bytes={10 << 20}-") in hub.gets


def test_ids_that_the_hub_does_not_know(hub: Hub, run) -> None:
    unknown = run(hub.address, "someone/else")
    assert unknown.returncode == 2
    assert "someone/else is neither a directory here nor a model on the hub" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hf.resolve("org/name") == Path("org/name")
    for text in ("org/name/..evil/x", "../x", "org//other", "a b/c", "-a/b"):
        with pytest.raises(CheckpointError, match="does not exist"):
            hf.resolve(text)
