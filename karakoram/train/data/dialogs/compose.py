"""From a task to a conversation: tools get names and company, calls get ids, thoughts and results are written down.

Every assistant message thinks in one short pattern: what is needed, which tool fits, and `argument (part) = value` for
each argument in the order of the declaration. The JSON that follows repeats this order, so that writing a call is copying.
"""

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from karakoram.tools import BUILTIN, Tool
from karakoram.tools import call as run_call
from karakoram.tools.tool import ToolError
from karakoram.train.data.dialogs.arithmetic import CALCULATE, OPERATE
from karakoram.train.data.dialogs.calendar import DATE_ADD, DATE_DIFFERENCE, WEEKDAY
from karakoram.train.data.dialogs.capability import Bound, Capability, bind, bind_fixed
from karakoram.train.data.dialogs.distractors import distractor
from karakoram.train.data.dialogs.lists import LARGEST, SUM
from karakoram.train.data.dialogs.measures import CONVERT
from karakoram.train.data.dialogs.phrases import Phrases
from karakoram.train.data.dialogs.speech import say, spell_numbers
from karakoram.train.data.dialogs.task import Task, Use
from karakoram.train.data.documents import Document, Message, Scenario
from karakoram.train.data.names import Split

DEMO: dict[str, Bound] = {
    capability.key: bind_fixed(capability, BUILTIN[name], names)
    for capability, name, names in (
        (CALCULATE, "calculator", {"expression": "expression"}),
        (DATE_ADD, "date_add", {"date": "date", "days": "days"}),
        (DATE_DIFFERENCE, "date_difference", {"from": "start", "to": "end"}),
        (WEEKDAY, "weekday", {"date": "date"}),
        (CONVERT, "convert_units", {"value": "value", "from": "from_unit", "to": "to_unit"}),
    )
}
_COMPANY = (CALCULATE, OPERATE, DATE_ADD, DATE_DIFFERENCE, WEEKDAY, CONVERT, SUM, LARGEST)
_SYSTEM = Phrases(
    "system",
    """You are a helpful assistant.
    You are a helpful assistant with tools.
    You are nano, a small model of Karakoram.
    Answer in one short sentence.
    Use the tools when they help.
    Be brief.
    You are an assistant for a shop.
    Help the user.
    You can call functions.
    Today is a good day. Be friendly.""",
    """You are a friendly assistant.
    Use a tool if one helps.
    Please be brief.""",
)
SILENT_SHARE = 0.15  # of conversations without thinking; in rich training more, since they went wrong twice as often
SILENT_SHARE_RICH = 0.22
_BUSY = ("error: busy, try again", "error: timeout", "error: temporary failure, try again", "error: try again")


@dataclass(slots=True)
class _Talk:
    """The conversation while it is written."""

    bound: dict[str, Bound]
    thinking: bool
    messages: list[Message] = field(default_factory=list)
    calls: int = 0
    mistakes: list[int] = field(default_factory=list)  # messages that nobody should learn to write


def compose(tasks: list[Task], rng: Random, split: Split, demo: bool) -> Scenario:
    """One conversation with a user turn per task. `demo` declares the built-in tools instead of invented ones."""
    bound, order = _declare(tasks, rng, split, demo)
    system = tasks[0].system
    if system is None and rng.random() < 0.15:
        system = _SYSTEM.pick(rng, split)
    silent = SILENT_SHARE_RICH if split == "train" and getattr(rng, "rich", False) else SILENT_SHARE
    talk = _Talk(bound, thinking=rng.random() >= silent)
    if system is not None:
        talk.messages.append({"role": "system", "content": system})
    for task in tasks:
        spelled = task.family in ("calculator", "word_problem")
        question = spell_numbers(task.question, rng) if spelled else task.question
        _turn(talk, task, question if task.verbatim else say(question, rng, split), rng)
    tools = [bound_tool.tool for bound_tool in order]
    failure = tasks[-1].failure
    document = Document(
        talk.messages, [tool.declaration() for tool in tools] or None, talk.thinking, mistakes=tuple(talk.mistakes)
    )
    if failure is not None:
        failing = _of(talk, tasks[-1].steps[0][0]).tool
        tools = [_fails_first(tool, failure) if tool is failing else tool for tool in tools]
    return Scenario(document, tools, tasks[-1].expected, tasks[-1].family)


