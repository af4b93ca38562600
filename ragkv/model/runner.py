"""The runner: what may exist once for a model, whatever engines, namespaces and threads stand over it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event
from typing import Any
from weakref import WeakValueDictionary

from transformers import PreTrainedModel

from ragkv.chunk import digest
from ragkv.errors import RecordError
from ragkv.forks import ForkedLock
from ragkv.kernels import Impl
from ragkv.model.decoder import Decoder
from ragkv.model.fingerprint import Weights, settings
from ragkv.model.glance import Glance
from ragkv.model.graphs import Graphs
from ragkv.model.inspection import refuse_autocast, refuse_by_config, refuse_state, unwrapped
from ragkv.model.rope import rope_frequencies
from ragkv.model.steps import Steps
from ragkv.model.traits import Facts, Traits, keep, model_key, recalled
from ragkv.model.turns import turns


class Runner:
    """Turns, probing and the fingerprint of one model. Got by :meth:`of`.

    Attributes:
        model: the transformers model, out of any wrapper.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._config = model.config.get_text_config(decoder=True)
        self._turns = turns(self._config)
        self._weights = Weights(model)
        self._decoders: dict[Impl, Decoder] = {}
        self._steps: WeakValueDictionary[tuple[Impl, bool | None], Steps] = WeakValueDictionary()  # they hold this
        self._probed = self._fingerprint = ""
        self._described = "", ""
        self._glance: Glance | None = None
        self._replaced = 0  # how often modules were, or tensors

    @classmethod
    def of(cls, model: Any) -> Runner:
        """The one runner of a model; a PEFT model has that of the model inside. It lives as long as somebody holds it.

        Raises:
            UnsupportedModelError: there is no transformers model inside, or its adapter adds tokens.
        """
        model = unwrapped(model)
        with _making.held:
            found = _runners.get(id(model))
            if found is None:
                found = _runners[id(model)] = cls(model)
            return found

    @contextmanager
    def turn(self) -> Iterator[str]:
        """The model for this thread alone, in the order of asking; reentrant. All models that share a config share the turns.

        The outermost turn looks whether the model is still what it was, so the fingerprint stands until the turn ends. Each token
        of an answer is such a turn, and looked at as a prompt is (:class:`~ragkv.model.glance.Glance`).

        Yields:
            The fingerprint.

        Raises:
            UnsupportedModelError: the model was changed into one that cannot be driven exactly.
        """
        with self._turns:
            if self._turns.depth == 1 or not self._fingerprint:
                self._look()
            yield self._fingerprint

    def idle(self, seconds: float, stop: Event) -> bool:
        """Whether nobody runs the model for so long from now on; waits for it, or until it is stopped."""
        before = self._turns.taken
        stop.wait(seconds)
        return self._turns.free and self._turns.taken == before

    @property
    def fingerprint(self) -> str:
        """Hex digest of the weights (active adapters' among them), configuration and attention, as the last turn found them."""
        if not self._fingerprint:
            with self.turn():
                pass
        return self._fingerprint

    @property
    def described(self) -> tuple[str, str]:
        """What the fingerprint is made of: hex digest of the weights, and the configuration as JSON (:func:`settings`)."""
        with self.turn():
            return self._described

    def refresh(self) -> None:
        """Take the fingerprint anew from every weight: for writes that PyTorch does not count, as those through ``.data``."""
        with self._turns:
            self._weights.forget()
            self._glance = None
            self._look()

    def decoder(self, kernels: Impl = "auto", facts: Facts | None = None) -> Decoder:
        """The model as fusion drives it: probed once for each choice of kernels, and again when more than weights change.

        Args:
            kernels: which implementation of ``ragkv.kernels`` runs.
            facts: where an earlier process may have kept what it found of this model, and this one keeps it.

        Raises:
            UnsupportedModelError: the model cannot be driven exactly.
        """
        if kernels in self._decoders:  # nobody waits for a turn to ask for it
            return self._decoders[kernels]
        with self._turns:
            if kernels not in self._decoders:
                self._decoders[kernels] = self._made(kernels, facts)
        with self.turn():
            return self._decoders[kernels]

    def steps(self, kernels: Impl = "auto", graphs: bool | None = None) -> Steps:
        """The forwards of all threads that use the model with this choice of kernels and graphs.

        Args:
            kernels: as for :meth:`decoder`.
            graphs: as for :meth:`ragkv.model.graphs.Graphs.of`.

        Raises:
            UnsupportedModelError: graphs were asked for, and the model has none.
        """
        steps = self._steps.get((kernels, graphs))
        if steps is None:
            decoder = self.decoder(kernels)
            made = Steps(decoder, self.turn, Graphs.of(decoder, graphs, self._mark))
            steps = self._steps.setdefault((kernels, graphs), made)
        return steps

    def _mark(self) -> object:
        """What changes with the model, and with where its weights are."""
        return self._weights.changes, self._replaced, self._fingerprint

    def _made(self, kernels: Impl, facts: Facts | None) -> Decoder:
        refuse_by_config(self._config)  # before weights are read
        key = None if facts is None else model_key(self.model, self.fingerprint, kernels)
        if facts is None or key is None:
            return Decoder(self.model, kernels)
        name = f"model:{key.hex()}"
        with suppress(RecordError):
            known = recalled(facts, name, key)
            if known is not None:
                return Decoder(self.model, kernels, Traits.from_bytes(known, self.model))
        decoder = Decoder(self.model, kernels)
        keep(facts, name, key, decoder.traits.to_bytes(self.model))
        return decoder

    def _look(self) -> None:
        refuse_autocast(self.model.device)
        described = settings(self._config)
        if self._glance is not None:
            if described == self._described[1] and self._glance.same():
                return
            self._replaced += not self._glance.stands()
        refuse_state(self.model)
        glance = Glance.of(self.model)  # first: what is written in between is found at the next look
        weights = self._weights.digest()
        fingerprint = digest(weights, described).hex()
        if fingerprint != self._fingerprint:
            self._changed(described)
        self._fingerprint, self._described, self._glance = fingerprint, (weights.hex(), described), glance

    def _changed(self, described: str) -> None:
        """Probe anew where more than weights did."""
        embedding, turning = self.model.get_input_embeddings().weight, rope_frequencies(self.model)
        probed = f"{described} {embedding.device} {embedding.dtype} {[table.tolist() for table in turning]}"
        if self._probed and probed != self._probed:
            for decoder in self._decoders.values():
                decoder.probe()
        self._probed = probed


_runners: WeakValueDictionary[int, Runner] = WeakValueDictionary()
_making = ForkedLock()
