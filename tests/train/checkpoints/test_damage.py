"""A checkpoint that is damaged, or was made to do harm: it is named, nothing of it runs, and nothing is half loaded."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from karakoram.errors import TrainingError
from karakoram.train.checkpoints import dcp, find
from karakoram.train.checkpoints.state import read_state
from karakoram.train.checkpoints.writer import CheckpointWriter
from tests.train.checkpoints import contents

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint in several files."""
    monkeypatch.setattr(dcp, "FILE_BYTES", 100)
    CheckpointWriter(tmp_path, asynchronous=False).save(1, contents.tensors(), contents.STATE)
    return find.path_of(tmp_path, 1)


def _refuse(path: Path, match: str = "is damaged") -> TrainingError:
    into = contents.blank(contents.tensors())
    with pytest.raises(TrainingError, match=match) as caught:
        dcp.read_tensors(path, into)
    assert not contents.differing(into, contents.blank(into)), "nothing was read"
    return caught.value


def _bombs(tmp_path: Path) -> tuple[Path, list[bytes]]:
    mark = tmp_path / "executed"
    torch.save(Bomb(mark), tmp_path / "bomb.pt")
    zipped = (tmp_path / "bomb.pt").read_bytes()
    plain = pickle.dumps(Bomb(mark))
    pickle.loads(plain)
    assert mark.exists(), "the bomb is a bomb"
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    mark.unlink()
    return mark, [plain, pickle.dumps(Bomb(mark), protocol=0), zipped]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_pickle_in_any_file_is_never_executed(path: Path, tmp_path: Path) -> None:
    mark, bombs = _bombs(tmp_path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert len(files) > 4
    for file in files:
        content = file.read_bytes()
        for bomb in bombs:
            file.write_bytes(bomb)
            error = _refuse(path)
            assert str(path) in error.what
            assert str(path) in error.fix
            if file.name == find.STATE_FILE:
                with pytest.raises(TrainingError, match=r"state\.json cannot be read"):
                    read_state(path)
            else:  # and with a CRC that vouches for it
                state_json = (path / find.STATE_FILE).read_bytes()
                contents.sign_anew(path)
                _refuse(path, r"safetensors cannot be used")
                (path / find.STATE_FILE).write_bytes(state_json)
        file.write_bytes(content)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_files_that_are_none_of_ours_are_not_opened(path: Path, tmp_path: Path) -> None:
    mark, bombs = _bombs(tmp_path)
    for name in (".metadata", "__0_0.distcp", "model/.metadata", "model/__0_0.distcp", "model/x.safetensors", "x.pt"):
        (path / name).write_bytes(bombs[0])
    assert not contents.differing(contents.loaded(path, contents.tensors()), contents.tensors())
    assert read_state(path)[0] == contents.STATE
    assert not mark.exists()


def _half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "No such file"),
        (_half, r"it has \d+ bytes, written were \d+"),
        (_flip_last_bit, "is not what was written"),
        (lambda file: file.write_bytes(b""), "it has 0 bytes"),
    ],
    ids=["missing", "truncated", "one bit", "empty"],
)
def test_damage_is_named_with_what_to_remove(path: Path, damage: Callable[[Path], Any], told: str) -> None:
    file = max((path / find.TENSORS_DIR).iterdir())
    damage(file)
    error = _refuse(path, f"is damaged: model/{re.escape(file.name)} .*{told}")
    assert error.fix == f"Remove {path} to resume from the checkpoint before it."
    shutil.rmtree(path)
    assert find.newest(path.parent.parent) is None


STATES: list[tuple[str, Any]] = [
    ("no json", "{"),
    ("a list", []),
    ("deep", "[" * 100_000),
    ("another format", {"format": 2, "tensors": {}, "files": {}, "state": {}}),
    ("no state", {"format": 1, "tensors": {}, "files": {}}),
    ("negative", {"format": 1, "tensors": {"a": ["F32", [-1]]}, "files": {}, "state": {}}),
    ("no number", {"format": 1, "tensors": {"a": ["F32", [True]]}, "files": {}, "state": {}}),
    ("dtype", {"format": 1, "tensors": {"a": ["F31", [1]]}, "files": {}, "state": {}}),
    ("dtype of another type", {"format": 1, "tensors": {"a": [["F32"], [1]]}, "files": {}, "state": {}}),
    ("escape", {"format": 1, "tensors": {}, "files": {"../x.safetensors": [1, 1]}, "state": {}}),
    ("absolute", {"format": 1, "tensors": {}, "files": {"/etc/x.safetensors": [1, 1]}, "state": {}}),
    ("no size", {"format": 1, "tensors": {}, "files": {"x.safetensors": ["1", 1]}, "state": {}}),
]


