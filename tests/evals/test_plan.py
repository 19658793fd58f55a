"""The plan's arithmetic: by hand on a tiny model, monotone in what a machine has, sane for published ones."""

from dataclasses import replace

import pytest
import torch

from karakoram.config import ModelConfig
from karakoram.errors import InputError
from karakoram.evals.plan import report, workload
from karakoram.evals.plan.hits import (
    Hits,
    distinct_shares,
    hit_rate,
    hits_of,
    token_by_token,
    typical_hits,
    typical_ids,
)
from karakoram.evals.plan.predict import Placement, Predictor
from karakoram.evals.plan.rates import Curve, Rates
from karakoram.evals.plan.report import Means
from karakoram.kernels.packed import record_bytes
from karakoram.model import cost
from tests.evals.described import PUBLISHED, described

GB = 10**9
TINY = ModelConfig(
    vocab_size=320, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=2, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
)  # fmt: skip
ATTENTION = 2 * 48 * 128 + 80 * 128 + 2 * 64 * 64 + 128 * 64  # q, kv_a, kv_b, o
OTHERS = 3 * ATTENTION + 3 * 128 * 256 + 2 * 8 * 128  # one dense layer, two routers
SHARED = 3 * 128 * 64  # a layer
HEAD = 320 * 128


def plain_rates(**changes: object) -> Rates:
    """Seconds that are easy to add up: 10 an expert, 30 a read, a millionth a weight."""
    flat = Curve(((1.0, 1e-6), (512.0, 1e-6)))
    rates = Rates(
        expert=Curve(((1.0, 10.0), (4.0, 10.0))), linear={"bf16": flat, "int4": flat, "fp8": flat},
        reads=Curve(((1.0, 30.0), (2.0, 60.0))), decode_pair_s=0.001, prefill_pair_s=0.001, whole_layer_s=0.25,
        fed_layer_s=0.5, memory_bytes_per_s=1e9, one_thread_bytes_per_s=1e9, matmul_flops_per_s=1e12, threads=2,
    )  # fmt: skip
    return replace(rates, **changes)  # type: ignore[arg-type]


HALF = Hits(((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)), ((1.0, 0.25), (4.0, 0.75)), "by hand")


# ------------------------------------------------------------------------------------------------ by hand


def test_weights_of_a_tiny_model() -> None:
    load = workload.of_config("tiny", TINY, "int4")
    assert load.kind == "int4" and load.shared == ("bf16", SHARED) and load.head == ("bf16", HEAD)
    assert load.prefill == {"bf16": OTHERS} == load.decode
    assert load.record_bytes == record_bytes(128, 64) and load.slot_bytes == 16384 and load.experts == 16
    everything = workload.of_config("tiny", TINY, "int4-all")
    keys = 3 * 2 * 64 * 32
    routers = 2 * 8 * 128
    assert everything.decode == {"int4": OTHERS - keys - routers, "bf16": keys + routers}
    assert everything.weights_bytes < load.weights_bytes


def test_a_decoded_token_by_hand() -> None:
    load = workload.of_config("tiny", TINY, "int4")
    found = Predictor(load, plain_rates(), HALF).decode(Placement(0, 8, 8), context=100)
    computing = 2 * 10 + SHARED * 1e-6
    # none, one or two of two missing, with a quarter, a half and a quarter of the chances
    waiting = 0.5 * (30 + 10 - computing) + 0.25 * (60 + 10 - computing)
    assert found.disk_s == pytest.approx(2 * waiting)
    assert found.experts_s == pytest.approx(2 * computing)
    assert found.read_s == pytest.approx(2 * (0.5 * 30 + 0.25 * 60))
    assert found.others_s == pytest.approx((OTHERS + HEAD) * 1e-6 + 3 * 2 * 100 * 0.001)
    assert found.layers_s == 3 * 0.5
    assert found.limit == "disk" and found.seconds == pytest.approx(
        found.disk_s + found.experts_s + found.others_s + found.layers_s
    )


