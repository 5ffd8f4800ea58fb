"""Decoding from scratch, for comparison: no key-value cache, no batch, one row.

Before every token the whole conversation so far is written as training writes it, and read in one `full` forward:
each control state is read, each image encoded, everything computed anew. What a finished turn is shown is appended
as a user turn, as the two rounds of the authors' evaluation did.
"""

from dataclasses import replace

import torch

from vpt.data.collate import collate
from vpt.data.records import Message
from vpt.generation.sampling import Sampling
from vpt.models.inner_forward import StagedKVCache
from vpt.perception.batch import VISION_TOWER, Action, RowBuilder
from vpt.perception.requests import PerceptionParser


class FromScratch:
    """One row that answers; `script` holds the tokens it begins with, control tokens left out."""

    def __init__(self, parts, record, folder, *, limit=24, actions=3, script=(), sampling=None, number=0, margin=0):
        self.parts, self.record, self.folder, self.limit, self.actions = parts, record, folder, limit, actions
        self.script, self.margin = list(script), margin
        self.sampling = sampling or Sampling()
        self.rng = self.sampling.rng_for(number)
        self.parser = PerceptionParser(parts.model.vocabulary)
        users = [i for i, message in enumerate(record.messages) if message.role == "user"]
        first, *_ = record.images[VISION_TOWER]
        self.image = first.frame
        self.images = {
            VISION_TOWER: list(parts.processor.process_images({VISION_TOWER: (first,)}, folder, where="")[VISION_TOWER])
        }
        self.conversation = RowBuilder()
        parts.processor.chat_template.encode(self.conversation, record.messages[: users[0] + 1], self.tokens())
        parts.processor.chat_template.add_generation_prompt(self.conversation)

    def tokens(self):
        return {source: [image.runs for _, image in images] for source, images in self.images.items()}

    def logits(self):
        """[1, vocabulary] after everything so far."""
        model = self.parts.model
        sample = self.parts.processor.build_sample(self.conversation, self.images, self.record)
        batch = collate([sample])
        passes, model.forward_config = model.forward_config, replace(model.forward_config, inner_forward="full")
        try:
            tokens, plan = model.project_features(model.encode_images(batch.images), batch), model.plan_forward(batch)
            hidden, _ = model.run_stages(batch, plan, tokens, StagedKVCache())
        finally:
            model.forward_config = passes
        return model.logits(hidden[plan.output_index[-1:]])

    @torch.no_grad()
    def decode(self):
        """All ids that it says, forced control tokens included."""
        vocabulary, scale = self.parts.model.vocabulary, self.parts.model.forward_config.projector_scale
        ids, turn = [], []
        while len(ids) < self.limit:
            chosen = self.choose(ids)  # drawn for each token, whether it is used or not
            token = self.script.pop(0) if self.script else chosen
            ids.append(token)
            turn.append(token)
            if token == vocabulary.im_end:
                if not self.show(turn):
                    break
                turn = []
                continue
            self.conversation.add([token])
            kind = self.parser.starts.get(token)
            if kind in vocabulary.actions:
                control = vocabulary.actions[kind].control
                self.conversation.actions.append(Action(len(self.conversation.ids), scale, kind, None))
                self.conversation.add([control] * scale)
                ids += [control] * scale
                turn += [control] * scale
            if token == vocabulary.end_of_text:
                break
        return ids

    def choose(self, ids):
        logits, vocabulary = self.logits(), self.parts.model.vocabulary
        logits[:, [action.control for action in vocabulary.actions.values()]] = -torch.inf
        if sum(token in self.parser.starts for token in ids) >= self.actions:
            logits[:, [*self.parser.starts]] = -torch.inf
        return self.sampling.sample(logits, [self.rng])[0]

    def show(self, turn):
        """Append the user turn that shows what `turn` asked for; False where it asked for nothing."""
        processor, shown = self.parts.processor, ""
        processor.chat_template.end_turn(self.conversation, loss=True)
        for request in self.parser.parse(turn):
            if request.kind == "region" and request.region is None:
                continue
            source = VISION_TOWER if request.region else request.kind
            image = self.image
            if request.region:
                size = self.folder.full_resolution(image, where="").size
                image = replace(image, crop=request.region.to_box(size, bins=8, margin=self.margin))
            processed = processor.process_images({source: (image,)}, self.folder, where="")[source][0]
            self.images.setdefault(source, []).append(processed)
            shown += "<image>" if request.region else f"<{processor.chat_template.encoder_tokens[source]}_image>"
        if not shown:
            return False
        processor.chat_template.encode(self.conversation, (Message("user", shown),), self.tokens())
        processor.chat_template.add_generation_prompt(self.conversation)
        return True
