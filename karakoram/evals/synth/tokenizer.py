"""A tokenizer for a model without one: every vocabulary size, valid UTF-8, readable nonsense.

Ranks: the 256 single bytes in GPT-2's order, then syllables of a consonant and a vowel (`ka`), each also behind a space
(` ka`), then words of two and three of them. Every token is a merge of two earlier ones. Special tokens are K2's names
at K2's offsets; the last two are [UNK] and [PAD].
"""

import base64
import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

from karakoram.chat.tokenizer import CONFIG_FILE, MODEL_FILE, Tokenizer
from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.train.data.bpe import byte_order, tokenizer_config

_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
_COPIED = (MODEL_FILE, CONFIG_FILE, "chat_template.jinja")


def generated_tokenizer(config: ModelConfig, dialect: str) -> dict[str, bytes]:
    """File name -> content of a tokenizer that fills the vocabulary."""
    first_special = first_special_id(config)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(_tokens(first_special))]
    specials = config.vocab_size - first_special
    found = tokenizer_config(first_special, config.max_position_embeddings, specials, dialect)
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    return {MODEL_FILE: b"".join(lines), CONFIG_FILE: text.encode()}


def tokenizer_of(directory: Path, config: ModelConfig) -> dict[str, bytes]:
    """File name -> content of the tokenizer in `directory`. InputError if it has another vocabulary than the model."""
    found = Tokenizer.from_dir(directory).n_vocab
    if found != config.vocab_size:
        raise InputError(
            f"the tokenizer in {directory} has {found:,} tokens, the model {config.vocab_size:,}.",
            "Give the tokenizer of this family, or none: one is generated then.",
        )
    paths = [directory / name for name in _COPIED]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def first_special_id(config: ModelConfig) -> int:
    """Where ordinary tokens end: special ones begin with [BOS] in this family."""
    if config.bos_token_id is None:
        raise InputError("this configuration names no bos_token_id.", "A synthetic vocabulary needs one.")
    return config.bos_token_id


def _tokens(count: int) -> list[bytes]:
    tokens = list(islice(_endless(), count))
    if len(tokens) < count:
        raise InputError(f"a vocabulary of {count:,} tokens cannot be generated.", "Give --tokenizer DIR.")
    return tokens


def _endless() -> Iterator[bytes]:
    yield from (bytes([byte]) for byte in byte_order())
    syllables = [(a + b).encode() for a, b in product(_CONSONANTS, _VOWELS)]
    for length in (1, 2, 3):
        for parts in product(syllables, repeat=length):
            word = b"".join(parts)
            yield word
            yield b" " + word
