"""Sentences compared with reference sentences."""

import string
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from vpt.errors import require
from vpt.evaluation.metrics.base import MeanScore, Metric
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Ratio


class RougeL(MeanScore):
    """ROUGE-L, F1 of the longest common subsequence of words, against the best reference (package rouge-score)."""

    name, needs = "rouge_l", ("rouge_score",)

    @cached_property
    def _scorer(self) -> Any:
        return require("rouge_score.rouge_scorer", "metrics", "ROUGE-L").RougeScorer(["rougeL"])

    def score(self, item: Prediction) -> float:
        return self._scorer.score_multi(item.accepted, item.answer)["rougeL"].fmeasure


class CiderD(Metric):
    """CIDEr-D (Vedantam et al., arXiv 1411.5726), 0 to 10, by pycocoevalcap; word weights come from the references of
    all the questions, so fewer than some hundred questions say little.

    Words are cut as by the Penn Treebank, lower-cased and freed of punctuation: what the original does with a Java
    program is done by nltk.
    """

    needs = ("pycocoevalcap", "nltk")

    @cached_property
    def _treebank(self) -> Any:
        return require("nltk.tokenize.treebank", "metrics", "CIDEr-D").TreebankWordTokenizer()

    def measure(self, items: Sequence[Prediction]) -> dict[str, Ratio]:
        if not items:
            return {"cider_d": Ratio.mean([])}
        cider = require("pycocoevalcap.cider.cider", "metrics", "CIDEr-D").Cider()
        references = {number: [self.words(text) for text in item.accepted] for number, item in enumerate(items)}
        said = {number: [self.words(item.answer)] for number, item in enumerate(items)}
        _, scores = cider.compute_score(references, said)
        return {"cider_d": Ratio.mean(scores.tolist())}

    def words(self, text: str) -> str:
        """Words with spaces between them."""
        pieces = self._treebank.tokenize(text.lower())
        return " ".join(piece for piece in pieces if piece.strip(string.punctuation))
