"""Texts that differ in their spelling alone made equal, for every metric that compares texts."""

import unicodedata

import regex

_STRAIGHT = str.maketrans(
    {**dict.fromkeys("‘’‚‛ʼ′´`", "'"), **dict.fromkeys("“”„‟«»″", '"'), **dict.fromkeys("‐‑‒–−", "-")}
)
_OTHER_MEANING = ("<super>", "<sub>", "<fraction>", "<circle>")  # 5² is not 52, nor is 3½ 31/2
_INVISIBLE = regex.compile(r"\p{Cf}")


def canonical(text: str) -> str:
    """Lower case, single spaces; letters composed (NFC) and of usual width, quotes and hyphens straight."""
    if not text.isascii():
        text = "".join(map(_usual, _INVISIBLE.sub("", text).translate(_STRAIGHT)))
    return " ".join(unicodedata.normalize("NFC", text.casefold()).split())


def _usual(letter: str) -> str:
    """The letters that a ligature, a wide or an otherwise compatible one stands for."""
    kind, *codes = unicodedata.decomposition(letter).split() or [""]
    if not kind.startswith("<") or kind in _OTHER_MEANING:
        return letter
    return "".join(_usual(chr(int(code, 16))) for code in codes)
