"""Sources: every document once and in order, from anywhere; what is damaged is named, what vanishes is an error."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karakoram.errors import TrainingError
from karakoram.train.data.corpus import lines as line_sources
from karakoram.train.data.corpus.lines import JsonLines, TextFiles
from karakoram.train.data.corpus.records import BadRecord, Fields, Source
from karakoram.train.data.corpus.tables import HuggingFace, Parquet

Write = Callable[..., Path]


def texts(source: Source) -> list[str | None]:
    documents = [source.document(record.raw) for record in source.records() if record.error is None]
    return [document.text if document else None for document in documents]


def check_goes_on_from_anywhere(source: Source) -> None:
    whole = list(source.records())
    assert whole
    for at, record in enumerate(whole):
        assert list(source.records(record.after)) == whole[at + 1 :]
    assert source.total in (0, whole[-1].done)


def test_json_lines_and_folders(tmp_path: Path, json_lines: Write) -> None:
    json_lines([{"text": "b1"}, {"text": "b2"}], "b.jsonl")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a1"}\n\n{"text": "a2"}'))
    json_lines([{"text": "not read"}], "c.json")
    source = JsonLines(tmp_path)
    assert texts(source) == ["a1", None, "a2", "b1", "b2"]
    assert [(r.file, r.number) for r in source.records()] == [
        ("a/z.jsonl.gz", 1), ("a/z.jsonl.gz", 2), ("a/z.jsonl.gz", 3), ("b.jsonl", 1), ("b.jsonl", 2),
    ]  # fmt: skip
    check_goes_on_from_anywhere(source)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "train.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"text": "x"}\n')
    assert [record.file for record in JsonLines(paths).records()] == [path.as_posix() for path in paths]


def test_conversations_and_fields(json_lines: Write) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = json_lines(
        [
            {"messages": chat, "tools": tools, "thinking": False},
            {"messages": json.dumps(chat), "tools": json.dumps(tools), "text": "ignored"},
            {"messages": chat, "tools": None},
        ]
    )
    source = JsonLines(path)
    first, second, third = (source.document(record.raw) for record in source.records())
    assert first and (first.messages, first.tools, first.thinking, first.text) == (chat, tools, False, None)
    assert second and (second.messages, second.tools, second.thinking) == (chat, tools, True)
    assert third and third.tools is None
    named = JsonLines(json_lines([{"body": "x"}], "n.jsonl"), Fields(text="body"))
    assert texts(named) == ["x"]
    assert named.describe() != JsonLines(named.paths).describe()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "not JSON"),
        (b'{"text": NaN}', "NaN is no JSON number"),
        (b'{"text": "x", "n": -Infinity}', "Infinity is no JSON number"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b"[1]", "a JSON list, not an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"txt": "x"}', "neither a field 'messages' nor 'text'"),
        (b'{"text": 5}', "a int, not a string"),
        (b'{"messages": 5}', "a int, not a list"),
        (b'{"messages": "[1"}', "the field 'messages': it is not JSON"),
        (b'{"messages": [{}], "tools": {}}', "a dict, not a list"),
        (b'{"messages": [{}], "thinking": "no"}', "not true or false"),
    ],
)
def test_bad_lines(line: bytes, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        JsonLines("unused").document(line)


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n")
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbffour")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no.html").write_text("x")
    whole = TextFiles(tmp_path)
    assert texts(whole) == ["one\ntwo\n\n \nthree\n", "four"]
    check_goes_on_from_anywhere(whole)
    parts = TextFiles(tmp_path, split="blank_lines")
    assert texts(parts) == ["one\ntwo\n", "three\n", "four"]
    assert [record.number for record in parts.records()] == [1, 5, 1]
    check_goes_on_from_anywhere(parts)
    with pytest.raises(TrainingError, match="Unknown split"):
        TextFiles(tmp_path, split="words")  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [5, 200, 600])
def test_a_truncated_gzip_ends_with_an_error(tmp_path: Path, json_lines: Write, cut: int) -> None:
    packed = gzip.compress(b"".join(b'{"text": "%d %s"}\n' % (i, str(i * 77777).encode()) for i in range(300)))
    assert len(packed) > 700
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:cut])
    json_lines([{"text": "still read"}], "b.jsonl")
    *good, bad, last = JsonLines(tmp_path).records()
    assert bad.error and "gzip" in bad.error and (bad.file, bad.number) == ("a.jsonl.gz", len(good) + 1)
    assert last.raw == b'{"text": "still read"}\n'
    [failed, other] = TextFiles([tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl"]).records()
    assert failed.error and not failed.raw and other.error is None


def test_no_gzip_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"text": "plain"}\n')
    [bad] = JsonLines(tmp_path).records()
    assert bad.error and "gzip" in bad.error


def test_giant_lines_are_not_kept(tmp_path: Path, json_lines: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_sources, "MAX_RECORD_BYTES", 64)
    path = json_lines([{"text": "short"}, {"text": "long" * 100}, {"text": "after"}])
    source = JsonLines(path)
    assert [(r.number, r.error is None) for r in source.records()] == [(1, True), (2, False), (3, True)]
    check_goes_on_from_anywhere(source)
    (tmp_path / "t.txt").write_text("word " * 6 + "\n" + "word " * 6 + "\n" + "word " * 6 + "\n\nshort\n")
    giant, short = TextFiles(tmp_path / "t.txt", split="blank_lines").records()
    assert giant.error and not giant.raw and giant.number == 1
    assert short.raw == b"short\n"
    [giant] = TextFiles(tmp_path / "t.txt").records()
    assert giant.error and not giant.raw


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for source, reason in (
        (JsonLines(tmp_path / "none.jsonl"), "There is no training data"),
        (JsonLines(tmp_path), "holds no file ending in .jsonl"),
        (JsonLines([]), "No file"),
        (Parquet(tmp_path), "holds no file ending in .parquet"),
    ):
        with pytest.raises(TrainingError, match=reason):
            source.describe()


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_vanishes_shrinks_or_grows(tmp_path: Path, packed: bool) -> None:
    name = "b.jsonl.gz" if packed else "b.jsonl"
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(20_000))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    second = tmp_path / name
    whole = gzip.compress(content, mtime=0) if packed else content

    def start() -> Any:
        second.write_bytes(whole)
        records = JsonLines(tmp_path).records()
        next(records)
        return records

    records = start()
    second.unlink()
    with pytest.raises(TrainingError, match=rf"{name} vanished"):
        list(records)
    for size in (0, len(whole) // 2):
        records = start()
        next(records)  # of the second file, which is open now
        with open(second, "rb+") as file:
            file.truncate(size)
        with pytest.raises(TrainingError, match=rf"{name} went from"):
            list(records)
    records = start()
    next(records)
    with open(second, "ab") as file:
        file.write(gzip.compress(b"more\n") if packed else b'{"text": "more"}\n')
    with pytest.raises(TrainingError, match=rf"{name} went from"):
        list(records)


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=group, compression="none")
    return path


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": f"a{i}", "other": i} for i in range(700)], 300)
    write_parquet(tmp_path / "b.parquet", [{"text": "b0"}, {"text": None}], 10)
    source = Parquet(tmp_path)
    assert texts(source) == [*(f"a{i}" for i in range(700)), "b0", None]
    assert source.total == 702
    whole = list(source.records())
    assert whole[450].raw == {"text": "a450"} and whole[450].number == 451
    for at in (0, 299, 450, 699, 700):
        assert list(source.records(whole[at].after)) == whole[at + 1 :]


def test_parquet_conversations(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Hi", "tool_calls": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
    ]
    path = write_parquet(tmp_path / "a.parquet", [{"messages": messages, "tools": "[]"}], 10)
    source = Parquet(path)
    [record] = source.records()
    document = source.document(record.raw)
    assert document and document.tools is None
    assert document.messages == [{"role": "user", "content": "Hi"}, {k: v for k, v in messages[1].items() if v}]


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": "x" * 50 + str(i)} for i in range(400)], 100)
    content = bytearray(path.read_bytes())
    content[8:200] = b"\xff" * 192  # the first page's header
    path.write_bytes(content)
    records = list(Parquet(path).records())
    bad = [record for record in records if record.error]
    assert len(bad) == 1 and bad[0].lost == 100 and bad[0].number == 1 and bad[0].file == "a.parquet"
    assert len(records) == 301
    path.write_bytes(content[:1000])
    with pytest.raises(TrainingError, match=r"a\.parquet is no whole Parquet file"):
        list(Parquet(path).records())
    path = write_parquet(tmp_path / "c.parquet", [{"body": "x"}], 100)
    with pytest.raises(TrainingError, match="neither a column 'messages' nor 'text', but only body"):
        list(Parquet(path).records())
    source = Parquet(path, Fields(text="body"))
    assert source.describe()
    path.unlink()
    with pytest.raises(TrainingError, match="vanished"):
        list(source.records())


def test_hugging_face_folder(tmp_path: Path, json_lines: Write) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    json_lines([{"text": f"t{i}", "n": i} for i in range(10)], "set/train.jsonl")
    source = HuggingFace(str(tmp_path / "set"))
    assert texts(source) == [f"t{i}" for i in range(10)]
    check_goes_on_from_anywhere(source)
    assert source.describe() == HuggingFace(str(tmp_path / "set")).describe()
    with pytest.raises(TrainingError, match="cannot be read"):
        list(HuggingFace(str(tmp_path / "set"), split="nosuch").records())
    with pytest.raises(TrainingError, match=r"cannot be read.*HF_HUB_OFFLINE"):
        list(HuggingFace(str(tmp_path / "nothing")).records())


def test_only_tables_are_read_from_hugging_face(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.xml").write_text("<a/>")
    with pytest.raises(TrainingError, match="of the kind 'xml'; only tables"):
        list(HuggingFace(str(tmp_path)).records())
