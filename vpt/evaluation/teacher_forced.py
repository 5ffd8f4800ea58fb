"""Scores with the right tokens given: loss, and the accuracy of each perception token on its own."""

from collections import Counter
from collections.abc import Iterable

import torch

from vpt.distributed.process_group import World
from vpt.models.vpt import VPTModel
from vpt.perception.batch import Batch


@torch.no_grad()
def teacher_forced_metrics(model: VPTModel, batches: Iterable[Batch], world: World | None = None) -> dict[str, float]:
    """Loss, accuracy over labelled tokens, and `perception/NAME`: how often each perception token is the likeliest
    where it is the label. A token that never is a label is left out; without any label there is no score. In a `world`
    of several processes, each has its own batches and all get the scores over all of them.
    """
    model.eval()
    names = model.vocabulary.perception_ids()
    loss = torch.zeros((), dtype=torch.float64)
    labels = hits = 0
    wanted: Counter[int] = Counter()
    met: Counter[int] = Counter()
    for batch in batches:
        with model.autocast():
            out = model(batch)
        loss += out.nll.double().sum().cpu()
        labels += len(out.targets)
        hits += int(out.correct.sum())
        wanted.update(out.targets.tolist())
        met.update(out.targets[out.correct].tolist())
    if world is not None and world.size > 1:
        counts = [labels, hits, *(wanted[token] for token in names), *(met[token] for token in names)]
        labels, hits, *by_token = world.all_gather(counts).sum(dim=0).tolist()
        wanted, met = (Counter(dict(zip(names, part))) for part in (by_token[: len(names)], by_token[len(names) :]))
        loss = world.all_reduce(loss)
    if not labels:
        return {}
    result = {"loss": float(loss) / labels, "token_accuracy": hits / labels}
    return result | {f"perception/{names[token]}": met[token] / wanted[token] for token in names if wanted[token]}
