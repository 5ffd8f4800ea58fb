"""The whole configuration as one tree of dataclasses. A key that is not here stops the run.

Hydra composes plain YAML; `vpt.config.resolve` merges the result into this schema, so that a typo at any depth, in any
file or on the command line, is an error with the nearest right name.
"""

from dataclasses import dataclass, field
from typing import Any

from vpt.config.fields import MISSING, bounded, choice


@dataclass
class LoraConfig:
    rank: int = bounded(0)  # 0: no adapters; else the language model itself is frozen
    alpha: float = bounded(16.0)  # adapters count alpha / rank
    dropout: float = bounded(0.0, high=1.0)
    targets: list[str] = field(default_factory=lambda: ["*"])  # patterns of the language model's linear layers


@dataclass
class ModelConfig:
    family: str = choice("qwen2_vl", "qwen2_5_vl")
    path: str | None = None  # hub name or folder; null means random weights of the sizes in `config`
    size: str = choice("full", "tiny")  # which size of each re-encoder goes with it
    config: dict[str, Any] = field(default_factory=dict)  # arguments of transformers' configuration
    dtype: str = choice("float32", "bfloat16")
    inner_forward: str = choice("shared", "full")  # full is the slow reference
    num_inner_forward_run: int = bounded(2, low=1, high=2)  # 1: the alignment stage
    projector_scale: int = bounded(1, low=1)  # control tokens of an action
    vision_encoder_ls: list[str] = field(default_factory=list)
    region_bins: int = bounded(8, high=1000)  # cells along a side; 0 leaves regions out
    region_format: str = choice("tokens", "text")  # text: the cells' numbers as [x0, y0, x1, y1], no new tokens
    positions: str = choice("mrope", "sequential")
    reencoded_positions: str = choice("sequential", "grid")
    activation_checkpointing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    token_ids: dict[str, int] = field(default_factory=dict)  # resolved from the tokenizer and recorded, never typed


@dataclass
class EncoderSize:
    weights: str | None = None  # hub name or folder of pretrained weights
    config: dict[str, Any] = field(default_factory=dict)  # arguments of transformers' configuration
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class that differ by size


@dataclass
class EncoderConfig:
    target: str = MISSING  # the class
    token_prefix: str = MISSING  # how its tokens are spelt: <|TOKEN_action|>
    size: str = choice("full", "tiny")
    path: str | None = None  # weights that take the place of the size's own
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the class
    sizes: dict[str, EncoderSize] = field(default_factory=dict)


@dataclass
class MaskingConfig:
    para_mask_id: int = bounded(0, high=2)  # 0 off, 1 hides the first user turn, 2 hides paragraphs 1 and 3
    para_mask_ratio: float = bounded(0.0, high=1.0)  # share of the rows with an action
    mode: str = choice("zero", "bottleneck")
    draw: str = choice("sample", "batch")


@dataclass
class ImageConfig:
    max_side: int = bounded(512, low=1)
    resample: str = choice("nearest", "bilinear", "bicubic", "lanczos")
    min_pixels: int = bounded(56 * 56, low=1)
    max_pixels: int = bounded(28 * 28 * 1280, low=1)
    max_file_pixels: int = bounded(100_000_000, low=1)  # pixels of a file, before anything of it is decoded
    apply_exif_rotation: bool = False  # turn images as their EXIF data say; boxes and crops then count in turned pixels


@dataclass
class VideoConfig:
    fps: float = bounded(2.0, low=0.001)  # frames looked at in a second of video, evenly spread
    max_frames: int = bounded(16, low=1)
    min_pixels: int = bounded(56 * 56, low=1)  # of a frame
    max_pixels: int = bounded(28 * 28 * 128, low=1)


@dataclass
class SourceConfig:
    target: str = "vpt.data.sources.record_files.RecordFile"  # the class; by default a file of VPT records
    weight: float = bounded(1.0)
    options: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] | None = None  # what its answers are measured by; null: data.metrics


@dataclass
class DataConfig:
    root: str | None = None
    train: dict[str, SourceConfig] = field(default_factory=dict)
    test: dict[str, SourceConfig] = field(default_factory=dict)
    mixing: str = choice("weights", "exhaust")  # exhaust: every record of every source once an epoch
    actions: dict[str, float] = field(default_factory=lambda: {"none": 1.0})
    action_prompt: bool = True
    perception: bool = True
    token_matched_images: bool = (
        False  # with perception=false: the whole image in as many tokens in place of each perception
    )
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])  # the first one gives the score
    limit: int | None = bounded(None, low=1)  # the first n test questions only
    on_error: str = choice("raise", "skip")  # skip: records that cannot be used are left out, counted, and named
    max_skipped_fraction: float = bounded(0.01, high=1.0)  # share of the rows at which a run that skips stops
    max_length: int = bounded(2048, low=1)
    overflow: str = choice("raise", "truncate")
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    workers: int = bounded(1)
    image_cache_mb: int = bounded(1024)
    feature_cache: str | None = None  # folder for what frozen encoders see of each image; null: seen anew every time
    feature_cache_gb: float = bounded(50.0)


