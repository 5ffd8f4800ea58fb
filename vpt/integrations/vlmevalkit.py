"""Our checkpoints in VLMEvalKit, as its model `vpt`; what follows the checkpoint are its own options.

python -m vpt.integrations.vlmevalkit outputs/dino --data MMBench_DEV_EN
"""

import runpy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from vpt.errors import ConfigError
from vpt.integrations.in_memory import IMAGE, Responder

try:
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel
except ImportError:  # the class works without it
    BaseModel, supported_VLM = object, None


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


def main(checkpoint: str, *options: str) -> None:
    """Run VLMEvalKit's own program on a checkpoint."""
    if supported_VLM is None:
        raise ConfigError("VLMEvalKit is not installed; docs/evaluation.md says how")
    supported_VLM["vpt"] = partial(VPTChat, checkpoint=checkpoint)
    sys.argv[1:] = ["--model", "vpt", *options]
    runpy.run_module("vlmeval", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
