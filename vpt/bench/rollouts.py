"""Time of rollouts that share their prompt over those of separate prompts: trained on, and prefilled."""

from dataclasses import replace

from torch import Tensor

from vpt.bench.measure import Measurement, Timed, ratio, training_step
from vpt.bench.models import SMALL
from vpt.data.synthetic import MEDIA, SyntheticRow, synthetic_records
from vpt.evaluation.questions import EvalQuestion
from vpt.generation.generator import Generator
from vpt.generation.row_state import GenerationLimits
from vpt.generation.sampling import Sampling
from vpt.rl.rollouts import draw_rollouts, rollout_batch

GROUP = 8
PROMPT = SyntheticRow(question=210)  # about 300 tokens with image and template
ANSWER = 30


def measure() -> list[Measurement]:
    """Forward and backward of a group of 8, prompts of 300 tokens, answers of 30; the prefill of that group."""
    bundle = SMALL.build()
    model = bundle.model
    [record] = synthetic_records(bundle.processor, [PROMPT])

    def generator(new_tokens: int) -> Generator:
        limits = GenerationLimits(new_tokens, action="none")
        return Generator(model.eval(), bundle.processor, bundle.tokenizer.decode, limits, Sampling(1.0))

    drawing = generator(ANSWER)
    groups = draw_rollouts(drawing, [EvalQuestion(record, MEDIA, "bench", 0)], numbers=[range(GROUP)])

    def step(share_prompts: bool) -> Timed:
        batch = rollout_batch(groups, drawing.constraints.forbidden, temperature=1.0, share_prompts=share_prompts)

        def loss() -> Tensor:
            return model(batch).nll.sum()

        return training_step(model, loss)

    prompt = bundle.processor.encode_prompt(record, MEDIA)
    shared, separate = [prompt] * GROUP, [replace(prompt) for _ in range(GROUP)]
    first = generator(1)
    prefills = [lambda prompts=prompts: first.generate(prompts, [MEDIA] * GROUP) for prompts in (shared, separate)]
    return [
        Measurement("rl_shared_vs_separate", ratio(step(True), step(False)), 1 / 3),
        Measurement("rl_prefill_shared", ratio(*prefills), 1 / 3),
    ]
