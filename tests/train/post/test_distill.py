"""Distillation: the loss and its gradient are the definition's, stored and online agree, and a student gains."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.model.documents import Documents
from karakoram.model.transformer import Transformer
from karakoram.train.data.batches import Batch
from karakoram.train.initialize import initialize
from karakoram.train.loss import head_loss, loss_and_gradient
from karakoram.train.post.distill import (
    PositionBatches,
    distill_slice,
    online_loss,
    online_objective,
    plain_loss,
    stored_objective,
)
from karakoram.train.post.teacher import TeacherLogits, top_k, write_teacher_logits

N, V = 6, 24


def numbers(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's logits, targets, weights, teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=generator, dtype=dtype) * 2
    targets = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator, dtype=dtype)
    weights[2] = 0
    return logits, targets, weights, torch.randn(N, V, generator=generator, dtype=dtype) * 3


class Sliced(torch.autograd.Function):
    """A loss with its own gradient, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Any) -> Tensor:
        value, gradient = loss(logits)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grads[0], None


@pytest.mark.parametrize("k", [1, 5, V - 1, V])
@pytest.mark.parametrize(("temperature", "share"), [(1.0, 1.0), (1.0, 0.6), (2.5, 1.0), (0.7, 0.3), (3.0, 0.0)])
def test_gradient_is_right_and_the_twin_agrees(k: int, temperature: float, share: float) -> None:
    logits, targets, weights, teacher = numbers()
    stored = top_k(teacher, k)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: Sliced.apply(z, lambda y: distill_slice(y, targets, weights, stored, temperature, share)), logits
    )
    loss, gradient = distill_slice(logits.detach(), targets, weights, stored, temperature, share)
    twin = plain_loss(logits, targets, weights, stored, temperature, share)
    twin.backward()
    assert logits.grad is not None
    assert torch.allclose(loss, twin.detach(), rtol=1e-10, atol=1e-12)
    assert torch.allclose(gradient, logits.grad, rtol=1e-8, atol=1e-10)
    assert not gradient[2].any(), "a row of weight 0 pushes nothing"


def test_share_0_is_cross_entropy_and_a_perfect_student_has_no_divergence() -> None:
    logits, targets, weights, teacher = numbers()
    loss, gradient = distill_slice(logits, targets, weights, top_k(teacher, 5), 1.0, 0.0)
    plain, plain_gradient = loss_and_gradient(logits, targets, weights)
    # the one is float64, the other float32
    assert torch.allclose(loss.float(), plain.float(), rtol=1e-6)
    assert torch.allclose(gradient.float(), plain_gradient.float(), atol=1e-6)
    for k in (3, V):
        loss, gradient = distill_slice(teacher + 7.0, targets, weights, top_k(teacher, k), 1.0, 1.0)
        # the stored log-probabilities are float32: 1e-7 of numbers up to 20
        assert abs(float(loss)) < 1e-5 and float(gradient.abs().max()) < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_of_the_vocabulary_is_the_online_loss(temperature: float) -> None:
    logits, targets, weights, teacher = numbers()
    stored = distill_slice(logits, targets, weights, top_k(teacher, V), temperature, 0.8)
    online = online_loss(logits, targets, weights, teacher, temperature, 0.8)
    whole = F.kl_div(
        (logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1), reduction="none",
        log_target=True,
    ).sum(-1)  # fmt: skip
    wanted = 0.8 * temperature**2 * whole + 0.2 * F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(online[0], (wanted * weights).sum(), rtol=1e-10)
    # stored log-probabilities are float32
    assert torch.allclose(stored[0], online[0], rtol=1e-5)
    assert torch.allclose(stored[1], online[1], atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda z: Sliced.apply(z, lambda y: online_loss(y, targets, weights, teacher, temperature, 0.8)),
        logits.requires_grad_(),
    )


def test_more_stored_ids_see_more_of_the_divergence() -> None:
    """Coarsening only loses divergence (data processing), and all of it is there at the end."""
    logits, targets, weights, teacher = numbers()
    seen = [float(distill_slice(logits, targets, weights, top_k(teacher, k), 1.0, 1.0)[0]) for k in range(1, V + 1)]
    assert all(a <= b + 1e-6 for a, b in zip(seen, seen[1:]))
    assert seen[0] < seen[-1]


