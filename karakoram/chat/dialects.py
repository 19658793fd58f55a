"""The seven ways in which the family talks, as a table of facts, and how to tell which one a checkpoint speaks.

All dialects frame a message as `<|im_ROLE|>NAME<|im_middle|>CONTENT<|im_end|>` without any white space between
messages. They differ in the tool declaration (JSON or TypeScript), in a default system prompt, in think blocks, and
in how an image is announced. What a dialect does lives in this table; `template.py` and `parser.py` read it and know
no dialect by name.

Sources: the chat templates of Kimi-K2-Instruct, -0905, -Thinking, K2.5, K2.6, Moonlight and Kimi-VL; sampling from
the model cards (K2: 0.6; K2-Thinking: 1.0; K2.5 and later: 1.0 thinking, 0.6 instant, top_p 0.95; Kimi-VL: 0.2,
Thinking 0.8). Where a card names no top_p it is 1. Moonlight's card names no temperature; K2's is used.
Changed: Moonlight's and Kimi-VL's templates drop tools and give roles other than system, user and assistant no opening
token, which would make them part of the message before; here both are rendered as K2 does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from karakoram.chat.tokenizer import CONFIG_FILE, read_json_object
from karakoram.errors import ChatError, TokenizerError

# The markers that all dialects share. Ids belong to tokenizers; names are the same everywhere.
IM_USER = "<|im_user|>"
IM_ASSISTANT = "<|im_assistant|>"
IM_SYSTEM = "<|im_system|>"
IM_MIDDLE = "<|im_middle|>"
IM_END = "<|im_end|>"
EOS = "[EOS]"
SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
ARGUMENT_BEGIN = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"
MEDIA_CONTENT = "<|media_content|>"
MEDIA_PAD = "<|media_pad|>"
MEDIA_END = "<|media_end|>"

FRAME_MARKERS = (IM_USER, IM_ASSISTANT, IM_SYSTEM, IM_MIDDLE)
TOOL_MARKERS = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENT_BEGIN, CALL_END)
STOP_MARKERS = (EOS, IM_END)

HELPFUL = "You are a helpful assistant"
KIMI = "You are Kimi, an AI assistant created by Moonshot AI."


@dataclass(frozen=True)
class Dialect:
    """What distinguishes one chat template from the others."""

    name: str
    default_system: str | None
    """System prompt inserted when the first message is not a system message."""
    tools_as: Literal["json", "typescript"]
    frame_names: bool
    """A frame carries `message.name` instead of the role where a name is given."""
    think: tuple[str, str]
    """The markers around reasoning. Models that were not trained to reason sometimes write them all the same."""
    think_in_prompt: bool
    """Assistant messages are rendered with a think block, empty for history."""
    think_prefill: bool
    """The generation prompt opens (or opens and closes) the think block; `thinking` is a switch."""
    starts_in_reasoning: bool
    """With thinking on, the output is reasoning from its first token, announced by a marker or not."""
    preserves_thinking: bool
    """Understands `preserve_thinking` and reads `message.reasoning` before `reasoning_content`."""
    image: tuple[str, str]
    """Opening marker of an image, and the literal text after its closing marker."""
    image_keys: bool
    """A part is an image also by having a key `image` or `image_url`, whatever its type."""
    video: str | None
    """Text that stands for a video, None where the template knows no video."""
    temperature: float
    top_p: float
    instant_temperature: float | None = None
    """Temperature with thinking off, where it differs."""


def _text_dialect(name: str, system: str, temperature: float, frame_names: bool, image_suffix: str) -> Dialect:
    return Dialect(
        name=name,
        default_system=system,
        tools_as="json",
        frame_names=frame_names,
        think=("<think>", "</think>"),
        think_in_prompt=False,
        think_prefill=False,
        starts_in_reasoning=False,
        preserves_thinking=False,
        image=("<|media_start|>", image_suffix),
        image_keys=True,
        video=None,
        temperature=temperature,
        top_p=1.0,
    )


def _multimodal_dialect(name: str, preserves_thinking: bool) -> Dialect:
    return Dialect(
        name=name,
        default_system=None,
        tools_as="typescript",
        frame_names=True,
        think=("<think>", "</think>"),
        think_in_prompt=True,
        think_prefill=True,
        starts_in_reasoning=True,
        preserves_thinking=preserves_thinking,
        image=("<|media_begin|>", "\n"),
        image_keys=False,
        video="<|kimi_k25_video_placeholder|>\n",
        temperature=1.0,
        top_p=0.95,
        instant_temperature=0.6,
    )


_K2 = _text_dialect("kimi-k2", KIMI, temperature=0.6, frame_names=True, image_suffix="\n")
# Kimi-VL's template closes the image tag inside a Jinja expression with trimmed neighbours: no newline follows it.
_KIMI_VL = _text_dialect("kimi-vl", HELPFUL, temperature=0.2, frame_names=False, image_suffix="")

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        _K2,
        replace(
            _K2,
            name="kimi-k2-thinking",
            think_in_prompt=True,
            starts_in_reasoning=True,
            temperature=1.0,
        ),
        _multimodal_dialect("kimi-k2.5", preserves_thinking=False),
        _multimodal_dialect("kimi-k2.6", preserves_thinking=True),
        _text_dialect("moonlight", HELPFUL, temperature=0.6, frame_names=False, image_suffix=""),
        _KIMI_VL,
        # Its tokenizer has no think tokens: the model writes the markers as text, and the template never renders them.
        replace(_KIMI_VL, name="kimi-vl-thinking", think=("◁think▷", "◁/think▷"), temperature=0.8),
    )
}


def get_dialect(name: str) -> Dialect:
    """The table row of `name`; ChatError lists the known ones."""
    dialect = DIALECTS.get(name)
    if dialect is None:
        raise ChatError(f"Unknown chat dialect {name!r}.", f"Known dialects: {', '.join(DIALECTS)}.")
    return dialect


def detect_dialect(path: Path) -> Dialect:
    """The dialect of the checkpoint or tokenizer in directory `path`: our own key, else features of its chat template.

    Our key is `"karakoram": {"dialect": NAME}`, in `tokenizer_config.json` or `config.json`. Else ChatError names
    `--dialect`.
    """
    tokenizer_config = _read_optional(path / CONFIG_FILE)
    for raw in (tokenizer_config, _read_optional(path / "config.json")):
        own = raw.get("karakoram")
        name = cast("dict[str, Any]", own).get("dialect") if isinstance(own, dict) else None
        if isinstance(name, str):
            return get_dialect(name)
    fix = f"Name the dialect with --dialect (one of {', '.join(DIALECTS)})."
    template = _chat_template(path, tokenizer_config)
    if template is None:
        raise ChatError(f"{path} has no chat template, so its chat dialect is unknown.", fix)
    name = dialect_of_template(template)
    if name is None:
        raise ChatError(f"The chat template of {path} is none of the known dialects.", fix)
    return DIALECTS[name]


def dialect_of_template(template: str) -> str | None:
    """Which dialect a Jinja chat template is, by features that only that dialect has; None if it is none of them."""

    def has(*words: str) -> bool:
        return any(word in template for word in words)

    if IM_MIDDLE not in template:
        return None
    if has("preserve_thinking"):
        return "kimi-k2.6"
    if has("tools_ts_str", "<|kimi_k25_video_placeholder|>"):
        return "kimi-k2.5"
    if has("◁think▷"):
        return "kimi-vl-thinking"
    if has("<think>"):
        return "kimi-k2-thinking"
    if has("tool_declare", SECTION_BEGIN, KIMI):
        return "kimi-k2"
    if has("<|media_start|>"):
        return "kimi-vl"
    return "moonlight" if has(HELPFUL) else None


def _read_optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except TokenizerError as error:
        raise ChatError(error.what, error.fix) from error


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The Jinja text: its own file, else a key of tokenizer_config.json, else of the processor's chat_template.json."""
    own_file = path / "chat_template.jinja"
    if own_file.is_file():
        try:
            return own_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatError(f"Cannot read {own_file}: {error}.", "Copy it again, or use --dialect.") from error
    for raw in (tokenizer_config, _read_optional(path / "chat_template.json")):
        template: object = raw.get("chat_template")
        if isinstance(template, list):
            template = _named_template(cast("Collection[object]", template))
        if isinstance(template, str):
            return template
    return None


def _named_template(templates: Collection[object]) -> str | None:
    """Of transformers' list form `[{"name": …, "template": …}]`, the one named default."""
    for entry in templates:
        if isinstance(entry, dict):
            fields = cast("dict[str, object]", entry)
            template = fields.get("template")
            if fields.get("name") == "default" and isinstance(template, str):
                return template
    return None
