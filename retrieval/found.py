"""From what a search found to hits, in the order of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ragkv.retrieval.hit import Hit
from ragkv.retrieval.options import Retrieval
from ragkv.retrieval.ranking import ordered
from ragkv.retrieval.records import Document, Passage, Reading
from ragkv.retrieval.snapshot import Snapshot

#: How a model reads a document, from a snapshot.
Readings = Callable[[Snapshot, Document], Reading]


class Hits:
    """Makes hits of passages of one snapshot.

    Args:
        view: the snapshot.
        retrieval: their order, and what they may have of tokens.
        readings: says how a model reads a document; asked once for each. None: nobody does.
        tokens: says how many tokens each passage of a reading has.
    """

    def __init__(
        self,
        view: Snapshot,
        retrieval: Retrieval,
        readings: Readings | None,
        tokens: Callable[[Reading], Sequence[int]] | None,
    ) -> None:
        self._view, self._retrieval = view, retrieval
        self._readings, self._tokens = readings, tokens
        self._read = dict[str, Reading]()

    def __call__(self, found: Mapping[int, float], copies: Mapping[int, set[int]]) -> list[Hit]:
        """The hits.

        Args:
            found: passages by id with their scores, the best first.
            copies: those of the same text that each of them stands for.
        """
        view, passages, tokens = self._view, [self._view.passage(passage_id) for passage_id in found], self._tokens
        if self._retrieval.max_context_tokens is not None and tokens is not None:
            most = self._retrieval.max_context_tokens
            passages = within(most, passages, lambda document: tokens(self._reading(document)))
        ranks = {passage.id: rank for rank, passage in enumerate(passages, 1)}
        return [
            Hit.of(
                passage,
                found[passage.id],
                self._reading(passage.document) if self._readings else None,
                tuple(Hit.of(view.passage(copy), found[passage.id]) for copy in sorted(copies.get(passage.id, ()))),
                ranks[passage.id],
            )
            for passage in ordered(passages, self._retrieval.order)
        ]

    def _reading(self, document: Document) -> Reading:
        assert self._readings is not None
        if document.id not in self._read:
            self._read[document.id] = self._readings(self._view, document)
        return self._read[document.id]


def within(budget: int, passages: Iterable[Passage], tokens: Callable[[Document], Sequence[int]]) -> list[Passage]:
    """The passages that fit into a budget of tokens, the first ones first; one that does not fit is passed over."""
    taken, lengths = list[Passage](), dict[str, Sequence[int]]()
    for passage in passages:
        document = passage.document
        if document.id not in lengths:
            lengths[document.id] = tokens(document)
        if lengths[document.id][passage.position] <= budget:
            budget -= lengths[document.id][passage.position]
            taken.append(passage)
    return taken
