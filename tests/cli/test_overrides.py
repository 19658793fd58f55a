"""key=value into nested frozen dataclasses: types, mistakes, and what only fits together."""

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from karakoram.cli.overrides import apply_overrides, settings_of, value_words
from karakoram.config import ModelConfig
from karakoram.errors import ConfigError, InputError
from karakoram.train.config import TrainConfig


class Colour(Enum):
    """As a recipe may have one."""

    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Rope:
    """Two fields that bound each other."""

    low: int = 1
    high: int = 4

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")


@dataclass(frozen=True)
class Optimizer:
    """A group."""

    learning_rate: float = 1e-3
    name: Literal["muonclip", "adamw"] = "muonclip"
    betas: tuple[float, float] = (0.9, 0.95)
    rope: Rope = field(default_factory=Rope)
    other: Rope | None = None


@dataclass(frozen=True)
class Config:
    """Every kind of annotation."""

    steps: int = 10
    tokens: int | None = None
    minutes: float | None = 5.0
    fast: bool = False
    label: str = "x"
    note: str | None = None
    sizes: tuple[int, ...] = ()
    names: tuple[str, ...] = ("a",)
    choice: Literal[1, 2, "auto"] = "auto"
    colour: Colour = Colour.RED
    out: Path | None = None
    extra: dict[str, Any] | None = None
    either: int | tuple[int, ...] | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    length: int = field(default=0, init=False)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("steps=1_000", 1000),
        ("steps=2.5e6", 2_500_000),
        ("steps = -3", -3),
        ("tokens=none", None),
        ("tokens=7", 7),
        ("minutes=2", 2.0),
        ("minutes=Null", None),
        ("optimizer.learning_rate=3e-3", 3e-3),
        ("optimizer.learning_rate=inf", math.inf),
        ("optimizer.name=adamw", "adamw"),
        ("optimizer.betas=0.8,0.9", (0.8, 0.9)),
        ("optimizer.betas=(0.8, 0.9)", (0.8, 0.9)),
        ("optimizer.rope.high=9", 9),
        ("optimizer.other=none", None),
        ("fast=yes", True),
        ("fast=0", False),
        ("label=a=b", "a=b"),
        ("label=", ""),
        ("note=none", None),
        ("note=10", "10"),
        ("sizes=1,2,3", (1, 2, 3)),
        ("sizes=4", (4,)),
        ("sizes=4,", (4,)),
        ("sizes=()", ()),
        ("sizes=", ()),
        ("names=[b, c]", ("b", "c")),
        ("choice=2", 2),
        ("choice=auto", "auto"),
        ("colour=blue", Colour.BLUE),
        ("colour=BLUE", Colour.BLUE),
        ("out=/a/b", Path("/a/b")),
        ('extra={"a": [1]}', {"a": [1]}),
        ("either=3", 3),
        ("either=3,4", (3, 4)),
        ("either=none", None),
    ],
)
def test_values(override: str, value: object) -> None:
    before = Config()
    after = apply_overrides(before, [override])
    found: Any = after
    for name in override.partition("=")[0].strip().split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    assert before == Config()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=2.5", "steps=2.5 does not fit. steps takes int."),
        ("steps=inf", "steps takes int"),
        ("steps=none", "steps takes int"),
        ("minutes=soon", "minutes takes float or none"),
        ("minutes=nan", "minutes takes float or none"),
        ("fast=maybe", "fast takes true or false"),
        ("optimizer.name=sgd", "optimizer.name takes muonclip or adamw"),
        ("optimizer.betas=1", "optimizer.betas takes float,float"),
        ("sizes=1,x", "sizes takes int,…"),
        ("choice=3", "choice takes 1 or 2 or auto"),
        ("colour=green", "colour takes red or blue"),
        ("extra=[1]", "extra takes a JSON object or none"),
        ("optimizer.other=3", "optimizer.other takes Rope or none"),
        ("optimizer.other.low=3", "optimizer.other is None"),
        ("optimizer=3", "optimizer is a group of settings. Set one of them: optimizer.learning_rate"),
        ("optimizer.rope=3", "Set one of them: optimizer.rope.low, optimizer.rope.high"),
        ("optimizer.learning_rat=3", "Did you mean optimizer.learning_rate?"),
        ("learning_rate=3", "Did you mean optimizer.learning_rate?"),
        ("stesp=3", "Did you mean steps"),
        ("zzz=3", "There is no setting 'zzz'. Settings: steps, tokens, minutes"),
        ("length=3", "There is no setting 'length'"),
        ("__class__=3", "There is no setting"),
        ("steps", "'steps' is no setting. Write key=value"),
        ("=3", "is no setting"),
        ("optimizer.rope.low=4", "Rope refuses low=4: low 4 must be below high 4."),
    ],
)
def test_mistakes(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        apply_overrides(Config(), [override])
    assert words in str(caught.value)


def test_a_key_twice_is_a_mistake() -> None:
    with pytest.raises(InputError, match="steps is given twice"):
        apply_overrides(Config(), ["steps=1", "steps=2"])


def test_what_only_fits_together_is_checked_together() -> None:
    for order in (["optimizer.rope.low=5", "optimizer.rope.high=9"], ["optimizer.rope.high=9", "optimizer.rope.low=5"]):
        assert apply_overrides(Config(), order).optimizer.rope == Rope(5, 9)


def test_nothing_given_changes_nothing() -> None:
    config = Config()
    assert apply_overrides(config, []) == config


def test_every_setting_reads_back_what_it_is_told_as() -> None:
    full = TrainConfig(model=ModelConfig.preset("nano"), steps=5)
    for config in (full, apply_overrides(full, ["optimizer.qk_clip_threshold=inf", "schedule.shape=cosine"])):
        told = [f"{key}={value_words(value)}" for key, value, _ in settings_of(config)]
        assert apply_overrides(config, told) == config
        assert len(told) > 50


def test_a_model_is_checked_as_a_model() -> None:
    config = TrainConfig(model=ModelConfig.preset("nano"), steps=5)
    small = apply_overrides(
        config, ["model.n_routed_experts=2", "model.num_experts_per_tok=1", "optimizer.momentum=0.9"]
    )
    assert (small.model.n_routed_experts, small.optimizer.momentum) == (2, 0.9)
    assert small.model.hidden_size == config.model.hidden_size
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        apply_overrides(config, ["model.n_routed_experts=2"])
    with pytest.raises(InputError, match="steps"):
        apply_overrides(config, ["steps=0"])
