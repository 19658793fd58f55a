"""What is recorded is read, and what is no trace is refused before it costs anything."""

import contextlib
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.engine.expert_store import trace as format
from karakoram.engine.expert_store.trace import UNKNOWN, TraceWriter, read_trace
from karakoram.errors import FormatError, InputError

LAYERS, EXPERTS, TOP_K = (1, 2, 5), 300, 4


def drawn_ids(random: np.random.Generator, tokens: int) -> np.ndarray:
    return np.stack([random.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])


def write(path: Path, passes: tuple[int, ...] = (7, 1, 1, 3)) -> list[np.ndarray]:
    """Passes of so many tokens; their ids [L, T, K]."""
    random = np.random.default_rng(0)
    written = []
    with TraceWriter(path, LAYERS, EXPERTS, TOP_K) as writer:
        for tokens in passes:
            written.append(np.stack([drawn_ids(random, tokens) for _ in LAYERS]))
            for layer, ids_TK in zip(LAYERS, written[-1], strict=True):
                writer.record(layer, ids_TK)
    return written


def damage(path: Path, at: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(new)] = new
    path.write_bytes(content)


def test_everything_comes_back(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    with TraceWriter(tmp_path / "t", LAYERS, EXPERTS, TOP_K, scores=True) as writer:
        ids, scores = drawn_ids(random, 3), random.random((3, TOP_K))
        for layer in LAYERS:
            writer.record(layer, ids, scores, np.array([4, 4, 9]))
            if layer == 2:
                writer.guess(5, np.array([1, 2, 299]))
        for layer in LAYERS:
            writer.record(layer, ids[:2], scores[:2], np.array([9, 4]))
    trace = read_trace(tmp_path / "t")
    assert (trace.layers, trace.experts, trace.top_k, trace.tokens, trace.cut) == (LAYERS, EXPERTS, TOP_K, 5, False)
    first, second = trace.passes
    assert (first.ids_LTK == ids).all()
    assert first.scores_LTK is not None
    assert np.allclose(first.scores_LTK, scores, atol=2**-11)  # float16 of numbers below 1
    assert first.guesses is not None
    assert [one.tolist() for one in first.guesses] == [[], [], [1, 2, 299]]
    assert first.sequences_T.tolist() == [4, 4, 9]
    assert first.positions_T.tolist() == [0, 1, 0]
    assert second.positions_T.tolist() == [1, 2]
    assert trace.ids_NLK().shape == (5, 3, TOP_K)


def test_without_sequences_they_are_unknown(tmp_path: Path) -> None:
    written = write(tmp_path / "t")
    trace = read_trace(tmp_path / "t")
    assert all((one.ids_LTK == ids).all() for one, ids in zip(trace.passes, written, strict=True))
    assert trace.passes[0].sequences_T.tolist() == [UNKNOWN] * 7
    assert trace.passes[1].positions_T.tolist() == [7]


def test_passes_that_do_not_end_are_forgotten(tmp_path: Path) -> None:
    ids = drawn_ids(np.random.default_rng(0), 4)
    with TraceWriter(tmp_path / "t", LAYERS, EXPERTS, TOP_K) as writer:
        writer.record(1, ids)
        writer.record(2, ids)
        writer.record(1, ids[:2])  # begun anew, with fewer rows
        writer.record(2, ids[:2])
        writer.record(5, ids[:2])
        writer.record(5, ids)  # a layer too many
        writer.record(1, ids)
        writer.record(5, ids)  # one left out
        writer.record(1, ids)
        writer.record(2, ids[:3])  # a row lost on the way
        writer.record(5, ids[:3])
        writer.record(1, ids)
    assert [one.ids_LTK.shape[1] for one in read_trace(tmp_path / "t").passes] == [2]


def test_a_killed_run_leaves_what_was_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "_FLUSH_S", 0.0)
    path, ids = tmp_path / "t", drawn_ids(np.random.default_rng(0), 2)
    writer = TraceWriter(path, LAYERS, EXPERTS, TOP_K)
    assert read_trace(path).passes == ()
    for _ in range(3):
        for layer in LAYERS:
            writer.record(layer, ids)
    assert read_trace(path).tokens == 6
    whole = path.read_bytes()
    writer.close()
    writer.close()
    for end in range(len(whole) - 40, len(whole)):
        path.write_bytes(whole[:end])
        trace = read_trace(path)
        assert trace.cut
        assert trace.tokens == 4


