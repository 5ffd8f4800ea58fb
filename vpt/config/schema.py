"""The whole configuration as one tree of dataclasses; `vpt.config.resolve` stops a run for any key that is not here."""

from dataclasses import dataclass, field
from typing import Any

from vpt.config.fields import MISSING, bounded, choice, optional_choice
from vpt.config.rl import RLConfig


@dataclass
class LoraConfig:
    rank: int = bounded(0)  # 0: no adapters; else the language model itself is frozen
    alpha: float = bounded(16.0)  # adapters count alpha / rank
    dropout: float = bounded(0.0, high=1.0)  # of the adapters' input
    targets: list[str] = field(default_factory=lambda: ["*"])  # patterns of the language model's linear layers


@dataclass
class ModelConfig:
    family: str = "qwen2_vl"  # of the base model: transformers' model type; see vpt/models/families
    path: str | None = None  # hub name or folder; null means random weights of the sizes in `config`
    thinking: bool = False  # a base model's edition that thinks first: an assistant's turns open with <think>
    size: str = choice("full", "small", "tiny")  # which size of each re-encoder goes with it
    config: dict[str, Any] = field(default_factory=dict)  # arguments of transformers' configuration
    dtype: str = choice("float32", "bfloat16")  # of all weights; bfloat16 is for what is not trained
    frozen_dtype: str | None = optional_choice("bfloat16")  # of frozen matrices in training; null: as all others
    load_in_4bit: bool = False  # what LoRA's adapters stand beside, in training; by bitsandbytes, whole models only
    inner_forward: str = choice("shared", "full")  # full is the slow reference
    num_inner_forward_run: int = bounded(2, low=1, high=2)  # 1: the alignment stage
    projector_scale: int = bounded(1, low=1)  # control tokens of an action
    vision_encoder_ls: list[str] = field(default_factory=list)  # names of the re-encoders; follows from `encoder`
    region_bins: int = bounded(8, high=1000)  # cells along a side; 0 leaves regions out
    region_format: str = choice("tokens", "text")  # text: the cells' numbers as [x0, y0, x1, y1], no new tokens
    positions: str = choice("mrope", "sequential")  # sequential: 1-D, as upstream trains
    reencoded_positions: str = choice("sequential", "grid")  # of re-encoded tokens: as text, or as the grid they form
    condition_init: float = bounded(1.0)  # factor on the first weights of what conditions a projector; upstream: 1
    activation_checkpointing: bool = False  # recompute decoder layers in the backward pass: less memory, more time
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
    size: str = choice("full", "small", "tiny")  # which of `sizes`
    path: str | None = None  # weights that take the place of the size's own
    frames: str = "middle"  # of a video: middle, all (that data.video samples), or a number of them, evenly spread
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the class
    sizes: dict[str, EncoderSize] = field(default_factory=dict)

    @property
    def weights(self) -> str | None:
        """Hub name or folder of its pretrained weights."""
        return self.path or self.sizes[self.size].weights


@dataclass
class MaskingConfig:
    para_mask_id: int = bounded(0, high=2)  # 0 off, 1 hides the first user turn, 2 hides paragraphs 1 and 3
    para_mask_ratio: float = bounded(0.0, high=1.0)  # share of the rows with an action
    mode: str = choice("zero", "bottleneck")  # zero: embeddings become 0; bottleneck: keys are hidden
    draw: str = choice("sample", "batch")  # sample: each row by itself, in training; batch: as upstream does


