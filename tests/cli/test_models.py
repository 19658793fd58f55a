"""`k2 models` on a cache laid out as huggingface_hub lays it out."""

import json
from pathlib import Path

import pytest

from karakoram import env
from karakoram.cli import main, models
from karakoram.config import PRESETS


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


def add(cache: Path, repo_id: str, config: object, weight_bytes: int = 2_000_000) -> Path:
    """One downloaded model: blobs, one snapshot of links, one ref."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"  # the same in all: so it is in duplicated repositories
    snapshot = repo / "snapshots" / commit
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for name, content in {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": b"\0" * weight_bytes,
    }.items():
        (repo / "blobs" / f"blob-{name}").write_bytes(content)
        (snapshot / name).symlink_to(repo / "blobs" / f"blob-{name}")
    return repo


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("COLUMNS", "160")
    add(tmp_path / "hub", "moonshotai/Moonlight", PRESETS["moonlight-16b"])
    add(tmp_path / "hub", "moonshotai/Odd", {**PRESETS["k2"], "mystery": 1})
    add(tmp_path / "hub", "someone/llama", {"model_type": "llama"})
    return tmp_path / "hub"


def test_the_family_is_listed_and_others_on_request(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = k2(capsys, "models")
    assert (code, err) == (0, "")
    assert "moonshotai/Moonlight" in out and "2.0 MB" in out and "deepseek-v3" in out
    assert "moonshotai/Odd" in out and "refused" in out
    assert "someone/llama" not in out and "1 model(s) of other families" in out
    assert "someone/llama" in k2(capsys, "models", "--all")[1]
    listed = json.loads(k2(capsys, "models", "--json")[1])
    assert [model["name"] for model in listed if model["name"] != "nano"] == ["moonshotai/Moonlight", "moonshotai/Odd"]
    assert all(model["size_bytes"] > 0 for model in listed)


def test_the_bundled_model_is_listed(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PRESETS["nano"]))
    monkeypatch.setattr(env, "bundled_model_dir", lambda: folder)
    assert [model.name for model in models.bundled()] == ["nano"]
    code, _, err = k2(capsys, "models", "remove", "nano", "--yes")
    assert code == 2 and "bundled" in err
    assert (folder / "config.json").exists()


def test_no_cache_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))
    monkeypatch.setattr(models, "bundled", list)
    code, out, _ = k2(capsys, "models")
    assert code == 0 and "no checkpoints here yet" in out
    assert json.loads(k2(capsys, "models", "--json")[1]) == []


def test_remove_with_yes_removes_that_model_only(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = k2(capsys, "models", "remove", "moonshotai/Moonlight", "--yes")
    assert code == 0 and "2.0 MB freed" in out
    assert sorted(path.name for path in cache.glob("models--*")) == [
        "models--moonshotai--Odd",
        "models--someone--llama",
    ]


def test_remove_asks_first(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = k2(capsys, "models", "remove", "moonshotai/Moonlight")
    assert code == 2 and "--yes" in err  # nobody to ask under pytest
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer in (False, True):
        monkeypatch.setattr("typer.confirm", lambda text, answer=answer: answer)
        assert k2(capsys, "models", "remove", "moonshotai/Moonlight")[0] == 0
        assert (cache / "models--moonshotai--Moonlight").exists() is not answer


@pytest.mark.parametrize("name", ["moonshotai/None", "../../etc", "*", ""])
def test_removing_what_is_not_there(name: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = k2(capsys, "models", "remove", name, "--yes")
    assert code == 2 and "not in the cache" in err
    assert len(list(cache.glob("models--*"))) == 3