@pytest.mark.parametrize("content", [state[1] for state in STATES], ids=[state[0] for state in STATES])
def test_a_state_that_makes_no_sense_is_named(path: Path, content: Any) -> None:
    (path / find.STATE_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(TrainingError, match=r"is damaged: state\.json cannot be read"):
        read_state(path)


def test_a_state_of_impossible_size_is_not_read(path: Path) -> None:
    with (path / find.STATE_FILE).open("r+b") as file:
        file.truncate(1 << 40)  # a hole: it takes no space
    with pytest.raises(TrainingError, match=r"it has 1099511627776 bytes"):
        read_state(path)


def test_a_huge_claim_allocates_nothing(path: Path) -> None:
    """A tensor of 4 EiB: what is asked for decides what there is memory for, and the files are compared with it."""
    file = path / find.STATE_FILE
    content = json.loads(file.read_text())
    content["tensors"]["bias/layer"] = ["F32", [2**60]]
    file.write_text(json.dumps(content))
    _refuse(path, r"1 tensors differ, the first is bias/layer: F32 \[1152921504606846976\] there, F32 \[16\] here")


def _rewritten(path: Path, name: str, offsets: Any) -> None:
    """Say of a stored piece that it belongs elsewhere, with a CRC that vouches for it."""
    for file in (path / find.TENSORS_DIR).iterdir():
        with safe_open(file, "pt") as opened:
            info = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            if name not in info:
                continue
            stored = {key: opened.get_tensor(key) for key in info}
        if offsets is None:
            del info[name]
        else:
            info[name]["saved_offsets"] = offsets
        save_file(stored, file, {"DCP_SHARDING_INFO": json.dumps(info)})
    contents.sign_anew(path)


@pytest.mark.parametrize("offsets", [[1], [-1], [2**62], [0, 0], [], ["0"], [True], [0.0], "0", None, 7, [2**70]])
def test_a_piece_that_belongs_nowhere_is_refused(path: Path, offsets: Any) -> None:
    _rewritten(path, "bias/layer", offsets)
    _refuse(path, r"is damaged: model/\S+ cannot be used: (bias/layer|its header does not say)")


def test_a_hole_and_an_overlap_are_refused(tmp_path: Path) -> None:
    """Pieces of one tensor in two files, as two ranks write them, and one of them moved or gone."""
    CheckpointWriter(tmp_path, asynchronous=False).save(1, {"a": torch.ones(4, 2)}, {})
    path = find.path_of(tmp_path, 1)
    (file,) = (path / find.TENSORS_DIR).iterdir()
    content = json.loads((path / find.STATE_FILE).read_text())
    for second_at, rows, told in ((2, 2, None), (1, 2, "do not make up"), (3, 1, "do not make up"), (0, 4, "do not")):
        names = {}
        for number, (at, count) in enumerate([(0, 2), (second_at, rows)]):
            names[f"shard-0000{number + 1}.safetensors"] = [0, 0]
            info = json.dumps({"a": {"saved_offsets": [at, 0]}})
            save_file(
                {"a": torch.full((count, 2), 2.0)},
                path / f"model/shard-0000{number + 1}.safetensors",
                {"DCP_SHARDING_INFO": info},
            )
        (path / find.STATE_FILE).write_text(json.dumps(content | {"files": names}))
        contents.sign_anew(path)
        into = {"a": torch.zeros(4, 2)}
        if told is None:
            dcp.read_tensors(path, into)
            assert (into["a"] == 2).all()
            continue
        with pytest.raises(TrainingError, match=f"the pieces of a {told}"):
            dcp.read_tensors(path, into)
        assert not into["a"].any()
    assert file.exists()
