"""One question, answered with tools that run in this process: the whole loop of an agent, on one page.

python examples/chat_with_tools.py ["What is 48 * 17?"]
"""

import sys
from typing import Any

import karakoram
from karakoram import tools
from karakoram.env import bundled_model_dir

MAX_CALL_ROUNDS = 4

session = karakoram.Session(karakoram.load_model(), karakoram.load_chat_format(bundled_model_dir()))
declarations = [tool.declaration() for tool in tools.BUILTIN.values()]
question = sys.argv[1] if len(sys.argv) > 1 else "What is 48 * 17?"
messages: list[dict[str, Any]] = [{"role": "user", "content": question}]

for _ in range(MAX_CALL_ROUNDS):
    for delta in session.stream(messages, tools=declarations, max_new_tokens=300, temperature=0.0):
        print(delta.get("reasoning_content") or delta.get("content") or "", end="", flush=True)
    assert session.last is not None
    answer = session.last.message
    messages.append(answer)
    print()
    if not answer.get("tool_calls"):
        break
    for call in answer["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        result = tools.call(tools.BUILTIN[name], arguments) if name in tools.BUILTIN else f"error: no tool {name}"
        print(f"[{name} {arguments} -> {result}]")
        messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": result})