@dataclass
class ImageConfig:
    max_side: int = bounded(512, low=1)  # of an image, in pixels
    crop_max_side: int | None = bounded(None, low=1)  # of a crop; null: as max_side
    resample: str = choice("nearest", "bilinear", "bicubic", "lanczos")  # how images are made smaller
    sizing: str = choice("rounded", "upstream")  # upstream: sides cut, not rounded; raised to 28; over 200 to 1: 180
    min_pixels: int | None = bounded(None, low=1)  # of what Qwen's tower sees; null: as published
    max_pixels: int | None = bounded(None, low=1)  # of what Qwen's tower sees; null: as published
    detail: int | None = bounded(None, low=1)  # all that is seen along the long side, in as many tokens as ever
    mean: list[float] | None = None  # of colours, for Qwen's tower; null: as published
    std: list[float] | None = None  # of colours, for Qwen's tower; null: as published
    max_file_pixels: int = bounded(100_000_000, low=1)  # pixels of a file, before anything of it is decoded
    apply_exif_rotation: bool = False  # turn images by EXIF, videos by display matrix; boxes count in turned pixels


@dataclass
class VideoConfig:
    fps: float = bounded(2.0, low=0.001)  # frames sampled of a second of video, evenly spread
    max_frames: int = bounded(16, low=1)  # of a video
    min_pixels: int = bounded(56 * 56, low=1)  # of a frame
    max_pixels: int = bounded(28 * 28 * 128, low=1)  # of a frame
    total_pixels: int | None = bounded(None, low=1)  # of all frames, where the base limits them; null: as published


@dataclass
class SourceConfig:
    target: str = "vpt.data.sources.record_files.RecordFile"  # the class; by default a file of VPT records
    weight: float = bounded(1.0)  # share of the samples, beside those of other sources
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class
    metrics: list[str] | None = None  # what its answers are measured by; null: data.metrics


