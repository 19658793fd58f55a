"""Karakoram: run, serve, train, shrink and put to work models of the Kimi K2 family.

These are the public names. They are resolved on first use (PEP 562), so that `import karakoram` takes milliseconds and
loads no torch: `karakoram.Tokenizer` never needs it, and `karakoram.load_model` fetches it when it is asked for.
Rooms inside the package import one another directly and never this module.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from karakoram.chat import ChatFormat, Tokenizer, load_chat_format
    from karakoram.config import ModelConfig
    from karakoram.model.generate import generate
    from karakoram.model.load import load_model
    from karakoram.session import Session

__version__ = "0.1.0"  # the only place; pyproject.toml reads it from here

__all__ = [
    "ChatFormat",
    "ModelConfig",
    "Session",
    "Tokenizer",
    "__version__",
    "generate",
    "load_chat_format",
    "load_model",
]

_ROOM_OF = {
    "ChatFormat": "karakoram.chat",
    "Tokenizer": "karakoram.chat",
    "load_chat_format": "karakoram.chat",
    "ModelConfig": "karakoram.config",
    "generate": "karakoram.model.generate",
    "load_model": "karakoram.model.load",
    "Session": "karakoram.session",
}


def __getattr__(name: str) -> object:
    """Resolve a public name, and keep it: the second use is an ordinary attribute."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'karakoram' has no attribute {name!r}")
    value: object = getattr(import_module(_ROOM_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
