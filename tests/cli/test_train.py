"""`k2 train`: which recipe, where, with which settings; and `k2 report`'s own words."""

from pathlib import Path
from typing import Any

import pytest

from karakoram.cli import main, train
from karakoram.cli.train import explicit_resume

PLANNED = """
from dataclasses import dataclass, field, replace

@dataclass(frozen=True)
class Stage:
    steps: int = 100
    rate: float = 1e-3

@dataclass(frozen=True)
class Plan:
    first: Stage = field(default_factory=Stage)
    second: Stage = field(default_factory=Stage)

@dataclass(frozen=True)
class Recipe:
    plan: Plan
    def with_plan(self, plan):
        return replace(self, plan=plan)

def recipe(steps: int = 100, seed: int = 0, data: str = ""):
    return Recipe(Plan(first=Stage(steps, 1e-3 + seed)))
"""


def k2(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main.run(list(arguments))
    out, err = capsys.readouterr()
    return left.value.code, out, err  # type: ignore[return-value]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(PLANNED)
    (tmp_path / "before").mkdir()
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path, Any]]:
    """What `run_recipe` was asked for: plan, directory, manner."""
    found: list[tuple[Any, Path, Any]] = []
    monkeypatch.setattr(
        "karakoram.train.recipe.run_recipe", lambda made, out, manner: found.append((made.plan, out, manner))
    )
    return found


@pytest.mark.parametrize(
    ("arguments", "where", "resume"),
    [
        ([], "runs/mine", False),
        (["steps=3", "--out", "x"], "x", False),
        (["--resume"], "runs/mine", True),
        (["--out", "x", "--resume"], "x", True),
        (["--resume", "--out", "x"], "x", True),
        (["--resume", "before"], "before", True),
        (["--resume=before", "--out", "./before"], "before", True),
        (["--resume", "steps=3"], "runs/mine", True),
        (["--resume", "before", "steps=3"], "before", True),
    ],
)
def test_a_file_is_a_recipe(
    recipe: Path, arguments: list[str], where: str, resume: bool, asked: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert k2(capsys, "train", str(recipe), *arguments) == (0, "", "")
    ((plan, out, manner),) = asked
    assert (out, manner.resume) == (Path(where), resume)
    assert plan.first.steps == (3 if "steps=3" in arguments else 100)


def test_the_flag_before_the_recipe(recipe: Path, asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    k2(capsys, "train", "--resume", str(recipe))
    assert asked[0][1:] == (Path("runs/mine"), asked[0][2]) and asked[0][2].resume
    assert explicit_resume(["--resume", "nano"]) == ["--resume=", "nano"]
    assert explicit_resume(["nano", "--", "--resume"]) == ["nano", "--", "--resume"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "No recipe is named"),
        (["train", "no.py"], "There is no recipe file no.py"),
        (["train", "nan"], "Recipes: "),
        (["train", "broken.py"], "broken.py, line 2: "),
        (["train", "empty.py"], "empty.py has no function recipe"),
        (["train", "mine.py", "steps"], "'steps' is no setting"),
        (
            ["train", "mine.py", "first.rat=3"],
            "Did you mean first.rate or second.rate? Settings: *.steps, *.rate, where",
        ),
        (["train", "mine.py", "--steps", "3", "steps=4"], "steps is given twice"),
        (["train", "mine.py", "steps=three"], "steps"),
        (["train", "mine.py", "--data", "no.jsonl"], "--data no.jsonl is not there"),
        (["train", "mine.py", "*.rat=3"], "There is no setting '*.rat'"),
        (["train", "mine.py", "--minutes", "3"], "mine.py has no parameter minutes. Leave out --minutes."),
        (["train", "mine.py", "--resume", "nowhere"], "--resume nowhere is not a directory"),
        (["train", "mine.py", "--resume", "before", "--out", "x"], "are two directories"),
        (["report", "nowhere"], "nowhere is not a directory"),
        (["report", "before"], "before holds no run"),
        (["report"], "Missing argument 'DIR'"),
    ],
)
def test_mistakes(recipe: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "broken.py").write_text("x = 1\ny = (\n")
    (recipe.parent / "empty.py").write_text("")
    code, out, err = k2(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def test_show_lists_settings_as_they_would_be(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = k2(capsys, "train", "mine.py", "--show", "--steps", "5", "second.rate=3e-3")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["first.steps", "5", "int"],
        ["first.rate", "0.001", "float"],
        ["second.steps", "100", "int"],
        ["second.rate", "0.003", "float;", "was", "0.001"],
    ]


def test_a_plan_is_changed_and_run(recipe: Path, asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--out", "x", "--threads", "1", "--steps", "7", "--sink", "wandb", "--expert-ranks", "2")
    assert k2(capsys, "train", "mine.py", *given, "*.rate=0.5", "second.steps=2") == (0, "", "")
    ((plan, out, manner),) = asked
    assert (plan.first.steps, plan.first.rate, plan.second.steps, plan.second.rate) == (7, 0.5, 2, 0.5)
    assert out == Path("x")
    assert (manner.resume, manner.threads, manner.sinks, manner.expert_ranks) == (False, 1, ("wandb",), 2)


def test_list_names_what_comes_along(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = k2(capsys, "train", "--list")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == train.recipes()
    assert "nano" in names


def test_what_a_recipe_file_raises_is_seen_in_full(recipe: Path) -> None:
    recipe.write_text("raise ZeroDivisionError('mine')")
    with pytest.raises(ZeroDivisionError, match="mine"):
        main.run(["train", str(recipe)])


def test_report_opens_a_browser_when_asked(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="curves need the extra 'train'")
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or len(opened) < 2)
    (recipe.parent / "before/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert k2(capsys, "report", "before", "--open") == (0, "wrote before/report.html\n", "")
    assert opened == [(recipe.parent / "before/report.html").as_uri()]
    assert k2(capsys, "report", "before", "--open", "--out", "x.html")[2] == "There is no browser here.\n"
