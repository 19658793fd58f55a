"""Shards: the same bytes however they were made, found again, restartable, and refused when they do not fit."""

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karakoram.chat import ChatFormat
from karakoram.errors import TrainingError
from karakoram.train.data.corpus import build
from karakoram.train.data.corpus.build import SkipLimit, build_shards
from karakoram.train.data.corpus.conversations import Rendering, text_sample
from karakoram.train.data.corpus.lines import JsonLines
from karakoram.train.data.corpus.shard_file import Shard, write_shard
from karakoram.train.data.corpus.shards import ShardSet

Write = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[3]
WORDS = "the a tool call glacier ice moves slowly 12 345 é 山 and over".split()


def some_texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))} for _ in range(count)]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHUNK_RECORDS", 16)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def test_every_text_is_a_sample(json_lines: Write, nano_dir: Path, nano_format: ChatFormat, tmp_path: Path) -> None:
    texts = some_texts(100)
    seen = []
    data = build_shards(
        JsonLines(json_lines(texts)), nano_dir, tmp_path / "cache", shard_tokens=700, progress=lambda *x: seen.append(x)
    )
    wanted = [text_sample(nano_format, record["text"]) for record in texts]
    assert len(data) == 100 and len(data.index["shards"]) > 3
    for number in random.Random(1).sample(range(100), 100):
        ids, weights = data.read(number, 0, int(data.lengths[number]))
        assert ids.tolist() == wanted[number].ids and weights.tolist() == wanted[number].weights
    assert data.tokens == sum(len(sample.ids) for sample in wanted)
    size = (tmp_path / "data.jsonl").stat().st_size
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (size, size)
    data.verify()


def test_the_same_call_finds_them_and_another_does_not(json_lines: Write, nano_dir: Path, tmp_path: Path) -> None:
    path, cache = json_lines(some_texts(20)), tmp_path / "cache"
    first = build_shards(JsonLines(path), nano_dir, cache)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy2(path, moved / path.name)  # with its time
    path.unlink()

    def never(*_: int) -> None:
        pytest.fail("built again")

    again = build_shards(JsonLines(moved / path.name), nano_dir, cache, progress=never)
    assert (again.folder, again.fingerprint) == (first.folder, first.fingerprint)
    other = build_shards(JsonLines(moved / path.name), nano_dir, cache, rendering=Rendering(read_weight=0.1))
    assert other.folder != first.folder
    json_lines(some_texts(21))
    assert build_shards(JsonLines(path), nano_dir, cache).folder not in (first.folder, other.folder)


def test_processes_change_no_byte(json_lines: Write, nano_dir: Path, tmp_path: Path) -> None:
    source = JsonLines(json_lines([*some_texts(150), {"txt": 1}, *some_texts(20, seed=1)]))
    one = build_shards(source, nano_dir, tmp_path / "one", shard_tokens=800)
    two = build_shards(source, nano_dir, tmp_path / "two", shard_tokens=800, processes=2)
    assert contents(one.folder) == contents(two.folder)
    assert two.index["skipped"] == 1


def test_of_two_builders_one_waits(json_lines: Write, nano_dir: Path, tmp_path: Path) -> None:
    source, builders = JsonLines(json_lines(some_texts(100))), set[int]()

    def one(number: int) -> ShardSet:
        return build_shards(source, nano_dir, tmp_path / "cache", progress=lambda *_: builders.add(number))

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(one, range(3)))
    assert len(builders) == 1
    assert len({data.fingerprint for data in found}) == 1 and len(found[0]) == 100


