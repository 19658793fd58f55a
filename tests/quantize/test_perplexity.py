"""Perplexity against its definition, token by token."""

import json
import math
from pathlib import Path

import pytest
import torch

from karakoram.errors import InputError, TokenizerError
from karakoram.model.load import load_model
from karakoram.quantize.perplexity import MAX_TEXT_BYTES, MAX_TOKENS, Perplexity, perplexity, read_token_ids
from tests.chat.conftest import write_tokenizer
from tests.checkpoint import tiny


def test_it_is_the_mean_over_windows(tmp_path: Path) -> None:
    """The definition in float64. 1e-5: float32 logits near 1 carry about 1e-7, and the mean is over 299 of them."""
    model = load_model(tiny.save(tmp_path / "m"), dtype="float32")
    ids = torch.randint(0, 160, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    total = 0.0
    for at in range(1, len(ids)):
        start = (at - 1) // 128 * 128  # the context of this model is 128, less than a window of 512
        logits = model(torch.tensor([ids[start:at]]), logits_for="last")[0, -1].double()
        total -= float(logits.log_softmax(0)[ids[at]])
    assert perplexity(model, ids) == pytest.approx(math.exp(total / 299), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary(tmp_path: Path) -> None:
    """All logits 0: every token has probability 1/160. 1e-5: the logarithm of 160 in float32, added up 49 times."""
    model = load_model(tiny.save(tmp_path / "m"), dense=True)
    assert model.lm_head is not None
    model.lm_head.weight.zero_()
    assert perplexity(model, list(range(50))) == pytest.approx(160, rel=1e-5)


def test_what_is_no_number_is_infinite_and_null_in_json(tmp_path: Path) -> None:
    model = load_model(tiny.save(tmp_path / "m"), dense=True)
    model.model.norm.weight.fill_(float("nan"))
    found = perplexity(model, [1, 2, 3])
    assert found == math.inf
    numbers = Perplexity("text", 2, 3.5, found).to_dict()
    assert json.loads(json.dumps(numbers, allow_nan=False)) == {
        "text": "text",
        "tokens": 2,
        "before": 3.5,
        "after": None,
    }


def test_a_long_text_is_read_to_its_bound_and_no_character_is_cut(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = tmp_path / "text"
    text.write_bytes(b"a" + "é".encode() * MAX_TEXT_BYTES)  # the bound falls into an é
    assert len(read_token_ids(tmp_path, text)) == MAX_TOKENS
    text.write_text("the x")
    assert len(read_token_ids(tmp_path, text)) == 3  # the | space | x


def test_mistakes(tmp_path: Path) -> None:
    text = tmp_path / "text"
    with pytest.raises(InputError, match="Cannot read"):
        read_token_ids(tmp_path, text)
    text.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"not UTF-8 \(byte 3\)"):
        read_token_ids(tmp_path, text)
    text.write_text("ab")
    with pytest.raises(TokenizerError):
        read_token_ids(tmp_path, text)
    write_tokenizer(tmp_path)
    text.write_text("a")
    with pytest.raises(InputError, match="1 tokens"):
        read_token_ids(tmp_path, text)
