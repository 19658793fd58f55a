"""Mixtures: an epoch holds each token once, batches are functions of their numbers, ranks share them, states fit."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karakoram.config import ModelConfig
from karakoram.errors import TrainingError
from karakoram.model.documents import Documents
from karakoram.model.transformer import Transformer
from karakoram.train.data.batches import Batch
from karakoram.train.data.corpus.mixture import BLOCK, Mixture, Part, RowBatches
from karakoram.train.data.corpus.packing import Packing
from karakoram.train.data.corpus.shards import ShardSet
from karakoram.train.initialize import initialize

sys.path.insert(0, str(Path(__file__).resolve().parent))
from made import VOCAB_SIZE, shards_of

PAD = 59_999
T = 16


def numbered(lengths: list[int], first: int = 0) -> list[list[int]]:
    """Samples in which every token is another one."""
    ends = np.cumsum([0, *lengths]) + first
    return [list(range(a, b)) for a, b in zip(ends, ends[1:])]


def lengths(count: int, seed: int, longest: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest, count).tolist()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ShardSet]:
    folder = tmp_path_factory.mktemp("sets")
    return [shards_of(folder / str(i), numbered(lengths(n, i), 20_000 * i)) for i, n in enumerate((40, 90, 25))]


def mixture(sets: list[ShardSet], weights: tuple[float | None, ...] = (2.0, 1.0, 1.0), seed: int = 3) -> Mixture:
    return Mixture([Part(f"p{i}", s, w) for i, (s, w) in enumerate(zip(sets, weights))], T, seed, PAD)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b) if x is not None and y is not None)


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), packing=st.sampled_from(get_args(Packing)))
def test_an_epoch_holds_each_token_once_and_learns_each_but_the_first(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], packing: Packing
) -> None:
    samples = numbered(sizes)
    data = shards_of(tmp_path_factory.mktemp("epoch"), samples, weights=lambda s, i: (s + i) % 101)
    mix = Mixture([Part("one", data)], T, 0, PAD, packing)
    for epoch in range(2):
        batch = mix.rows(epoch * len(mix.plans[0]), len(mix.plans[0]))
        real = batch.token_ids != PAD
        assert sorted(batch.token_ids[real].tolist()) == list(range(sum(sizes)))
        learned = sorted(batch.targets[batch.targets != PAD].tolist())
        assert learned == sorted(token for sample in samples for token in sample[1:])
        weight_of = {t: ((s + i) % 101) / 100 for s, x in enumerate(samples) for i, t in enumerate(x)}
        for token, target, weight in zip(batch.token_ids.flatten(), batch.targets.flatten(), batch.weights.flatten()):
            if target == PAD:
                assert weight == 0
            else:
                assert target == token + 1  # of the same sample, for no sample begins with a learned token
                assert weight == np.float32(weight_of[int(target)])


def test_documents_and_positions(sets: list[ShardSet]) -> None:
    batch = mixture(sets).rows(0, 60)
    assert batch.documents is not None
    assert [field.dtype for field in batch] == [torch.int64, torch.int64, torch.float32, torch.int32]
    documents = Documents(batch.documents)
    begins = {sample[0] for i, n in enumerate((40, 90, 25)) for sample in numbered(lengths(n, i), 20_000 * i)}
    last = {20_000 * i + sum(lengths(n, i)) - 1 for i, n in enumerate((40, 90, 25))}
    padded = 0
    for row, start, stop in documents.spans:
        ids = batch.token_ids[row, start:stop].tolist()
        if ids[0] == PAD:
            padded += 1
            assert set(ids) == {PAD} and stop == T and not batch.weights[row, start:].any()
            continue
        assert ids == list(range(ids[0], ids[0] + len(ids)))  # one sample
        assert not any(token in begins for token in ids[1:])
        assert documents.positions_BT[row, start:stop].tolist() == list(range(len(ids)))
        if ids[-1] + 1 in begins or ids[-1] in last:
            assert batch.targets[row, stop - 1] == PAD and not batch.weights[row, stop - 1]
        else:  # the sample goes on in another row: its next token is still learned
            assert batch.targets[row, stop - 1] == ids[-1] + 1 and batch.weights[row, stop - 1] == 1
    assert padded


def test_a_packed_row_is_as_good_as_its_samples_alone(tmp_path: Path) -> None:
    """The summed loss of an epoch in packed rows is that of every sample in a row of its own."""
    kinds = {
        "model_type": "kimi_k2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1,
    }  # fmt: skip
    config = ModelConfig.from_dict(ModelConfig.preset("nano").to_dict() | kinds)
    model = initialize(Transformer(config, dtype=torch.float32), 0)
    for layer in model.model.layers:  # fresh weights hardly look at one another
        layer.self_attn.o_proj.weight.data *= 30
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 96, size).tolist() for size in rng.integers(2, T, 20)]
    data = shards_of(tmp_path, samples, weights=lambda s, i: 10 * (1 + (s + i) % 10))

    def loss(batch: Batch, documents: Documents | None) -> float:
        x = model.hidden(batch.token_ids, documents=documents)
        head = model.model.embed_tokens if model.lm_head is None else model.lm_head
        each = torch.nn.functional.cross_entropy(
            (x @ head.weight.T).flatten(0, 1), batch.targets.flatten(), reduction="none"
        )
        return float((each * batch.weights.flatten()).sum())

    with torch.no_grad():
        mix = Mixture([Part("one", data)], T, 0)
        packed = mix.rows(0, len(mix.plans[0]))
        assert packed.documents is not None and len(packed.token_ids) < 17
        alone = 0.0
        for number, sample in enumerate(samples):
            ids = torch.tensor([sample])
            weights = torch.from_numpy(data.read(number, 0, len(sample))[1] / np.float32(100))[None]
            alone += loss(Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:]), None)
        # float32 sums over other shapes: a few units in the last place of about 600
        assert loss(packed, Documents(packed.documents)) == pytest.approx(alone, rel=1e-5)
        assert loss(packed, None) != pytest.approx(alone, rel=1e-4)  # 8e-4 off


def test_any_row_is_the_same_wherever_one_starts(sets: list[ShardSet]) -> None:
    whole = mixture(sets).rows(0, 400)
    for first, count in ((399, 1), (0, 7), (123, 40), (5, 300)):
        assert same(
            mixture(sets).rows(first, count), Batch(*(x[first : first + count] for x in whole if x is not None))
        )
    far = 10**12 + 5
    began = mixture(sets)
    assert same(began.rows(far, 3), mixture(sets).rows(far, 3))
    assert not same(mixture(sets).rows(0, 40), mixture(sets, seed=4).rows(0, 40))


def test_ranks_share_a_batch(sets: list[ShardSet]) -> None:
    mix = mixture(sets)
    whole = mix.rows(24, 12)
    for world in (1, 2, 3, 4, 12):
        parts = [mix.rows(24, 12, rank, world) for rank in range(world)]
        for field, pieces in zip(whole, zip(*parts)):
            assert field is not None and torch.equal(torch.stack(pieces, 1).flatten(0, 1), field)
    uneven = [mix.rows(24, 12, rank, 5).token_ids for rank in range(5)]  # a batch that grows is rarely a multiple
    assert [len(ids) for ids in uneven] == [3, 3, 2, 2, 2]
    assert all(torch.equal(ids, whole.token_ids[rank::5]) for rank, ids in enumerate(uneven))


def test_weights_are_kept_and_epochs_differ(sets: list[ShardSet]) -> None:
    mix = mixture(sets, (2.0, 1.0, 1.0))
    assert mix.quotas == [2048, 1024, 1024]
    places = [mix.place(number) for number in range(BLOCK, 2 * BLOCK)]
    assert Counter(part for part, _, _ in places) == {0: 2048, 1: 1024, 2: 1024}
    for start in range(0, BLOCK, 512):  # mixed evenly: 256 of 512, give or take 5 standard deviations of 10.6
        assert abs(sum(part == 0 for part, _, _ in places[start : start + 512]) - 256) < 54
    rows = len(mix.plans[0])
    of_first = [place for place in (mix.place(number) for number in range(2 * BLOCK)) if place[0] == 0]
    epochs = [of_first[start : start + rows] for start in range(0, 3 * rows, rows)]
    for number, epoch in enumerate(epochs):
        assert {e for _, e, _ in epoch} == {number}
        assert sorted(row for _, _, row in epoch) == list(range(rows))
    assert len({tuple(row for _, _, row in epoch) for epoch in epochs}) == 3
    sizes = [len(plan) for plan in mix.plans]
    by_size = mixture(sets, (None, None, None)).quotas
    assert sum(by_size) == BLOCK
    assert all(abs(quota - BLOCK * size / sum(sizes)) < 1 for quota, size in zip(by_size, sizes))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ((1.0, None, 1.0), "Some parts"),
        ((1.0, 0.0, 1.0), "finite weights above 0"),
        ((1.0, float("nan"), 1.0), "finite weights above 0"),
        ((1.0, float("inf"), 1.0), "finite weights above 0"),
        ((1.0, 1e-9, 1.0), "p1 has so small a weight"),
    ],
)
def test_impossible_weights(sets: list[ShardSet], weights: tuple[float | None, ...], reason: str) -> None:
    with pytest.raises(TrainingError, match=reason):
        mixture(sets, weights)


def test_impossible_parts(sets: list[ShardSet], tmp_path: Path) -> None:
    for parts in ([], [Part("a", sets[0]), Part("a", sets[1])]):
        with pytest.raises(TrainingError, match="name of its own"):
            Mixture(parts, T, 0)
    with pytest.raises(TrainingError, match="The seed is -1"):
        Mixture([Part("a", sets[0])], T, -1)
    with pytest.raises(TrainingError, match="hold no sample"):
        Mixture([Part("empty", shards_of(tmp_path, []))], T, 0)


def ramp(tokens: int) -> int:
    return 4 + 2 * min(tokens // 500, 4)


def test_batches_are_ranges_of_rows(sets: list[ShardSet]) -> None:
    mix = mixture(sets)
    equal = RowBatches(mix, 8)
    assert equal.range(10**9) == (8 * 10**9, 8)
    assert same(equal.batch(3), mix.rows(24, 8)) and same(equal.batch(3, 1, 2), mix.rows(24, 8, 1, 2))
    first, tokens, ranges = 0, 0, []
    for _ in range(60):
        count = ramp(tokens)
        ranges.append((first, count))
        first, tokens = first + count, tokens + count * T
    growing = RowBatches(mix, ramp, settled_after=2000)
    assert growing.range(59) == ranges[59]  # before any other was asked for
    assert [growing.range(n) for n in range(60)] == ranges
    assert [RowBatches(mix, ramp, settled_after=2000).range(n) for n in reversed(range(60))] == ranges[::-1]
    with pytest.raises(TrainingError, match="would have 0 rows"):
        RowBatches(mix, 0).batch(0)


def test_states(sets: list[ShardSet], tmp_path: Path) -> None:
    state = json.loads(json.dumps(mixture(sets).state(17)))
    assert mixture(sets).load(state) == 17
    shorter = shards_of(tmp_path / "other", numbered(lengths(40, 0))[:-1])
    changed = shards_of(tmp_path / "changed", [[t ^ (t == 5) for t in sample] for sample in numbered(lengths(40, 0))])
    for other, reason in (
        (mixture(sets, seed=4), "seed 3 → 4"),
        (mixture(sets, (1.0, 1.0, 1.0)), "p0 has another weight; p1 has another weight"),
        (mixture([changed, *sets[1:]]), "p0 has other tokens"),
        (mixture([shorter, *sets[1:]]), "p0 has other tokens"),
        (mixture(sets[:2], (2.0, 1.0)), "they were p0, p1, p2 and are p0, p1"),
        (Mixture(mixture(sets).parts, 32, 3, PAD), "sequence_tokens 16 → 32"),
        (Mixture(mixture(sets).parts, T, 3, PAD, "in_order"), "packing 'best_fit' → 'in_order'"),
    ):
        with pytest.raises(TrainingError, match=reason):
            other.load(state)
    for position in (None, -1, 1.5, True, 2**70, "3"):
        with pytest.raises(TrainingError, match="position in its data"):
            mixture(sets).load(state | {"position": position})
    with pytest.raises(TrainingError, match="does not tell its data"):
        mixture(sets).load({"position": 3})
    batches = RowBatches(mixture(sets), ramp, 2000)
    saved = json.loads(json.dumps(batches.state(40)))
    assert RowBatches(mixture(sets), ramp, 2000).load(saved) == 40
    with pytest.raises(TrainingError, match=r"Batch 40 began at row \d+ and would now begin at row 320"):
        RowBatches(mixture(sets), 8).load(saved)


def test_ids_outside_a_vocabulary_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shards_of(folder, [*numbered([5, 6]), [1, VOCAB_SIZE, 2]])
    mix = Mixture([Part("bad", ShardSet(folder))], T, 0)
    with pytest.raises(TrainingError, match=r"shard-00000\.k2s has the id 60000 .* at position 12"):
        mix.rows(0, len(mix.plans[0]))
