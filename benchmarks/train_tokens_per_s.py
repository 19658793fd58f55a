"""How fast does the trainer train? Tokens per second of whole steps, beside transformers on the same machine.

Shape: 29 million parameters, K2's in miniature (`SHAPE`); batches of 8 rows of 512 random ids; a step is forward,
backward and optimizer, masters and publishing included. Beside it transformers' DeepseekV3 with fused AdamW, eager,
float32: what a person gets without this package. The two alternate, so that other load on the machine hits both;
medians count.

    python benchmarks/train_tokens_per_s.py [--steps 5] [--rounds 3] [--threads N] [--ours-only]

One line of JSON on stdout: tokens/s of both, their ratio, and the share of the measured peak, which is the arithmetic
of the model's matrix products (three times the forward's) over what one large bfloat16 product reaches here.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from karakoram.config import ModelConfig
from karakoram.env import processor
from karakoram.model.cost import flops_per_token, parameters
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.fuse import fuse
from karakoram.train.machine import faster_dtype, keep_freed_memory
from karakoram.train.trainer import Trainer

ROWS, LENGTH = 8, 512
WARM_UP_STEPS = 3  # compiling, and kernels that oneDNN prepares for each new shape
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 1,
    "topk_group": 1,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


class RandomIds:
    """Batches of uniformly random ids, all weighted alike."""

    def __getitem__(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1), generator=generator)
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones(ROWS, LENGTH))


def our_step(config: ModelConfig, dtype: torch.dtype) -> Callable[[int], object]:
    """One step of this package's trainer, compiled where it can be."""
    batches = RandomIds()
    trainer = Trainer(TrainConfig(config, steps=1000, int4_from=1.0), batches, Path(tempfile.gettempdir()), {}, dtype)
    trainer.slice_loss = fuse(trainer.model)
    return lambda number: trainer.train_step(batches[number])


def their_step() -> Callable[[int], object]:
    """The same step with transformers' DeepseekV3 and torch's fused AdamW, eager, in float32."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE, num_nextn_predict_layers=0, use_cache=False)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    batches = RandomIds()

    def step(number: int) -> float:
        batch = batches[number]
        logits = model(batch.token_ids).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def tokens_per_s(step: Callable[[int], object], numbers: range) -> list[float]:
    """Speed of each step."""
    speeds = []
    for number in numbers:
        began = time.perf_counter()
        step(number)
        speeds.append(ROWS * LENGTH / (time.perf_counter() - began))
    return speeds


def matmul_peak_flops(size: int = 2048, tries: int = 8) -> float:
    """FLOP/s of the best of a few large square bfloat16 products: what else runs on the machine only takes away."""
    a, b = torch.randn(size, size).bfloat16(), torch.randn(size, size).bfloat16()
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def measure(steps: int, rounds: int, ours_only: bool) -> dict[str, Any]:
    """Warm both up, then alternate: `rounds` times `steps` steps of each."""
    config = ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **SHAPE, "quantization_config": None})
    dtype = faster_dtype()
    candidates = {"ours": our_step(config, dtype)}
    if not ours_only and find_spec("transformers"):
        candidates["transformers"] = their_step()
    speeds: dict[str, list[float]] = {name: [] for name in candidates}
    peak = 0.0
    for name, step in candidates.items():
        print(f"warming up: {name}", file=sys.stderr)
        tokens_per_s(step, range(WARM_UP_STEPS))
    for turn in range(rounds):
        first = WARM_UP_STEPS + turn * steps
        for name, step in candidates.items():
            speeds[name] += tokens_per_s(step, range(first, first + steps))
        peak = max(peak, matmul_peak_flops())
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    # each token attends to half the row in the mean; a training step costs three forwards
    flops = 3 * flops_per_token(config, LENGTH // 2, absorbed=False)
    return {
        "parameters": parameters(config).total,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_per_s": {name: round(value) for name, value in medians.items()},
        "slowest_and_fastest": {name: [round(min(v)), round(max(v))] for name, v in speeds.items()},
        "ratio": round(medians["ours"] / medians["transformers"], 2) if "transformers" in medians else None,
        "flops_per_token": flops,
        "bf16_matmul_peak_flops": round(peak),
        "share_of_peak": round(medians["ours"] * flops / peak, 4),
    }


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ours-only", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    line = {
        "benchmark": "train_tokens_per_s",
        "commit": commit or None,
        "machine": platform.machine(),
        "cpu": processor().model,
        "threads": options.threads,
        "torch": torch.__version__,
        "batch": [ROWS, LENGTH],
        **measure(options.steps, options.rounds, options.ours_only),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
