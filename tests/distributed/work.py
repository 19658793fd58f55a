"""What the ranks of the tests do, each in its own process with torchrun's environment."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from karakoram.distributed.collectives import gradient_norm, share
from karakoram.distributed.expert_parallel import ExpertParallel, SpreadExperts
from karakoram.distributed.fsdp import gather_anew, split
from karakoram.distributed.layout import local
from karakoram.distributed.mesh import Alone, Ranks, start
from karakoram.errors import TrainingError
from karakoram.model.moe import LocalExperts
from karakoram.model.transformer import Transformer
from karakoram.model.watch import Watch
from karakoram.train.balance import sign_step
from karakoram.train.initialize import biases_of, initialize
from karakoram.train.loss import head_loss, loss_and_gradient
from karakoram.train.optim.adamw import AdamW
from karakoram.train.optim.owned import OwnedMuon
from tests.train.tiny import model_config

# Nothing divides evenly: 97 rows, 30 numbers, 54 rows, 3 · 26 rows, over 2 or 4.
SHAPE = {
    "vocab_size": 97, "hidden_size": 30, "intermediate_size": 50, "moe_intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 21, "kv_lora_rank": 38, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 16, "v_head_dim": 14,
}  # fmt: skip
STEPS, ROWS, LENGTH = 20, 7, 12
RATE = 1e-2


def train(
    ranks: Alone | Ranks, tied: bool, experts: int, held_out: bool = False, dtype: str = "float32"
) -> dict[str, Any]:
    """A small training loop over ranks: what the trainer does, in float32 or bfloat16, without schedule and guard."""
    model = initialize(
        Transformer(
            model_config(**SHAPE, n_routed_experts=experts, tie_word_embeddings=tied), dtype=getattr(torch, dtype)
        ),
        seed=3,
    )
    layouts = split(model, ranks)
    weights = {name: local(p.detach()).float() for name, p in model.named_parameters()}  # masters; in float32 the same
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        held = layouts[name].held
        assert weight.shape == tuple(one.stop - one.start for one in held), (name, weight.shape, held)
    matrices = {n: w for n, w in weights.items() if w.ndim > 1 and "embed" not in n and "head" not in n}
    # in bfloat16 a gradient's last bit becomes the direction's third digit; several rounds
    muon = OwnedMuon(matrices, layouts, ranks, dtype=torch.float32, round_numbers=5000)
    adamw = AdamW({n: w for n, w in weights.items() if n not in matrices})
    watch, biases, told = (
        Watch(threshold=1e9, margins=True),
        biases_of(model),
        {"losses": [], "norms": [], "logits": []},
    )
    for step in range(STEPS):
        watch.reset()
        ids, targets, weights_BT = batch(step)
        mine = slice(ranks.rank, None, ranks.world)
        weights_N = (weights_BT / weights_BT.sum())[mine].flatten()
        x_ND = model.hidden(ids[mine], watch=watch).flatten(0, 1)
        head = model.model.embed_tokens if model.lm_head is None else model.lm_head
        loss = head_loss(x_ND, head.weight, targets[mine].flatten(), weights_N, loss_and_gradient)
        loss.backward()
        gradients = {name: local(p.grad) for name, p in parameters.items()}
        told["losses"].append(float(ranks.sum_(loss.detach().clone())))
        told["norms"].append(gradient_norm(gradients, ranks))
        share(watch, ranks)
        told["logits"].append([largest_H.tolist() for largest_H in watch.max_logits.values()])
        muon.step(gradients, RATE, scale=0.5)
        adamw.step(gradients, RATE / 2)
        sign_step(biases, watch.loads, 1e-3)
        model.zero_grad()
        for name, weight in weights.items():
            local(parameters[name].detach()).copy_(weight)
        if held_out:
            with torch.no_grad():
                told["held_out"] = float(model.hidden(batch(STEPS)[0]).square().mean())
            gather_anew(model)
    told["update_rms"] = muon.update_rms()
    told["loads"] = {layer: load_E.tolist() for layer, load_E in watch.loads.items()}
    told["margins"] = {layer: int(counts_EQ.sum()) for layer, counts_EQ in watch.margin_counts.items()}
    told["weights"] = {name: layouts[name].gathered(weight) for name, weight in weights.items()}
    told["momenta"] = {name: layouts[name].gathered(buffer) for name, buffer in muon.state().items()}
    return told


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens of a small part of the vocabulary, targets, weights: [7, 12]."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 40, (ROWS, LENGTH + 1), generator=generator)
    return ids[:, :-1], (ids[:, :-1] * 3 + 1) % 40, torch.rand(ROWS, LENGTH, generator=generator)


# ---------------------------------------------------------------------------------------------------- tasks


def parity(out: Path, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Experts split over all ranks against all of them; then trainings, each with its `expert_ranks`.

    Rank 0 leaves the trained weights.
    """
    first = _ranks(out)
    bank = Ranks(first.device, first.world, first.pulse)
    told: dict[str, Any] = {"bank": {name: _compare(bank, *case) for name, case in _cases(first.world).items()}}
    for number, run in enumerate(runs):
        run = dict(run)
        ranks = Ranks(first.device, run.pop("expert_ranks"), first.pulse)
        result = train(ranks, **run)
        tensors = {
            f"{kind}/{n}": t.contiguous() for kind in ("weights", "momenta") for n, t in result.pop(kind).items()
        }
        if ranks.is_main:
            save_file(tensors, out / f"{number}.safetensors")
        told[str(number)] = result
    return told


