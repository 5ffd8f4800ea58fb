"""Memory of one GPU while it trains, by formula, in bytes.

    weights       every parameter and buffer as it is stored
    gradients     as the trained ones
    optimizer     AdamW's two moments, as the trained ones; in 8 bits a byte each, and a scale to 256 of them
    copies        bf16 autocast over float32 weights: of trained matrices, all through the forward pass; of frozen ones
                  that a gradient passes through, one for each stage until the backward pass (none with checkpointing)
    exchange      `vpt.estimate.gpus.communication_bytes`
    activations   what the decoder keeps for the backward pass (`kept_by_layer`); with checkpointing, each layer's
                  input, its keys and values, and all of one layer in the largest stage; projectors keep their features
                  twice (before and after the norm) and three times what they make of them
    workspace     inside one layer's MLP: the gate, the other half and their product, or the gradients of these, in the
                  largest stage that keeps anything, or in a larger one that runs while nothing is kept yet; keys and
                  values of stages that keep nothing else, while later stages run; one weight that 4 bits stand for
    logits        of one chunk of labelled positions: as computed, in float32, their log-softmax, its gradient; and
                  lm_head's gradient, which comes first, when all activations are still there: as computed, as stored
    waiting       what a weight's gradient adds that waits for its other uses, beyond activations and all that are gone
                  by then: of the decoder's as computed, whole, once the last stage's backward pass is done and another
                  is to come; of a tied embedding the head's, the stage's own, and their sum

Frozen towers keep nothing. Of trained ones (random weights) every matrix is taken to keep its input and output. The sum
is reached from the second micro-batch of a step on, when the first one's gradients are there. The allocator's
fragments, the driver's own memory and NCCL's come on top.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from vpt.config.schema import TrainConfig
from vpt.config.weight_folder import ASSETS, UPSTREAM, read_settings, weight_paths
from vpt.estimate.activations import BFLOAT16, DTypeBytes, cached_by_layer, kept_activations, matrices
from vpt.estimate.gpus import FLOAT32, ShardingPlan, communication_bytes
from vpt.estimate.workload import Workload
from vpt.models.output import LOGIT_CHUNK
from vpt.models.quantization import BYTES, base_weights
from vpt.models.vpt import VPTModel


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    copies: float = 0.0
    exchange: float = 0.0
    activations: float = 0.0
    workspace: float = 0.0
    logits: float = 0.0
    waiting: float = 0.0

    @property
    def total(self) -> float:
        """Bytes of all parts together."""
        return sum(asdict(self).values())


def predict_memory(
    model: VPTModel, load: Workload, spread: ShardingPlan, types: DTypeBytes, *, optimizer: str = "adamw",
    in_4bit: bool = False,
) -> Memory:  # fmt: skip
    """The memory of one GPU of `spread` under a micro-batch; weights, gradients and moments may wait elsewhere.

    Args:
        model: on any device, its parameters frozen and trained as in the run.
        load: of the micro-batch.
        spread: the processes.
        types: of numbers.
        optimizer: `optim.name`.
        in_4bit: `model.load_in_4bit`.
    """
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    packed = [linear.weight for _, linear in base_weights(model)] if in_4bit else []
    here = 0.0 if spread.offload else 1 / spread.shards
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    saved = sum(weight.nbytes - BYTES * weight.numel() for weight in packed)
    layers = model.language.layers
    inner = layers[0].mlp.gate_proj.out_features
    activations = kept_activations(model, load, types)
    gated = 3 * inner * types.products
    workspace = max(gated * load.max_grad_stage, gated * load.max_stage - activations)
    logits = min(load.labels, LOGIT_CHUNK) * model.qwen.lm_head.out_features
    logits = logits * (3 * FLOAT32 + (types.products if types.products < FLOAT32 else 0))
    logits += _head_gradient(model, spread, types)
    gone = activations * load.last_stage / max(load.positions, 1.0) + workspace + logits
    return Memory(
        weights=(held - saved) * here,
        gradients=trained * here,
        optimizer=moment_bytes(model, optimizer) * here,
        copies=_copies(model, load, spread, packed) if types.products < types.stored else 0.0,
        exchange=communication_bytes(model, spread, product=types.products, kept=activations),
        activations=activations,
        workspace=workspace
        + len(layers) * load.no_grad_positions * cached_by_layer(layers[0], types)
        + max((weight.nbytes + weight.numel() * types.products for weight in packed), default=0.0),
        logits=logits,
        waiting=max(0.0, _waiting_gradients(model, load, spread, types) - gone),
    )


def _head_gradient(model: VPTModel, spread: ShardingPlan, types: DTypeBytes) -> float:
    """Bytes of lm_head's gradient on its way to where gradients are gathered; sharded, that one is in `exchange`."""
    weight = model.qwen.lm_head.weight
    if not weight.requires_grad:
        return 0.0
    stored = 0 if spread.sharded else weight.nbytes
    return stored + (weight.numel() * types.products if types.products < weight.element_size() else 0)


