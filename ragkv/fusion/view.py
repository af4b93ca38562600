"""What a method is shown of a prompt, and what it answers.

L layers, H kv heads, N tokens of the prompt, R reusable tokens, D head_dim. Tokens are named by their slots: their indices in the
prompt's ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from ragkv.chunk import Attended
from ragkv.errors import MethodError
from ragkv.fusion.layout import Layout
from ragkv.kernels import Impl, deviation
from ragkv.lazy import lazy
from ragkv.store import Rates

#: The averages of the suffix's attention, by name: over all tokens or the last one, or the mean of several.
AVERAGED: dict[str, tuple[str, ...]] = {"all": ("all",), "last": ("last",), "both": ("all", "last")}


class Narrows(Protocol):
    """What is asked at the layers that a selection names."""

    def narrow(self, check: Check) -> Tensor:
        """The tokens to go on with."""


@dataclass(frozen=True, eq=False)
class Variant:
    """KV of a chunk as they were computed behind some others.

    Attributes:
        attended: what its tokens attended to there.
        key: of the KV; empty for those that were read with the chunk's document.
        base: position of the chunk's first token there.
        rows: the tokens that it holds, by their numbers in the chunk; ``None`` for all. The others are as they were read.
    """

    attended: Attended
    key: bytes = b""
    base: int = 0
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """What a method wants of one prompt.

    Attributes:
        tokens: the chunk tokens to compute from layer 0 on, among ``layout.reusable``; in any order, repeated or not.
        context: the chunk tokens that they may see, besides the prefix and their own chunk; ``None``: all in front of them.
        checks: layers at which ``method`` is asked to narrow the set.
        keep: tokens that stay in it all the same.
        method: decides further; the one that was asked, if not given.
        name: what the report calls it; ``repr(method)`` if not given.
        why: what was weighed to choose it, for the report.
        variants: of each chunk which of its :attr:`View.variants` is taken; the first ones where there are none here.
        saved: of each chunk how many tokens fewer are chosen than of its first variant.
        whole: numbers of chunks all of whose tokens are among them: of these nothing need be loaded. Whoever names them, be it
            none, vouches that the tokens, the context and whatever ``method`` keeps are distinct and open, so that no device is
            waited for to check it; ``None``: all that is found out.
        rates: figures by which a chunk is computed that comes from a pool more slowly than that; ``None``: it is waited for.
        reckoned: milliseconds that the prompt should take as ``"chosen"``, and in the other ways, for the report.
    """

    tokens: Tensor
    context: Tensor | None = None
    checks: Sequence[int] = ()
    keep: Tensor | None = None
    method: Narrows | None = None
    name: str = ""
    why: str = ""
    variants: Sequence[Variant] = ()
    saved: Sequence[int] = ()
    whole: frozenset[int] | None = None
    rates: Rates | None = None
    reckoned: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, chosen: Selection | Tensor, method: Narrows) -> Selection:
        """What ``method.select`` returned, with all that it may leave out.

        Raises:
            MethodError: it is neither slots nor a selection of slots.
        """
        selection = chosen if isinstance(chosen, Selection) else cls(chosen)
        for name in ("tokens", "context", "keep"):
            given = getattr(selection, name)
            if given is not None or name == "tokens":
                check_chosen(given, method)
        decides = selection.method or method
        return replace(selection, method=decides, name=selection.name or repr(decides))


def check_chosen(chosen: object, method: Narrows) -> None:
    """Refuse what names no tokens: a mask would be taken for the slots 0 and 1.

    Raises:
        MethodError: it is no row of whole numbers.
    """
    numbers = isinstance(chosen, Tensor) and not (chosen.is_floating_point() or chosen.dtype == torch.bool)
    if isinstance(chosen, Tensor) and chosen.dim() == 1 and (numbers or not len(chosen)):
        return
    got = f"a tensor {list(chosen.shape)} of {chosen.dtype}" if isinstance(chosen, Tensor) else f"{chosen!r:.80}"
    raise MethodError(
        f"{method!r} must name tokens by their slots, in a tensor [n] of whole numbers (of a mask over them: "
        f"layout.reusable[mask]); got {got}"
    )


class View:
    """A prompt before anything of it is recomputed. What a method does not ask for is not worked out.

    Args:
        layout: the prompt.
        layers: L.

    Attributes:
        spared: numbers of the chunks that are computed whole, whatever is stored of them, which is not shown.
    """

    def __init__(self, layout: Layout, layers: int):
        self.layout: Layout = layout
        self.layers: int = layers
        self.spared: frozenset[int] = frozenset()

    def open(
        self, without: frozenset[int], limit_s: float = inf, levels: Mapping[int, str] = MappingProxyType({})
    ) -> None:
        """Has the stored chunks opened, before anything of them is looked at, but for some that are computed whole.

        Args:
            without: their numbers; see :attr:`spared`.
            limit_s: as for :class:`~ragkv.store.source.Asking`: those that were not found in time are spared, too.
            levels: lossy levels of a pool at which others are taken, by their numbers.
        """
        raise self._unseen

    @property
    def elapsed_s(self) -> float:
        """Seconds since the prompt was asked for."""
        return 0.0

    @property
    def lossy(self) -> bool:
        """Whether chunks may be opened at lossy levels: not where a method looks at them, nor where what is computed is kept."""
        return False

    @lazy
    def sensitivity(self) -> Tensor:
        """``[R]`` how much each token's values change behind another text, measured when its document was read; 0 where spared.

        Raises:
            MethodError: it was not measured for some chunk.
        """
        raise self._unseen

    @lazy
    def variants(self) -> list[list[Variant]]:
        """What is stored of each chunk: as it was read with its document, then what prompts computed of it behind other chunks.

        Of a chunk whose KV under its path are exact, those alone.

        Raises:
            MethodError: what a chunk attends to was not measured.
        """
        raise self._unseen

    def attention(self, queries: str = "all") -> Tensor:
        """What the suffix looks at, over the chunks as they are stored and at its final position.

        Args:
            queries: mean over ``"all"`` suffix tokens; the ``"last"`` one's alone; or the mean of ``"both"``.

        Returns:
            ``[L, R]`` attention, mean over heads.

        Raises:
            MethodError: the model does not show its attention.
        """
        raise self._unseen

    @lazy
    def deviation(self) -> Tensor:
        """``[L, R]`` squared distance of the stored keys and values to those of a full prefill, which is run for it.

        Keys and values are each scaled to a mean of 1 in their layer, and added.
        """
        raise self._unseen

    @lazy
    def check_layer(self) -> int:
        """The layer at which it shows best which tokens depend on the text in front of them, found out once for the model."""
        raise self._unseen

    @lazy
    def rates(self) -> Rates | None:
        """What was measured of this machine and this model (``ragkv advise``); ``None`` where nothing was. Measures nothing."""
        return None

    @lazy
    def tiers(self) -> Sequence[str | None]:
        """The tier that each chunk's KV would be read from; ``None`` where they are missing. Loads nothing.

        What is being moved to memory for this very question counts as where it was before.
        """
        raise self._unseen

    @property
    def _unseen(self) -> MethodError:
        return MethodError(
            "what is stored can be looked at once a prompt's turn has come: by select, and not by spares"
        )


@dataclass(frozen=True, eq=False)
class Check:
    """What a method sees at a layer where it narrows the set: fresh and stored KV of the reusable tokens being computed.

    Attributes:
        layer: the decoder layer about to run.
        layers: L.
        layout: the whole prompt.
        tokens: ``[R]`` the reusable tokens being computed, ascending, on the layer's device as all that follows.
        fresh_keys: ``[H, R, D]``, rotated to their positions in the prompt; like ``stored_keys``.
        fresh_values: ``[H, R, D]``; like ``stored_values``.
        stored_keys: what the cache holds for the same tokens.
        stored_values: what the cache holds for the same tokens.
        impl: which implementation of ``ragkv.kernels`` runs.
        looked: ``[l, C]`` what the suffix attended to in each of the C chunks, in the l layers so far, mean over heads; ``None``
            where the method does not go by what is attended to.
    """

    layer: int
    layers: int
    layout: Layout
    tokens: Tensor
    fresh_keys: Tensor
    fresh_values: Tensor
    stored_keys: Tensor
    stored_values: Tensor
    impl: Impl = "auto"
    looked: Tensor | None = None

    def key_deviation(self) -> Tensor:
        """``[R]`` squared distance of fresh and stored keys, over heads and dimensions."""
        return deviation(self.fresh_keys, self.stored_keys, impl=self.impl)

    def value_deviation(self) -> Tensor:
        """``[R]`` squared distance of fresh and stored values, over heads and dimensions."""
        return deviation(self.fresh_values, self.stored_values, impl=self.impl)
