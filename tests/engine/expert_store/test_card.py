"""Experts on a card: what it takes, what it computes. The CPU stands in for the card; with `gpu`, a real one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from karakoram.checkpoint import open_checkpoint
from karakoram.checkpoint.experts import open_expert_source
from karakoram.engine.expert_store import card as card_module
from karakoram.engine.expert_store.card import Card
from karakoram.errors import InputError
from karakoram.model.transformer import Transformer
from tests.engine.expert_store.fed import EVERYTHING, FedModel, fed, run

LAYER, SLOTS = 3, 30
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _choose_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_module, "WATCHED_PASSES", 3)


def card_for(path: Path, device: str, slots: int = SLOTS) -> Card:
    source = open_expert_source(open_checkpoint(path))
    try:
        return Card(torch.device(device), slots * source.record_bytes, source)
    finally:
        source.close()


def mixed(one: FedModel | Transformer, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    model = one if isinstance(one, Transformer) else one.model
    return model.model.layers[LAYER].mlp.experts.mix(x_ND, ids_NK, weights_NK, None)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_differs_by_a_hundredth_at_most_and_always_equally(
    device: str, nano: Transformer, packed_nano: Path
) -> None:
    """bf16 keeps 8 bits: each of the three roundings is at most 2^-9 of its value, a layer's sum 1e-2 in all."""
    draw = torch.Generator().manual_seed(1)
    x_ND = torch.randn(7, 256, generator=draw).bfloat16()
    ids_NK = torch.rand(7, 16, generator=draw).topk(4).indices
    weights_NK = torch.rand(7, 4, generator=draw)
    card = card_for(packed_nano, device)
    with fed(40, path=packed_nano, card=card) as one:
        run(one.model)
        assert len(card) == SLOTS
        held = [key for key in range(EVERYTHING) if card.holds(np.array([key]))[0]]
        assert any(key // 16 == LAYER - 1 for key in held)  # MoE layers begin at 1
        found = mixed(one, x_ND, ids_NK, weights_NK)
        assert torch.equal(mixed(one, x_ND, ids_NK, weights_NK), found)
    expected = mixed(nano, x_ND, ids_NK, weights_NK)
    assert not torch.equal(found, expected)
    assert float((found - expected).float().norm() / expected.float().norm()) < 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_on_the_card_leaves_memory_and_is_read_no_more(device: str, packed_nano: Path) -> None:
    card = card_for(packed_nano, device, EVERYTHING)
    with fed(20, path=packed_nano, card=card, guessing=False) as one:
        for _ in range(4):
            run(one.model)
        there = card.holds(np.arange(EVERYTHING))
        assert there.sum() > 40
        assert not (there & one.store.residency.resident).any()
        first = run(one.model)
        reads = one.store.readers.done
        again = run(one.model)
        assert first[0] == again[0]
        assert one.store.readers.done == reads


def test_until_it_has_chosen_it_changes_nothing(packed_nano: Path, in_memory: object) -> None:
    card = card_for(packed_nano, "cpu")
    with fed(20, path=packed_nano, card=card) as one:
        assert run(one.model, 3)[0] == in_memory[0][:3]  # type: ignore[index]
        assert len(card) == 0


def test_too_little_memory_for_one_expert_is_refused(packed_nano: Path) -> None:
    with pytest.raises(InputError, match="hold no expert") as caught:
        card_for(packed_nano, "cpu", 0)
    assert "--vram" in caught.value.fix