@dataclass
class DataConfig:
    root: str | None = None  # the folder that record files and image paths start from
    train: dict[str, SourceConfig] = field(default_factory=dict)
    test: dict[str, SourceConfig] = field(default_factory=dict)
    mixing: str = choice("weights", "exhaust")  # exhaust: every record of every source once an epoch
    actions: dict[str, float] = field(default_factory=lambda: {"none": 1.0})  # kind -> share, where sources choose
    action_prompt: bool = True  # whether questions say which perception to use (Free Choice: false)
    perception: bool = True  # false: without any perception turn
    token_matched_images: bool = False  # with perception=false: the image in as many tokens instead
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])  # the first one gives the score
    limit: int | None = bounded(None, low=1)  # the first n test questions only
    on_error: str = choice("raise", "skip")  # skip: records that cannot be used are left out, counted, and named
    max_skipped_fraction: float = bounded(0.01, high=1.0)  # share of the rows at which a run that skips stops
    max_length: int = bounded(2048, low=1)  # tokens of a row
    overflow: str = choice("raise", "truncate")  # what becomes of longer rows
    image: ImageConfig = field(default_factory=ImageConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    workers: int = bounded(1)  # processes that prepare batches
    image_cache_mb: int = bounded(1024)  # prepared images that each worker keeps
    feature_cache: str | None = None  # folder for what frozen encoders see of each image; null: seen anew every time
    feature_cache_gb: float = bounded(50.0)  # what that folder may hold


@dataclass
class OptimConfig:
    name: str = choice("adamw", "adamw_8bit")  # adamw_8bit: moments in 8 bits, by bitsandbytes; not of shards
    lr: float = bounded(2e-5)  # learning rate at its highest
    weight_decay: float = bounded(0.0)  # of matrices; vectors and embeddings have none
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # two, each from 0 to below 1
    eps: float = bounded(1e-8)  # of AdamW
    warmup_ratio: float = bounded(0.03, high=1.0)  # share of the steps
    min_lr_ratio: float = bounded(0.0, high=1.0)  # share of lr that the cosine ends at
    max_grad_norm: float = bounded(1.0)  # gradient norm; 0 does not clip
    lr_scale: dict[str, float] = field(default_factory=dict)  # pattern of parameter names -> factor on lr
    freeze: list[str] = field(default_factory=list)  # patterns; on top of pretrained towers, which are frozen
    unfreeze: list[str] = field(default_factory=list)  # patterns; applied after `freeze`


@dataclass
class TrainingConfig:
    steps: int = bounded(6000, low=1)  # of the optimizer
    batch_size: int = bounded(256, low=1)  # rows of a step, over all processes
    micro_batch_size: int = bounded(8, low=1)  # rows that go through the model at once
    precision: str = choice("fp32", "bf16")  # bf16: autocast
    compile: bool = False  # decoder layers through torch.compile: for GPUs; a CPU gains nothing by it
    log_every: int = bounded(10, low=1)  # steps
    eval_every: int = bounded(500)  # steps; the last one is evaluated, too; 0: none is
    eval_rows: int = bounded(1000)  # test records of each source that are scored with the right tokens given
    final_eval_questions: int | None = bounded(None)  # answered by generating once trained; null: the whole test split
    checkpoint_every: int = bounded(500, low=1)  # steps
    max_nonfinite_steps: int = bounded(10)  # in a row, without a finite loss and gradient; one more ends the run
    keep_checkpoints: int = bounded(2, low=1)  # the last n checkpoints stay ...
    best_metric: str | None = "eval/loss"  # ... and the best one: by a metric of the evaluation; of a loss, the lowest
    save_frozen_weights: bool = False  # copy what came from a folder and stays; false: its path and SHA-256 are saved


@dataclass
class StrategyConfig:
    kind: str = choice("auto", "single", "ddp", "fsdp", "hybrid")  # auto: see vpt/distributed/strategy.py
    shard_size: int | None = bounded(None, low=1)  # hybrid: processes that share a copy of the weights; null: a node's
    reshard_after_forward: bool = True  # fsdp, hybrid: free a layer's weights after its forward; False: gather once
    cpu_offload: bool = False  # fsdp, hybrid: weights, gradients and optimizer states wait in the CPU's memory


@dataclass
class GenerationConfig:
    batch_size: int = bounded(128, low=1)  # questions that are answered together
    max_new_tokens: int = bounded(64, low=1)  # of an answer, in all its turns
    max_actions: int = bounded(3)  # times an answer may ask for perception
    crop_margin: int = bounded(0)  # cells by which a selected region is widened on each side
    action: str = "free"  # none forbids perception; region or a re-encoder's name forces that one
    temperature: float = bounded(0.0)  # 0 takes the likeliest token; the paper: 1, with top_k 10 and top_p 0.1
    top_k: int = bounded(0)  # 0 takes all
    top_p: float = bounded(1.0, low=0.001, high=1.0)  # 1 takes all
    seed: int = bounded(0)  # each question draws by this and its own number
    stop: list[str] = field(default_factory=list)  # tokens that end an answer, besides those of the chat format


@dataclass
class TrackingConfig:
    wandb: bool = True  # mirror metrics.jsonl at W&B
    project: str | None = None  # at W&B; null: WANDB_PROJECT, or else vpt
    entity: str | None = None  # at W&B; null: WANDB_ENTITY, or else the key's own
    mode: str = choice("auto", "online", "offline")  # auto: as WANDB_MODE says; offline without key or network


@dataclass
class TrainConfig:
    run_name: str = MISSING  # names the folder OUTPUT_DIR/RUN_NAME
    output_dir: str = "outputs"  # where runs are
    seed: int = bounded(0)  # of everything that is drawn
    device: str = choice("auto", "cpu", "cuda")  # auto: cuda where there is one
    threads: int | None = bounded(None, low=1)  # of a process, on the CPU; null: one for each core that it may use
    pictures: bool = True  # curves.png, samples.png and report.html at the end
    init_from: str | None = None  # a run or checkpoint whose weights this one starts from
    init_experiment: str | None = None  # what makes the run in `init_from`; trained first where that is not there
    init_exclude: list[str] = field(default_factory=list)  # patterns of tensors that are not taken from it
    model: ModelConfig = field(default_factory=ModelConfig)
    encoder: dict[str, EncoderConfig] = field(default_factory=dict)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
