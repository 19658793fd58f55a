"""Why a request is not answered, before any API surface has put it in its own shape.

Everything below the server raises `KarakoramError`s; everything in the server raises `Refusal`. `refusal_of` turns the
one into the other, and each surface turns a refusal into the error body that its clients know.

| status | when |
|---|---|
| 400 | the request is wrong: `param` names the field |
| 401 | a key is needed, or this one is not known |
| 404 | no such model, stream or page |
| 405 | no such method for this page |
| 408 | the reader of a stream has fallen too far behind (inside the stream: it began with 200) |
| 410 | this part of a resumable stream has been dropped |
| 413 | the body is too large, or the conversation does not fit the context (`wanted` of `context` tokens) |
| 429 | the queue is full: `retry_after_s` |
| 503 | the model is loading, or the engine has stopped |
"""

from __future__ import annotations

import re

from karakoram.engine.request import EngineStopped, QueueFull
from karakoram.errors import ContextOverflow, KarakoramError, SchemaError

# (what OpenAI calls it, what Anthropic calls it)
_KINDS = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    410: ("not_found_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    503: ("service_unavailable_error", "overloaded_error"),
}
_INDEXED = re.compile(r"(Message|Tool) (\d+) ")
_FIELD = re.compile(r"[a-z][a-z0-9_]*(?= is )")


class Refusal(Exception):
    """A request that is not answered: the HTTP status, a sentence or two, and what a program can read of it.

    param   path of the field at fault in the request as the client wrote it: `messages[3].content`
    code    OpenAI's word for the case, such as "model_not_found"; None where there is none
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def openai_kind(self) -> str:
        """`error.type` of OpenAI's error body."""
        return _KINDS.get(self.status, ("server_error", "api_error"))[0]

    @property
    def anthropic_kind(self) -> str:
        """`error.type` of Anthropic's error body."""
        return _KINDS.get(self.status, ("server_error", "api_error"))[1]

    def openai_body(self) -> dict[str, object]:
        """OpenAI's error body; its clients read the request's id from the headers."""
        return {
            "error": {"message": self.message, "type": self.openai_kind, "param": self.param, "code": self.code},
        }

    def anthropic_body(self, request_id: str) -> dict[str, object]:
        """Anthropic's error body."""
        error = {"type": self.anthropic_kind, "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}


def refusal_of(error: KarakoramError) -> Refusal:
    """What a floor below could not do, as a refusal; the field is read from the sentence where it is named there."""
    message = str(error)
    if isinstance(error, ContextOverflow):
        return Refusal(413, message, "messages", "context_length_exceeded")
    if isinstance(error, QueueFull):
        return Refusal(429, message, code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, EngineStopped):
        return Refusal(503, message, code="engine_stopped")
    if isinstance(error, SchemaError):
        return Refusal(400, message, error.where or error.keyword, "unsupported_schema")
    return Refusal(400, message, _field_of(message))


def _field_of(message: str) -> str | None:
    """`messages[3]` of "Message 3 has …", `top_p` of "top_p is 7. …"."""
    if indexed := _INDEXED.match(message):
        return f"{indexed[1].lower()}s[{indexed[2]}]"
    field = _FIELD.match(message)
    return field[0] if field else None
