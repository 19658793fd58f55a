"""What the recipes over one's own data share: rows out of files, the tokenizer's files, the model to begin with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from karakoram.errors import InputError
from karakoram.train.config import TrainConfig
from karakoram.train.data.batches import Batch
from karakoram.train.data.corpus.conversations import Rendering
from karakoram.train.data.corpus.material import rows_of
from karakoram.train.data.corpus.mixture import Mixture, RowBatches
from karakoram.train.recipe import Material, Workplace
from karakoram.train.trainer import Objective

HELD_OUT_BATCHES = 8  # at most
BESIDE = ("tiktoken.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Corpus:
    """A recipe's `material`. read_weight: of what an assistant did not write; plain text weighs 1 anyway."""

    name: str
    data: str
    held_out: str
    tokenizer: Path
    sequence_tokens: int
    read_weight: float
    model: Callable[[torch.dtype], Any] | None = None
    objective: Callable[[TrainConfig], Objective] | None = None

    def __call__(self, stage: str, config: TrainConfig, place: Workplace) -> Material:
        context = config.model.max_position_embeddings
        if self.sequence_tokens > context:
            raise InputError(
                f"Rows of {self.sequence_tokens} tokens are longer than the model's context of {context}.",
                f"Give sequence_tokens of at most {context}, or model.max_position_embeddings={self.sequence_tokens}.",
            )

        def rows(data: str, what: str) -> RowBatches:
            with place.bar(what) as progress:
                return rows_of(
                    data, self.tokenizer, place.root / "tokens", config.batch, self.sequence_tokens,
                    config.model.vocab_size, config.seed, config.model.pad_token_id or 0,
                    Rendering(read_weight=self.read_weight), place.threads, progress,
                    place.say,
                )  # fmt: skip

        held: Sequence[Batch] = ()
        if self.held_out:
            held = _once(rows(self.held_out, "Tokens held out").mixture, config.batch.tokens_per_step)
        files = {n: (self.tokenizer / n).read_bytes() for n in BESIDE if (self.tokenizer / n).is_file()}
        return Material(
            rows(self.data, "Tokens"),
            files,
            held,
            {"recipe": self.name, "data": self.data, "sequence_tokens": self.sequence_tokens},
            self.objective(config) if self.objective else None,
            self.model,
        )


def _once(mixture: Mixture, batch_tokens: int) -> list[Batch]:
    """The first rows, as batches; fewer where the data end before: nothing is measured twice."""
    per_batch = batch_tokens // mixture.sequence_tokens
    count = min(HELD_OUT_BATCHES * per_batch, sum(len(plan) for plan in mixture.plans))
    return [mixture.rows(first, min(per_batch, count - first)) for first in range(0, count, per_batch)]