@dataclass
class OptimConfig:
    lr: float = bounded(2e-5)
    weight_decay: float = bounded(0.0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # two, each from 0 to below 1
    eps: float = bounded(1e-8)
    warmup_ratio: float = bounded(0.03, high=1.0)  # share of the steps
    min_lr_ratio: float = bounded(0.0, high=1.0)  # share of lr that the cosine ends at
    max_grad_norm: float = bounded(1.0)  # gradient norm; 0 does not clip
    lr_scale: dict[str, float] = field(default_factory=dict)  # pattern of parameter names -> factor on lr
    freeze: list[str] = field(default_factory=list)  # patterns; on top of pretrained towers, which are frozen
    unfreeze: list[str] = field(default_factory=list)  # patterns; applied after `freeze`


@dataclass
class TrainingConfig:
    steps: int = bounded(6000, low=1)
    batch_size: int = bounded(256, low=1)  # rows of a step, over all processes
    micro_batch_size: int = bounded(8, low=1)  # rows that go through the model at once
    precision: str = choice("fp32", "bf16")
    compile: bool = False  # decoder layers through torch.compile: for GPUs; a CPU gains nothing by it
    log_every: int = bounded(10, low=1)
    eval_every: int = bounded(500)  # steps; 0 evaluates at the end only
    eval_rows: int = bounded(1000)
    final_eval_questions: int | None = None  # answered by generating once trained; null is the whole test split
    checkpoint_every: int = bounded(500, low=1)
    max_nonfinite_steps: int = bounded(10)  # in a row, without a finite loss and gradient; one more ends the run
    keep_checkpoints: int = bounded(2, low=1)  # the last n checkpoints stay ...
    best_metric: str | None = (
        "eval/loss"  # ... and the best one: by a metric of the evaluation, the lower a loss the better
    )


@dataclass
class StrategyConfig:
    kind: str = choice("auto", "single", "ddp", "fsdp", "hybrid")  # auto: see vpt/distributed/strategy.py
    shard_size: int | None = None  # hybrid: processes that share one copy of the weights; null: those of a node
    reshard_after_forward: bool = (
        True  # fsdp, hybrid: free a layer's weights after its forward pass; False: gather once a step
    )


@dataclass
class GenerationConfig:
    batch_size: int = bounded(128, low=1)
    max_new_tokens: int = bounded(64, low=1)
    max_actions: int = bounded(3)  # times an answer may ask for perception
    crop_margin: int = bounded(0)  # cells by which a selected region is widened on each side
    action: str = "free"  # none forbids perception; region or a re-encoder's name forces that one
    temperature: float = bounded(0.0)  # 0 takes the likeliest token; the paper: 1, with top_k 10 and top_p 0.1
    top_k: int = bounded(0)  # 0 takes all
    top_p: float = bounded(1.0, low=0.001, high=1.0)
    seed: int = bounded(0)  # each question draws by this and its own number
    stop: list[str] = field(default_factory=list)  # tokens that end an answer, besides those of the chat format


@dataclass
class TrackingConfig:
    wandb: bool = True
    project: str = "vpt"
    entity: str | None = None
    mode: str = choice("auto", "online", "offline")  # auto: online where there is a key


@dataclass
class TrainConfig:
    run_name: str = MISSING
    output_dir: str = "outputs"
    seed: int = 0
    device: str = choice("auto", "cpu", "cuda")
    init_from: str | None = None  # a run or checkpoint whose weights this one starts from
    init_exclude: list[str] = field(default_factory=list)  # patterns of tensors that are not taken from it
    model: ModelConfig = field(default_factory=ModelConfig)
    encoder: dict[str, EncoderConfig] = field(default_factory=dict)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class EvalDataConfig:
    limit: int | None = bounded(None, low=1)
    root: str | None = None
    max_length: int | None = bounded(None, low=1)
    metrics: list[str] | None = None  # of every source


@dataclass
class AblationConfig:
    target: str = MISSING  # a class of vpt/evaluation/controls, or another like them
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class JudgeConfig:
    url: str | None = None  # of a server with the OpenAI chat format, up to /v1; null asks no judge
    model: str = "gpt-4o-2024-08-06"  # the paper's
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key, where the server wants one
    questions: int = bounded(1000, low=1)  # of each data set, the first ones
    workers: int = bounded(8, low=1)  # requests at a time
    retries: int = bounded(6)  # of a request that fails for a moment, each after a longer wait
    timeout: float = bounded(60.0)  # seconds
    cache: str = "outputs/judge.sqlite"  # replies, so that nothing is asked twice


@dataclass
class EvalConfig:
    """Settings of `eval.py`; null means as trained."""

    checkpoint: str = MISSING
    name: str = "test"
    baseline: str | None = None  # another run or checkpoint, answering the same questions, to compare with
    ablations: dict[str, AblationConfig] = field(default_factory=dict)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    device: str = choice("auto", "cpu", "cuda")
    pictures: bool = True  # the report, too
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(wandb=False))  # a W&B run of its own
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    generation: dict[str, Any] = field(default_factory=dict)  # keys of GenerationConfig, in place of the trained ones
