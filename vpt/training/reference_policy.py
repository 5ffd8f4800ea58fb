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
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        absent = {name: torch.zeros(now.shape) for name, now in trained.items() if is_adapter(name)}
        known = absent | {name: then[name] for name in trained if name in then}
        self.weights = {name: tensor.to(model.device, trained[name].dtype) for name, tensor in known.items()}

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """[M] of a batch's labelled tokens."""
        training = self.model.training
        self.model.eval()
        output = functional_call(self.model, self.weights, (batch,))
        self.model.train(training)
        return -output.nll