def _declare(tasks: list[Task], rng: Random, split: Split, demo: bool) -> tuple[dict[str, Bound], list[Bound]]:
    """The tools by capability, and in the order of declaration: what is needed, then rivals and distractors, shuffled."""
    needed: dict[int, Capability] = {}
    for task in tasks:
        for use in (use for step in task.steps for use in step):
            needed[id(use.capability)] = use.capability
    if demo:
        chosen = (
            list(DEMO)
            if rng.random() < 0.75
            else [key for key in DEMO if key in {c.key for c in needed.values()} or rng.random() < 0.4]
        )
        return DEMO, [DEMO[key] for key in chosen]
    if all(task.bare for task in tasks):
        return {}, []
    groups = {group_of(capability) for capability in needed.values()}
    extra: list[Capability] = [rival for task in tasks for rival in task.rivals if rng.random() < 0.4]
    actions = all(task.family != "missing_tool" for task in tasks)  # nothing that could do what is refused
    want = (0, 0, 1, 1, 1, 2, 2, 3)[int(rng.random() * 8)]
    want = min([want, *(task.company for task in tasks)])
    while len(extra) < want:
        candidate = (
            distractor(rng, split) if actions and rng.random() < 0.5 else _COMPANY[int(rng.random() * len(_COMPANY))]
        )
        group = group_of(candidate)
        if candidate.key == "distractor" or group not in groups:
            groups.add(group)
            extra.append(candidate)
    if not needed and not extra:
        extra.append(_COMPANY[int(rng.random() * len(_COMPANY))])
    taken: set[str] = set()
    capabilities = list(needed.values()) + extra[: max(1, 4 - len(needed))]
    order = [bind(capability, rng, split, taken) for capability in capabilities]
    bound = {str(id(capability)): tool for capability, tool in zip(capabilities, order, strict=True)}
    rng.shuffle(order)
    return bound, order


def group_of(capability: Capability) -> str:
    """Tools of one group could answer the same question."""
    return capability.group or capability.key


def _of(talk: _Talk, use: Use) -> Bound:
    return talk.bound.get(str(id(use.capability))) or talk.bound[use.capability.key]


def _turn(talk: _Talk, task: Task, question: str, rng: Random) -> None:
    talk.messages.append({"role": "user", "content": question})
    result = ""
    failure = task.failure
    for step in task.steps:
        if task.mistaken and step is task.steps[0]:
            _mistake(talk, step[0], rng)
            again = Use(step[0].capability, step[0].values, f"A name was wrong. {step[0].thought}")
            if task.gives_up:
                _mistake(talk, again, rng)
                talk.messages.append(
                    _assistant(talk, "It failed again. Stop.", "I could not do that: the call failed.")
                )
                return
            result = _call(talk, [again], None)
        elif failure is not None:
            _call(talk, step, [failure] * len(step))
            failure = None
            again = [Use(use.capability, use.values, "It failed. Try again.") for use in step]
            result = _call(talk, again, None)
        else:
            result = _call(talk, step, None)
    thought = task.thought or (f"The result is {result}." if len(result) < 40 else "Now answer.")
    talk.messages.append(_assistant(talk, thought, task.answer))


def _assistant(talk: _Talk, thought: str, content: str) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if talk.thinking:
        message["reasoning_content"] = thought
    return message


