"""The same model on a CUDA device: forward, cache, batch and sampling agree with the CPU; skipped without one."""

from pathlib import Path

import pytest
import torch

from karakoram import generate, load_model
from karakoram.model.generate import generate_batch
from tests.model import reference
from tests.model.reference import TOLERANCE, Case

pytestmark = pytest.mark.gpu


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    reference.build(Case(n_group=4)).save_pretrained(tmp_path)
    return tmp_path


def test_float32_is_the_cpus(directory: Path) -> None:
    """TF32 is off by default in torch; with it, products would keep 10 bits."""
    here, there = load_model(directory, dtype="float32"), load_model(directory, "cuda", "float32")
    ids_BT = reference.token_ids(2)
    expected = reference.logits(here, ids_BT)
    assert reference.distance(reference.logits(there, ids_BT.cuda()).cpu(), expected) <= TOLERANCE
    cache = there.new_cache(2, 200)
    with torch.inference_mode():
        parts = [there(piece_BT, cache).cpu() for piece_BT in ids_BT.cuda().split([150, 1, 1, 48], 1)]
    assert reference.distance(torch.cat(parts, 1), expected) <= TOLERANCE
    prompts = [ids_BT[0, :9].tolist(), ids_BT[1, :70].tolist()]
    expected_ids = [list(generate(here, prompt, 12, stop_ids=())) for prompt in prompts]
    assert [list(generate(there, prompt, 12, stop_ids=())) for prompt in prompts] == expected_ids
    assert generate_batch(there, prompts, 12, stop_ids=()) == expected_ids


def test_gradients_are_the_cpus(directory: Path) -> None:
    here, there = (load_model(directory, device, "float32").requires_grad_(True) for device in ("cpu", "cuda"))
    ids_BT = reference.token_ids(2)
    here(ids_BT).square().mean().backward()
    there(ids_BT.cuda()).square().mean().backward()
    for (name, a), b in zip(here.named_parameters(), there.parameters()):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad.cpu()).norm() <= 1e-3 * a.grad.norm(), name


def test_sampling_in_bfloat16_repeats(directory: Path) -> None:
    model = load_model(directory, "cuda")
    first = list(generate(model, [5, 6, 7], 12, temperature=1.0, top_p=0.9, seed=5, stop_ids=()))
    assert first == list(generate(model, [5, 6, 7], 12, temperature=1.0, top_p=0.9, seed=5, stop_ids=()))