def test_all_in_memory_waits_for_nothing() -> None:
    load = workload.of_config("tiny", TINY, "int4")
    found = Predictor(load, plain_rates(), HALF).decode(Placement(0, 16, 0), context=0)
    assert (found.disk_s, found.read_s, found.layers_s) == (0, 0, 3 * 0.25) and found.limit == "memory"
    prompt = Predictor(load, plain_rates(), HALF).prompt(Placement(0, 16, 0), 4, cold=True)
    assert prompt.disk_s == 0


def test_a_prompt_by_hand() -> None:
    load = workload.of_config("tiny", TINY, "int4")
    found = Predictor(load, plain_rates(), HALF).prompt(Placement(0, 8, 8), 4, cold=True)
    computing = 6 * 10 + SHARED * 1e-6  # four tokens visit three quarters of eight
    assert found.read_s == pytest.approx(2 * 6 * 30)
    assert found.disk_s == pytest.approx(2 * (6 * 30 + 10 - computing))
    assert found.others_s == pytest.approx((OTHERS + HEAD) * 1e-6 + 3 * 2 * 4 * 2 * 0.001)
    warm = Predictor(load, plain_rates(), HALF).prompt(Placement(0, 8, 8), 4, cold=False)
    assert warm.read_s == pytest.approx(2 * 2 * 30)  # half of the eight are there


def test_curves_between_and_beyond_their_points() -> None:
    curve = Curve.of([(4, 3.0), (1, 2.0), (2, 1.0)])  # a larger size that took less time: noise
    assert curve.points == ((1.0, 2.0), (2.0, 2.0), (4.0, 3.0))
    assert [curve.at(x) for x in (0, 0.5, 1, 3, 4, 6)] == [0, 1, 2, 2.5, 3, 4]
    assert Curve(((2.0, 5.0),)).at(6) == 15


# ------------------------------------------------------------------------------------------------ monotone


def speed(load: workload.Workload, rates: Rates, means: Means) -> float:
    return report.report(load, rates, PUBLISHED, means)["decode"]["tokens_per_s"]