def test_logits_far_apart_stay_finite() -> None:
    logits, targets, weights, teacher = numbers(dtype=torch.float32)
    logits[:, 0], teacher[:, 1] = 5000.0, 5000.0
    for k in (1, 5, V):
        loss, gradient = distill_slice(logits, targets, weights, top_k(teacher, k), 1.0, 0.5)
        assert loss.isfinite() and gradient.isfinite().all()


def test_through_the_head_in_bf16_and_fp32() -> None:
    """Slices by row numbers, hidden states to loss: the gradients of x and head are autograd's."""
    generator = torch.Generator().manual_seed(3)
    rows = 2100  # three slices of the head's 1,024
    x = torch.randn(rows, 16, generator=generator)
    head = torch.randn(V, 16, generator=generator) * 0.3
    targets = torch.randint(V, (rows,), generator=generator)
    weights = torch.full((rows,), 1 / rows)
    stored = top_k(torch.randn(rows, V, generator=generator) * 2, 6)

    def of_slice(logits: Tensor, at: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ids, logp, rest = (t[at] for t in stored)
        return distill_slice(logits, targets[at], w, (ids, logp, rest), 2.0, 0.7)

    # float32: sums of 2,100 rows in another order; bfloat16: logits and gradients are rounded to 8 bits, 0.4 %
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        a, b = (t.clone().to(dtype).requires_grad_() for t in (x, head))
        head_loss(a, b, torch.arange(rows), weights, of_slice).backward()
        c, d = (t.detach().float().requires_grad_() for t in (a, b))
        plain_loss(F.linear(c, d), targets, weights, stored, 2.0, 0.7).backward()
        for ours, theirs in ((a, c), (b, d)):
            assert ours.grad is not None and theirs.grad is not None
            assert (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm() < tolerance


# ------------------------------------------------------------------------------------------- a teacher and a student

WORDS = 48


def model(hidden: int, layers: int, seed: int) -> Transformer:
    shape: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": hidden, "intermediate_size": 2 * hidden, "moe_intermediate_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "max_position_embeddings": 64,
        "quantization_config": None,
    }  # fmt: skip
    torch.set_num_threads(1)
    config = ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **shape})
    return initialize(Transformer(config, dtype=torch.float32), seed)


def chain(tokens: int, seed: int) -> np.ndarray:
    """A noisy chain: what follows depends on the last word, with an entropy of about 2 nats."""
    table = np.random.default_rng(7).dirichlet(np.full(WORDS, 0.25), WORDS).cumsum(1)
    rng = np.random.default_rng(seed)
    ids = [0]
    for roll in rng.random(tokens - 1):
        ids.append(min(WORDS - 1, int(np.searchsorted(table[ids[-1]], roll))))
    return np.array(ids, dtype=np.uint16)


def offsets_of(ids: np.ndarray, length: int = 32) -> np.ndarray:
    return np.arange(0, len(ids) + 1, length)


