"""Samples stand behind the prompts that inference encodes; caches are the same bytes however they were made."""

import sys
from pathlib import Path

import numpy as np
import pytest

from karakoram.chat import ChatFormat
from karakoram.errors import TrainingError
from karakoram.train.data import dialogs, pack
from karakoram.train.data.documents import Document
from karakoram.train.data.pack import Mix, build_token_cache, document_samples, open_token_cache, samples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "evals"))
from oracle import reference_steps


def test_written_tokens_follow_exactly_the_prompts_of_inference(fmt: ChatFormat) -> None:
    turns = mistakes = 0
    for index in range(300):
        document = dialogs.generate(21, index)
        mistakes += len(document.mistakes)
        messages = document.messages
        ends = [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get("tool_calls")]
        found = document_samples(fmt, document)
        assert len(found) == len(ends)
        turns += len(ends) > 1
        for (ids, weights), end in zip(found, ends, strict=True):
            assert len(ids) == len(weights)
            wanted = [0.1] * len(ids)
            said = max(i for i, m in enumerate(messages[:end]) if m["role"] == "user")
            made = [i for i in range(said, end + 1) if messages[i]["role"] == "assistant"]
            steps = reference_steps(fmt, Document(messages[: end + 1], document.tools, document.thinking))
            for number, (prompt, new_ids) in zip(made, steps, strict=True):
                assert ids[: len(prompt)] == prompt
                generated = new_ids[: new_ids.index(fmt.tokenizer.special_ids["<|im_end|>"]) + 1]
                assert ids[len(prompt) : len(prompt) + len(generated)] == generated
                weight = 0.0 if number in document.mistakes else 1.0  # what went wrong is seen and not learned
                wanted[len(prompt) : len(prompt) + len(generated)] = [weight] * len(generated)
            assert weights == wanted
    assert turns > 5
    assert mistakes > 1


