"""Requests of the OpenAI chat format, checked, and errors in its shape."""

import json
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vpt.errors import UserError, did_you_mean

SMALLEST_TOP_P = 0.001  # of GenerationConfig; 0 means the likeliest token alone, and so does this
INVALID = "invalid_request_error"
_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode  # `json.dumps` makes one each time
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class ApiError(UserError):
    """What a client is told: a status, and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, kind: str = INVALID, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.error = status, {"message": message, "type": kind, "param": param, "code": code}

    def response(self) -> JSONResponse:
        """The reply."""
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse({"error": self.error}, self.status, headers=headers)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Model):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(_Model):
    """`data:image/...;base64,...`; `detail` changes nothing here."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Model):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageURL


class ChatMessage(_Model):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(_Model):
    """`include_usage`: a last piece with the counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextFormat(_Model):
    """The only format of answers."""

    type: Literal["text"]


class ChatRequest(_Model):
    """A request; `action` and what follows it are not OpenAI's: clients put them into `extra_body`."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # taken, without effect
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    response_format: TextFormat | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    # ours
    top_k: int | None = Field(None, ge=0)
    action: str | None = None
    max_actions: int | None = Field(None, ge=0)
    crop_margin: int | None = Field(None, ge=0)
    action_prompt: bool | None = None  # whether the sentence that asked for perception in training follows the question
    ablation: Literal["features_zeroed", "region_random"] | None = None
    pictures: bool = False  # of each step of the trace, as `Reply.draw` draws them

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def settings(self) -> dict[str, Any]:
        """What it asks of `generation`; None where it leaves things as trained."""
        return {
            "max_new_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": None if self.top_p is None else max(self.top_p, SMALLEST_TOP_P),
            "top_k": self.top_k,
            "action": self.action,
            "max_actions": self.max_actions,
            "crop_margin": self.crop_margin,
        }


def parse_request(body: bytes) -> ChatRequest:
    """Read a request. Raises ApiError that names the parameter which is wrong, and the nearest right one."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in first["loc"] if part not in ("text", "image_url", "str") or part == first["loc"][-1]]
    param, message = ".".join(path), first["msg"]
    if first["type"] == "extra_forbidden":
        message = "is no parameter that this server knows" + did_you_mean(path[-1], [*ChatRequest.model_fields])
    raise ApiError(400, f"{param}: {message}" if param else message, param=param or None)


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data).encode() + b"\n\n"