def learn(model: Transformer, batches: PositionBatches, ids: np.ndarray, steps: int, objective: Any = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for number in range(steps):
        batch = batches.batch(number)
        weights_N = batch.weights.flatten() / batch.weights.sum()
        x_ND = model.hidden(batch.token_ids).flatten(0, 1)
        if objective is not None:
            loss = objective(model, x_ND, batch, weights_N)
        else:
            targets_N = torch.from_numpy(ids[batch.targets.flatten().numpy() + 1].astype(np.int64))
            loss = head_loss(x_ND, model.model.embed_tokens.weight, targets_N, weights_N, loss_and_gradient)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def held_out_loss(model: Transformer) -> float:
    rows = torch.from_numpy(chain(64 * 33, 99).astype(np.int64)).view(64, 33)
    return float(F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, np.ndarray, Path]:
    """A teacher that read 25 times what the student will, the student's 2,048 tokens, and their stored logits."""
    teacher, much, few = model(64, 2, 0), chain(51_200, 1), chain(2048, 2)
    learn(teacher, PositionBatches(much, offsets_of(much), 512, 0), much, 100)
    path = write_teacher_logits(teacher, few, offsets_of(few), tmp_path_factory.mktemp("teacher") / "logits", k=16)
    return teacher, few, path


def test_a_distilled_student_reads_the_held_out_text_better(taught: Any) -> None:
    teacher, few, path = taught
    stored = TeacherLogits(path, (few, offsets_of(few)))
    batches = PositionBatches(few, offsets_of(few), 512, 0)
    losses: dict[str, float] = {"teacher": held_out_loss(teacher)}
    for name, objective in (("hard", None), ("distilled", stored_objective(stored, few, 1.0, 0.9))):
        student = model(32, 1, 5)
        learn(student, batches, few, 60, objective)
        losses[name] = held_out_loss(student)
    print(losses)
    assert losses["teacher"] < losses["distilled"] < losses["hard"] - 0.1


def test_stored_and_online_objectives_agree(taught: Any, tmp_path: Path) -> None:
    teacher, few, _ = taught
    path = write_teacher_logits(teacher, few, offsets_of(few), tmp_path / "all", k=WORDS, value_dtype="float32")
    stored = stored_objective(TeacherLogits(path), few, 2.0, 0.75)
    student, batch = model(32, 1, 5), PositionBatches(few, offsets_of(few), 512, 0).batch(3)
    weights_N = batch.weights.flatten() / batch.weights.sum()
    targets = torch.from_numpy(few[batch.targets.numpy() + 1].astype(np.int64))
    results = []
    for objective, its_batch in (
        (stored, batch),
        (online_objective(teacher, 2.0, 0.75), batch._replace(targets=targets)),
    ):
        student.zero_grad()
        loss = objective(student, student.hidden(batch.token_ids).flatten(0, 1), its_batch, weights_N)
        loss.backward()
        results.append((float(loss.detach()), [p.grad.clone() for p in student.parameters() if p.grad is not None]))
    # batches of other shapes: float32 sums in another order
    assert math.isclose(results[0][0], results[1][0], rel_tol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_the_teacher_sees_documents_apart_as_the_student_does(taught: Any) -> None:
    """A row of two documents is two rows of one; a teacher that read across would say something else."""
    teacher, few, _ = taught
    student, objective = model(32, 1, 5), online_objective(teacher, 1.0, 1.0)
    ids = torch.from_numpy(few[:33].astype(np.int64))
    documents_T = torch.arange(2, dtype=torch.int32).repeat_interleave(16)
    packed = Batch(ids[None, :32], ids[None, 1:], torch.ones(1, 32), documents_T[None])
    apart = Batch(*(tensor.view(2, 16) for tensor in packed[:3]))
    losses = []
    for batch in (packed, apart):
        documents = None if batch.documents is None else Documents(batch.documents)
        x_ND = student.hidden(batch.token_ids, documents=documents).flatten(0, 1)
        losses.append(float(objective(student, x_ND, batch, batch.weights.flatten() / 32).detach()))
    # float32 sums in another order
    assert math.isclose(*losses, rel_tol=1e-5)


def test_position_batches_are_documents_and_their_places() -> None:
    ids = np.arange(100, 160, dtype=np.uint16)
    offsets = np.array([0, 7, 8, 28, 60])
    tenths = np.full(60, 10, dtype=np.uint8)
    tenths[:7] = 1
    batches = PositionBatches(ids, offsets, 100, 0, tenths)
    batch = batches.batch(0)
    assert len(batch.token_ids) == 3
    at, learned = batch.targets, batch.weights > 0
    assert torch.equal(batch.token_ids[learned], at[learned] + 100)
    assert sorted(at[learned].tolist()) == [p for p in range(60) if p not in (6, 7, 27, 59)]
    assert torch.allclose(batch.weights[learned & (at < 7)], torch.tensor(0.1))
    assert torch.equal(batches.batch(0).targets, at)
    halves = [batches.batch(0, rank, 2).targets for rank in range(2)]
    assert sum(len(half) for half in halves) == 3
    with pytest.raises(InputError, match="cannot hold a document of 32"):
        PositionBatches(ids, offsets, 20, 0)


def test_other_vocabularies_and_settings_are_refused(taught: Any) -> None:
    teacher, few, path = taught
    stored = TeacherLogits(path)
    with pytest.raises(InputError, match="Temperature 0"):
        stored_objective(stored, few, 0.0)
    with pytest.raises(InputError, match=r"share 1\.5"):
        online_objective(teacher, 1.0, 1.5)
    batch = PositionBatches(few, offsets_of(few), 512, 0).batch(0)
    stored.vocab_size = 50
    with pytest.raises(InputError, match="The student has 48 ids, the teacher 50"):
        stored_objective(stored, few)(model(32, 1, 5), torch.zeros(1, 32), batch, torch.ones(1))