def _cases(world: int) -> dict[str, tuple[list[int], Callable[[Tensor], Tensor]]]:
    evenly: Callable[[Tensor], Tensor] = lambda scores_NE: scores_NE.topk(2).indices  # noqa: E731
    return {
        "even": ([24] * world, evenly),
        "filled up": ([512] * world, evenly),  # so many rows that runs are rounded up
        "no tokens here": ([0] + [17] * (world - 1), evenly),
        "all to the last rank": ([9] * world, lambda scores_NE: scores_NE[:, -2:].topk(2).indices + 6),
        "all to one expert": ([9] * world, lambda scores_NE: torch.zeros(len(scores_NE), 1, dtype=torch.int64)),
    }


def _compare(ranks: Ranks, tokens: list[int], choose: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    torch.manual_seed(5)
    everything = LocalExperts(model_config(**SHAPE, n_routed_experts=8), "cpu", torch.float32)
    for stack in everything.parameters():
        torch.nn.init.normal_(stack, std=0.2)
    x_ND, scores_NE = torch.randn(sum(tokens), 30), torch.rand(sum(tokens), 8)
    ids_NK = choose(scores_NE)
    weights_NK, grad_ND = scores_NE.gather(1, ids_NK), torch.randn(sum(tokens), 30)
    mine = slice(sum(tokens[: ranks.rank]), sum(tokens[: ranks.rank + 1]))
    inputs = [t.clone().requires_grad_() for t in (x_ND, weights_NK)]
    expected = everything(inputs[0], ids_NK, inputs[1])
    expected.backward(grad_ND)
    results = []
    for _ in range(2):
        part = ExpertParallel({1: SpreadExperts(everything, ranks.experts.get_group())})
        own = [t[mine].clone().requires_grad_() for t in (x_ND, weights_NK)]
        found = part(1, own[0], ids_NK[mine], own[1])
        found.backward(grad_ND[mine])
        stacks = [p.grad for p in part.layers[1].parameters()]
        results.append([found.detach(), own[0].grad, own[1].grad, *stacks])
    here = 8 // ranks.world
    experts = slice(ranks.rank * here, (ranks.rank + 1) * here)
    wanted = [expected.detach()[mine], inputs[0].grad[mine], inputs[1].grad[mine]]
    wanted += [stack.grad[experts] for stack in everything.parameters()]
    distances = [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(results[0], wanted, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return {"distance": max(distances), "same_again": same, "rows": len(found)}


def lose(out: Path, victim: int, how: str) -> dict[str, Any]:
    """All-reduces until rank `victim` is lost in step 3."""
    ranks = _ranks(out)
    began = 0.0
    try:
        with ranks.together():
            for step in range(10**9):
                if step == 3 and ranks.rank == victim:
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise ValueError("the data is gone")
                began = time.monotonic()
                ranks.sum_(torch.ones(3))
    except TrainingError as error:
        return {"error": str(error), "took_s": time.monotonic() - began}
    return {}


def _ranks(out: Path) -> Ranks:
    torch.set_num_threads(1)
    meeting = "env://" if "TORCHELASTIC_RUN_ID" in os.environ else f"file://{out / 'meeting'}"
    ranks = start(1, "cpu", timeout_s=30, rendezvous=meeting)
    assert isinstance(ranks, Ranks)
    return ranks


if __name__ == "__main__":  # under torchrun
    lose(Path(sys.argv[1]), victim=1, how="kill")
