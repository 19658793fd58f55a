"""The bill of a model against published totals, a dump of K2-Instruct, and the modules themselves."""

import subprocess
import sys

import pytest

from karakoram.config import PRESETS, ModelConfig
from karakoram.model import cost


def billions(number: float, digits: int = 1) -> float:
    return round(number / 1e9, digits)


def test_k2_comes_out_as_published() -> None:
    count = cost.parameters(ModelConfig.preset("k2"))
    assert billions(count.total) == 1026.4
    assert (billions(count.active), billions(count.active_with_head), billions(count.active_with_both)) == (
        30.5,
        31.7,
        32.9,
    )
    for name in ("k2-0905", "k2-thinking", "k2.5", "k2.6"):
        assert cost.parameters(ModelConfig.preset(name)) == count


def test_moonlight_comes_out_as_published() -> None:
    count = cost.parameters(ModelConfig.preset("moonlight-16b"))
    assert (billions(count.without_embeddings, 2), billions(count.active, 2)) == (15.29, 2.24)
    assert billions(count.total, 2) == 15.96


def test_k2_elements_and_bytes_agree_with_a_dump_of_the_release() -> None:
    """1,026,470,731,056 elements with fp8 scales and 61 stale buffers of 56; 958.5 GiB."""
    config = ModelConfig.preset("k2")
    scales = sum(
        row.count * (row.bytes_each("fp8") - row.rows * row.columns) // 4
        for row in cost.matrices(config)
        if row.format_in("fp8") == "fp8"
    )
    assert cost.parameters(config).total + scales + 61 * 56 == 1_026_470_731_056
    assert round(cost.stored_bytes(config) / 2**30, 1) == 958.5


def test_k25_bytes_agree_with_the_release() -> None:
    """554.27 GiB, of which 942,287,232 bytes are the image tower and the projector."""
    assert round((cost.stored_bytes(ModelConfig.preset("k2.5")) + 942_287_232) / 2**30, 2) == 554.27


def test_cache_and_decoding() -> None:
    k2 = ModelConfig.preset("k2")
    assert cost.kv_bytes_per_token(k2) == 61 * 576 * 2 == 70_272
    alone = cost.decode_bytes_per_token(k2)
    assert cost.decode_bytes_per_token(k2, context_tokens=1000) - alone == 70_272_000
    assert billions(alone) == 33.0
    # one token of bf16 reads two bytes per active parameter, one embedding row, and 4 per router bias
    count = cost.parameters(k2)
    assert cost.decode_bytes_per_token(k2, weight_format="bf16") == (
        2 * count.active_with_head + 2 * k2.hidden_size + 2 * 60 * 384
    )


def test_flops_are_twice_the_parameters_multiplied_with() -> None:
    k2 = ModelConfig.preset("k2")
    count = cost.parameters(k2)
    vectors = 61 * (2 * 7168 + 1536 + 512) + 7168 + 60 * 384  # norms and router biases multiply nothing
    assert cost.flops_per_token(k2) == 2 * (count.active_with_head - vectors)
    per_pair = cost.flops_per_token(k2, 1) - cost.flops_per_token(k2)
    assert per_pair == 2 * 61 * 64 * (576 + 512)
    assert cost.flops_per_token(k2, 1, absorbed=False) - cost.flops_per_token(k2) == 2 * 61 * 64 * (192 + 128)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("weight_format", cost.FORMATS)
def test_components_sum_to_the_whole(name: str, weight_format: str) -> None:
    config = ModelConfig.preset(name)
    bill = cost.components(config, weight_format)
    count = cost.parameters(config)
    assert [part.name for part in bill] == list(cost.COMPONENTS)
    assert sum(part.parameters for part in bill) == count.total
    assert sum(part.active_parameters for part in bill) == count.active_with_both
    assert sum(part.stored_bytes for part in bill) == cost.stored_bytes(config, weight_format)


def test_a_tied_head_is_active_but_not_stored_twice() -> None:
    raw = ModelConfig.preset("nano").to_dict()
    tied = cost.parameters(ModelConfig.from_dict({**raw, "tie_word_embeddings": True}))
    untied = cost.parameters(ModelConfig.from_dict({**raw, "tie_word_embeddings": False}))
    assert untied.total - tied.total == 4096 * 256
    assert tied.active_with_head == untied.active_with_head


def test_a_dense_model_has_no_experts() -> None:
    raw = ModelConfig.preset("nano").to_dict()
    config = ModelConfig.from_dict({**raw, "first_k_dense_replace": 9})
    count = cost.parameters(config)
    assert count.active == count.without_embeddings
    assert cost.stored_bytes(config, "int4") == cost.stored_bytes(config, "bf16")


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_lora_rank": None}, {"tie_word_embeddings": True}, {"n_shared_experts": 2, "first_k_dense_replace": 0}],
)
def test_the_bill_is_the_module(changes: dict[str, object]) -> None:
    """Counted from the configuration = counted over the parameters and buffers of the model built from it."""
    import torch

    from karakoram.model.transformer import Transformer

    config = ModelConfig.from_dict({**ModelConfig.preset("nano").to_dict(), **changes})
    model = Transformer(config, device=torch.device("meta"), dtype=torch.bfloat16)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == cost.parameters(config).total + (
        config.vocab_size * config.hidden_size
        if "lm_head.weight" in model.state_dict() and config.tie_word_embeddings
        else 0
    )


def test_cost_needs_no_torch() -> None:
    code = "import karakoram.model.cost, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
