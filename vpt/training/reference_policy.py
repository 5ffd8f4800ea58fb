"""The reference of reward learning: the model as the run found it, from which the KL term measures."""

import torch
from torch import Tensor
from torch.func import functional_call

from vpt.checkpoint.resume import WarmStart
from vpt.models.lora import is_adapter
from vpt.models.vpt import VPTModel
from vpt.perception.batch import Batch


class ReferencePolicy:
    """The model with the trainable weights that `init_from` has, so that no second model is held: what is frozen, or
    lacking there, is the model's own. Adapters that `init_from` lacks are switched off.
    """

    def __init__(self, model: VPTModel, start: WarmStart) -> None:
        """`model`: of the run, on its device, at any step."""
        self.model = model
        then = start.named_as(model)
        trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.weights = {name: then[name].to(now) for name, now in trained.items() if name in then}
        self.weights |= {name: now * 0 for name, now in trained.items() if is_adapter(name) and name not in then}

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """[M] of a batch's labelled tokens."""
        training = self.model.training
        self.model.eval()
        output = functional_call(self.model, self.weights, (batch,))
        self.model.train(training)
        return -output.nll
