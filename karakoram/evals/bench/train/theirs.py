"""What is measured beside this package: transformers' DeepseekV3, loaded by name where it is installed.

A whole step is the model with its own loss and torch's fused AdamW, without gradient clipping: what a person writes
who trains it by hand.
"""

from importlib import import_module
from typing import Any

import torch

from karakoram.evals.bench.train.order import THEIRS, Order
from karakoram.evals.bench.train.ours import Call, draw_weights, there_and_back

LEARNING_RATE = 1e-3
MODELING = f"{THEIRS}.models.deepseek_v3.modeling_deepseek_v3"


def step(order: Order, dtype: torch.dtype) -> Call:
    """Forward, backward, AdamW; labels are the ids themselves, shifted inside."""
    torch.manual_seed(0)
    config = config_of(order)
    model = import_module(THEIRS).DeepseekV3ForCausalLM(config).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def call(number: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(0, config.vocab_size, (order.rows, order.length), generator=draw)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss.detach())}

    return call


def layer(order: Order, dtype: torch.dtype) -> Call:
    """DeepseekV3MoE forward and backward."""
    config = config_of(order)
    made = import_module(MODELING).DeepseekV3MoE(config).to(dtype).train()
    draw_weights(made)
    return there_and_back(made, order, config.hidden_size, dtype)


def config_of(order: Order) -> Any:
    """Theirs, of the order's shape, with its implementation of the experts."""
    config = import_module(THEIRS).DeepseekV3Config(**order.shape)
    config._experts_implementation = order.implementation
    return config
