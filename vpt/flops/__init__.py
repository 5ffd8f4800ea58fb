"""Floating-point operations of a training step, by formula.

    a matrix of in x out, n positions    forward 2 n in out; backward as much for its own gradient where it is trained,
                                         and as much for the gradient of its input where one flows on
    attention, h heads of width d        forward 4 h d pairs, backward twice that; a pair is a query and a key that it
                                         sees, so causal attention over n positions has n (n + 1) / 2
    language model                       every segment of every row (`vpt.perception.segments`): `shared` runs each
                                         position once, `full` once more for each action; a row masked by `zero` runs
                                         once more from its first masked position on. The MLP of the last layer sees
                                         only positions that predict a label or are control states
    visual tower                         n patches, of which merge^2 become one position of the merger; a patch sees its
                                         frame, or its window (Qwen2.5-VL)
    re-encoders, projectors              a constant an image, counted once by torch's own counter on the meta device:
                                         a new encoder needs no formula
    lm_head                              labelled positions only
    activation checkpointing             forward of every decoder layer again, but for its last product

A frozen module that has nothing trained before it runs forward only, and not at all where its features are cached
(`vpt.data.feature_cache`). Normalisations, activations, rotary embeddings and
the sum in f + (f . c) c are no matrix products and are not counted.
"""

from vpt.flops.cost import FlopCost
from vpt.flops.meter import FlopMeter

__all__ = ["FlopCost", "FlopMeter"]
