"""The check of the nano model: 500 held-out dialogs, greedy, with tools that really run.

Tool names, argument names and sentence templates of these dialogs are disjoint from training by construction
(`train/data/names.py`, `train/data/dialogs/phrases.py`), and tests prove it. Reported: the share of calls that parse
and satisfy the schema of a declared tool, the share of final answers that are exact (`scoring.py` says what that
means), per family and per number of calls, all with 95 % Wilson intervals. Two more numbers say what the shares leave
out: dialogs that needed a call and got none, and dialogs without a final answer.

Two editions. The first has at most two calls for a question. The second, the default, takes 68 % of its dialogs from
the first (the same ones) and adds chains: 5 % of two calls, 9 % each of three, four and five, a fifth of them word
problems.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from karakoram.chat import ChatFormat
from karakoram.errors import InputError
from karakoram.evals.scoring import Share, outcome_is_exact
from karakoram.evals.tool_loop import MAX_NEW_TOKENS, MAX_ROUNDS, GenerateBatch, Outcome, live
from karakoram.train.data import dialogs
from karakoram.train.data.documents import Scenario

DIALOGS = 500
SEED = 20_000
EDITION = 2
# edition -> shares of the mixes of `dialogs.MIXES`, and the loop's rounds and tokens per message
_SHARES: dict[int, dict[str, float]] = {
    1: {"first": 1.0},
    2: {"first": 0.68, "chain_2": 0.05, "chain_3": 0.09, "chain_4": 0.09, "chain_5": 0.09},
}
_LIMITS = {1: (4, 192), 2: (MAX_ROUNDS, MAX_NEW_TOKENS)}
_GOLDEN = 0.6180339887498949  # steps of this size fill the unit interval evenly, so any prefix has the right shares


def _mix(edition: int, index: int) -> str:
    place = (index * _GOLDEN) % 1.0
    for mix, share in _SHARES[edition].items():
        place -= share
        if place < 0:
            return mix
    return "first"


def scenarios(count: int = DIALOGS, seed: int = SEED, edition: int = EDITION) -> list[Scenario]:
    """The first `count` held-out dialogs of an edition; the same for everyone. Raises InputError for an unknown one."""
    if edition not in _SHARES:
        raise InputError(
            f"There is no edition {edition} of nano-tools.", f"Choose one of {', '.join(map(str, _SHARES))}."
        )
    return [dialogs.scenario(seed, index, "eval", mix=_mix(edition, index)) for index in range(count)]


@dataclass(slots=True)
class Report:
    """The result; `str` is what the command prints, `to_dict` what it writes."""

    calls: Share
    answers: Share
    families: dict[str, tuple[Share, Share]]  # name -> (calls, answers)
    by_calls: dict[int, tuple[Share, Share]]  # how many calls the reference makes -> the same
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
        rows = {name: self.families[name] for name in sorted(self.families)}
        rows |= {_counted(number): self.by_calls[number] for number in sorted(self.by_calls)}
        for name, (calls, answers) in rows.items():
            shown = f"calls {calls}" if calls.trials else "no calls"
            lines.append(f"  {name:<{width}}  answers {answers}; {shown}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Counts as `[successes, trials]`, ready for JSON."""
        plain = lambda share: [share.successes, share.trials]  # noqa: E731
        rows = lambda shares: {  # noqa: E731
            str(name): {"calls": plain(calls), "answers": plain(answers)} for name, (calls, answers) in shares.items()
        }
        return {
            "calls": plain(self.calls),
            "answers": plain(self.answers),
            "without_call": self.without_call,
            "unfinished": self.unfinished,
            "families": rows(self.families),
            "by_calls": rows(self.by_calls),
        }

    def failures(self, limit: int = 10) -> list[Outcome]:
        """Conversations whose answer is not exact, for looking at."""
        return [outcome for outcome in self.outcomes if not outcome_is_exact(outcome)][:limit]


def _counted(number: int) -> str:
    return f"{number} call" if number == 1 else f"{number} calls"


def wanted_calls(scenario: Scenario) -> int | None:
    """How many calls the reference makes after the last user message; None where there is no reference."""
    rest = scenario.document.messages[len(scenario.prompt_messages) :]
    return sum(len(message.get("tool_calls") or ()) for message in rest) if rest else None


def report(outcomes: list[Outcome]) -> Report:
    """Counts over finished conversations."""

    def shares(of: list[Outcome]) -> tuple[Share, Share]:
        calls = Share(sum(outcome.valid_calls for outcome in of), sum(outcome.calls for outcome in of))
        return calls, Share(sum(outcome_is_exact(outcome) for outcome in of), len(of))

    by_family: dict[str, list[Outcome]] = {}
    by_calls: dict[int, list[Outcome]] = {}
    without_call = 0
    for outcome in outcomes:
        by_family.setdefault(outcome.scenario.family, []).append(outcome)
        wanted = wanted_calls(outcome.scenario)
        if wanted is not None:
            by_calls.setdefault(wanted, []).append(outcome)
            without_call += outcome.calls == 0 and wanted > 0
    calls, answers = shares(outcomes)
    return Report(
        calls,
        answers,
        {name: shares(of) for name, of in by_family.items()},
        {number: shares(of) for number, of in by_calls.items()},
        without_call=without_call,
        unfinished=sum(outcome.answer is None for outcome in outcomes),
        outcomes=outcomes,
    )


def evaluate(
    fmt: ChatFormat,
    generate_batch: GenerateBatch,
    count: int = DIALOGS,
    seed: int = SEED,
    progress: Callable[[int, int], None] | None = None,
    edition: int = EDITION,
) -> Report:
    """Runs the check. `generate_batch` must be greedy for the numbers to be comparable."""
    asked = scenarios(count, seed, edition)
    rounds, tokens = _LIMITS[edition]
    return report(live(fmt, asked, generate_batch, rounds, tokens, progress))
