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
    logits        of one chunk of labelled positions: as computed, in float32, their log-softmax, its gradient

Frozen towers keep nothing. Of trained ones (random weights) every matrix is taken to keep its input and output. The sum
is reached from the second micro-batch of a step on, when the first one's gradients are there. The allocator's
fragments, the driver's own memory and NCCL's come on top.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vpt.config.schema import TrainConfig
from vpt.config.weight_folder import ASSETS, UPSTREAM, read_settings, weight_paths
from vpt.estimate.gpus import FLOAT32, ShardingPlan, communication_bytes
from vpt.estimate.workload import Workload
from vpt.models.output import LOGIT_CHUNK
from vpt.models.quantization import BYTES, base_weights
from vpt.models.vpt import VPTModel, is_trained

BFLOAT16 = 2


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

    @property
    def total(self) -> float:
        """Bytes of all parts together."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class DTypeBytes:
    """Bytes of numbers: `stored` in weights, and so between layers; in `products`.

    `packed`: whether attention runs packed, as on a GPU in half precision, or padded (`vpt.models.attention`).
    """

    stored: int
    products: int
    packed: bool

    @classmethod
    def of(cls, model: VPTModel, *, autocast: bool, packed: bool) -> "DTypeBytes":
        """Bytes a number of a model takes; `autocast`: bf16 products whatever is stored (`training.precision=bf16`)."""
        stored: int = model.language.embed_tokens.weight.element_size()
        return cls(stored, BFLOAT16 if autocast else stored, packed)


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
    activations = _activations(model, load, types)
    gated = 3 * inner * types.products
    logits = min(load.labels, LOGIT_CHUNK) * model.qwen.lm_head.out_features
    return Memory(
        weights=(held - saved) * here,
        gradients=trained * here,
        optimizer=moment_bytes(model, optimizer) * here,
        copies=_copies(model, load, spread, packed) if types.products < types.stored else 0.0,
        exchange=communication_bytes(model, spread, product=types.products),
        activations=activations,
        workspace=max(gated * load.max_grad_stage, gated * load.max_stage - activations)
        + len(layers) * load.no_grad_positions * _cached_by_layer(layers[0], types)
        + max((weight.nbytes + weight.numel() * types.products for weight in packed), default=0.0),
        logits=logits * (3 * FLOAT32 + (types.products if types.products < FLOAT32 else 0)),
    )


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


def kept_by_layer(layer: Any, load: Workload, types: DTypeBytes, *, read: float) -> float:
    """Bytes that one of transformers' decoder layers keeps for its backward pass, its MLP of `read` positions.

    Of a stream D wide, queries H, keys and values K wide, an MLP I wide; p bytes in products, s in the stream:

        two norms      their input in float32, and normalised, where their weight is trained: 2 D (4 + s); those of
                       queries and keys, where there are any, likewise: (H + K) (4 + p)
        matrices       their input, where they or their adapters are trained, cast once for each where the stream is
                       wider than products: 2 D s, or 5 D p; adapters of rank r also keep r p
        attention      queries and output 2 H p; of each key that a segment sees, 2 K p; padded calls expand them to
                       the query heads, 2 H p, and keep a mask of p for each pair
        MLP            gate, its activation, the other half, and where the last matrix is trained their product: 4 I p
    """
    attention, mlp, p, s = layer.self_attn, layer.mlp, types.products, types.stored
    width, inner, query = attention.q_proj.in_features, mlp.gate_proj.out_features, attention.q_proj.out_features

    def fed(norm: nn.Module, *matrices: nn.Module) -> int:
        trained = [is_trained(matrix) for matrix in matrices]
        inputs = any(trained) * s if s == p else sum(trained) * p
        return width * (FLOAT32 + s * is_trained(norm) + inputs)

    mixed = fed(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
    mixed += p * (2 * query + _ranks(attention))
    for norm, matrix in ((getattr(attention, f"{x}_norm", None), getattr(attention, f"{x}_proj")) for x in "qk"):
        mixed += 0 if norm is None else matrix.out_features * (FLOAT32 + p * is_trained(norm))
    gated = fed(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    gated += p * ((3 + is_trained(mlp.down_proj)) * inner + _ranks(mlp))
    seen = 2 * attention.k_proj.out_features if types.packed else 2 * query
    pairs = 0 if types.packed else load.masked * p
    return load.positions * mixed + read * gated + load.keys * seen * p + pairs


def _ranks(module: nn.Module) -> int:
    return sum(matrix.out_features for name, matrix in module.named_modules() if name.endswith("lora_A.default"))


def _cached_by_layer(layer: Any, types: DTypeBytes) -> int:
    """Bytes of a position's key, as the rotary embedding leaves it, and value."""
    attention = layer.self_attn
    return attention.k_proj.out_features * types.stored + attention.v_proj.out_features * types.products


def _activations(model: VPTModel, load: Workload, types: DTypeBytes) -> float:
    layers, width = model.language.layers, model.language.config.hidden_size
    one = kept_by_layer(layers[0], load, types, read=load.positions)
    kept = load.asked * width * (FLOAT32 + types.stored)  # the last norm
    kept += load.positions * 2 * layers[0].self_attn.head_dim * FLOAT32  # cosines and sines
    if model.forward_config.checkpointing:
        kept += len(layers) * load.positions * (width * types.stored + _cached_by_layer(layers[0], types))
        kept += one * load.max_grad_stage / max(load.positions, 1.0)
    else:
        kept += (len(layers) - 1) * one + kept_by_layer(layers[-1], load, types, read=load.asked)
    kept += types.stored * sum(
        tokens * (2 * model.encoder(name).projector.linear_feature.in_features + 3 * width)
        for name, tokens in load.perceived.items()
    )
    if is_trained(model.tower):
        widths = sum(m.in_features + m.out_features for m in _matrices(model.tower.blocks))
        kept += load.patches * types.products * widths
    return kept


def _copies(model: VPTModel, load: Workload, spread: ShardingPlan, packed: Sequence[Tensor]) -> float:
    copied = model.qwen.lm_head.weight.numel()
    if not spread.sharded:  # else units are gathered as bfloat16
        weights = [matrix.weight for matrix in _matrices(model.language.layers)]
        stages = 0 if model.forward_config.checkpointing else load.stages
        apart = {id(weight) for weight in packed}
        wide = [weight for weight in weights if weight.element_size() > BFLOAT16 and id(weight) not in apart]
        copied += sum(weight.numel() * (1 if weight.requires_grad else stages) for weight in wide)
    return BFLOAT16 * copied


def _matrices(module: nn.Module) -> Iterable[nn.Linear]:
    return (layer for layer in module.modules() if isinstance(layer, nn.Linear))
