"""The check of the nano model: 500 held-out dialogs, greedy, with tools that really run.

Tool names, argument names and sentence templates of these dialogs are disjoint from training by construction
(`train/data/names.py`, `train/data/dialogs/phrases.py`), and tests prove it. Reported: the share of calls that parse
and satisfy the schema of a declared tool, the share of final answers that are exact (`scoring.py` says what that
means), per family, all with 95 % Wilson intervals. Two more numbers say what the shares leave out: dialogs that needed
a call and got none, and dialogs without a final answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from karakoram.chat import ChatFormat
from karakoram.evals.scoring import Share, outcome_is_exact
from karakoram.evals.tool_loop import GenerateBatch, Outcome, live
from karakoram.train.data import dialogs
from karakoram.train.data.documents import Scenario

DIALOGS = 500
SEED = 20_000


def scenarios(count: int = DIALOGS, seed: int = SEED) -> list[Scenario]:
    """The first `count` held-out dialogs; the same for everyone."""
    return [dialogs.scenario(seed, index, "eval") for index in range(count)]


@dataclass(slots=True)
class Report:
    """The result; `str` is what the command prints, `to_dict` what it writes."""

    calls: Share
    answers: Share
    families: dict[str, tuple[Share, Share]]  # name -> (calls, answers)
    without_call: int
    unfinished: int
    outcomes: list[Outcome] = field(repr=False, default_factory=list)

    def __str__(self) -> str:
        width = max(len(name) for name in self.families) if self.families else 0
        lines = [
            f"calls that parse and satisfy their schema: {self.calls}",
            f"final answers exact:                       {self.answers}",
            f"dialogs that needed a call and got none: {self.without_call}; without a final answer: {self.unfinished}",
        ]
        for name, (calls, answers) in sorted(self.families.items()):
            shown = f"calls {calls}" if calls.trials else "no calls"
            lines.append(f"  {name:<{width}}  answers {answers}; {shown}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Counts as `[successes, trials]`, ready for JSON."""
        plain = lambda share: [share.successes, share.trials]  # noqa: E731
        families = {
            name: {"calls": plain(calls), "answers": plain(answers)} for name, (calls, answers) in self.families.items()
        }
        return {
            "calls": plain(self.calls),
            "answers": plain(self.answers),
            "without_call": self.without_call,
            "unfinished": self.unfinished,
            "families": families,
        }

    def failures(self, limit: int = 10) -> list[Outcome]:
        """Conversations whose answer is not exact, for looking at."""
        return [outcome for outcome in self.outcomes if not outcome_is_exact(outcome)][:limit]


def report(outcomes: list[Outcome]) -> Report:
    """Counts over finished conversations."""

    def shares(of: list[Outcome]) -> tuple[Share, Share]:
        calls = Share(sum(outcome.valid_calls for outcome in of), sum(outcome.calls for outcome in of))
        return calls, Share(sum(outcome_is_exact(outcome) for outcome in of), len(of))

    def needs_call(outcome: Outcome) -> bool:
        first = len(outcome.scenario.prompt_messages)
        return any(message.get("tool_calls") for message in outcome.scenario.document.messages[first:])

    by_family: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_family.setdefault(outcome.scenario.family, []).append(outcome)
    calls, answers = shares(outcomes)
    return Report(
        calls,
        answers,
        {name: shares(of) for name, of in by_family.items()},
        without_call=sum(outcome.calls == 0 and needs_call(outcome) for outcome in outcomes),
        unfinished=sum(outcome.answer is None for outcome in outcomes),
        outcomes=outcomes,
    )


def evaluate(
    fmt: ChatFormat,
    generate_batch: GenerateBatch,
    count: int = DIALOGS,
    seed: int = SEED,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Runs the check. `generate_batch` must be greedy for the numbers to be comparable."""
    return report(live(fmt, scenarios(count, seed), generate_batch, progress=progress))