def test_threads_do_not_mix_their_bytes(tmp_path: Path) -> None:
    ids = drawn_ids(np.random.default_rng(0), 2)
    one_layer = TraceWriter(tmp_path / "t", (3,), EXPERTS, TOP_K)
    threads = [threading.Thread(target=lambda: [one_layer.record(3, ids) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one_layer.close()
    trace = read_trace(tmp_path / "t")
    assert trace.tokens == 400
    assert all((one.ids_LTK[0] == ids).all() for one in trace.passes)


@given(st.data())
def test_no_damage_passes_unseen_or_breaks_the_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t"
    write(path, (2, 1))
    size = path.stat().st_size
    at = data.draw(st.integers(0, size - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != path.read_bytes()[at]))
    damage(path, at, bytes([value]))
    with contextlib.suppress(FormatError):
        assert read_trace(path).cut  # a length that points beyond the end: as if the run had been killed


def block(raw: bytes, announced: int | None = None) -> bytes:
    packed = zlib.compress(raw)
    head = struct.pack("<4sIII", b"BLK1", len(raw) if announced is None else announced, len(packed), zlib.crc32(packed))
    return head + packed


def a_pass(ids: list[int], tokens: int = 1) -> bytes:
    return struct.pack("<Ii", tokens, -1) + np.array(ids, "<u2").tobytes() + bytes(2 * len(LAYERS))


@pytest.mark.parametrize(
    "block",
    [
        block(a_pass([300] + [*range(11)])),  # an expert that is none
        block(a_pass([1, 1, 2, 3] + [*range(8)])),  # the same twice
        block(a_pass([*range(12)], tokens=2**32 - 1)),  # more tokens than bytes
        block(a_pass([])[:4]),
        block(struct.pack("<I", 0) + bytes(6)),  # a pass of nothing
        block(a_pass([*range(12)])[:-6] + struct.pack("<HHHH", 0, 0, 1, 300)),  # a guess that is none
        block(bytes(1 << 20), announced=100),  # unpacks to more than it says
        block(a_pass([*range(12)]), announced=1 << 20),
        block(a_pass([*range(12)]), announced=2**32 - 1),
        struct.pack("<4sIII", b"BLK1", 10, 2**32 - 1, 0),
        b"BLK2" + bytes(12),
    ],
)
def test_blocks_that_lie_are_refused(tmp_path: Path, block: bytes) -> None:
    write(tmp_path / "t", ())
    with (tmp_path / "t").open("ab") as file:
        file.write(block)
    with pytest.raises(FormatError, match="damaged"):
        read_trace(tmp_path / "t")


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "t")
    monkeypatch.setattr(format, "MOST_TRACE_BYTES", 100)
    with pytest.raises(FormatError, match="shorter"):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "flags", "match"),
    [
        ((1, 1), 8, 2, 0, "not in order"),
        ((1,), 0, 1, 0, "0 experts"),
        ((1,), 8, 9, 0, "9 of 8"),
        ((1,), 8, 0, 0, "0 of 8"),
        ((), 8, 1, 0, "0 layers"),
        ((1,), 8, 1, 4, "flags 0x4"),
    ],
)
def test_headers_that_are_absurd_are_refused(
    tmp_path: Path, layers: tuple[int, ...], experts: int, top_k: int, flags: int, match: str
) -> None:
    path = tmp_path / "t"
    path.write_bytes(format._header(layers, experts, top_k, flags))
    with pytest.raises(FormatError, match=match):
        read_trace(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"K2EXPERT", b"PK\3\4" + bytes(100)):
        (tmp_path / "t").write_bytes(content)
        with pytest.raises(FormatError, match="no trace"):
            read_trace(tmp_path / "t")


def test_a_model_that_no_trace_can_hold(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="70000 experts"):
        TraceWriter(tmp_path / "t", (0,), 70_000, 2)
    assert not (tmp_path / "t").exists()


def test_wrong_shapes_are_mistakes(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", (0,), 8, 2, scores=True) as writer:
        for ids, scores in ((np.zeros((1, 3)), np.zeros((1, 3))), (np.zeros((1, 2)), None), (np.zeros((0, 2)), None)):
            with pytest.raises(ValueError):
                writer.record(0, ids, scores)
        with pytest.raises(ValueError, match="sequences"):
            writer.record(0, np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(3))
