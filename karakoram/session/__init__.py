"""Messages in, message parts out: where words meet tokens. `direct` talks to a model, `chat` through an engine."""

from karakoram.session.direct import (
    DEFAULT_NEW_TOKENS,
    Delta,
    Session,
    Turn,
    check_context,
    check_prompt,
    check_sampling,
    check_vocabulary,
)

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "Delta",
    "Session",
    "Turn",
    "check_context",
    "check_prompt",
    "check_sampling",
    "check_vocabulary",
]
