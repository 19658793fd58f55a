"""What this package's side of `k2 bench train` runs: the trainer's own step, or its layer of experts."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from karakoram.evals.bench.train.order import Order, config_of
from karakoram.model.moe import MixtureOfExperts
from karakoram.train.config import GuardConfig, TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.fuse import fuse
from karakoram.train.machine import faster_dtype
from karakoram.train.trainer import Trainer

Call = Callable[[int], dict[str, Any]]  # number of the step -> loss, seconds and the like; it is timed from outside


class RandomIds:
    """Batches of uniformly random ids, all weighted alike."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        self.rows, self.length, self.vocabulary = rows, length, vocabulary

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """Batch `number`, the same for the same number."""
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, self.vocabulary, (self.rows, self.length + 1), generator=draw)
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones(self.rows, self.length))


def dtype_of(order: Order) -> torch.dtype:
    """The order's, or the one that multiplies faster here."""
    return faster_dtype() if order.dtype == "auto" else getattr(torch, order.dtype)


def step(order: Order, dtype: torch.dtype) -> Call:
    """A step of `Trainer` with MuonClip; what is not forward and backward is the optimizer's."""
    config = TrainConfig(config_of(order.shape), steps=10**6, guard=GuardConfig(after_steps=10**6))
    source = RandomIds(order.rows, order.length, config.model.vocab_size)
    trainer = Trainer(config, source, Path(tempfile.gettempdir()), {}, dtype, order.compiled)
    if order.compiled:
        trainer.slice_loss = fuse(trainer.model)
    backward, spent_s = trainer.backward, [0.0]

    def timed(*arguments: Any, **more: Any) -> float:
        began = time.perf_counter()
        loss = backward(*arguments, **more)
        spent_s[0] = time.perf_counter() - began
        return loss

    trainer.backward = timed

    def call(_: int) -> dict[str, Any]:
        line = trainer.train_step(trainer.next_batch())
        return {"loss": line["loss"], "backward_s": spent_s[0], "skipped": line.get("skipped", False)}

    return call


def layer(order: Order, dtype: torch.dtype) -> Call:
    """A layer of experts forward and backward, router and shared expert included."""
    config = config_of(order.shape)
    made = MixtureOfExperts(config, config.first_k_dense_replace, None, dtype)
    draw_weights(made)
    if order.compiled:
        fuse(made)  # pyright: ignore[reportArgumentType]  # it looks for the pieces, whatever holds them
    return there_and_back(made, order, config.hidden_size, dtype)


@torch.no_grad()
def draw_weights(module: torch.nn.Module) -> None:
    """Normal, 0.02; the router's by a seed of their own, so that every candidate sends tokens to the same experts."""
    draw = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        seeded = torch.Generator().manual_seed(0) if name == "gate.weight" else draw
        parameter.copy_(torch.randn(parameter.shape, generator=seeded) * 0.02)


def there_and_back(module: torch.nn.Module, order: Order, hidden: int, dtype: torch.dtype) -> Call:
    """Forward and backward of [rows, length, hidden], gradients of input and weights; a few inputs in turn."""
    draw = torch.Generator().manual_seed(2)
    inputs = [torch.randn(order.rows, order.length, hidden, generator=draw).to(dtype) for _ in range(4)]
    gradient = torch.randn(order.rows, order.length, hidden, generator=draw).to(dtype)

    def call(number: int) -> dict[str, Any]:
        x = inputs[number % len(inputs)].detach().requires_grad_()
        module.zero_grad(set_to_none=True)
        y = module(x)
        y.backward(gradient)
        return {"loss": float(y.detach().float().square().mean())}

    return call
