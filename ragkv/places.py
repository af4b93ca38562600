"""Where a prompt's chunks lie, and what of them it would load: known without opening any."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from ragkv.fusion.layout import Layout
from ragkv.fusion.view import View
from ragkv.lazy import lazy
from ragkv.library.documents import Documents
from ragkv.library.rates import known_rates
from ragkv.library.watching import moved_for_this
from ragkv.methods import Method
from ragkv.store import Rates


class Places(View):
    """A view that knows where the prompt's chunks lie.

    Args:
        documents: whose chunks they are.
        layout: the prompt.
        keys: of its chunks' KV.
        looks: the method that is asked looks at what is stored.
        layers: L.
    """

    def __init__(
        self, documents: Documents, layout: Layout, keys: Sequence[bytes], looks: bool = False, layers: int = 0
    ):
        super().__init__(layout, layers)
        self._documents, self._keys, self._looks = documents, keys, looks

    @lazy
    def rates(self) -> Rates | None:
        """See :class:`View`."""
        return known_rates(self._documents)

    @property
    def lossy(self) -> bool:
        """See :class:`View`."""
        # What is kept of a path is exact, and so must be what it was computed behind.
        return not self._looks and self._documents.paths is None

    @lazy
    def tiers(self) -> Sequence[str | None]:
        """See :class:`View`."""
        rates, layout = self.rates, self.layout
        limit_s = inf if rates is None else rates.patience_s(layout.tokens - layout.held, layout.held)
        moved, places = moved_for_this(), self._documents.store.where(self._keys, limit_s)
        chunks = zip(layout.chunks, self._keys, strict=True)
        return ["cpu" if p.path else moved[key].tier if key in moved else places.get(key) for p, key in chunks]


def to_load(documents: Documents, layout: Layout, method: Method) -> list[bytes]:
    """The keys of what a prompt would load, wherever that lies."""
    keys = [documents.key(placed.chunk) for placed in layout.chunks]
    spared = method.spares(Places(documents, layout, keys, method.looks))
    return [key for number, key in enumerate(keys) if number not in spared]
