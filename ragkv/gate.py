"""A quality gate: a share of prompts is checked against a full prefill, and what proves too far off is not used any more."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from threading import Event
from time import monotonic

import torch
from torch import Tensor

from ragkv.background import Background
from ragkv.closeness import divergence, same_top
from ragkv.errors import ArgumentError, ArgumentTypeError, MethodError, instance, whole_number
from ragkv.fusion.layout import Layout
from ragkv.lazy import keep_last
from ragkv.library.documents import Documents
from ragkv.methods import FullPrefill, Method
from ragkv.methods.calibrated import LADDER, Calibrated, Chosen
from ragkv.methods.words import as_method
from ragkv.model.rows import Rows
from ragkv.report import FusedPrompt

logger: logging.Logger = logging.getLogger(__name__)

_ACTIONS = ("full", "more", "warn")
#: One check counts as this many times the bound at most.
_MOST_TIMES = 5
#: Checks that wait at most, each with its prompt's ids and logits; further ones are left out.
_MOST_WAITING = 8
#: Methods that are watched at most.
_MOST_METHODS = 64
#: So long nobody must have run the model: between two tokens of an answer it is free for less.
_QUIET_S = 0.05
#: Of one turn of a check: who comes meanwhile waits for so many.
_PIECE_TOKENS = 128


@dataclass(frozen=True)
class Gate:
    """Check a share of an engine's prompts against a full prefill of the same ids, and act where they are too far off.

    A check runs behind the prompt, in a thread of its own, while nobody needs the model. It compares the distributions of the first
    token. The rule: of each method the last ``window`` checks are looked at, as soon as there are ``checks`` of them; where their
    mean KL exceeds ``kl``, each counted as five times that at most, the gate acts. It stays so until :meth:`Guard.reset`.

    Attributes:
        share: of the prompts that are checked, 0 to 1. What is exact anyway is not counted.
        kl: the bound on the mean, in nats.
        action: what is done then. ``"full"``: prompts are prefilled in full; ``"more"``: by the next dearer method of ``ladder``,
            which is then checked in its turn; ``"warn"``: nothing but a warning, which the others give too.
        checks: the fewest checks that say something.
        window: checks that are looked at, the last ones.
        patience_s: so long a check waits for the model to be free; then it takes turns like everybody, a piece at a time.
        seed: of the draw; ``None`` for another one each time.
        ladder: for ``"more"``: methods from the dearest to the cheapest. From the dearest one, and from a method that does not
            stand there, the next step is full prefill.

    Raises:
        ArgumentError, ArgumentTypeError, MethodError: a value is out of range, or of another type.
    """

    share: float = 0.01
    kl: float = 0.2
    action: str = "full"
    checks: int = 20
    window: int = 100
    patience_s: float = 30.0
    seed: int | None = None
    ladder: Sequence[Method | str] = LADDER

    def __post_init__(self) -> None:
        for name in ("share", "kl", "patience_s"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ArgumentTypeError(f"Gate: {name} must be a number, got {value!r}")
        if not 0 < self.share <= 1:
            raise ArgumentError(f"Gate: share must lie in 0 .. 1 and be more than 0, got {self.share}")
        if not self.kl > 0 or not self.patience_s >= 0:
            raise ArgumentError(
                f"Gate: kl must be more than 0 nats, and patience_s at least 0; got {self.kl} and {self.patience_s}"
            )
        if self.action not in _ACTIONS:
            raise ArgumentError(f"Gate: action must be one of {', '.join(_ACTIONS)}, got {self.action!r}")
        whole_number("Gate: checks", self.checks, 1)
        whole_number("Gate: window", self.window, self.checks)
        if self.seed is not None:
            whole_number("Gate: seed", self.seed)
        instance("Gate: ladder", self.ladder, list | tuple, "a list of methods, from the dearest to the cheapest")
        object.__setattr__(self, "ladder", tuple(map(as_method, self.ladder)))
        if any(isinstance(method, Calibrated) for method in self.ladder):
            raise MethodError(
                "Gate: calibrated is no step of a ladder: it is what one of its steps stands in the place of"
            )


@dataclass
class _Window:
    """The last checks of one method, and what came of them.

    Attributes:
        kls: of the method as it is now put together.
        steps: how often the gate has acted.
        said: why it did.
    """

    kls: deque[float]
    steps: int = 0
    said: str = ""


@dataclass(frozen=True, eq=False)
class _Check:
    """One prompt that was drawn."""

    ids: Tensor
    logits: Tensor
    fingerprint: str
    name: str
    window: _Window
    steps: int
    deadline_s: float


class Guard:
    """A gate at work, as ``engine.gate``. Safe for several threads; a fork goes on with what its parent knew.

    Args:
        gate: what is to be done.
        documents: of the engine.
    """

    def __init__(self, gate: Gate, documents: Documents):
        self.gate: Gate = gate
        self._runner = documents.runner
        self._store, self._kernels = documents.store, documents.kernels
        self._drawn, self._windows = Random(gate.seed), dict[str, _Window]()
        self._background = Background("a check of ragkv's gate", _MOST_WAITING)

    @property
    def tripped(self) -> dict[str, str]:
        """Why the gate has acted, by method."""
        with self._background.guard:
            return {name: window.said for name, window in self._windows.items() if window.steps}

    def reset(self) -> None:
        """Forget all checks and what came of them; the store's statistics stay."""
        with self._background.guard:
            self._windows.clear()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the prompts that were drawn so far are checked; whether they are."""
        return self._background.wait(timeout_s)

    def close(self) -> None:
        """End the check that runs, at its next piece, and drop the others."""
        self._background.close()

    def fused(self, method: Method, layout: Layout, make: Callable[[Method], FusedPrompt]) -> FusedPrompt:
        """A prompt, put together by its method, or by what stands in its place by now; and drawn for a check, perhaps.

        Args:
            method: that was asked for.
            layout: of the prompt.
            make: puts it together.
        """
        asked = method.method if isinstance(method, Chosen) else method
        with self._background.guard:
            window = self._windows.get(repr(asked)) or _Window(deque(maxlen=self.gate.window))
            keep_last(self._windows, repr(asked), window, _MOST_METHODS)
            steps, said = window.steps, window.said
        instead = self._instead(asked, steps)
        prompt = make(method if instead is asked else instead)
        prompt.report.gate = said if not steps or instead is asked else f"{said}: {instead!r} in its place"
        if not (instead == FullPrefill() or _exact(prompt, layout)) and self._draws():
            logits, name = prompt.logits.detach().clone(), prompt.report.method
            deadline = monotonic() + self.gate.patience_s
            check = _Check(layout.ids, logits, prompt.fingerprint, name, window, steps, deadline)
            self._background.add(partial(self._checked, check))
        return prompt

    def _draws(self) -> bool:
        with self._background.guard:
            return self._drawn.random() < self.gate.share

    def _instead(self, asked: Method, steps: int) -> Method:
        """What stands in the place of a method behind so many steps."""
        if not steps or self.gate.action == "warn":
            return asked
        ladder = list(self.gate.ladder)
        at = ladder.index(asked) - steps if self.gate.action == "more" and asked in ladder else -1
        return as_method(ladder[at]) if at >= 0 else FullPrefill()

    def _checked(self, check: _Check, closing: Event) -> None:
        full = self._prefilled(check, closing)
        if full is None:
            return
        kl = divergence(full, check.logits)
        self._store.count_check(check.name, kl, bool(same_top(full, check.logits)))
        with self._background.guard:
            if check.window.steps == check.steps:  # else it is of a method that is not used any more
                self._count(check, kl)

    def _count(self, check: _Check, kl: float) -> None:
        gate, window = self.gate, check.window
        window.kls.append(min(kl, _MOST_TIMES * gate.kl))
        mean = sum(window.kls) / len(window.kls)
        if len(window.kls) < gate.checks or mean <= gate.kl or (window.steps and gate.action == "warn"):
            return
        window.said = f"mean KL {mean:.3g} of the last {len(window.kls)} checks of {check.name}, more than {gate.kl:g}"
        window.steps += 1
        window.kls.clear()
        what = {"full": "full prefill", "more": "a dearer method", "warn": "nothing"}[gate.action]
        logger.warning("prompts are too far from a full prefill: %s; from now on %s in its place", window.said, what)

    @torch.no_grad()
    def _prefilled(self, check: _Check, closing: Event) -> Tensor | None:
        """A full prefill's next-token logits ``[1, V]``; ``None`` where it was ended, or the model is another one by now."""
        ids, decoder = check.ids, self._runner.decoder(self._kernels)
        cache = decoder.cache(len(ids))
        for at in range(0, len(ids), _PIECE_TOKENS):
            while not self._runner.idle(_QUIET_S, closing) and monotonic() < check.deadline_s and not closing.is_set():
                pass
            if closing.is_set():
                return None
            piece = ids[at : at + _PIECE_TOKENS]
            with self._runner.turn() as fingerprint:
                if fingerprint != check.fingerprint:
                    return None
                if at + len(piece) < len(ids):
                    decoder.read(piece, cache, at)
                    continue
                return decoder.forward(Rows(piece, torch.arange(at, len(ids), device=ids.device), cache))
        return None


def _exact(prompt: FusedPrompt, layout: Layout) -> bool:
    """Whether there is nothing to check: all was computed, or is exact where it stands, and nothing was placed in an earlier turn.

    Prompts whose chunks stand apart (``starts=``) are no prompts that a model would be given.
    """
    chunks = zip(layout.chunks, prompt.report.chunks, strict=True)
    inexact = [placed for placed, one in chunks if one.level or (not placed.exact and one.source != "path")]
    placed = inexact and min(prompt.report.fresh_by_layer) < prompt.report.chunk_tokens
    return not layout.even or not (placed or layout.held)
