"""When an answer counts as exact, and how sure a share of successes is.

An answer is exact when
- it is not empty and holds no marker of the chat format (`<|`, `functions.`),
- every expected value stands in it whole: a number as a number of the same value, any other text literally, with no
  letter or digit directly before or after it,
- and nothing contradicts: every other number in it also stands in what the user or the system prompt said, in the
  arguments of the calls that were made, or in the reference answer; and no weekday is named that is neither expected
  nor in the question.

So `27*14 is 378.` and `It is 378 boxes` are exact for 378, while `378 or 380`, `3780` and `37 8` are not.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from karakoram.evals.tool_loop import Outcome
from karakoram.tools.dates import WEEKDAYS
from karakoram.train.data.documents import Message

_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)|(?<=\d[-/])\d+(?!\w)")
_PLAIN = re.compile(r"-?\d+(?:\.\d+)?")


def numbers(text: str) -> set[Fraction]:
    """The numbers that stand in a text. A minus directly after a digit or letter is an operator, not a sign."""
    return {Fraction(match.replace(",", "")) for match in _NUMBER.findall(text)}


def is_exact(content: str, expected: Iterable[str], known: str) -> bool:
    """As the module says; `known` is all text whose numbers and weekdays may be repeated."""
    if not content.strip() or "<|" in content or "functions." in content:
        return False
    found = numbers(content)
    allowed = numbers(known) | {abs(value) for value in numbers(known)}
    for value in expected:
        if _PLAIN.fullmatch(value):
            if Fraction(value) not in found:
                return False
        elif not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", content):
            return False
        allowed |= numbers(value)
    if found - allowed:
        return False
    named = {day for day in WEEKDAYS if day in content}
    return all(day in known or any(day in value for value in expected) for day in named)


def _known(outcome: Outcome) -> str:
    """Prompt, reference answer and the arguments of calls. The results of tools are not in it."""
    parts = [message["content"] for message in outcome.messages if message["role"] in ("user", "system")]
    reference: list[Message] = outcome.scenario.document.messages[-1:]
    parts += [message["content"] for message in reference if message["role"] == "assistant"]
    for message in outcome.messages:
        parts += [call["function"]["arguments"] for call in message.get("tool_calls") or []]
    return "\n".join(parts)


def outcome_is_exact(outcome: Outcome) -> bool:
    """Whether the final answer of a conversation is exact; False when none came."""
    return outcome.answer is not None and is_exact(outcome.answer, outcome.scenario.expected, _known(outcome))


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson interval of a share, as fractions; (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True, slots=True)
class Share:
    """Successes out of trials, printed with its 95 % interval."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        return self.successes / self.trials if self.trials else 0.0

    def __str__(self) -> str:
        low, high = wilson(self.successes, self.trials)
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        return f"{100 * self.value:5.1f} % ({self.successes}/{self.trials}, {interval})"
