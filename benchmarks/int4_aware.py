"""What does int4 cost, and how much of it does int4-aware training win back?

A small K2-shaped model (`SHAPE`) is trained in bfloat16 to its end; a copy of the run leaves it at `--int4-from` and
goes on with the same batches, its routed experts on the int4 grid. Three models come out: (i) bfloat16, (ii) the same
weights rounded by `quantize` as published, (iii) trained on the grid. All three read the same held-out rows, at least
200,000 tokens of them; gaps are paired by row.

    gap of rounding   loss(ii) - loss(i)
    gap of training   loss(iii) - loss(i)     the bar: at most half of the other

The finished int4 checkpoint is also compared with what `quantize` makes of the bfloat16 export of the same weights:
how many codes, scales and values differ (the bar: none).

    python benchmarks/int4_aware.py --data DIR [--seeds 0 1 2] [--steps 500] [--threads 1] [--out FILE]

DIR holds `text/*.txt` and `gsm8k/train.jsonl`; generated dialogs are mixed in. One line of JSON a seed and one for all:
means over the seeds, and two standard errors: over rows within a seed, and over seeds.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.chat import load_chat_format
from karakoram.checkpoint import open_checkpoint
from karakoram.config import ModelConfig
from karakoram.env import bundled_model_dir, processor
from karakoram.model.load import load_model
from karakoram.model.transformer import Transformer
from karakoram.quantize.quantize import quantize
from karakoram.train.data.batches import Batch
from karakoram.train.data.names import Split
from karakoram.train.data.pack import samples
from karakoram.train.data.plain_text import read_texts
from karakoram.train.machine import keep_freed_memory

ROWS, LENGTH = 16, 256
HELD_OUT_EVERY = 16  # of the pieces of text: about 230,000 tokens
DIALOG_TOKENS = 500_000
HELD_OUT_DIALOG_TOKENS = 60_000
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "quantization_config": None,
}


class Rows:
    """Rows of LENGTH + 1 ids in a fixed random order, another one every epoch; batch n is a function of seed and n."""

    def __init__(self, rows_RT: Tensor, seed: int) -> None:
        self.rows_RT, self.seed = rows_RT, seed

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """What the trainer asks for."""
        per_epoch = len(self.rows_RT) // ROWS
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows_RT))
        ids = self.rows_RT[torch.from_numpy(order[place * ROWS : (place + 1) * ROWS])].long()
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones(ROWS, LENGTH))


def token_rows(data_dir: Path) -> tuple[Tensor, Tensor]:
    """Training rows and held-out rows, int32 [R, LENGTH + 1]."""
    fmt = load_chat_format(bundled_model_dir())
    end = fmt.tokenizer.special_ids["[EOS]"]
    pieces = [document.text or "" for document in read_texts(data_dir)]
    for line in (data_dir / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines():
        problem = json.loads(line)
        pieces.append(f"{problem['question']}\n{problem['answer']}")
    train: list[int] = []
    held_out: list[int] = []
    for number, piece in enumerate(pieces):
        into = held_out if number % HELD_OUT_EVERY == 0 else train
        into += [*fmt.tokenizer.encode(piece), end]
    splits: tuple[tuple[list[int], Split, int], ...] = (
        (train, "train", DIALOG_TOKENS),
        (held_out, "eval", HELD_OUT_DIALOG_TOKENS),
    )
    for into, split, wanted in splits:
        until = len(into) + wanted
        for ids, _ in samples(fmt, 0, split=split):
            into += ids
            if len(into) >= until:
                break
    return cut(train), cut(held_out)


def cut(ids: list[int]) -> Tensor:
    """A flat list as rows that overlap by one id: each id but the first is a target once."""
    count = (len(ids) - 1) // LENGTH
    flat = torch.tensor(ids[: count * LENGTH + 1], dtype=torch.int32)
    return flat.unfold(0, LENGTH + 1, LENGTH).contiguous()


@torch.no_grad()
def row_losses(model: Transformer, rows_RT: Tensor) -> Tensor:
    """Mean cross-entropy of every row, float64 [R]."""
    losses = []
    for rows in rows_RT.split(ROWS):
        ids = rows.long()
        logits = model.logits(model.hidden(ids[:, :-1]))
        losses.append(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().mean(1))
    return torch.cat(losses)


def train_both(rows_RT: Tensor, seed: int, options: argparse.Namespace, out: Path) -> tuple[Path, Path]:
    """The run to its end, and the run that left it for the grid: their finished models' directories."""
    from karakoram.train.config import BalanceConfig, OptimizerConfig, ScheduleConfig, TrainConfig
    from karakoram.train.trainer import Trainer

    model = ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **SHAPE})

    config = TrainConfig(
        model,
        steps=options.steps,
        optimizer=OptimizerConfig(learning_rate=options.rate, adamw_learning_rate=options.rate),
        schedule=ScheduleConfig(warmup_steps=30, decay_from=options.decay_from),
        balance=BalanceConfig(rate=3e-3),
        int4_from=2.0,
        seed=seed,
    )
    plain = Trainer(config, Rows(rows_RT, seed), out / "bf16", {}, torch.bfloat16, compiled=False)
    learn(plain, options.int4_from)
    # neither copy writes a checkpoint before its end
    aware = copy.deepcopy(plain, {id(plain.checkpoints): plain.checkpoints})
    aware.config, aware.out = replace(config, int4_from=options.int4_from), out / "int4"
    learn(plain, 1.0)
    learn(aware, 1.0)
    return plain.finish(), aware.finish()


