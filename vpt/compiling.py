"""`training.compile`: decoder layers through torch.compile.

Attention and caches stay outside of the compiled graphs: what they do depends on each batch's layout. What is left of a
layer is compiled once for all layers and all lengths: norms, rotary embeddings, the MLP's activation and product, which
are many small kernels otherwise. Frozen towers and everything else run as they are.
"""

from torch._dynamo import config as dynamo

from vpt.model import VPTModel


def compile_layers(model: VPTModel) -> None:
    """Compile the decoder layers in place. The first steps take a minute longer; numbers change by rounding."""
    dynamo.allow_unspec_int_on_nn_module = True  # a layer's number would make it a graph of its own
    for layer in model.language.layers:
        layer.compile(dynamic=True)
