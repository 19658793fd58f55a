"""A recipe of one's own: a small model of K2's shape learns this project's documentation for a few steps.

python examples/train_a_small_model.py [STEPS]
k2 train examples/train_a_small_model.py --steps 200 optimizer.learning_rate=5e-3    # the same, by the command
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import karakoram
from karakoram.env import bundled_model_dir
from karakoram.train.config import BalanceConfig, BatchConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from karakoram.train.corpus import Corpus
from karakoram.train.recipe import Manner, Recipe, run_recipe


def recipe(steps: int = 10, seed: int = 0) -> Recipe:
    """Two layers, eight experts of which two run; MuonClip, experts balanced by quantiles."""
    model = replace(
        karakoram.ModelConfig.preset("nano"), num_hidden_layers=2, hidden_size=64, intermediate_size=128,
        moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, quantization_config=None,
    )  # fmt: skip
    plan = TrainConfig(
        model, steps, seed=seed,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=5, decay_from=0.5),
        batch=BatchConfig(tokens_per_step=1024),
        balance=BalanceConfig(rule="quantile"),
    )  # fmt: skip
    docs = Path(__file__).parents[1] / "docs"
    material = Corpus("example", str(docs), "", bundled_model_dir(), sequence_tokens=128, read_weight=1.0)
    return Recipe(plan, material)


if __name__ == "__main__":  # processes that tokenise start this file anew
    with tempfile.TemporaryDirectory() as out:
        made = recipe(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
        folder = run_recipe(made, Path(out), Manner(threads=1, compiled=False))
        model, fmt = karakoram.load_model(folder), karakoram.load_chat_format(folder)
        print(fmt.tokenizer.decode(list(karakoram.generate(model, fmt.tokenizer.encode("The"), max_new_tokens=12))))