@pytest.mark.parametrize("preset", ["k2-thinking", "moonlight-16b"])
def test_more_is_never_slower(preset: str) -> None:
    load = workload.of_config(preset, ModelConfig.preset(preset), "int4")
    rates, least = described(load), report.budget(load, Means(0)).least_bytes
    by_ram = [speed(load, rates, Means(least + n * load.experts * load.slot_bytes // 20)) for n in range(24)]
    assert by_ram == sorted(by_ram) and by_ram[-1] > 1.5 * by_ram[0]
    by_disk = [speed(load, described(load, gb * 1e9), Means(least + 8 * GB)) for gb in (0.5, 1, 2, 4, 8, 16, 1000)]
    assert by_disk == sorted(by_disk) and by_disk[-1] > by_disk[0]
    by_memory = [speed(load, described(load, 5e9, gb * 1e9), Means(least + 8 * GB)) for gb in (10, 20, 40, 80)]
    assert by_memory == sorted(by_memory)
    by_card = [speed(load, rates, Means(least + 8 * GB, gb * GB)) for gb in (0, 4, 8, 24, 80)]
    assert by_card == sorted(by_card)


# ------------------------------------------------------------------------------------------------ published models


def test_k2_on_a_workstation() -> None:
    """24 GB card, 128 GB of RAM, a disk of 5 GB/s. What is not experts is 22 GB of bf16 a token: slow memory limits."""
    load = workload.of_config("k2-thinking", ModelConfig.preset("k2-thinking"))
    assert load.record_bytes == pytest.approx(24.8e6, rel=0.01) and load.experts == 60 * 384
    found = report.report(load, described(load), PUBLISHED, Means(128 * GB, 24 * GB))
    where = found["placement"]
    assert where["on_card"] + where["in_ram"] + where["on_disk"] == load.experts
    assert 850 < where["on_card"] < 960 and 3000 < where["in_ram"] < 5000
    assert 1 < found["decode"]["tokens_per_s"] < 1.6 and found["limit"] == "memory"
    server = report.report(load, described(load, 5e9, 300e9), PUBLISHED, Means(128 * GB, 24 * GB))
    assert 1.5 < server["decode"]["tokens_per_s"] < 4 and server["limit"] == "disk"
    assert 5 < found["first_token_s"]["16"] < 120 and found["first_token_s"]["512"] > found["first_token_s"]["16"]
    assert found["helps"][0]["tokens_per_s"] > found["decode"]["tokens_per_s"]
    assert {one["what"] for one in found["helps"]} <= {"ram", "disk", "memory", "card"}
    gains = [one["tokens_per_s"] for one in found["helps"]]
    assert gains == sorted(gains, reverse=True)
    assert "limited by the disk" in report.line(server) and "processor and memory" in report.line(found)


def test_moonlight_fits_into_memory() -> None:
    load = workload.of_config("moonlight-16b", ModelConfig.preset("moonlight-16b"), "int4")
    found = report.report(load, described(load), PUBLISHED, Means(128 * GB))
    assert found["placement"]["on_disk"] == 0 and found["limit"] == "memory"
    bytes_per_token = cost.decode_bytes_per_token(load.config, 512, "int4")
    assert found["decode"]["tokens_per_s"] == pytest.approx(60e9 / bytes_per_token, rel=0.1)  # layers cost time too
    assert all(one["what"] in ("memory", "card") for one in found["helps"])


def test_too_little_memory_is_refused_with_the_least() -> None:
    load = workload.of_config("k2-thinking", ModelConfig.preset("k2-thinking"))
    with pytest.raises(InputError, match="Give at least --ram"):
        report.report(load, described(load), PUBLISHED, Means(4 * GB))


def test_formats_that_are_none() -> None:
    with pytest.raises(InputError, match="no format"):
        workload.of_config("k2", ModelConfig.preset("k2"), "int3")


# ------------------------------------------------------------------------------------------------ hits


def test_a_trace_that_repeats_is_found_in_memory() -> None:
    ids_SLK = torch.tensor([0, 1]).expand(64, 3, 2).contiguous()  # two experts a layer, always
    assert hit_rate(token_by_token(ids_SLK, 8), 0.25) == 1.0
    turns_SLK = (torch.arange(64)[:, None, None] * 2 + torch.arange(2)).expand(64, 3, 2) % 8
    assert hit_rate(token_by_token(turns_SLK.contiguous(), 8), 1.0) == 1.0
    assert dict(distinct_shares(turns_SLK.contiguous(), 8)) == {1.0: 0.25, 4.0: 1.0, 16.0: 1.0, 64.0: 1.0}


def test_typical_routing_is_as_published() -> None:
    """Issue 5 and K2's expected behaviour: a third repeats, a quarter in memory serves three quarters or more."""
    ids_SLK = typical_ids(64, 6, tokens=256, layers=2)
    repeats = (ids_SLK[1:, :, :, None] == ids_SLK[:-1, :, None, :]).any(-1).float().mean()
    assert 0.28 < repeats < 0.40
    hits = hits_of(token_by_token(ids_SLK, 64), "x")
    assert all(a[1] <= b[1] for a, b in zip(hits.hit, hits.hit[1:]))
    assert hits.rate(0) == 0 and hits.rate(1) == 1 and 0.6 < hits.rate(0.25) < 0.85
    assert hits.visited(1) == pytest.approx(6 / 64) and hits.visited(10_000) <= 1


@pytest.mark.slow
def test_typical_routing_of_k2_is_served_as_expected() -> None:
    """A good cache that holds a quarter of the experts serves 75 to 85 % (issue 5)."""
    assert 0.75 <= typical_hits(384, 8).rate(0.25) <= 0.85
