"""A model lives through a conversation: it writes, its calls are really executed, it reads the results, until it
answers.

The loop knows nothing of models: `generate_batch(prompts, max_new_tokens, stop_ids)` takes token ids and returns new
token ids (with or without the stop id), so the same loop serves any engine, batched as the engine likes, and a scripted
one in tests.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from karakoram.chat import ChatFormat
from karakoram.tools import Tool, call, parse_arguments
from karakoram.train.data.documents import Message, Scenario

GenerateBatch = Callable[[list[list[int]], int, Collection[int]], Sequence[Sequence[int]]]

MAX_ROUNDS = 7  # the longest wanted chain has five steps and an answer; one more to correct a mistake
MAX_NEW_TOKENS = 512  # the longest wanted assistant message, five calls at once, has about 400


@dataclass(slots=True)
class Outcome:
    """What happened. `answer` is None when no final answer came within the rounds."""

    scenario: Scenario
    messages: list[Message]
    calls: int = 0
    valid_calls: int = 0
    problems: list[str] = field(default_factory=list)
    answer: str | None = None


def _check_and_run(outcome: Outcome, tools: dict[str, Tool], tool_call: dict[str, Any]) -> str:
    """Counts the call as valid if it is whole, names a declared tool and satisfies its schema; returns the result."""
    outcome.calls += 1
    name, arguments = tool_call["function"]["name"], tool_call["function"]["arguments"]
    tool = tools.get(name)
    if tool is None:
        outcome.problems.append(f"unknown tool {name!r}")
        return f"error: there is no tool {name}"
    _, problems = parse_arguments(tool, arguments)
    if tool_call.get("incomplete"):
        problems = ["the call was cut off", *problems]
    if problems:
        outcome.problems.append(f"{name}: {problems[0]}")
    else:
        outcome.valid_calls += 1
    return call(tool, arguments)


def _take_turn(fmt: ChatFormat, outcome: Outcome, new_ids: Sequence[int], max_new_tokens: int) -> None:
    """One generated message: either calls, which run, or the final answer."""
    document = outcome.scenario.document
    parser = fmt.parser(document.tools, thinking=document.thinking)
    parser.feed(list(new_ids))
    message = parser.finish("length" if len(new_ids) >= max_new_tokens else "stop")
    calls = message.get("tool_calls") or []
    kept = {key: message.get(key) for key in ("reasoning_content", "content") if message.get(key)}
    outcome.messages.append({"role": "assistant", "content": "", **kept, **({"tool_calls": calls} if calls else {})})
    if not calls:
        outcome.answer = message.get("content") or ""
        return
    tools = {tool.name: tool for tool in outcome.scenario.tools}
    for tool_call in calls:
        result = _check_and_run(outcome, tools, tool_call)
        outcome.messages.append({"role": "tool", "tool_call_id": tool_call["id"], "content": result})


def live(
    fmt: ChatFormat,
    scenarios: Sequence[Scenario],
    generate_batch: GenerateBatch,
    max_rounds: int = MAX_ROUNDS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """Outcomes in the order of the scenarios. All conversations that still run form one batch per round."""
    outcomes = [Outcome(scenario, list(scenario.prompt_messages)) for scenario in scenarios]
    for _ in range(max_rounds):
        running = [outcome for outcome in outcomes if outcome.answer is None]
        if not running:
            break
        prompts = []
        for outcome in running:
            document = outcome.scenario.document
            prompts.append(fmt.encode(outcome.messages, document.tools, thinking=document.thinking))
        for outcome, new_ids in zip(running, generate_batch(prompts, max_new_tokens, fmt.stop_ids), strict=True):
            _take_turn(fmt, outcome, new_ids, max_new_tokens)
        if progress is not None:
            progress(sum(outcome.answer is not None for outcome in outcomes), len(outcomes))
    return outcomes
