"""What torchrun's environment may say, and the mesh of one."""

import pytest
import torch

from karakoram.distributed.collectives import gradient_norm, share
from karakoram.distributed.fsdp import split
from karakoram.distributed.layout import local
from karakoram.distributed.mesh import Alone, start
from karakoram.errors import TrainingError
from karakoram.model.transformer import Transformer
from karakoram.model.watch import Watch
from tests.train.tiny import model_config

ENVIRONMENTS = {
    "no number": ({"WORLD_SIZE": "two"}, 1, "WORLD_SIZE is 'two'"),
    "no ranks": ({"WORLD_SIZE": "0"}, 1, "WORLD_SIZE is '0'"),
    "no rank": ({"WORLD_SIZE": "2"}, 1, "RANK is None"),
    "rank past the last": ({"WORLD_SIZE": "2", "RANK": "2"}, 1, "RANK is '2'"),
    "local rank past the last": ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"}, 1, "LOCAL_RANK is '-1'"),
    "experts over more than there are": ({}, 2, "2 expert ranks do not divide 1 ranks"),
    "experts over a part": ({"WORLD_SIZE": "6", "RANK": "0"}, 4, "Choose 1 or 2 or 3 or 6"),
    "experts over none": ({"WORLD_SIZE": "2", "RANK": "0"}, 0, "0 expert ranks"),
}


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_what_cannot_be_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is joined: no process group, no waiting."""
    variables, expert_ranks, words = ENVIRONMENTS[case]
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(TrainingError, match=words):
        start(expert_ranks, "cpu")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("world", [None, "1"])
def test_one_process_is_alone(world: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchrun, or with one rank: nothing is sent, nothing split."""
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    ranks = start(device="cpu")
    assert isinstance(ranks, Alone) and ranks.is_main and (ranks.rank, ranks.world) == (0, 1)
    x = torch.tensor([1.0, 2.0])
    assert ranks.sum_(x).equal(x) and ranks.max_(x).equal(x) and not ranks.any(False)
    with ranks.together():
        ranks.barrier()
    assert gradient_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0]).bfloat16()}, ranks) == 5.0
    assert gradient_norm({}, ranks) == 0.0
    watch = Watch()
    watch.see_logits(1, torch.tensor([1.0, 2.0]))
    share(watch, ranks)
    assert watch.max_logits[1].tolist() == [1.0, 2.0] and watch.loads == {}
    model = Transformer(model_config(), dtype=torch.float32)
    before = dict(model.named_parameters())
    layouts = split(model, ranks)
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and local(parameter) is parameter
        assert layouts[name].rows == slice(0, len(parameter)) and layouts[name].whole(parameter) is parameter
