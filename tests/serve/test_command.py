"""`k2 serve`: what it refuses, and the whole way once, with the bundled model."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from karakoram.cli import main
from karakoram.cli.serve import keys_of, names_of
from karakoram.errors import InputError
from karakoram.serve.listen import bind, is_public, url_of
from tests.serve.conftest import WAIT_S

pytestmark = pytest.mark.timeout(120)


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as left:
        main.run(["serve", *arguments])
    return left.value.code, capsys.readouterr().err


def test_a_public_address_needs_a_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("K2_API_KEY", raising=False)
    code, err = k2(capsys, "--host", "0.0.0.0", "--port", "0")
    assert code == 2 and "K2_API_KEY" in err and "--allow-public" in err


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, err = k2(capsys, "--port", str(port))
    assert code == 2 and str(port) in err and "--port" in err


def test_an_address_of_another_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = k2(capsys, "--host", "192.0.2.1", "--port", "0", "--allow-public")
    assert code == 2 and "192.0.2.1" in err


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = k2(capsys, "no-such-model", "--port", "0")
    assert code == 2 and "no-such-model" in err


def test_a_model_that_does_not_load(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, err = k2(capsys, str(tmp_path), "--port", "0")
    assert code == 2 and "k2: error:" in err


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False),
        ("127.8.9.1", False),
        ("::1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.1.5", True),
        ("example.org", True),
    ],
)
def test_public_addresses(host: str, public: bool) -> None:
    assert is_public(host) == public


def test_keys() -> None:
    assert keys_of(["a"], " b  c ") == ["a", "b", "c"]
    assert keys_of(None, None) == [] == keys_of(None, "")
    with pytest.raises(InputError):
        keys_of([" "], None)


def test_names(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    assert names_of("nano") == ["nano"]
    assert names_of("moonshotai/Kimi-K2") == ["moonshotai/Kimi-K2", "Kimi-K2"]
    assert names_of(str(tmp_path / "my-model")) == ["my-model"]


def test_both_families_of_addresses() -> None:
    with bind("127.0.0.1", 0) as four:
        assert url_of(four).startswith("http://127.0.0.1:")
    if socket.has_ipv6:
        try:
            with bind("::1", 0) as six:
                assert url_of(six).startswith("http://[::1]:")
        except InputError:
            pytest.skip("this machine has no IPv6")
    with pytest.raises(InputError):
        bind("::zz", 0)


@pytest.mark.slow
def test_the_whole_way() -> None:
    command = [sys.executable, "-c", "from karakoram.cli.main import run; run()", "serve", "--port", "0"]
    environment = {**os.environ, "K2_API_KEY": "sesame-street"}
    command += ["--context", "512", "--max-concurrency", "4", "--name", "tiny"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout and server.stderr
        line = server.stdout.readline()
        assert line.startswith("tiny is ready at http://127.0.0.1:"), server.stderr.read()
        url = line.split()[4]
        with httpx.Client(base_url=url, timeout=WAIT_S, headers={"x-api-key": "sesame-street"}) as client:
            body = {"messages": [{"role": "user", "content": "What is 17 * 23?"}], "max_tokens": 20, "stream": True}
            text = client.post("/v1/chat/completions", json=body).text
            assert text.endswith("data: [DONE]\n\n")
            assert json.loads(text.split("\n\n")[0].removeprefix("data: "))["model"] == "tiny"
            assert "vllm:num_requests_running" in client.get("/metrics").text
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 401
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=WAIT_S)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 0, err
    assert "sesame" not in line + out + err and "Traceback" not in err
