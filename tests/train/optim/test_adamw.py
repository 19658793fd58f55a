"""AdamW on masters: torch's numbers from bfloat16 gradients, and a state that survives the way through a file."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from karakoram.train.optim.adamw import AdamW


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"norm.weight": torch.randn(8, generator=generator), "embed.weight": torch.randn(6, 8, generator=generator)}


def _gradients(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator).bfloat16() for name, w in _weights().items()}


def test_steps_are_those_of_the_formula() -> None:
    """Two steps by hand, in float64: betas 0.9 and 0.95, eps 1e-8, decay decoupled."""
    adamw, rate, decay, scale = AdamW(_weights(), 0.1), 0.01, 0.1, 0.5
    expected = {name: w.double() for name, w in _weights().items()}
    first = {name: torch.zeros_like(w) for name, w in expected.items()}
    second = {name: torch.zeros_like(w) for name, w in expected.items()}
    for step in (1, 2):
        adamw.step(_gradients(step), rate, scale)
        for name, gradient in _gradients(step).items():
            g = gradient.double() * scale
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            ratio = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[name] = expected[name] * (1 - rate * decay) - rate * ratio
    for name, weight in adamw.weights.items():
        assert torch.allclose(weight.double(), expected[name], rtol=1e-5, atol=1e-6), name  # float32 against float64


def test_state_survives_a_file(tmp_path: Path) -> None:
    first = AdamW(_weights())
    first.step(_gradients(1), 0.01)
    save_file(first.state(), tmp_path / "state.safetensors")
    second = AdamW({name: w.clone() for name, w in first.weights.items()})
    second.load(load_file(tmp_path / "state.safetensors"))
    for adamw in (first, second):
        adamw.step(_gradients(2), 0.01)
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_without_a_gradient_nothing_moves() -> None:
    adamw = AdamW(_weights())
    adamw.step({"norm.weight": _gradients(1)["norm.weight"]}, 0.01)
    assert torch.equal(adamw.weights["embed.weight"], _weights()["embed.weight"])
    assert not torch.equal(adamw.weights["norm.weight"], _weights()["norm.weight"])