def test_most_samples_are_short(fmt: ChatFormat) -> None:
    """Of pretraining as before; with chains of five calls a fifth more on average, and hardly any too long."""
    means = {}
    for mix in (pack.PRETRAIN, pack.SFT):
        stream = samples(fmt, seed=3, mix=mix)
        lengths = sorted(len(next(stream)[0]) for _ in range(600))
        means[mix.families] = sum(lengths) / len(lengths)
        assert lengths[len(lengths) * 6 // 10] <= (400 if mix is pack.PRETRAIN else 440)  # names are spelled in pairs
        assert lengths[int(len(lengths) * 0.995)] <= pack.MAX_SAMPLE_TOKENS
    assert means["sft"] < 1.25 * means["pretrain"]


def test_what_is_read_weighs_what_the_mix_says(fmt: ChatFormat) -> None:
    [(ids, weights), *_] = document_samples(fmt, dialogs.generate(3, 7), read_weight=0.0)
    assert set(weights) == {0.0, 1.0}
    assert document_samples(fmt, dialogs.generate(3, 7))[0][0] == ids


def test_stages() -> None:
    pretrain, sft = pack.stage_mix("pretrain"), pack.stage_mix("sft")
    assert (pretrain.rich, pretrain.read_weight, pretrain.families) == (False, 0.1, "pretrain")
    assert (sft.rich, sft.read_weight, sft.families) == (True, 0.0, "sft")
    assert pack.stage_mix("int4") == sft
    with_data = pack.stage_mix("pretrain", Path("data"))
    assert with_data.dialogs + with_data.gsm8k + with_data.text == pytest.approx(1)
    assert pack.stage_mix("sft", Path("data")).text == 0  # plain text has nothing that an assistant writes
    with pytest.raises(TrainingError, match="cannot be stored"):
        Mix(read_weight=0.25)
    with pytest.raises(TrainingError, match="no mix"):
        Mix(families="third")


def test_samples_start_anywhere(fmt: ChatFormat) -> None:
    stream = samples(fmt, seed=3, start_index=7)
    assert next(stream) == document_samples(fmt, dialogs.generate(3, 7, mix="pretrain"))[0]


def test_plain_text_weighs_one_and_ends(fmt: ChatFormat) -> None:
    [(ids, weights)] = document_samples(fmt, Document([], text="To be, or not to be"))
    assert ids[-1] == fmt.tokenizer.special_ids["[EOS]"]
    assert set(weights) == {1.0}


def _bytes(path: Path) -> list[bytes]:
    return [(path / f"{name}.npy").read_bytes() for name in ("ids", "weights", "offsets")]


def test_cache_is_the_same_with_two_processes_and_after_an_interruption(tmp_path: Path, tokenizer_dir: Path) -> None:
    seen: list[int] = []
    one = build_token_cache(
        tmp_path / "one", tokenizer_dir, 200_000, seed=4, progress=lambda done, wanted: seen.append(done)
    )
    assert seen == sorted(seen)
    assert seen[-1] >= 200_000

    class Interrupted(Exception):
        pass

    def stop(done: int, wanted: int) -> None:
        if done > 100_000:
            raise Interrupted

    with pytest.raises(Interrupted):
        build_token_cache(tmp_path / "two", tokenizer_dir, 200_000, seed=4, progress=stop)
    with pytest.raises(TrainingError, match="no finished"):
        open_token_cache(tmp_path / "two")
    chunks: list[int] = []
    build_token_cache(
        tmp_path / "two", tokenizer_dir, 200_000, seed=4, processes=2, progress=lambda d, w: chunks.append(d)
    )
    assert len(chunks) < len(seen)  # it went on, it did not begin again
    assert _bytes(one) == _bytes(tmp_path / "two")
    assert not list((tmp_path / "two").glob("*.part"))


def test_cache_holds_the_samples(tmp_path: Path, tokenizer_dir: Path, fmt: ChatFormat) -> None:
    path = build_token_cache(tmp_path / "cache", tokenizer_dir, 20_000, seed=5)
    ids, weights, offsets = open_token_cache(path)
    assert ids.dtype == np.uint16
    assert weights.dtype == np.uint8
    assert offsets[0] == 0
    assert offsets[-1] == len(ids) == len(weights)
    stream = samples(fmt, seed=5)
    for number in range(20):
        wanted_ids, wanted_weights = next(stream)
        span = slice(offsets[number], offsets[number + 1])
        assert ids[span].tolist() == wanted_ids
        assert weights[span].tolist() == [round(10 * weight) for weight in wanted_weights]
    assert build_token_cache(path, tokenizer_dir, 20_000, seed=5) == path


def test_a_cache_of_other_settings_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    build_token_cache(tmp_path / "cache", tokenizer_dir, 10_000, seed=5)
    for changed in (Mix(rich=True), Mix(read_weight=0.0), Mix(families="sft")):
        with pytest.raises(TrainingError, match="other settings"):
            build_token_cache(tmp_path / "cache", tokenizer_dir, 10_000, seed=5, mix=changed)
    with pytest.raises(TrainingError, match="other settings"):
        build_token_cache(tmp_path / "cache", tokenizer_dir, 10_000, seed=6)
    with pytest.raises(TrainingError, match="--data"):
        build_token_cache(tmp_path / "other", tokenizer_dir, 10_000, mix=Mix(gsm8k=0.5))


def test_mix_of_sources(tmp_path: Path, tokenizer_dir: Path, fmt: ChatFormat) -> None:
    (tmp_path / "data/text").mkdir(parents=True)
    (tmp_path / "data/text/a.txt").write_text("A line of plain text about nothing.\n" * 200)
    mix = Mix(dialogs=0.5, text=0.5, data_dir=str(tmp_path / "data"))
    ids, weights, _ = open_token_cache(build_token_cache(tmp_path / "cache", tokenizer_dir, 300_000, mix=mix))
    plain = fmt.tokenizer.special_ids["[EOS]"]
    assert (np.asarray(ids) == plain).sum() > 100
    assert 0.3 < (np.asarray(weights) == 10).mean() < 0.9


def test_a_worker_that_dies_is_an_error_and_no_endless_restart(tokenizer_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "tokenizer"
    damaged.mkdir()
    (damaged / "tiktoken.model").write_bytes((tokenizer_dir / "tiktoken.model").read_bytes())
    with pytest.raises(TrainingError, match="ended before"):
        build_token_cache(tmp_path / "cache", damaged, 10_000, processes=2)
