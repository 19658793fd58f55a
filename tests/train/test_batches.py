"""Batches: every document once an epoch, little padding, and each batch a function of its number alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from karakoram.errors import TrainingError
from karakoram.train.data.batches import Batches

DOCUMENTS, TOKENS_PER_BATCH, PAD = 3000, 6144, 60_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 20 to 900 tokens, most around 200, as generated dialogs are; each begins with its own number."""
    path = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.2, 0.6, DOCUMENTS), 20, 900).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = generator.integers(DOCUMENTS, PAD, offsets[-1]).astype(np.uint16)
    ids[offsets[:-1]] = np.arange(DOCUMENTS)
    np.save(path / "ids.npy", ids)
    np.save(path / "weights.npy", generator.integers(0, 11, offsets[-1]).astype(np.uint8))
    np.save(path / "offsets.npy", offsets)
    return path


def _batches(cache: Path, seed: int = 0) -> Batches:
    return Batches(cache, TOKENS_PER_BATCH, PAD, seed)


def _epochs(batches: Batches, count: int) -> list[list[int]]:
    """The documents' numbers in the order of the first `count` epochs, by the first id of each row."""
    epochs: list[list[int]] = []
    number = 0
    for _ in range(count):
        seen: list[int] = []
        while len(seen) < DOCUMENTS:
            seen += batches[number].token_ids[:, 0].tolist()
            number += 1
        epochs.append(seen)
    return epochs


def test_every_document_comes_once_an_epoch(cache: Path) -> None:
    first, second = _epochs(_batches(cache), 2)
    assert sorted(first) == sorted(second) == list(range(DOCUMENTS))
    assert first != second, "another order in the next epoch"
    assert _epochs(_batches(cache, seed=1), 1) != [first], "and for another seed"


def test_a_row_is_a_document_and_its_targets_are_one_ahead(cache: Path) -> None:
    batches = _batches(cache)
    ids, tenths, offsets = (np.load(cache / f"{name}.npy") for name in ("ids", "weights", "offsets"))
    for number in (0, 5, 31):
        batch = batches[number]
        assert batch.token_ids.shape == batch.targets.shape == batch.weights.shape
        assert batch.token_ids.dtype == torch.int64
        assert batch.token_ids.shape[1] % 16 == 0
        for row in range(len(batch.token_ids)):
            document = int(batch.token_ids[row, 0])
            start, stop = offsets[document], offsets[document + 1]
            inputs = stop - start - 1
            assert batch.token_ids[row, :inputs].tolist() == ids[start : stop - 1].tolist()
            assert batch.targets[row, :inputs].tolist() == ids[start + 1 : stop].tolist()
            expected = torch.from_numpy(tenths[start + 1 : stop] / 10).float()
            assert torch.allclose(batch.weights[row, :inputs], expected)
            assert not batch.weights[row, inputs:].any(), "padding has no weight"
            assert (batch.targets[row, inputs:] == PAD).all()


def test_the_first_pool_goes_from_short_to_long(cache: Path) -> None:
    batches = _batches(cache)  # all documents fit into one pool
    widths = [batches[number].token_ids.shape[1] for number in range(60)]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    later = [batches[number].token_ids.shape[1] for number in range(200, 260)]  # the second epoch
    assert later != sorted(later)


def test_batches_are_full_and_hardly_padded(cache: Path) -> None:
    batches, real, padded, seen, number = _batches(cache), 0, 0, 0, 0
    sizes = []
    while seen < DOCUMENTS:
        batch = batches[number]
        seen, number = seen + len(batch.token_ids), number + 1
        real += int((batch.targets != PAD).sum())
        padded += batch.token_ids.numel()
        sizes.append(batch.token_ids.numel())
    assert 1 - real / padded < 0.15
    assert max(sizes) <= TOKENS_PER_BATCH
    assert np.median(sizes) > 0.9 * TOKENS_PER_BATCH


def test_a_batch_depends_on_its_number_alone(cache: Path) -> None:
    used = _batches(cache)
    epoch = sum(1 for _ in used._epoch_rows(0))
    for number in (3, epoch - 1, epoch, 2 * epoch + 7, 3, 0, epoch + 1):  # forwards over epochs, and back
        for a, b in zip(used[number][:3], _batches(cache)[number][:3]):  # no documents within rows
            assert torch.equal(a, b), f"batch {number}"
    with pytest.raises(IndexError, match="numbered from 0"):
        _ = used[-1]


def test_an_empty_or_unfinished_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no finished token cache"):
        Batches(tmp_path, TOKENS_PER_BATCH, PAD, 0)
    for name, dtype in (("ids", np.uint16), ("weights", np.uint8)):
        np.save(tmp_path / f"{name}.npy", np.zeros(0, dtype))
    np.save(tmp_path / "offsets.npy", np.zeros(1, np.int64))
    with pytest.raises(TrainingError, match="no document"):
        Batches(tmp_path, TOKENS_PER_BATCH, PAD, 0)
