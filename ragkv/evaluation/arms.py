"""Arms: the ways to put a prompt together that an evaluation compares.

An arm says which chunks the prompt holds, what their KV were read behind, and which method puts them together. Written as
``method@context``: ``cache-blend:ratio=0.15@alone``. Methods and their knobs are spelled as for ``ragkv ask --method``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ragkv.errors import MethodError
from ragkv.evaluation.cases import Case, Place
from ragkv.evaluation.errors import EvaluationError
from ragkv.fusion.view import View
from ragkv.methods import Calibrated, FullPrefill, Method, Random, Reuse
from ragkv.methods.words import knobs_of, known_methods, parse_method

#: What chunks were read behind: the prefix alone, or their own document's earlier text too.
CONTEXTS = ("alone", "document")
#: Or behind passages of other documents as well: asked only by name.
NEIGHBOURS = "neighbours"
FULL, FULL_DOCUMENTS = "full-prefill", "full-documents"
RANDOM = "random"
DEFAULT = "default"

#: The settings that papers recommend; CacheBlend at the layer that suits the model, and at its paper's.
_PAPERS = ("lego-link:k=16", "cache-blend:ratio=0.15", "cache-blend:ratio=0.15,check_layer=1")
#: Special arms that the default leaves out: they tell nothing new and cost as much as a full prefill, or hardly more than nothing.
_RARE = ("prefix-only@alone", "no-rotation@document")
#: Knobs that are the share of tokens to recompute.
_SHARES = ("ratio", "budget", "share")


@dataclass(frozen=True)
class PrefixOnly(Method):
    """Recompute all from the first chunk on that is not exact where it stands: what caching of common prefixes gives."""

    def select(self, view: View) -> Tensor:
        """Every chunk behind the exact ones."""
        return view.layout.inexact


@dataclass(frozen=True)
class Arm:
    """One way to answer.

    Attributes:
        name: as it is written and shown; it ends in ``@`` and what chunks were read behind, where stored KV are used.
        reads: which chunks are in the prompt: ``"retrieved"``, ``"documents"`` (all of those that something was retrieved of),
            ``"gold"`` or ``"nothing"``.
        method: puts the prompt together; ``None`` where it depends on the prompt.
        rotated: whether keys are turned to their new positions.
        k_share: instead of ``method``: the first tokens of every chunk, so many that they are about this share.
        like: instead of ``method``: tokens drawn at random, as many as the arm of this name was charged.
    """

    name: str
    reads: str = "retrieved"
    method: Method | None = None
    rotated: bool = True
    k_share: float | None = None
    like: str = ""

    @property
    def family(self) -> str:
        """What its name begins with; arms of one family and context are one series in a plot."""
        return re.split("[:=@]", self.name)[0]

    @property
    def context(self) -> str:
        """One of :data:`CONTEXTS`, or :data:`NEIGHBOURS`; ``""`` where no stored KV are used."""
        return self.name.rpartition("@")[2] if "@" in self.name else ""

    def places(self, case: Case) -> tuple[Place, ...]:
        """The chunks in the prompt, in order."""
        return {"retrieved": case.retrieved, "documents": case.whole, "gold": case.gold, "nothing": ()}[self.reads]

    def suits(self, case: Case) -> bool:
        """Whether the case has chunks for it."""
        return self.reads != "gold" or bool(case.gold)

    def method_for(self, chunk_tokens: Sequence[int], charged: Mapping[str, float]) -> Method:
        """The method for one prompt.

        Args:
            chunk_tokens: tokens of each of the prompt's chunks.
            charged: the budgets charged to the arms that ran before, by name.

        Raises:
            MethodError: the arm that it shall be like did not run.
        """
        if self.method is not None:
            return self.method
        if self.k_share is not None:
            settings = {"k": max(1, round(self.k_share * sum(chunk_tokens) / len(chunk_tokens)))}
            return known_methods()[self.family](**settings)
        if self.like not in charged:
            raise MethodError(f"{self.like} did not run, so that no budget equals its")
        return Random(ratio=min(1.0, charged[self.like]))


def parse_arms(words: Sequence[str], budgets: Sequence[float]) -> list[Arm]:
    """The arms that words name.

    Args:
        words: names of arms: special ones (:func:`special_arms`), methods (``reuse``, ``lego-link:k=16``), both contexts unless one
            is given (``reuse@document``), ``random=ARM`` for a random choice at the budget charged to another arm, and
            ``default``. A method that takes a share of tokens, given without it, is run at every budget.
        budgets: shares of the tokens, 0 to 1.

    Raises:
        EvaluationError: there is no such arm; the message lists what there is.
    """
    if not all(0 <= budget <= 1 for budget in budgets):
        raise EvaluationError(f"budgets must lie in 0 .. 1, got {list(budgets)}")
    arms: dict[str, Arm] = {}
    for word in words or [DEFAULT]:
        for arm in default_arms(budgets) if word == DEFAULT else _parse(word, budgets):
            arms.setdefault(arm.name, arm)
    # A random control needs to know what the arm that it is like was charged, so it comes behind all others.
    return sorted(arms.values(), key=lambda arm: bool(arm.like))


def default_arms(budgets: Sequence[float]) -> list[Arm]:
    """Special arms, every method of ``ragkv.methods`` at every budget on both contexts, what papers run, and controls for it."""
    arms = [arm for arm in special_arms() if arm.name not in _RARE]
    for name, kind in known_methods().items():
        if kind not in (FullPrefill, Calibrated):
            arms += [arm for context in CONTEXTS for arm in _budgeted(name, context, budgets)]
    for paper in _PAPERS:
        arms += [*_parse(paper, budgets), *_parse(f"{RANDOM}={paper}", budgets)]
    families = list(dict.fromkeys(arm.family for arm in arms))
    return sorted(arms, key=lambda arm: (families.index(arm.family), CONTEXTS.index(arm.context or CONTEXTS[0])))


def special_arms() -> list[Arm]:
    """The arms that are no method of the library."""
    return [
        Arm(FULL, method=FullPrefill()),
        Arm(FULL_DOCUMENTS, reads="documents", method=FullPrefill()),
        Arm("gold-only", reads="gold", method=FullPrefill()),
        Arm("no-context", reads="nothing", method=FullPrefill()),
        *[Arm(f"prefix-only@{context}", method=PrefixOnly()) for context in CONTEXTS],
        *[Arm(f"no-rotation@{context}", method=Reuse(), rotated=False) for context in CONTEXTS],
    ]


def _parse(word: str, budgets: Sequence[float]) -> list[Arm]:
    special = [arm for arm in special_arms() if word in (arm.name, arm.name.split("@")[0])]
    if special:
        return special
    spec, at, context = word.rpartition("@") if "@" in word else (word, "", "")
    known = (*CONTEXTS, NEIGHBOURS)
    if at and context not in known:
        raise EvaluationError(f"no arm {word!r}: behind the @ stands one of {', '.join(known)}")
    contexts = [context] if at else CONTEXTS
    if spec.startswith(f"{RANDOM}="):
        return [arm for context in contexts for arm in _random_like(spec.removeprefix(f"{RANDOM}="), context, budgets)]
    try:
        if spec in known_methods():
            return [arm for context in contexts for arm in _budgeted(spec, context, budgets)]
        method = parse_method(spec)
    except MethodError as error:
        names = [*dict.fromkeys(arm.name.split("@")[0] for arm in special_arms()), f"{RANDOM}=ARM", DEFAULT]
        raise EvaluationError(f"no arm {word!r}. Besides methods there are: {', '.join(names)}. {error}") from error
    if isinstance(method, FullPrefill):
        return [Arm(FULL, method=method)]
    return [Arm(f"{spec}@{context}", method=method) for context in contexts]


def _budgeted(name: str, context: str, budgets: Sequence[float]) -> list[Arm]:
    """A method at every budget, or as it is where it takes none."""
    kind = known_methods()[name]
    knobs = knobs_of(kind)
    share = next((knob for knob in _SHARES if knob in knobs), None)
    if share is not None:
        return [Arm(f"{name}:{share}={budget:g}@{context}", method=kind(**{share: budget})) for budget in budgets]
    if "k" in knobs:
        return [Arm(f"{name}:k={budget:.0%}@{context}", k_share=budget) for budget in budgets]
    return [Arm(f"{name}@{context}", method=kind())]


def _random_like(spec: str, context: str, budgets: Sequence[float]) -> list[Arm]:
    return [Arm(f"{RANDOM}={arm.name}", like=arm.name) for arm in _parse(f"{spec}@{context}", budgets)]
