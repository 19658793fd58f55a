"""Requests of OpenAI's Responses API as conversations in OpenAI's older shape.

    message items                       messages; developer is system
    reasoning, message, function_call   reasoning_content, content, tool_calls of one assistant message
    function_call_output                a message of role tool

Neighbouring items of the assistant belong to one message, until something comes that cannot follow in one: text after
text or after a call, reasoning after either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter

from karakoram.engine.request import Sampling
from karakoram.serve.openai.conversation import EFFORT_TOKENS
from karakoram.serve.refusal import Refusal
from karakoram.serve.responses import schemas
from karakoram.serve.responses.answers import place_of
from karakoram.serve.responses.store import Stored
from karakoram.serve.service import Service
from karakoram.session.chat import ChatRequest

Message = dict[str, Any]

# ---------------------------------------------------------------------------------------------------- messages

_ITEM: TypeAdapter[Any] = TypeAdapter(schemas.Item)


class _Conversation:
    """Messages as items come in, after those of `history`, which are left as they are."""

    def __init__(self, history: Sequence[Message]) -> None:
        self.messages = list(history)
        self._open: Message | None = None  # the assistant's message that is being put together
        calls = [call["id"] for message in history for call in message.get("tool_calls") or ()]
        results = {message["tool_call_id"] for message in history if message["role"] == "tool"}
        self._answered = {call_id: call_id in results for call_id in calls}  # of each call

    def add(self, path: str, item: Any) -> None:
        """Refusal names what is wrong at `path`."""
        if isinstance(item, schemas.MessageItem):
            if item.role == "assistant":
                self._assistant("content")["content"] = _text_of(item.content, "")
            else:
                role = "user" if item.role == "user" else "system"
                self._other({"role": role, "content": _text_of(item.content, "\n")})
        elif isinstance(item, schemas.ReasoningItem):
            texts = "".join(text.text for text in item.content or item.summary or ())
            message = self._assistant("reasoning_content")
            message["reasoning_content"] = message.get("reasoning_content", "") + texts
        elif isinstance(item, schemas.FunctionCallItem):
            self._call(path, item)
        else:
            self._result(path, item)

    def _other(self, message: Message) -> None:
        self._open = None
        self.messages.append(message)

    def _call(self, path: str, item: schemas.FunctionCallItem) -> None:
        calls = self._assistant("tool_calls").setdefault("tool_calls", [])
        if any(call["id"] == item.call_id for call in calls):
            raise Refusal(400, f"Two calls of one turn have the call_id {item.call_id!r}.", f"{path}.call_id")
        function = {"name": item.name, "arguments": item.arguments}
        calls.append({"id": item.call_id, "type": "function", "function": function})
        self._answered[item.call_id] = False

    def _result(self, path: str, item: schemas.FunctionCallOutputItem) -> None:
        answered = self._answered.get(item.call_id)
        if answered is not False:
            what = "No function_call before it has" if answered is None else "There is an output already for"
            raise Refusal(400, f"{what} the call_id {item.call_id!r}.", f"{path}.call_id")
        self._answered[item.call_id] = True
        output = _text_of(item.output, "\n")
        self._other({"role": "tool", "tool_call_id": item.call_id, "content": output})

    def _assistant(self, part: str) -> Message:
        """The assistant message that `part` belongs to: the open one where it may still come, else a new one."""
        closed_by = () if part == "tool_calls" else ("content", "tool_calls")
        if self._open is None or any(key in self._open for key in closed_by):
            self._open = {"role": "assistant"}
            self.messages.append(self._open)
        return self._open


def _text_of(content: str | Sequence[Any], between: str) -> str:
    if isinstance(content, str):
        return content
    return between.join(part.refusal if isinstance(part, schemas.RefusalPart) else part.text for part in content)


Find = Callable[[str], Stored | None]


def read_input(body: schemas.ResponsesRequest, find: Find) -> list[Message]:
    """The conversation in OpenAI's older shape, without instructions; `find` gives stored answers by id."""
    history: list[Message] = []
    if body.previous_response_id is not None:
        stored = find(body.previous_response_id)
        if stored is None:
            what = f"There is no stored response {body.previous_response_id!r}. Send the conversation as input."
            raise Refusal(400, what, "previous_response_id", "previous_response_not_found")
        history = [*stored.messages, stored.message]
    conversation = _Conversation(history)
    if isinstance(body.input, str):
        conversation.add("input", schemas.MessageItem(role="user", content=body.input))
    else:
        for place, item in enumerate(body.input):
            path = f"input[{place}]"
            conversation.add(path, _found(path, item, find) if isinstance(item, schemas.ItemReference) else item)
    messages = list(_settled(conversation.messages))
    if not messages:
        raise Refusal(400, "There is nothing to answer: input has no messages.", "input")
    return messages


