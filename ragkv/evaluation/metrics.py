"""What an answer is worth, and how far a next-token distribution is from another."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from ragkv.closeness import divergence as divergence
from ragkv.closeness import same_top as same_top

#: Articles by language: SQuAD's (arXiv:1606.05250) and MLQA's (arXiv:1910.07475). What else a language needs is in :func:`words`.
_ARTICLES = {
    "en": re.compile(r"\b(a|an|the)\b"),
    "de": re.compile(r"\b(ein|eine|einen|eines|einer|einem|der|die|das|den|dem|des)\b"),
}
LANGUAGES = (*_ARTICLES, "zh")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
# Written without blanks between words: Han, kana, Thai and Lao, Burmese, Khmer.
_UNSPACED = re.compile(rf"([{_HAN}\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])")


def words(text: str, language: str = "en") -> list[str]:
    """Words in lower case, without punctuation and articles, as SQuAD counts them; outside English as MLQA does.

    Of a text that is nothing else, as the answer "A", they stay: it would be equal to an empty one.

    Args:
        text: an answer.
        language: one of :data:`LANGUAGES`. Whatever it is, of scripts without blanks every character is a word.
    """
    text = text.lower()
    if language == "en":
        plain = text.translate(_NO_PUNCTUATION)
    else:
        plain = "".join(letter for letter in text if not unicodedata.category(letter).startswith("P"))
    parted = _ARTICLES[language].sub(" ", plain) if language in _ARTICLES else plain
    parted = _UNSPACED.sub(r" \1 ", parted)
    return parted.split() or plain.split() or text.split()


def language_of(text: str) -> str:
    """The language of :data:`LANGUAGES` that a text is most likely in: Chinese by its characters, else by the articles in it."""
    if len(re.findall(f"[{_HAN}]", text)) > len(text) / 10:
        return "zh"
    return max(_ARTICLES, key=lambda language: len(_ARTICLES[language].findall(text.lower())))


def exact_match(answer: str, gold: Sequence[str], language: str = "en") -> float:
    """1 if the answer is one of the gold answers, both normalised."""
    return float(any(words(answer, language) == words(right, language) for right in gold))


def contains(answer: str, gold: Sequence[str], language: str = "en") -> float:
    """1 if a gold answer stands in the answer, word by word, both normalised."""
    said, *rights = (f" {' '.join(words(text, language))} " for text in (answer, *gold))
    return float(any(right in said for right in rights if right.strip()))


def f1(answer: str, gold: Sequence[str], language: str = "en") -> float:
    """Harmonic mean of precision and recall over words, the best over the gold answers (SQuAD)."""
    return _f_measure(lambda a, b: (Counter(a) & Counter(b)).total(), answer, gold, language)


def rouge_l(answer: str, gold: Sequence[str], language: str = "en") -> float:
    """F-measure over the longest common subsequence of words, the best over the gold answers (Lin, 2004)."""
    return _f_measure(_common_subsequence, answer, gold, language)


def edit_similarity(answer: str, gold: str) -> float:
    """1 less the share of characters to insert or remove that make the one of the other: twice their longest common subsequence
    over both lengths. For code blanks count, too.
    """
    length = len(answer) + len(gold)
    return 2 * _common_subsequence(answer, gold) / length if length else 1.0


def _f_measure(common: Callable[[list[str], list[str]], int], answer: str, gold: Sequence[str], language: str) -> float:
    said, rights = words(answer, language), [words(right, language) for right in gold]
    return max(2 * common(said, right) / (len(said) + len(right)) if said or right else 1.0 for right in rights)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for column, other in enumerate(b, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]
