"""Where a prompt's chunks lie, and what of them it would load: known without opening any."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import cast

from ragkv.fusion.layout import Layout
from ragkv.fusion.view import Looks, View
from ragkv.library.documents import Documents
from ragkv.library.rates import known_rates
from ragkv.library.watching import moved_for_this
from ragkv.methods import Method
from ragkv.store import Rates


class Places:
    """Where a prompt's chunks lie, as far as a view asks.

    Args:
        documents: whose chunks they are.
        layout: the prompt.
        keys: of its chunks' KV.
        looks: the method that is asked looks at what is stored.
    """

    def __init__(self, documents: Documents, layout: Layout, keys: Sequence[bytes], looks: bool = False):
        self._documents, self._layout, self._keys, self._looks = documents, layout, keys, looks

    def rates(self) -> Rates | None:
        """See :meth:`ragkv.fusion.view.Looks.rates`."""
        return known_rates(self._documents)

    def lossy(self) -> bool:
        """See :meth:`ragkv.fusion.view.Looks.lossy`."""
        # What is kept of a path is exact, and so must be what it was computed behind.
        return not self._looks and self._documents.paths is None

    def elapsed_s(self) -> float:
        """See :meth:`ragkv.fusion.view.Looks.elapsed_s`."""
        return 0.0

    def tiers(self) -> list[str | None]:
        """See :meth:`ragkv.fusion.view.Looks.tiers`."""
        rates, layout = known_rates(self._documents), self._layout
        limit_s = inf if rates is None else rates.patience_s(layout.tokens - layout.held, layout.held)
        moved, places = moved_for_this(), self._documents.store.where(self._keys, limit_s)
        chunks = zip(self._layout.chunks, self._keys, strict=True)
        return ["cpu" if p.path else moved[key].tier if key in moved else places.get(key) for p, key in chunks]


def to_load(documents: Documents, layout: Layout, method: Method) -> list[bytes]:
    """The keys of what a prompt would load, wherever that lies."""
    keys = [documents.key(placed.chunk) for placed in layout.chunks]
    spared = method.spares(View(layout, 0, cast(Looks, Places(documents, layout, keys, method.looks))))
    return [key for number, key in enumerate(keys) if number not in spared]
