"""Our checkpoints in VLMEvalKit: add `VPTChat` to its `vlmeval/config.py`.

supported_VLM["vpt"] = partial(VPTChat, checkpoint="outputs/dino")
"""

from collections.abc import Sequence
from typing import Any

from vpt.integrations.in_memory import IMAGE, Responder

try:
    from vlmeval.vlm.base import BaseModel
except ImportError:  # it is not a package that can be required
    BaseModel = object


class VPTChat(BaseModel):
    """The interface of VLMEvalKit's models."""

    INTERLEAVE = True
    is_api = False

    def __init__(
        self, checkpoint: str, device: str = "auto", action_prompt: bool | None = None, **settings: Any
    ) -> None:
        """`settings` are keys of `generation`, such as `action` or `max_new_tokens`."""
        super().__init__()
        self.responder, self.settings = Responder(checkpoint, device=device, action_prompt=action_prompt), settings

    def generate_inner(self, message: Sequence[dict[str, str]], dataset: str | None = None) -> str:
        """Answer one message: parts of type `image` (a path) and `text`, in order; `dataset` changes nothing."""
        images, text = [], ""
        for part in message:
            if part["type"] == "image":
                images.append(part["value"])
                text += IMAGE
            else:
                text += f"\n{part['value']}" if text.endswith(IMAGE) else part["value"]
        return self.responder.respond([(images, text)], **self.settings)[0]
