"""A stand-in for a model that has learned everything: it continues each prompt as the reference document does."""

from collections.abc import Collection

from karakoram.chat import ChatFormat
from karakoram.train.data.documents import Document, Scenario


def reference_steps(fmt: ChatFormat, document: Document) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, wanted new ids) of every assistant message after the last user message, by the template."""
    messages = document.messages
    last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    special = fmt.tokenizer.special_ids
    steps = []
    for index in range(last_user + 1, len(messages)):
        message = messages[index]
        if message["role"] != "assistant":
            continue
        prompt = fmt.encode(messages[:index], document.tools, thinking=document.thinking)
        if message.get(
            "tool_calls"
        ):  # with calls the template keeps the reasoning, so the next prompt holds the message
            after = fmt.encode(
                messages[: index + 1], document.tools, thinking=document.thinking, add_generation_prompt=False
            )
            assert after[: len(prompt)] == prompt
            steps.append((prompt, after[len(prompt) :]))
        else:
            wanted = fmt.tokenizer.encode(message["content"]) + [special["<|im_end|>"]]
            if document.thinking:
                wanted = fmt.tokenizer.encode(message.get("reasoning_content") or "") + [special["</think>"], *wanted]
            steps.append((prompt, wanted))
    return steps


def oracle(fmt: ChatFormat, scenarios: list[Scenario]):
    """A `generate_batch` that knows the reference continuation of every prompt of the scenarios."""
    known = {
        tuple(prompt): wanted for scenario in scenarios for prompt, wanted in reference_steps(fmt, scenario.document)
    }

    def generate_batch(prompts: list[list[int]], max_new_tokens: int, stop_ids: Collection[int]) -> list[list[int]]:
        return [known.get(tuple(prompt), [next(iter(stop_ids))]) for prompt in prompts]

    return generate_batch
