"""What a method's choice comes to: which tokens of a prompt are computed, and where the method is asked again.

N tokens of the prompt, S tokens being computed, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import SupportsIndex

import torch
from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.layout import Layout
from ragkv.fusion.view import Check, Narrows, Selection, check_chosen


@dataclass(frozen=True, eq=False)
class Plan:
    """What is computed of one prompt.

    Attributes:
        rows: ``[S]`` tokens to compute from layer 0 on, ascending; the suffix is always among them.
        checks: layers before which the method is asked again, ascending.
        first_stored: the first layer of which stored KV are looked at; L where none are.
        context: the chunk tokens that chunk tokens being computed may see besides the prefix and their own chunk; ``None``: all
            that stand in front of them.
        narrow: asked at the checks; returns those of the tokens to go on with.
        whole: numbers of the chunks that are computed whole, in all layers: their stored KV are not looked at.
        saved: of each chunk how many tokens need no computing because of what was computed before.
        fresh: how many of the rows are chunks' tokens; ``None`` where nobody knows: to count them waits for the device.
        trailing: whether the rows are the prompt's last ones; ``None`` for the same reason.
    """

    rows: Tensor
    checks: tuple[int, ...] = ()
    first_stored: int = 0
    context: Tensor | None = None
    narrow: Callable[[Check], Tensor] | None = None
    whole: frozenset[int] = frozenset()
    saved: tuple[int, ...] = ()
    fresh: int | None = None
    trailing: bool | None = None


def plan(selection: Selection, layout: Layout, layers: int) -> Plan:
    """Check what a method chose, where it does not vouch for it (:attr:`Selection.whole`).

    Args:
        selection: by :meth:`Selection.of`.
        layout: the prompt.
        layers: L.

    Raises:
        MethodError: it chose tokens outside ``layout.reusable``, or layers that do not exist, or fewer tokens than the chunks have
            that it says it chose whole.
    """
    method = selection.method
    assert method is not None
    known, reusable = selection.whole, layout.reusable
    checked = partial(_subset, allowed=reusable, method=method, known=known is not None)
    chosen = checked(selection.tokens)
    if known is not None:
        _check_whole(known, len(chosen), layout, method)
    active, saved = chosen, (0,) * len(layout.chunks)
    if layout.mended or any(map(layout.settles, layout.chunks)):
        there = torch.isin(chosen, layout.settled)
        active, known = chosen[~there], None
        saved = tuple(torch.bincount(layout.owners[chosen[there]], minlength=len(saved)).tolist())
    if selection.saved:
        saved = tuple(more + less for more, less in zip(saved, selection.saved, strict=True))
    checks = tuple(sorted(set(selection.checks))) if len(active) else ()
    if not all(isinstance(layer, SupportsIndex) and layer in range(layers) for layer in checks):
        raise MethodError(f"{method!r} asked to check layers {checks} of a model with {layers}")
    context = None if selection.context is None else checked(selection.context)

    narrows = partial(_subset, method=method, known=selection.whole is not None and _of_one_class(method))

    def narrow(check: Check) -> Tensor:
        chosen = method.narrow(check)
        check_chosen(chosen, method)
        kept = narrows(chosen, allowed=check.tokens)
        if selection.keep is None:
            return kept
        return check.tokens[torch.isin(check.tokens, torch.cat([kept, selection.keep.to(kept.device)]))]

    if len(active) == len(reusable) > 0 and context is None and not layout.earlier:
        # With the prefix computed too, though it is exact already, the model runs its ordinary causal path without a mask.
        rows = torch.arange(layout.held, layout.tokens, device=layout.ids.device)
        first = checks[0] if checks else layers
        return Plan(rows, checks, first, None, narrow, saved=saved, fresh=len(active), trailing=True)
    whole = frozenset() if checks else _whole(active, layout) if known is None else known
    trailing = None if known is None else len(active) == _ending(whole, layout)
    return Plan(torch.cat([active, layout.suffix]), checks, 0, context, narrow, whole, saved, len(active), trailing)


def _whole(active: Tensor, layout: Layout) -> frozenset[int]:
    """The numbers of the chunks all of whose tokens are active."""
    lengths = [len(placed.chunk) for placed in layout.chunks]
    if len(active) < min(lengths, default=1):
        return frozenset()
    counts = torch.bincount(layout.owners[active], minlength=len(lengths)).tolist()
    return frozenset(number for number, length in enumerate(lengths) if counts[number] == length)


def _check_whole(whole: frozenset[int], tokens: int, layout: Layout, method: Narrows) -> None:
    """Refuse what is vouched for and cannot be, as far as the host knows: what is neither loaded nor computed would be made up."""
    lengths = dict(enumerate(len(placed.chunk) for placed in layout.chunks))
    if not (set(whole) <= lengths.keys() and sum(map(lengths.__getitem__, whole)) <= tokens <= sum(lengths.values())):
        raise MethodError(
            f"{method!r} says of {tokens} tokens that they are all of the chunks {sorted(whole)}, and distinct: who takes other "
            "tokens in the place of a selection's says whole=None, too"
        )


def _ending(whole: frozenset[int], layout: Layout) -> int:
    """How many tokens the last chunks have that are all of them whole."""
    numbers = takewhile(whole.__contains__, reversed(range(len(layout.chunks))))
    return sum(len(layout.chunks[number].chunk) for number in numbers)


def _of_one_class(method: Narrows) -> bool:
    """Whether who vouched for what is selected vouches for what is narrowed: a subclass of its may have a ``narrow`` of its own."""
    classes = type(method).__mro__
    select, narrow = (next((cls for cls in classes if name in vars(cls)), None) for name in ("select", "narrow"))
    return select is not None and narrow is not None and issubclass(select, narrow)


def _subset(chosen: Tensor, *, allowed: Tensor, method: Narrows, known: bool) -> Tensor:
    """The chosen ones, ascending; where they are not known to be distinct and allowed, a device is waited for."""
    chosen = chosen.to(allowed.device, torch.long)
    if known or not len(chosen):
        return chosen.sort().values
    chosen = torch.unique(chosen)
    if not torch.isin(chosen, allowed).all():
        raise MethodError(
            f"{method!r} chose tokens that are not open to it: it must choose among the {len(allowed)} reusable tokens being "
            "computed, and the set may only shrink with depth"
        )
    return chosen