def _call(talk: _Talk, step: list[Use], results: list[str] | None) -> str:
    """Writes the assistant message with its calls and the tool messages; returns the last result unwrapped."""
    calls, thoughts, answers, plain = [], [], [], ""
    for index, use in enumerate(step):
        bound = _of(talk, use)
        arguments = bound.arguments(use.values)
        call_id = f"functions.{bound.tool.name}:{talk.calls}"
        talk.calls += 1
        text = json.dumps(arguments, ensure_ascii=False)
        function = {"name": bound.tool.name, "arguments": text}
        calls.append({"id": call_id, "type": "function", "function": function})
        thoughts.append(_thought(use, bound, arguments))
        try:
            plain = use.capability.compute(use.values)
            answer = bound.wrap(plain) if results is None else results[index]
        except ToolError as error:
            answer = plain = f"error: {error}"
        answers.append((call_id, answer))
    message = _assistant(talk, " ".join(thoughts), "")
    message["tool_calls"] = calls
    talk.messages.append(message)
    talk.messages += [{"role": "tool", "tool_call_id": call_id, "content": answer} for call_id, answer in answers]
    return plain if len(step) == 1 and results is None else " and ".join(answer for _, answer in answers)


def _mistake(talk: _Talk, use: Use, rng: Random) -> None:
    """The call with a wrong name of the tool or of an argument, and the error that the tool loop answers with."""
    bound = _of(talk, use)
    arguments = bound.arguments(use.values)
    name, names = bound.tool.name, list(arguments)
    others = [key for other in talk.bound.values() if other is not bound for key in other.names.values()]
    if rng.random() < 0.3:
        name = _garbled(name, rng)
    else:
        at = int(rng.random() * len(names))
        wrong = others[int(rng.random() * len(others))] if others and rng.random() < 0.6 else _garbled(names[at], rng)
        names[at] = wrong if wrong not in names else _garbled(names[at], rng)
    given = dict(zip(names, arguments.values(), strict=True))
    text = json.dumps(given, ensure_ascii=False)
    answer = f"error: there is no tool {name}" if name != bound.tool.name else run_call(bound.tool, text)
    call_id = f"functions.{name}:{talk.calls}"
    talk.calls += 1
    values = ", ".join(
        f"{key} = {value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()
    )
    message = _assistant(talk, f"{use.thought} Use {name}: {values}.", "")
    message["tool_calls"] = [{"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}]
    talk.mistakes.append(len(talk.messages))
    talk.messages += [message, {"role": "tool", "tool_call_id": call_id, "content": answer}]


def _garbled(name: str, rng: Random) -> str:
    """The name with two letters replaced, as a model that copies badly writes it."""
    at = int(rng.random() * max(1, len(name) - 1))
    new = "".join("abdegiklmnoprstu"[int(rng.random() * 16)] for _ in range(2))
    garbled = name[:at] + new + name[at + 2 :]
    return garbled if garbled != name else name + new


def _thought(use: Use, bound: Bound, arguments: dict[str, Any]) -> str:
    """What is needed, the tool, and the arguments; where there are several, each with its part in the matter.

    So a value is chosen in two short steps (description -> part, part -> value) instead of one long one.
    """
    roles = [role for key in bound.order for role in bound.capability.roles if role.key == key and key in use.values]
    several = len(roles) > 1
    values = ", ".join(
        f"{name}{f' ({role.said or role.key})' if several else ''} = {value if isinstance(value, str) else json.dumps(value)}"
        for role, (name, value) in zip(roles, arguments.items(), strict=True)
    )
    return f"{use.thought} Use {bound.tool.name}: {values}."


def _fails_first(tool: Tool, failure: str) -> Tool:
    """The tool, failing once: its first call raises what the document shows."""
    left = [failure.removeprefix("error: ")]

    def run(arguments: dict[str, Any]) -> str:
        if left:
            raise ToolError(left.pop())
        return tool.run(arguments)

    return Tool(tool.name, tool.description, tool.parameters, run)


def with_failure(task: Task, rng: Random) -> Task:
    """The same task, with a tool that fails the first time; unchanged if it starts with several calls or finds nothing."""
    if len(task.steps[0]) == 1 and "could not" not in task.expected:
        task.failure = _BUSY[int(rng.random() * len(_BUSY))]
    return task