def _waiting_gradients(model: VPTModel, load: Workload, spread: ShardingPlan, types: DTypeBytes) -> float:
    """Bytes of gradients that wait while the last stage's embeddings get theirs; sharded, one is in `exchange`."""
    embedding = model.language.embed_tokens.weight
    tied = model.qwen.lm_head.weight is embedding
    waiting = embedding.requires_grad * embedding.nbytes * (3 - spread.sharded if tied else load.stages > 1)
    if load.stages > 1:
        trained = [weight for weight in model.language.layers.parameters() if weight.requires_grad]
        waiting += sum(weight.numel() * min(types.products, weight.element_size()) for weight in trained)
    return waiting


def moment_bytes(model: VPTModel, optimizer: str) -> float:
    """Bytes of AdamW's moments; `optimizer`: `optim.name`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "adamw":
        return sum(2 * parameter.nbytes for parameter in trained)
    return sum(
        2 * (p.numel() + FLOAT32 * -(-p.numel() // 256) if p.numel() >= 4096 else 4 * p.numel()) for p in trained
    )


def state_bytes(model: VPTModel, config: TrainConfig) -> tuple[int, int]:
    """Bytes of a checkpoint: the weights that it holds, each once, and the optimizer's moments and step counts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    named = _named_prefixes(config)
    held = {
        id(tensor): tensor.nbytes
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not name.startswith(named)
    }
    count = FLOAT32 if config.optim.name == "adamw" else 8  # of steps
    return sum(held.values()), int(moment_bytes(model, config.optim.name)) + count * len(trained)


def _named_prefixes(config: TrainConfig) -> tuple[str, ...]:
    """What the names of tensors begin with whose frozen ones checkpoints name (`vpt.checkpoint.frozen_weights`)."""
    if config.training.save_frozen_weights:
        return ()
    paths = {key: path for key, path in weight_paths(config).items() if not Path(path).is_relative_to(ASSETS)}
    if "model.path" in paths and read_settings(Path(paths["model.path"])).get("model_type") == UPSTREAM:
        return ("",)
    encoders = (f"encoders.{name}.vision." for name in config.encoder if f"encoder.{name}.path" in paths)
    return (*(["qwen."] if "model.path" in paths else []), *encoders)


def _copies(model: VPTModel, load: Workload, spread: ShardingPlan, packed: Sequence[Tensor]) -> float:
    copied = model.qwen.lm_head.weight.numel()
    if not spread.sharded:  # else units are gathered as bfloat16
        weights = [matrix.weight for matrix in matrices(model.language.layers)]
        stages = 0 if model.forward_config.checkpointing else load.stages
        apart = {id(weight) for weight in packed}
        wide = [weight for weight in weights if weight.element_size() > BFLOAT16 and id(weight) not in apart]
        copied += sum(weight.numel() * (1 if weight.requires_grad else stages) for weight in wide)
    return BFLOAT16 * copied