@pytest.mark.parametrize("packed", [False, True])
def test_a_killed_build_goes_on(
    json_lines: Write, nano_dir: Path, tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = json_lines([*some_texts(150), b"bad", *some_texts(20, seed=1)])
    if packed:
        packed_path = tmp_path / "data.jsonl.gz"
        packed_path.write_bytes(gzip.compress(path.read_bytes()))
        path = packed_path
    whole = build_shards(JsonLines(path), nano_dir, tmp_path / "whole", shard_tokens=800)

    class Killed(BaseException):
        pass

    def kill_after(chunks: int) -> Callable[[int, int], None]:
        left = [chunks]

        def progress(done: int, total: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        return progress

    write, cache, stops = write_shard, tmp_path / "killed", 0
    for chunks in (0, 1, 3, 4):
        with pytest.raises(Killed):
            build_shards(JsonLines(path), nano_dir, cache, shard_tokens=800, progress=kill_after(chunks))

    def torn(path: Path, *arguments: Any) -> str:
        nonlocal stops
        checksum = write(path, *arguments)
        stops += 1
        if stops < 3:
            raise Killed  # the shard is there, the index does not know it
        return checksum

    monkeypatch.setattr(build, "write_shard", torn)
    for _ in range(2):
        with pytest.raises(Killed):
            build_shards(JsonLines(path), nano_dir, cache, shard_tokens=800)
    [folder] = cache.iterdir()
    with pytest.raises(TrainingError, match="are not finished"):
        ShardSet(folder)
    (folder / "shard-00099.part").write_bytes(b"left over")
    finished = build_shards(JsonLines(path), nano_dir, cache, shard_tokens=800)
    assert contents(finished.folder) == contents(whole.folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_sigkill(json_lines: Write, nano_dir: Path, tmp_path: Path, processes: int) -> None:
    path = json_lines(some_texts(300))
    code = f"""
import os, signal, sys
from pathlib import Path
from karakoram.train.data.corpus import build
from karakoram.train.data.corpus.lines import JsonLines

def progress(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

assert "torch" not in sys.modules  # seconds and memory for every process that tokenises
build.CHUNK_RECORDS = 16
if __name__ == "__main__":
    build.build_shards(
        JsonLines({str(path)!r}), Path({str(nano_dir)!r}), Path({str(tmp_path / "cache")!r}), processes={processes},
        progress=progress, shard_tokens=800,
    )
"""
    script = tmp_path / "killed.py"
    script.write_text(code)
    # Captured output ends when the last process that holds it does: tokenising ones must not outlive their reader.
    killed = subprocess.run([sys.executable, script], check=False, capture_output=True, timeout=120, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [folder] = (tmp_path / "cache").iterdir()
    before = contents(folder)
    assert len(json.loads(before["index.json"])["shards"]) >= 3
    finished = build_shards(JsonLines(path), nano_dir, tmp_path / "cache", shard_tokens=800)
    assert all(contents(folder)[name] == before[name] for name in before if name.endswith(".k2s"))
    assert contents(finished.folder) == contents(
        build_shards(JsonLines(path), nano_dir, tmp_path / "whole", shard_tokens=800).folder
    )


def test_bad_lines_are_counted_and_named(json_lines: Write, nano_dir: Path, tmp_path: Path) -> None:
    records: list[Any] = some_texts(60)
    records[7], records[30], records[31] = b'{"text": "\xff"}', b"{", {"text": ""}
    path = json_lines(records)
    data = build_shards(JsonLines(path), nano_dir, tmp_path)
    assert (len(data), data.index["records"], data.index["skipped"], data.index["empty"]) == (57, 60, 2, 1)
    assert data.index["skipped_examples"] == [
        "data.jsonl:8: it is not UTF-8 at byte 10",
        "data.jsonl:31: it is not JSON (Expecting property name enclosed in double quotes, character 3)",
    ]
    with pytest.raises(TrainingError, match=r"first 32 records, 2 cannot be read; the first: data\.jsonl:8: it is not"):
        build_shards(JsonLines(path), nano_dir, tmp_path / "strict", skip_limit=SkipLimit(0.0, 1))
    many = [record if i % 9 else b"{" for i, record in enumerate(some_texts(200))]
    with pytest.raises(TrainingError, match=r"cannot be read.*now 0\.10% and at least 10"):
        build_shards(JsonLines(json_lines(many, "many.jsonl")), nano_dir, tmp_path)


def test_nothing_to_learn(json_lines: Write, nano_dir: Path, tmp_path: Path) -> None:
    path = json_lines([{"text": " "}, {"messages": []}])
    with pytest.raises(TrainingError, match=r"hold no document \(records: 2, skipped: 0, empty: 2\)"):
        build_shards(JsonLines(path), nano_dir, tmp_path)
    with pytest.raises(TrainingError, match="read_weight is nan"):
        build_shards(JsonLines(path), nano_dir, tmp_path, rendering=Rendering(read_weight=float("nan")))


def test_a_process_that_dies(json_lines: Write, nano_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="A process that tokenises ended"):
        build_shards(DiesInWorker(json_lines(some_texts(20))), nano_dir, tmp_path, processes=2)


class DiesInWorker(JsonLines):
    def document(self, raw: bytes) -> Any:
        import os

        os._exit(3)


def test_a_full_disk(json_lines: Write, nano_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_shard", full)
    with pytest.raises(TrainingError, match=r"cannot be written.*No space left"):
        build_shards(JsonLines(json_lines(some_texts(20))), nano_dir, tmp_path)


@pytest.fixture
def built(json_lines: Write, nano_dir: Path, tmp_path: Path) -> ShardSet:
    return build_shards(JsonLines(json_lines(some_texts(60))), nano_dir, tmp_path / "cache", shard_tokens=500)


def test_another_vocabulary_is_refused(built: ShardSet, nano_dir: Path, tmp_path: Path) -> None:
    assert ShardSet(built.folder, nano_dir, 4096).vocab_size == 4096
    assert ShardSet(built.folder, nano_dir, 9000).vocab_size == 4096
    with pytest.raises(TrainingError, match=r"vocabulary of 4,096 tokens; the model has 4,000"):
        ShardSet(built.folder, vocab_size=4000)
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copy(nano_dir / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["model_max_length"] = 7  # no matter of the vocabulary
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ShardSet(built.folder, tmp_path)
    tokens = config["added_tokens_decoder"]
    first, second = sorted(tokens)[:2]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match="made with another tokenizer"):
        ShardSet(built.folder, tmp_path)


def overwrite(path: Path, at: int, new: bytes) -> None:
    with open(path, "rb+") as file:
        file.seek(at)
        file.write(new)


def test_damaged_shards(built: ShardSet) -> None:
    path = built.folder / "shard-00001.k2s"
    good, first = path.read_bytes(), built.index["shards"][0]["samples"]
    ids_at = 64 + 8 * (built.index["shards"][1]["samples"] + 1)
    weights_at = ids_at + 2 * built.index["shards"][1]["tokens"]
    for at, new, reason in (
        (0, b"X", "does not begin"),
        (8, b"\x02", "does not begin"),
        (16, b"\xff" * 8, "where its header promises"),
        (64, b"\x01", "offsets that do not rise"),
        (72, b"\x00" * 8, "offsets that do not rise"),
        (64 + 8, b"\xff" * 7 + b"\x7f", "offsets that do not rise"),
    ):
        overwrite(path, at, new)
        with pytest.raises(TrainingError, match=rf"shard-00001\.k2s .*{reason}"):
            ShardSet(built.folder)
        path.write_bytes(good)
    path.write_bytes(good[:-1])
    with pytest.raises(TrainingError, match="where its header promises"):
        ShardSet(built.folder)
    path.write_bytes(good[:10])
    with pytest.raises(TrainingError, match="has only 10 bytes"):
        ShardSet(built.folder)
    for at, new, reason in (
        (ids_at + 4, b"\x00\x10", "id 4096 .*position 2"),
        (weights_at + 3, b"\xff", "weight 255 .*position 3"),
    ):
        path.write_bytes(good)
        overwrite(path, at, new)
        damaged = ShardSet(built.folder)
        with pytest.raises(TrainingError, match=rf"shard-00001\.k2s has the {reason}"):
            damaged.read(first, 0, int(damaged.lengths[first]))
        with pytest.raises(TrainingError, match="has the checksum"):
            damaged.verify()
    path.write_bytes(good)
    ShardSet(built.folder).verify()


def test_shards_that_vanish_or_shrink_while_open(built: ShardSet) -> None:
    path = built.folder / "shard-00000.k2s"
    built.read(0, 0, 1)
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(TrainingError, match=r"shard-00000\.k2s went from"):
        built.read(0, 0, 1)
    path.unlink()
    for reads in (lambda: built.read(0, 0, 1), lambda: ShardSet(built.folder)):
        with pytest.raises(TrainingError, match=r"shard-00000\.k2s (vanished|cannot be opened)"):
            reads()


def test_a_shard_of_another_set(built: ShardSet) -> None:
    shutil.copy(built.folder / "shard-00000.k2s", built.folder / "shard-00001.k2s")
    with pytest.raises(TrainingError, match=r"shard-00001\.k2s holds .* where its index says"):
        ShardSet(built.folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("shards"),
        lambda index: index.update(version=2),
        lambda index: index.update(tokens=-1),
        lambda index: index.update(tokens=1e3),
        lambda index: index["shards"][0].update(file="../other"),
        lambda index: index["shards"][0].update(xxh3_64=5),
        lambda index: index["tokenizer"].update(vocab_size=None),
        lambda index: index.update(complete="yes"),
        lambda index: index.update(shards=5),
        lambda index: index.update(position=[0, -1, 0]),
        lambda index: index.update(position=[0, 1]),
        lambda index: index.update(skipped="none"),
        lambda index: index.update(skipped_examples=[5]),
    ],
)
def test_a_damaged_index(built: ShardSet, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((built.folder / "index.json").read_text())
    change(index)
    (built.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(TrainingError, match=r"index\.json is damaged"):
        ShardSet(built.folder)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no token shards"):
        ShardSet(tmp_path)


def test_wide_ids(tmp_path: Path) -> None:
    ids, weights = (
        [np.array([70_000, 1], "<u4"), np.array([163_839], "<u4")],
        [np.array([100, 0], "u1"), np.array([7], "u1")],
    )
    write_shard(tmp_path / "s.k2s", 4, ids, weights, np.array([1, 2]))
    shard = Shard(tmp_path / "s.k2s")
    assert shard.ids.tolist() == [70_000, 1, 163_839] and shard.weights.tolist() == [100, 0, 7]
    assert shard.offsets.tolist() == [0, 1, 3]
