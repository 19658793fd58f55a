"""`k2 synth`: true formats, different experts, and the routing that published traces have, measured by running it.

The small shape has Moonlight's experts (6 of 64) and K2's attention. Statistics of 768 tokens in 5 layers scatter by
about a percent; layers and seeds differ by two more, since 64 experts are few. 4 points hold for seeds 0 to 3.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from karakoram.chat.tokenizer import Tokenizer
from karakoram.checkpoint import open_checkpoint, pack_checkpoint
from karakoram.checkpoint.experts.layout import FILE_NAME, read_front
from karakoram.cli import main
from karakoram.config import PRESETS, ModelConfig
from karakoram.errors import CheckpointError, ConfigError, InputError
from karakoram.evals.synth import shape as shapes
from karakoram.evals.synth.measure import Measured, Routes, measure, overall
from karakoram.evals.synth.routing import TARGET, Statistics, solve
from karakoram.evals.synth.shape import Shape
from karakoram.evals.synth.write import record, write
from karakoram.model.generate import generate
from karakoram.model.load import load_model
from karakoram.model.watch import Watch
from karakoram.quantize.quantize import quantize
from karakoram.train.data.bpe import tokenizer_config

SMALL = {
    **PRESETS["k2-thinking"],
    "vocab_size": 8192, "bos_token_id": 7936, "eos_token_id": 7938, "pad_token_id": 8191,
    "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 256,
    "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 64, "num_experts_per_tok": 6,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_preset() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "small", SMALL)
        patch.setitem(shapes.DIALECTS, "small", "kimi-k2-thinking")
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, small_preset: None) -> Path:
    out = tmp_path_factory.mktemp("synth") / "small"
    return write(Shape("small"), out).directory


@pytest.fixture(scope="module")
def measured(small: Path) -> Measured:
    return measure(small)


def close(found: Statistics, points: float) -> None:
    assert found.top_quarter_load == pytest.approx(TARGET.top_quarter_load, abs=points)
    assert found.repeat == pytest.approx(TARGET.repeat, abs=points)
    assert found.next_layer_recall == pytest.approx(TARGET.next_layer_recall, abs=points)


def test_routing_has_the_published_statistics(measured: Measured) -> None:
    close(measured.statistics, 0.04)
    assert sorted(measured.by_layer) == [1, 2, 3, 4, 5]
    assert math.isnan(measured.by_layer[1].next_layer_recall)  # no mixture comes before it


def test_no_layer_is_far_off(measured: Measured) -> None:
    """The stream keeps its proportions however deep: nothing grows from layer to layer but what shall."""
    for found in measured.by_layer.values():
        assert found.repeat == pytest.approx(TARGET.repeat, abs=0.07)
        assert found.top_quarter_load == pytest.approx(TARGET.top_quarter_load, abs=0.07)


def test_greedy_text_is_lively_and_routed_alike(small: Path) -> None:
    """Decoded by the loaded model, from a prompt of few tokens. 160 tokens scatter more than 768 do."""
    model = load_model(small)
    plain: Any = model.forward
    with Routes(model) as routes:
        model.forward = lambda *args, **kwargs: plain(*args, watch=Watch(), **kwargs)
        told = list(generate(model, Tokenizer.from_dir(small).encode("the mountain in the north"), 200))
        found = overall(routes.statistics(settled=40))
    assert len(told) == 200
    assert len(set(told)) > 150
    close(found, 0.08)


def test_names_shapes_and_formats_are_those_of_the_preset(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    checkpoint.check()
    assert checkpoint.config == ModelConfig.from_dict(SMALL)
    formats = {name: checkpoint.format_of(name) for name, _, _ in shapes.names.expected_tensors(checkpoint.config)}
    assert {name for name, kind in formats.items() if kind == "int4"} == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(1, 6)
        for expert in range(64)
        for part in ("gate", "up", "down")
    }
    assert checkpoint.read("model.layers.1.mlp.gate.e_score_correction_bias").dtype == torch.float32
    assert json.loads((small / "config.json").read_text())["quantization_config"] == SMALL["quantization_config"]


def test_experts_differ_and_do_not_compress(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    codes = [
        checkpoint.read(f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight_packed").numpy().tobytes()
        for layer in (1, 2)
        for expert in range(64)
    ]
    assert len(set(codes)) == len(codes)
    together = b"".join(codes)
    assert len(zlib.compress(together)) > 0.95 * len(together)


def test_int4_all_is_stored_as_quantize_stores_it(small: Path, tmp_path: Path) -> None:
    written = write(Shape("small", 2, "int4-all"), tmp_path / "all").directory
    quantize(write(Shape("small", 2), tmp_path / "experts").directory, tmp_path / "quantized", "int4-all")
    found, wanted = open_checkpoint(written), open_checkpoint(tmp_path / "quantized")
    assert found.raw_config["quantization_config"] == wanted.raw_config["quantization_config"]
    described = [
        {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
        for checkpoint in (found, wanted)
    ]
    assert described[0] == described[1]


def test_int4_all_is_routed_alike(tmp_path: Path) -> None:
    """Rounded projections change the numbers, not the statistics."""
    close(measure(write(Shape("small", 4, "int4-all"), tmp_path / "all").directory).statistics, 0.05)


def test_packed_is_what_pack_makes_of_it(tmp_path: Path) -> None:
    shape = Shape("small", 3)
    pack_checkpoint(write(shape, tmp_path / "plain").directory, tmp_path / "wanted")
    found = write(shape, tmp_path / "found", packed=True).directory
    (layout, sums), (wanted_layout, wanted_sums) = (read_front(tmp_path / n / FILE_NAME) for n in ("found", "wanted"))
    assert sums.tolist() == wanted_sums.tolist()
    contents = [(tmp_path / name / FILE_NAME).read_bytes()[layout.first :] for name in ("found", "wanted")]
    assert contents[0] == contents[1]
    assert layout.first == wanted_layout.first
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in (tmp_path / "wanted").iterdir())
    open_checkpoint(found).check()
    assert not list(tmp_path.glob(".*"))


def test_a_seed_gives_the_same_bytes_and_another_others(tmp_path: Path) -> None:
    shape = Shape("small", 2)
    first, again, other = (
        write(shape, tmp_path / name, seed).directory for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    shards = [(path / "model-00001-of-00001.safetensors").read_bytes() for path in (first, again, other)]
    assert shards[0] == shards[1] != shards[2]


def test_a_generated_tokenizer_fills_the_vocabulary(small: Path) -> None:
    tokenizer = Tokenizer.from_dir(small)
    assert tokenizer.n_vocab == SMALL["vocab_size"]
    assert tokenizer.special_ids["<|im_end|>"] == SMALL["eos_token_id"]
    assert len(tokenizer.special_ids) == 256
    text = "Bakaru zolu: 北 42!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" bakaru")) < len(" bakaru")  # words are made of syllables
    one = tokenizer.encode(" baka")
    assert tokenizer.decode(one) == " baka" and len(one) == 1


def test_special_tokens_are_those_of_training_as_far_as_they_go(small: Path) -> None:
    """One function for both; a vocabulary with room for five named ones has those and the last two."""
    whole = tokenizer_config(300, 2048)["added_tokens_decoder"]
    few = tokenizer_config(300, 2048, 7, "kimi-k2")
    assert few["karakoram"] == {"dialect": "kimi-k2"}
    named = {key: one["content"] for key, one in few["added_tokens_decoder"].items()}
    assert list(named.values()) == [whole[str(300 + at)]["content"] for at in (0, 1, 2, 3, 4)] + ["[UNK]", "[PAD]"]
    stored = json.loads((small / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    first = min(map(int, stored))
    kept = {int(key) - first: one for key, one in stored.items() if one["content"] not in ("[UNK]", "[PAD]")}
    assert kept == {int(k) - 300: one for k, one in whole.items() if one["content"] not in ("[UNK]", "[PAD]")}


def test_a_tokenizer_is_copied_if_it_fits(small: Path, tmp_path: Path) -> None:
    copied = write(Shape("small", 2), tmp_path / "copied", tokenizer=small).directory
    assert (copied / "tiktoken.model").read_bytes() == (small / "tiktoken.model").read_bytes()
    with pytest.raises(InputError, match=r"8,192 tokens, the model 163,840"):
        write(Shape("moonlight-16b", 2), tmp_path / "never", tokenizer=small)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_too_little_room_is_said_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match="bytes needed, 1,000 bytes free"):
        write(Shape("small", 2), tmp_path / "out", packed=packed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_there_is_not_overwritten(tmp_path: Path, packed: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(CheckpointError, match="not empty"):
        write(Shape("small", 2), tmp_path / "out", packed=packed)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_what_a_killed_run_left_is_overwritten(tmp_path: Path) -> None:
    left = tmp_path / ".out.synth"
    left.mkdir()
    (left / "experts.k2experts").write_bytes(b"half")
    write(Shape("small", 2), tmp_path / "out", packed=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_presets_have_their_true_sizes() -> None:
    """571 GB of experts in K2's published int4; K2.5 calls its text model `language_model`."""
    experts = [w for w in Shape("k2-thinking").weights() if w.int4]
    assert len(experts) == 60 * 384 * 3
    assert sum(w.nbytes for w in experts) == pytest.approx(571e9, rel=0.01)
    assert {w.stored.split(".")[0] for w in Shape("k2.5", 2).weights()} == {"language_model"}
    assert Shape("moonlight-16b", 3).config.num_hidden_layers == 3


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="no preset 'k9'"):
        Shape("k9")
    with pytest.raises(InputError, match=r"1 layers are no part of moonlight-16b, which has 27"):
        Shape("moonlight-16b", 1)
    with pytest.raises(InputError, match="no format 'fp8'"):
        Shape("moonlight-16b", format="fp8")


def test_few_experts_come_as_near_as_they_can() -> None:
    """Of nano's 16 experts a token takes 4: popularity alone repeats half of them."""
    found = solve(16, 4)
    assert found.token < 0.01
    assert found.bias_E.shape == (16,)


def test_a_measurement_joins_the_account(small: Path, measured: Measured) -> None:
    record(small, measured)
    told = json.loads((small / "synth.json").read_text())
    assert told["seed"] == 0 and told["preset"] == "small"
    assert told["measured"]["repeat"] == measured.statistics.repeat
    assert told["target"]["next_layer_recall"] == 0.65


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.run(["synth", "small", "--layers", "3", "--packed", "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (0, "")
    assert out.startswith(f"wrote {tmp_path / 'out'}: 0.0 GB in ")
    assert "experts repeated from the token before" in out and "(published 33%)" in out
    assert "measured" in json.loads((tmp_path / "out" / "synth.json").read_text())
    assert main.load_command("synth").help.split("\n")[0] == main.COMMANDS["synth"][2]
