"""The teacher's top k on disk: the right rows, the right bytes, an end that an interruption does not change."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from karakoram.config import ModelConfig
from karakoram.errors import InputError, TrainingError
from karakoram.model.transformer import Transformer
from karakoram.train.initialize import initialize
from karakoram.train.post import teacher as teachers
from karakoram.train.post.teacher import TeacherLogits, top_k, write_teacher_logits

SHAPE: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 64, "quantization_config": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Transformer:
    torch.set_num_threads(1)
    config = ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **SHAPE})
    model = initialize(Transformer(config, dtype=torch.float32), 0)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # sharper than at first: some ids far likelier than others
    return model


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.array([5, 17, 1, 0, 40, 9, 23])
    return rng.integers(0, 48, lengths.sum()).astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)])


def test_rows_are_the_teachers_own(teacher: Transformer, data: Any, tmp_path: Path) -> None:
    ids, offsets = data
    stored = TeacherLogits(write_teacher_logits(teacher, ids, offsets, tmp_path / "t", k=8, shard_tokens=30), data)
    assert len(list((tmp_path / "t").glob("logp-*.bin"))) == 4  # 95 tokens in shards of 30
    for start, stop in zip(offsets, offsets[1:]):
        if start == stop:
            continue
        with torch.no_grad():
            logits = teacher(torch.from_numpy(ids[start:stop].astype(np.int64))[None])[0]
        wanted_ids, logp, rest = top_k(logits, 8)
        found_ids, found_logp, found_rest = stored.rows(np.arange(start, stop))
        assert torch.equal(found_ids, wanted_ids)
        # float16 has 11 bits: half a step of 1/128 at log-probabilities of 8 to 16, and the sum is made 1 again
        assert torch.allclose(found_logp, logp, atol=2**-8 + 4e-3, rtol=0)
        assert torch.allclose(found_rest, rest, atol=2**-8 + 4e-3, rtol=0)
        total = found_logp.exp().sum(-1) + found_rest.exp()
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


@pytest.mark.parametrize(("k", "dtype", "wanted"), [(8, "float16", 34), (8, "float32", 52), (48, "float16", 194)])
def test_bytes_per_token(teacher: Transformer, data: Any, tmp_path: Path, k: int, dtype: str, wanted: int) -> None:
    write_teacher_logits(teacher, *data, tmp_path / "t", k=k, value_dtype=dtype)
    files = [f for f in (tmp_path / "t").iterdir() if f.suffix == ".bin"]
    assert sum(f.stat().st_size for f in files) == wanted * len(data[0])
    assert TeacherLogits(tmp_path / "t").bytes_per_token == wanted


def test_k2_takes_386_bytes_and_nano_258() -> None:
    settings = {"k": 64, "value_dtype": "float16"}
    assert teachers.bytes_per_token(settings | {"vocab_size": 163_840}) == 386
    assert teachers.bytes_per_token(settings | {"vocab_size": 4096}) == 258


def test_an_interrupted_run_ends_in_the_same_bytes(
    teacher: Transformer, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "BATCH_TOKENS", 32)
    write_teacher_logits(teacher, *data, tmp_path / "whole", k=4, shard_tokens=30)
    calls: list[int] = []

    def stop(done: int, _tokens: int) -> None:
        calls.append(done)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_teacher_logits(teacher, *data, tmp_path / "cut", k=4, shard_tokens=30, progress=stop)
    with pytest.raises(TrainingError, match=f"{calls[-1]} of 95"):
        TeacherLogits(tmp_path / "cut")
    with (tmp_path / "cut" / "ids-00000.bin").open("ab") as file:
        file.write(b"\xff" * 7)  # killed while it wrote on: the index does not know of it
    write_teacher_logits(teacher, *data, tmp_path / "cut", k=4, shard_tokens=30, progress=lambda d, _: calls.append(d))
    assert calls[2] > calls[1], "what was done is not done again"
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes(), file.name


def test_others_are_refused(teacher: Transformer, data: Any, tmp_path: Path) -> None:
    ids, offsets = data
    path = write_teacher_logits(teacher, ids, offsets, tmp_path / "t", k=4)
    with pytest.raises(TrainingError, match="another k"):
        write_teacher_logits(teacher, ids, offsets, path, k=5)
    changed = ids.copy()
    changed[3] += 1
    with pytest.raises(TrainingError, match="another data"):
        write_teacher_logits(teacher, changed % 48, offsets, path, k=4)
    with pytest.raises(TrainingError, match="other tokens"):
        TeacherLogits(path, (changed, offsets))
    other = initialize(Transformer(teacher.config, dtype=torch.float32), 1)
    with pytest.raises(TrainingError, match="another teacher"):
        write_teacher_logits(other, ids, offsets, path, k=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(TrainingError, match="not empty"):
        write_teacher_logits(teacher, ids, offsets, tmp_path / "full", k=4)


def test_data_that_the_teacher_cannot_read(teacher: Transformer, tmp_path: Path) -> None:
    ids = np.zeros(100, dtype=np.int64)
    with pytest.raises(InputError, match="Document 0 has 100 tokens"):
        write_teacher_logits(teacher, ids, np.array([0, 100]), tmp_path / "t", k=4)
    with pytest.raises(InputError, match="do not divide"):
        write_teacher_logits(teacher, ids, np.array([0, 50]), tmp_path / "t", k=4)
    ids[70] = 48
    with pytest.raises(InputError, match="Token 70 is 48"):
        write_teacher_logits(teacher, ids, np.array([0, 50, 100]), tmp_path / "t", k=4)
    with pytest.raises(InputError, match="k 49"):
        write_teacher_logits(teacher, ids, np.array([0, 50, 100]), tmp_path / "t", k=49)


def test_a_teacher_of_nan_writes_nothing(data: Any, tmp_path: Path, teacher: Transformer) -> None:
    broken = Transformer(teacher.config, dtype=torch.float32)
    broken.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite"):
        write_teacher_logits(broken, *data, tmp_path / "t", k=4)


def _index(path: Path, **changes: Any) -> None:
    file = path / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [{"k": 0}, {"k": 1 << 40}, {"tokens": 1 << 60}, {"tokens": 2.5}, {"shard_tokens": -1}, {"format": 2},
     {"value_dtype": "O"}, {"vocab_size": True}],
)  # fmt: skip
def test_a_wrong_index_is_refused(teacher: Transformer, data: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_teacher_logits(teacher, *data, tmp_path / "t", k=4)
    _index(path, **changes)
    with pytest.raises(TrainingError, match=r"index\.json"):
        TeacherLogits(path)


def test_damaged_shards_are_refused(teacher: Transformer, data: Any, tmp_path: Path) -> None:
    path = write_teacher_logits(teacher, *data, tmp_path / "t", k=4)
    with pytest.raises(InputError, match="Position 95"):
        TeacherLogits(path).rows(np.array([3, 95]))
    with pytest.raises(InputError, match="Position -1"):
        TeacherLogits(path).rows(np.array([-1]))
    file = path / "logp-00000.bin"
    whole = file.read_bytes()
    for content in (b"\0" * len(whole), b"\xff" * len(whole)):  # certain of all four; NaN
        file.write_bytes(content)
        with pytest.raises(TrainingError, match="no teacher wrote"):
            TeacherLogits(path).rows(np.arange(95))
    file.write_bytes(whole[:-1])
    with pytest.raises(TrainingError, match="logp-00000"):
        TeacherLogits(path)