def learn(trainer: Any, until: float) -> None:
    """Steps up to a share of the run."""
    while trainer.progress < until:
        line = trainer.train_step(trainer.batches.batch(trainer.position))
        if trainer.step % 50 == 0:
            print(f"  step {trainer.step}: loss {line['loss']:.3f}", file=sys.stderr, flush=True)


def differences(one: Path, other: Path) -> dict[str, int]:
    """How many stored codes, scales and values of two int4 checkpoints differ; a tensor that one lacks counts whole."""
    first, second = (_stored(path) for path in (one, other))
    counts = {"codes": 0, "scales": 0, "values": 0}
    for name in first.keys() | second.keys():
        kind = "codes" if name.endswith("_packed") else "scales" if name.endswith("_scale") else "values"
        a, b = first.get(name), second.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            counts[kind] += (a if b is None else b).numel()  # pyright: ignore[reportOptionalMemberAccess]
        else:
            counts[kind] += int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
    return counts


def _stored(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    open_checkpoint(path).check()
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def one_seed(train_RT: Tensor, held_RT: Tensor, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train, round, read the held-out rows with all three, compare the exports."""
    from karakoram.train.checkpoints.export import save_model

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        plain, aware = train_both(train_RT, seed, options, out)
        trained_s = time.monotonic() - began
        quantize(plain, out / "rounded")
        models = {"bf16": plain, "rounded": out / "rounded", "int4_aware": aware}
        losses = {name: row_losses(load_model(path, dense=True), held_RT) for name, path in models.items()}
        loaded = load_model(aware, dense=True)
        save_model(loaded, loaded.config, out / "dense", {}, int4=False)
        quantize(out / "dense", out / "again")
        changed = differences(aware, out / "again")
    gaps = {name: losses[name] - losses["bf16"] for name in ("rounded", "int4_aware")}
    return {
        "seed": seed,
        "loss": {name: float(loss_R.mean()) for name, loss_R in losses.items()},
        "gap": {name: float(gap_R.mean()) for name, gap_R in gaps.items()},
        "gap_standard_error": {name: float(gap_R.std() / math.sqrt(len(gap_R))) for name, gap_R in gaps.items()},
        "ratio": float(gaps["int4_aware"].mean() / gaps["rounded"].mean()),
        "export_changed": changed,
        "training_s": round(trained_s, 1),
    }


def over_seeds(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean gaps, their standard errors over the seeds, and the ratio of the means."""
    summary: dict[str, Any] = {"seeds": [line["seed"] for line in lines]}
    for key in ("loss", "gap"):
        summary[key] = {name: statistics.mean(line[key][name] for line in lines) for name in lines[0][key]}
    if len(lines) > 1:
        summary["gap_standard_error"] = {
            name: statistics.stdev(line["gap"][name] for line in lines) / math.sqrt(len(lines))
            for name in lines[0]["gap"]
        }
    summary["ratio"] = summary["gap"]["int4_aware"] / summary["gap"]["rounded"]
    summary["export_changed"] = {
        kind: sum(line["export_changed"][kind] for line in lines) for kind in lines[0]["export_changed"]
    }
    return summary


def main() -> None:
    """One line a seed, then one for all; to stdout and to the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="holds text/*.txt and gsm8k/train.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate")
    parser.add_argument("--int4-from", type=float, default=0.8, help="share of the run")
    parser.add_argument(
        "--decay-from", type=float, default=0.5, help="share of the run at which the rate begins to fall"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="append the lines to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    train_RT, held_RT = token_rows(options.data)
    print(f"{train_RT[:, 1:].numel():,} tokens to learn, {held_RT[:, 1:].numel():,} held out", file=sys.stderr)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    about = {
        "benchmark": "int4_aware", "commit": commit or None, "machine": platform.machine(), "cpu": processor().model,
        "threads": options.threads, "cpus": os.cpu_count(), "torch": torch.__version__, "steps": options.steps,
        "tokens": options.steps * ROWS * LENGTH, "int4_from": options.int4_from, "decay_from": options.decay_from,
        "learning_rate": options.rate,
        "unique_tokens": train_RT[:, 1:].numel(), "held_out_tokens": held_RT[:, 1:].numel(),
    }  # fmt: skip
    lines: list[dict[str, Any]] = []
    for seed in options.seeds:
        lines.append(one_seed(train_RT, held_RT, seed, options))
        _write(about | lines[-1], options.out)
    _write(about | over_seeds(lines), options.out)


def _write(line: dict[str, Any], out: Path | None) -> None:
    print(json.dumps(line), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
