"""The alphabet of talk: messages, prompts, token ids, and the way back. No torch here.

`Tokenizer` turns text into token ids, `ChatFormat` turns messages into a prompt and a model's output back into a
message. Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from karakoram.chat.format import ChatFormat as ChatFormat
    from karakoram.chat.format import load_chat_format as load_chat_format
    from karakoram.chat.tokenizer import Tokenizer as Tokenizer

__all__ = ["ChatFormat", "Tokenizer", "load_chat_format"]


def __getattr__(name: str) -> object:
    if name == "Tokenizer":
        from karakoram.chat.tokenizer import Tokenizer

        return Tokenizer
    if name in ("ChatFormat", "load_chat_format"):
        from karakoram.chat import format as chat_format

        return getattr(chat_format, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
