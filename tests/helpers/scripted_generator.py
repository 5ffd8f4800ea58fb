"""A generator that says what records say, and records for it."""

from conftest import REGION_TURNS, action_turns, conversation, video, video_conversation
from vpt.generation.generator import Generator
from vpt.perception.regions import Region

REGION = Region(1, 2, 5, 6)


class Scripted(Generator):
    """Says what its records say, and keeps the logits it would have chosen from."""

    def __init__(self, parts, samples, limits, intervention=None):
        super().__init__(parts.model.eval(), parts.processor, parts.tokenizer.decode, limits, intervention=intervention)
        self.logits = {}
        self.scripts = {sample.record.where: script_of(parts, sample) for sample in samples}

    def _sample(self, rows, logits):
        chosen = []
        for row, scores in zip(rows, logits, strict=True):
            where = row.sample.record.where
            said = self.logits.setdefault(where, [])
            chosen.append(self.scripts[where][len(said)])
            said.append(scores)
        return chosen


def script_of(parts, sample):
    """What a record's assistant says, control tokens left out."""
    control_tokens = {action.control for action in parts.model.vocabulary.actions.values()}
    return [token for token in sample.labels.tolist() if token != -100 and token not in control_tokens]


def records():
    """Conversations whose actions all re-encode the first image, as a generating model does."""
    region = conversation("1.png", REGION_TURNS)
    region["images"].append("1.png_%d,%d,%d,%d" % REGION.to_box((96, 48), bins=8))
    both = conversation("2.png", REGION_TURNS, action_turns("seg"), answer="no", seg_images=["2.png"])
    both["images"].append("2.png_%d,%d,%d,%d" % REGION.to_box((80, 112), bins=8))
    many = conversation(
        "0.png", action_turns("detection"), action_turns("clip"), action_turns("detection"), answer="a red circle",
        detection_images=["0.png", "0.png"], clip_images=["0.png"],
    )  # fmt: skip
    watched = video_conversation(  # perception sees the middle frame
        video(), action_turns("clip"), REGION_TURNS, action_turns("detection"), answer="teal",
        clip_images=["frame3.png"], detection_images=["frame3.png"],
        images=["frame3.png_%d,%d,%d,%d" % REGION.to_box((80, 48), bins=8)],
    )  # fmt: skip
    return [many, region, both, conversation("3.png", answer="brown"), watched]
