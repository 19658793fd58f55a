"""Knowledge distillation: a student learns the teacher's distributions, not only what came next (arXiv 1503.02531).

From the stored top k (`teacher.py`), teacher and student are compared over k + 1 outcomes: each of the k ids, and all
others together. With o the student's logits of the k ids and the log-sum-exp of all its other logits,

    KL = τ² Σ p (log p - log q)      q = softmax(o / τ),   p = softmax([logp, rest] / τ)
    ∂KL/∂o = τ (q - p),              ∂o_rest/∂logit_j = softmax over the others

At τ = 1 that is the exact KL of the two coarsened distributions, a lower bound of the whole one; with k = V it is the
whole one at any τ. At τ > 1 the others stay one outcome: what tempering would do inside them is not stored. τ² keeps
the gradient's size (Hinton et al., §2). The loss is share · KL + (1 - share) · cross-entropy.

The head runs on slices of rows, as in `loss.py`: a slice's logits become loss and gradient while they are in the cache,
and the whole [N, V] is never there. `plain_loss` is the twin by autograd, `online_objective` the same with the teacher
in memory.

Legend: N rows, D hidden, V vocabulary, K stored ids.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from karakoram.errors import InputError
from karakoram.model.documents import Documents
from karakoram.model.transformer import Transformer
from karakoram.train.data.batches import Batch
from karakoram.train.loss import head_loss
from karakoram.train.post.teacher import TeacherLogits

NOTHING = -1e4  # the log-sum-exp of no logits at all: exp of it is 0, and 0 times it is 0
Objective = Callable[[Transformer, Tensor, Batch, Tensor], Tensor]
Stored = tuple[Tensor, Tensor, Tensor]


def distill_slice(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, stored: Stored, temperature: float, share: float
) -> tuple[Tensor, Tensor]:
    """Σ weight · (share · KL + (1 - share) · CE), and its gradient in the logits' dtype [N, V].

    stored: ids int64 [N, K], log-probabilities [N, K], log of the rest's mass [N].
    """
    ids_NK, logp_NK, rest_N = stored
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    target_N = wide_NV.gather(-1, targets_N[:, None])[:, 0]
    chosen_NK = wide_NV.gather(-1, ids_NK)
    others_NV = wide_NV.scatter(-1, ids_NK, -torch.inf)
    others_N = others_NV.logsumexp(-1).clamp_min(NOTHING)
    outcomes_NK1 = torch.cat((chosen_NK, others_N[:, None]), -1)
    log_q_NK1 = (outcomes_NK1 / temperature).log_softmax(-1)
    log_p_NK1 = _tempered(logp_NK, rest_N, temperature, wide_NV.dtype)
    p_NK1 = log_p_NK1.exp()
    kl_N = temperature**2 * (p_NK1 * (log_p_NK1 - log_q_NK1)).sum(-1)
    whole_N = outcomes_NK1.logsumexp(-1)
    loss = ((share * kl_N + (1 - share) * (whole_N - target_N)) * weights_N).sum()

    push_NK1 = share * temperature * (log_q_NK1.exp() - p_NK1)
    push_NK1 = (push_NK1 + (1 - share) * (outcomes_NK1 - whole_N[:, None]).exp()) * weights_N[:, None]
    grad_NV = others_NV.sub_(others_N[:, None]).exp_().mul_(push_NK1[:, -1:])
    grad_NV.scatter_(-1, ids_NK, push_NK1[:, :-1])
    grad_NV.scatter_add_(-1, targets_N[:, None], ((share - 1) * weights_N).to(grad_NV.dtype)[:, None])
    return loss, grad_NV.to(logits_NV.dtype)


def plain_loss(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, stored: Stored, temperature: float, share: float
) -> Tensor:
    """The same sum by autograd, from the definitions: the truth of `distill_slice`."""
    ids_NK, logp_NK, rest_N = stored
    s_NV = logits_NV.log_softmax(-1)
    others_N = s_NV.scatter(-1, ids_NK, -torch.inf).exp().sum(-1)
    outcomes_NK1 = torch.cat((s_NV.gather(-1, ids_NK), others_N[:, None].clamp_min(1e-300).log()), -1)
    log_p_NK1 = _tempered(logp_NK, rest_N, temperature, s_NV.dtype)
    log_q_NK1 = (outcomes_NK1 / temperature).log_softmax(-1)
    kl_N = temperature**2 * F.kl_div(log_q_NK1, log_p_NK1, reduction="none", log_target=True).sum(-1)
    ce_N = F.nll_loss(s_NV, targets_N, reduction="none")
    return ((share * kl_N + (1 - share) * ce_N) * weights_N).sum()


def online_loss(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, teacher_NV: Tensor, temperature: float, share: float
) -> tuple[Tensor, Tensor]:
    """`distill_slice` with the teacher's logits whole: loss, and gradient [N, V]."""
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    log_p_NV = (teacher_NV.to(wide_NV.dtype) / temperature).log_softmax(-1)
    log_q_NV, s_NV = (wide_NV / temperature).log_softmax(-1), wide_NV.log_softmax(-1)
    kl_N = temperature**2 * (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    ce_N = -s_NV.gather(-1, targets_N[:, None])[:, 0]
    grad_NV = share * temperature * (log_q_NV.exp() - log_p_NV.exp()) + (1 - share) * s_NV.exp()
    grad_NV.scatter_add_(-1, targets_N[:, None], torch.full_like(grad_NV[:, :1], share - 1))
    loss = ((share * kl_N + (1 - share) * ce_N) * weights_N).sum()
    return loss, (grad_NV * weights_N[:, None]).to(logits_NV.dtype)


def stored_objective(stored: TeacherLogits, ids: np.ndarray, temperature: float = 1.0, share: float = 0.9) -> Objective:
    """For `Trainer`, with batches whose `targets` are flat positions (`PositionBatches`).

    ids  the flat tokens of the cache: the hard targets. Raises InputError where student and teacher have other
    vocabularies, or for a temperature or share that cannot be.
    """
    _check(temperature, share)

    def objective(model: Transformer, x_ND: Tensor, batch: Batch, weights_N: Tensor) -> Tensor:
        _same_vocabulary(model, stored.vocab_size)
        # what follows the last token of all is not there; its weight is 0
        next_N = (batch.targets.flatten().cpu() + 1).clamp_max(stored.tokens - 1)
        targets_N = torch.from_numpy(np.asarray(ids[next_N.numpy()], dtype=np.int64)).to(x_ND.device)
        rows = tuple(t.to(x_ND.device) for t in stored.rows(batch.targets.flatten().cpu()))

        def of_slice(logits_NV: Tensor, rows_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
            ids_NK, logp_NK, rest_N = (t[rows_N] for t in rows)
            return distill_slice(logits_NV, targets_N[rows_N], weights_N, (ids_NK, logp_NK, rest_N), temperature, share)

        return _by_slices(model, x_ND, weights_N, of_slice)

    return objective


def online_objective(teacher: Transformer, temperature: float = 1.0, share: float = 0.9) -> Objective:
    """For `Trainer` and ordinary batches: the teacher reads each batch too. The reference for what is stored."""
    _check(temperature, share)

    def objective(model: Transformer, x_ND: Tensor, batch: Batch, weights_N: Tensor) -> Tensor:
        _same_vocabulary(model, teacher.config.vocab_size)
        targets_N = batch.targets.flatten()
        with torch.no_grad():
            documents = None if batch.documents is None else Documents(batch.documents)
            teacher_ND = teacher.to(x_ND.device).hidden(batch.token_ids, documents=documents).flatten(0, 1)

        def of_slice(logits_NV: Tensor, rows_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                teacher_NV = teacher.logits(teacher_ND[rows_N])
            return online_loss(logits_NV, targets_N[rows_N], weights_N, teacher_NV, temperature, share)

        return _by_slices(model, x_ND, weights_N, of_slice)

    return objective


class PositionBatches:
    """Batches of whole documents whose `targets` are flat positions of the tokens themselves; padded, weight 0 there.

    A batch is a function of seed and number. `tenths` are the cache's weights (`open_token_cache`); None: all 1.
    """

    def __init__(
        self, ids: np.ndarray, offsets: np.ndarray, tokens_per_batch: int, seed: int, tenths: np.ndarray | None = None
    ) -> None:
        self.ids, self.offsets, self.tenths = ids, np.asarray(offsets, dtype=np.int64), tenths
        self.documents = np.nonzero(np.diff(self.offsets) > 1)[0]  # one token alone has no target
        if not len(self.documents):
            raise InputError("No document has two tokens.", "Give documents with something to predict.")
        longest = int(np.diff(self.offsets).max())
        if tokens_per_batch < longest:
            raise InputError(
                f"A batch of {tokens_per_batch} tokens cannot hold a document of {longest}.", "Make batches larger."
            )
        self.rows, self.seed = min(len(self.documents), tokens_per_batch // longest), seed

    def batch(self, number: int, rank: int = 0, world: int = 1) -> Batch:
        """Rows rank, rank + world, … of the batch."""
        per_epoch = len(self.documents) // self.rows
        epoch, place = divmod(number, per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(self.documents)
        chosen = order[place * self.rows : (place + 1) * self.rows][rank::world]
        width = int((self.offsets[chosen + 1] - self.offsets[chosen]).max()) - 1
        at_BT = self.offsets[chosen][:, None] + np.arange(width)
        learned_BT = at_BT < self.offsets[chosen + 1][:, None] - 1
        at_BT = np.where(learned_BT, at_BT, self.offsets[chosen][:, None])
        weights_BT = learned_BT.astype(np.float32)
        if self.tenths is not None:
            weights_BT *= self.tenths[at_BT + 1] / np.float32(10)
        token_ids = torch.from_numpy(np.asarray(self.ids[at_BT], dtype=np.int64))
        return Batch(token_ids, torch.from_numpy(at_BT), torch.from_numpy(weights_BT))


def _by_slices(
    model: Transformer, x_ND: Tensor, weights_N: Tensor, of_slice: Callable[[Tensor, Tensor, Tensor], tuple]
) -> Tensor:
    """`head_loss` hands each slice the numbers of its rows in place of targets."""
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    rows_N = torch.arange(len(x_ND), device=x_ND.device)
    return head_loss(x_ND, head.weight, rows_N, weights_N, of_slice)


def _tempered(logp_NK: Tensor, rest_N: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Log-probabilities of the k + 1 outcomes at a temperature; an outcome without mass gets `NOTHING`."""
    outcomes_NK1 = torch.cat((logp_NK, rest_N[:, None]), -1).to(dtype).clamp_min(NOTHING)
    return (outcomes_NK1 / temperature).log_softmax(-1)


def _check(temperature: float, share: float) -> None:
    if not 0 < temperature < 1e3 or not 0 <= share <= 1:
        raise InputError(
            f"Temperature {temperature} and share {share} cannot be.", "The one is above 0, the other from 0 to 1."
        )


def _same_vocabulary(model: Transformer, teacher_ids: int) -> None:
    if model.config.vocab_size != teacher_ids:
        raise InputError(
            f"The student has {model.config.vocab_size:,} ids, the teacher {teacher_ids:,}.",
            "Distil between models that share a tokenizer.",
        )
