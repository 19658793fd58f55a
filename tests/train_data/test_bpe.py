"""The tokenizer: K2's layout, digits apart, words copied whatever stands before them, exact round trips."""

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karakoram.chat import ChatFormat, Tokenizer
from karakoram.errors import TrainingError
from karakoram.train.data.bpe import (
    N_RANKS,
    N_SPECIALS,
    SPECIALS,
    byte_order,
    generated_texts,
    learn_ranks,
    words_apart,
)
from karakoram.train.data.names import NOUNS, PROSE, SPLITS, split_of, tool_name


def test_layout_follows_k2(tokenizer_dir: Path, fmt: ChatFormat) -> None:
    tok = fmt.tokenizer
    assert tok.n_vocab == N_RANKS + N_SPECIALS == 4096
    assert [tok.token_bytes(rank)[0] for rank in range(256)] == byte_order()
    assert tok.encode("!") == [0]
    for offset, name in SPECIALS.items():
        assert tok.special_ids[name] == N_RANKS + offset
    assert tok.special_ids["[UNK]"] == 4094
    assert tok.special_ids["[PAD]"] == 4095
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    assert config["karakoram"] == {"dialect": "kimi-k2.5"}
    assert config["model_max_length"] == 2048
    assert fmt.dialect == "kimi-k2.5"


def test_specials_are_k2s(tokenizer_dir: Path, shared_dir: Path) -> None:
    k2 = json.loads((shared_dir / "data/kimi_tokenizer/tokenizer_config.json").read_text())["added_tokens_decoder"]
    ours = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    for key, entry in k2.items():
        if entry["content"] in ("[UNK]", "[PAD]"):
            continue
        mine = ours[str(int(key) - 163_584 + N_RANKS)]
        assert mine == entry


def test_byte_order_is_k2s(shared_dir: Path) -> None:
    lines = (shared_dir / "data/kimi_tokenizer/tiktoken.model").read_text().splitlines()[:256]
    import base64

    assert [base64.b64decode(line.split()[0])[0] for line in lines] == byte_order()


def test_digits_never_merge(fmt: ChatFormat) -> None:
    tok = fmt.tokenizer
    for rank in range(256, N_RANKS):
        token = tok.token_bytes(rank)
        assert not any(48 <= byte <= 57 for byte in token), token
    assert len(tok.encode("2024-03-05")) == 10


def test_a_name_has_the_same_tokens_after_a_space_a_dot_and_a_quote(fmt: ChatFormat) -> None:
    tok = fmt.tokenizer
    held_out = [noun for noun in NOUNS if split_of(noun) == "eval" and noun in words_apart()]
    assert len(held_out) > 50
    for noun in held_out:
        alone = tok.encode(noun)
        assert tok.encode("." + noun) == tok.encode(".") + alone
        assert tok.encode('"' + noun) == tok.encode('"') + alone
        if noun[0] != "a":  # ` a` is a token, and may be left over when pairs have been made
            assert tok.encode(" " + noun) == tok.encode(" ") + alone


def test_names_are_made_of_single_letters_and_pairs(fmt: ChatFormat) -> None:
    tok = fmt.tokenizer
    rng = Random(7)
    for split in SPLITS:
        for _ in range(300):
            name = tool_name(rng, split, set())
            longer = [tok.token_bytes(i) for i in tok.encode("." + name) if len(tok.token_bytes(i)) > 2]
            # words of prose occur in the names of training, and are looked up whole there, too
            assert all(token.decode().strip("_-").lower() in PROSE for token in longer), (name, longer)


@given(st.text(max_size=200))
def test_round_trip(fmt: ChatFormat, text: str) -> None:
    assert fmt.tokenizer.decode(fmt.tokenizer.encode(text)) == text


def test_generated_text_is_short_in_tokens(fmt: ChatFormat) -> None:
    texts = list(generated_texts(100, seed=99))
    assert (
        sum(map(len, texts)) / sum(len(fmt.tokenizer.encode(text)) for text in texts) > 2.1
    )  # names are spelled in pairs


def test_training_is_deterministic() -> None:
    texts = list(generated_texts(60, seed=1))
    assert learn_ranks(texts, words_apart(), 1200) == learn_ranks(texts, words_apart(), 1200)


def test_no_name_can_contain_a_whole_word_of_prose(fmt: ChatFormat) -> None:
    """Words longer than a pair are looked up whole; if two tokens merged to one, it would appear inside names."""
    tok: Tokenizer = fmt.tokenizer
    known = {tok.token_bytes(rank) for rank in range(N_RANKS)}
    merging = {token for token in known if len(token) <= 2} - {b" a"}  # the one exception
    words = [token for token in known if len(token) > 2 and token.strip().isalpha() and token.isascii()]
    assert len(words) > 400
    for token in words:
        assert not any(token[:cut] in merging and token[cut:] in merging for cut in range(1, len(token))), token


def test_too_little_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="tokens"):
        learn_ranks(["a small text"], words_apart(), 6000)