def _found(path: str, reference: schemas.ItemReference, find: Find) -> Any:
    """The item that a reference names."""
    where = place_of(reference.id)
    stored = find(where[0]) if where is not None else None
    for item in stored.output if stored is not None else ():
        if item["id"] == reference.id:
            return _ITEM.validate_python(item)
    what = f"There is no stored item {reference.id!r}. Send the item itself."
    raise Refusal(400, what, f"{path}.id", "item_not_found")


def _settled(messages: Sequence[Message]) -> Iterator[Message]:
    """Reasoning that nothing follows has no place in a conversation; calls may come without content."""
    for message in messages:
        if message["role"] == "assistant" and "content" not in message:
            if not message.get("tool_calls"):
                continue
            message = {**message, "content": ""}
        yield message


# ---------------------------------------------------------------------------------------------------- the rest


def read_tools(body: schemas.ResponsesRequest) -> list[dict[str, Any]]:
    """Declarations in OpenAI's older shape: those that may be called. `strict` null is true, as it is at OpenAI."""
    tools = [
        {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
        for tool in body.tools or ()
    ]
    if not isinstance(body.tool_choice, schemas.AllowedTools):
        return tools
    declared = {tool["function"]["name"] for tool in tools}
    for place, allowed in enumerate(body.tool_choice.tools):
        if allowed.name not in declared:
            path = f"tool_choice.tools[{place}].name"
            raise Refusal(400, f"{allowed.name!r} is not among the tools.", path)
    names = {allowed.name for allowed in body.tool_choice.tools}
    return [tool for tool in tools if tool["function"]["name"] in names]


def read_request(body: schemas.ResponsesRequest, service: Service) -> ChatRequest:
    """Everything but the messages, which may have to be looked up."""
    _refuse_logprobs(body)
    effort = body.reasoning.effort if body.reasoning is not None else None
    thinking = effort != "none"
    sampling: dict[str, Any] = {**service.sampling(thinking)}
    sampling |= {key: value for key in ("temperature", "top_p") if (value := getattr(body, key)) is not None}
    choice = body.tool_choice
    if isinstance(choice, schemas.NamedTool):
        kind, named = "named", choice.name
    else:
        kind, named = (choice.mode if isinstance(choice, schemas.AllowedTools) else choice or "auto"), None
    shape = body.text.format if body.text is not None else None
    schema = None
    if isinstance(shape, schemas.JsonSchemaFormat):
        schema = shape.schema_
    elif isinstance(shape, schemas.JsonObjectFormat):
        schema = {"type": "object"}
    return ChatRequest(
        messages=(),
        tools=read_tools(body),
        tool_choice=kind,
        named_tool=named,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        thinking=thinking,
        reasoning_tokens=EFFORT_TOKENS[effort] if effort is not None and thinking else None,
        response_schema=schema,
        sampling=Sampling(**sampling),
        max_new_tokens=body.max_output_tokens,
    )


def _refuse_logprobs(body: schemas.ResponsesRequest) -> None:
    what = "Log-probabilities are not served here: /v1/chat/completions has them."
    for place, included in enumerate(body.include or ()):
        if included == "message.output_text.logprobs":
            raise Refusal(400, what, f"include[{place}]")
    if body.top_logprobs:
        raise Refusal(400, what, "top_logprobs")


def echo_of(body: schemas.ResponsesRequest, chat: ChatRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    reasoning = body.reasoning or schemas.Reasoning()
    shape = body.text.format if body.text is not None else None
    verbosity = (body.text.verbosity if body.text is not None else None) or "medium"
    form = {"type": "text"} if shape is None else shape.model_dump(by_alias=True, exclude_none=True)
    choice = body.tool_choice
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": chat.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary or reasoning.generate_summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": chat.sampling.temperature,
        "text": {"format": form, "verbosity": verbosity},
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": 0,
        "top_p": chat.sampling.top_p,
        "truncation": "disabled",
        "user": body.user,
    }
