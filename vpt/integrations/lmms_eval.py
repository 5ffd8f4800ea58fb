"""Our checkpoints in lmms-eval, found by its entry-point group `lmms_eval.models`.

    lmms-eval --model vpt --model_args checkpoint=outputs/dino --tasks pope --batch_size 32

Further model_args: device, action_prompt, action (`free`, `none`, `region`, a re-encoder's name),
max_actions, max_side and max_length.
"""

from itertools import islice
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from vpt.integrations.in_memory import Responder
from vpt.utils.text import until

# a task's generation setting -> our name for it
_SETTINGS = {"max_new_tokens": "max_new_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}


def manifest() -> ModelManifest:
    """The entry by which lmms-eval finds the class below."""
    return ModelManifest(model_id="vpt", simple_class_path="vpt.integrations.lmms_eval.VPTForLmmsEval")


class VPTForLmmsEval(lmms):
    """Answers `generate_until` tasks, batch by batch."""

    is_simple = True

    def __init__(
        self, checkpoint: str, batch_size: int | str = 1, device: str | None = None, action_prompt: bool | None = None,
        action: str | None = None, max_actions: int | None = None, max_batch_size: int | None = None,
        max_side: int | None = None, max_length: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.responder = Responder(checkpoint, device=device or "auto", action_prompt=action_prompt, max_side=max_side,
                                   max_length=max_length)  # fmt: skip
        self.batch = int(batch_size)
        chosen = {"action": action, "max_actions": max_actions}
        self.settings = {key: value for key, value in chosen.items() if value is not None}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests."""
        answers: list[str] = []
        left = iter(requests)
        with tqdm(total=len(requests), desc="answering", unit="question") as bar:
            while batch := list(islice(left, self.batch)):
                answers.extend(self._answer(batch))
                bar.update(len(batch))
        return answers

    def _answer(self, batch: list[Instance]) -> list[str]:
        """Rows that ask for other settings than the first are answered after it."""
        questions, settings, stops = zip(*(self._question(request) for request in batch))
        if any(setting != settings[0] for setting in settings):
            return [answer for request in batch for answer in self._answer([request])]
        answers = self.responder.respond(questions, **settings[0])
        return [until(text, stop) for text, stop in zip(answers, stops)]

    def _question(self, request: Instance) -> tuple[tuple[list[Any], str], dict[str, Any], list[str]]:
        """Images and text, settings, and strings that end the answer."""
        text, wanted, doc_to_visual, number, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][number]) or []
        settings = {_SETTINGS[key]: value for key, value in wanted.items() if key in _SETTINGS and value is not None}
        if not wanted.get("do_sample", settings.get("temperature", 0) > 0):
            settings = {"temperature": 0.0, **{k: v for k, v in settings.items() if k == "max_new_tokens"}}
        until = wanted.get("until") or []
        return (images, text), self.settings | settings, [until] if isinstance(until, str) else list(until)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered: a model's perception depends on its own tokens."""
        raise NotImplementedError("vpt answers generate_until tasks only; choose such a task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: raises NotImplementedError."""
        raise NotImplementedError("vpt answers single-round tasks only; choose such a task")
