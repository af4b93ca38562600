"""What an answer is worth, and how far a next-token distribution is from another."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from ragkv.closeness import divergence as divergence
from ragkv.closeness import same_top as same_top

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces: the normalisation of SQuAD (arXiv:1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """1 if the answer is one of the gold answers, both normalised."""
    return float(any(normalised(answer) == normalised(right) for right in gold))


def contains(answer: str, gold: Sequence[str]) -> float:
    """1 if a gold answer stands in the answer, word by word, both normalised."""
    padded = f" {normalised(answer)} "
    return float(any(f" {normalised(right)} " in padded for right in gold if normalised(right)))


def f1(answer: str, gold: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, the best over the gold answers (SQuAD)."""
    return _f_measure(lambda a, b: (Counter(a) & Counter(b)).total(), answer, gold)


def rouge_l(answer: str, gold: Sequence[str]) -> float:
    """F-measure over the longest common subsequence of words, the best over the gold answers (Lin, 2004)."""
    return _f_measure(_common_subsequence, answer, gold)


def _f_measure(common: Callable[[list[str], list[str]], int], answer: str, gold: Sequence[str]) -> float:
    words, rights = normalised(answer).split(), [normalised(right).split() for right in gold]
    return max(2 * common(words, right) / (len(words) + len(right)) if words or right else 1.0 for right in rights)


def _common_subsequence(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for column, other in enumerate(b, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
