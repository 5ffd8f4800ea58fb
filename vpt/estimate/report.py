"""The tables that `vpt estimate` prints."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from vpt.estimate.activations import DTypeBytes
from vpt.estimate.gpus import GIGA, memory_of_a_gpu, micro_batch, peak_flops, samples_per_second, sharding_plan
from vpt.estimate.memory import Memory, predict_memory, state_bytes
from vpt.estimate.settings import EstimateConfig
from vpt.estimate.typical_samples import image_size, typical_samples
from vpt.estimate.workload import workload_of
from vpt.flops import FlopCost, FlopMeter
from vpt.flops.meter import LANGUAGE_PART
from vpt.models.build import ModelBundle
from vpt.training.optimizer import parameter_table

FULL = 0.95  # share of a GPU's memory beyond which a run is said not to fit


class Report:
    """The description of one run; iterating gives its lines.

    Args:
        config: of the run, and what is assumed.
        bundle: on the meta device (`build_on_meta`).
    """

    def __init__(self, config: EstimateConfig, bundle: ModelBundle) -> None:
        self.config, self.model = config, bundle.model
        self.examples = typical_samples(config, bundle.processor)
        self.meter = FlopMeter(self.model)
        self.costs = [self.meter.step(example.batch) for example in self.examples]

    def __iter__(self) -> Iterator[str]:
        path = self.config.model.path
        sizes = (
            f"{path}/config.json"
            if path and Path(path).is_dir()
            else "the configuration; nothing was fetched or loaded"
        )
        yield f"run {self.config.run_name}: {path or 'random weights'}, sizes from {sizes}"
        for table in (self.modules, self.samples, self.flops, self.memory, self.speed, self.checkpoints):
            yield ""
            yield from table()

    def modules(self) -> Iterator[str]:
        """Parameters, trained or frozen."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        yield "modules, parameters"
        yield parameter_table(self.model)
        line = f"  {_count(total)}, of which {_count(trained)} are trained"
        if self.model.qwen.config.tie_word_embeddings:
            apart = total + self.model.qwen.lm_head.weight.numel()
            line += f"; {_count(apart)} with lm_head, which is tied, counted apart"
        yield line

    def samples(self) -> Iterator[str]:
        """Tokens of each kind of sample, and what was assumed about them."""
        assumed, (width, height) = self.config.assume, image_size(self.config)
        yield "tokens of a sample"
        yield f"  {'':20}{'share':>7}{'image':>7}{'text':>7}{'perceived':>11}{'all':>7}{'labelled':>10}{'run':>7}"
        for example in self.examples:
            row, [cut] = example.row, self.model.split_segments([example.row])
            run = sum(segment.length for segment in cut)
            yield (
                f"  {example.kind + (', masked' if row.masked else ''):20}{example.share:7.2f}"
                f"{example.image_tokens:7}{example.text_tokens:7}{example.perceived_tokens:11}{row.length:7}"
                f"{example.batch.num_labels:10}{run:7}"
            )
        yield f"  assumed: images of {width}x{height} (assume.image); questions of {assumed.question} tokens, answers"
        yield f"  of {assumed.answer} (assume.question, assume.answer); shares of data.actions (assume.actions)"
        yield f"  run: positions through the language model, model.inner_forward={self.config.model.inner_forward}"

    def mean(self) -> dict[str, FlopCost]:
        """Cost of the mean sample, by part."""
        weighed = list(zip(self.examples, self.costs, strict=True))
        parts = dict.fromkeys(part for costs in self.costs for part in costs)
        return {
            part: sum((costs.get(part, FlopCost()) * example.share for example, costs in weighed), FlopCost())
            for part in parts
        }  # fmt: skip

    def flops(self) -> Iterator[str]:
        """FLOPs of the mean sample, by part."""
        mean = self.mean()
        unit, name = _unit(sum(cost.total for cost in mean.values()))
        yield f"{name} FLOPs of the mean sample; formula: vpt/flops/__init__.py"
        yield f"  {'':28}{'matrices':>10}{'attention':>11}{'backward':>10}{'again':>8}{'total':>9}"
        for part, cost in {**mean, "all": sum(mean.values(), FlopCost())}.items():
            figures = (cost.linear, cost.attention, cost.backward, cost.recomputed, cost.total)
            yield "  {:28}{:10.2f}{:11.2f}{:10.2f}{:8.2f}{:9.2f}".format(part, *(value / unit for value in figures))
        for example, costs in zip(self.examples, self.costs, strict=True):
            kind = f"{example.kind}, masked" if example.row.masked else example.kind
            yield f"  language model, {kind}: {costs[LANGUAGE_PART].total / unit:.2f}"
        if self.config.data.feature_cache:
            yield "  frozen encoders run once for each image, and then no more: data.feature_cache is set"

    def predicted_memory(self, *, on_gpu: bool = True) -> Memory:
        """Bytes on each GPU, or in each process on a CPU."""
        config, how = self.config, sharding_plan(self.config, self.model)
        types = DTypeBytes.of(self.model, autocast=config.training.precision == "bf16", on_gpu=on_gpu)
        load = workload_of(self.meter, self.examples, micro_batch(config))
        return predict_memory(
            self.model, load, how, types, optimizer=config.optim.name, in_4bit=config.model.load_in_4bit
        )

    def memory(self) -> Iterator[str]:
        """Bytes on each GPU, by part."""
        config, rows, how = self.config, micro_batch(self.config), sharding_plan(self.config, self.model)
        memory = self.predicted_memory()
        shared = f", {how.shards} GPUs to a copy" if how.sharded else ""
        checkpointing = "on" if config.model.activation_checkpointing else "off"
        unit, name = _unit(memory.total)
        yield (
            f"memory of each GPU, {name} bytes; gpus={how.gpus}, {how.kind}{shared}; micro-batches of {rows} rows, "
            f"checkpointing {checkpointing}"
        )
        for part, size in asdict(memory).items():
            yield f"  {part:12}{size / unit:9.2f}"
        fits = memory.total < FULL * memory_of_a_gpu(config)
        yield (
            f"  {'together':12}{memory.total / unit:9.2f}  {'fits' if fits else 'does not fit'} the "
            f"{memory_of_a_gpu(config) / GIGA:g}e9 of {config.assume.gpu}; formula: vpt/estimate/memory.py"
        )

    def speed(self) -> Iterator[str]:
        """Samples and tokens a second, and days of each run that is asked about."""
        config, training = self.config, self.config.training
        flops = sum(cost.total for cost in self.mean().values())
        tokens = sum(example.share * example.row.length for example in self.examples)
        rate = samples_per_second(config, flops)
        yield f"speed on gpus={config.gpus}, by {flops:.3g} FLOPs and {tokens:.0f} tokens a sample"
        peak = f"{peak_flops(config) / 1e12:g}e12 FLOP/s, {config.assume.gpu} in {training.precision}"
        yield f"  assumed: a peak of {peak} (assume.gpu, assume.peak_tflops);"
        yield f"  {config.assume.utilisation:.0%} of it reached (assume.utilisation)"
        yield f"  {rate:,.1f} samples a second, {rate * tokens:,.0f} tokens a second"
        yield f"  {'':36}{'samples':>16}{'steps':>12}{'days':>10}"
        for name, samples in self.lengths().items():
            yield f"  {name:36}{samples:16,}{-(-samples // training.batch_size):12,}{samples / rate / 86_400:10.2f}"

    def lengths(self) -> dict[str, int]:
        """Runs that are asked about: name -> samples."""
        training = self.config.training
        recipe = {f"this run, {training.steps:,} x {training.batch_size}": training.steps * training.batch_size}
        return recipe | {f"{records:,} records, once each": records for records in self.config.assume.records}

    def checkpoints(self) -> Iterator[str]:
        """Bytes of checkpoints on the disk."""
        training, (weights, optimizer) = self.config.training, state_bytes(self.model, self.config)
        each = weights + optimizer
        unit, name = _unit(each)
        yield f"checkpoints, {name} bytes: {each / unit:.2f} each"
        yield f"  {weights / unit:.2f} weights, {optimizer / unit:.2f} AdamW's moments"
        yield (
            f"  on the disk: {training.keep_checkpoints * each / unit:.2f} "
            f"(training.keep_checkpoints={training.keep_checkpoints}), "
            f"{(training.keep_checkpoints + 1) * each / unit:.2f} while one more is written"
        )
        for name, samples in self.lengths().items():
            saves = -(-samples // (training.batch_size * training.checkpoint_every))
            yield f"  {name:36}{saves:10,} saves, {saves * each / unit:14,.2f} written"


def _unit(largest: float) -> tuple[float, str]:
    """The unit that a table is best read in, and its name."""
    power = next((power for power in (12, 9) if largest >= 10**power), 6)
    return 10.0**power, f"10^{power}"


def _count(parameters: int) -> str:
    return f"{parameters / GIGA:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"
